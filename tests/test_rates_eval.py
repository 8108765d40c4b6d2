"""lalic eval on weights of several rates: a curve, each point of which is what the model gives at that quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_codec import tiny_model
from tiny_rates import rates_model, save_rates, write_rates_bundle

from lalic.bdrate import main as bdrate
from lalic.codec.coder import encode_image, pad
from lalic.compare import main as compare
from lalic.errors import LalicError
from lalic.eval import main
from lalic.ladder import lambda_at
from lalic.measure import Session, measure
from lalic.metrics import estimated_bits, psnr, to_rgb8, to_tensor
from lalic.model import LALIC
from lalic.plot import main as plot
from lalic.report.cli import main as report
from lalic.results import read_curve


@pytest.fixture(scope="module")
def model() -> LALIC:
    return rates_model()


@pytest.fixture(scope="module")
def bundle(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rates_bundle(model, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (40, 70), "b.png": (64, 64)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def evaluate(weights: Path | str, images: Path, folder: Path, *flags: str) -> dict[str, Any]:
    assert main(["-p", str(weights), "-i", str(images), "--result", str(folder / "result.json"), *flags]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def curve(bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("curve")
    flags = ("--both", "-o", str(folder / "recon"), "-q", "1", "2.5", "4", "4.50", "6")
    return folder, evaluate(bundle, images, folder, *flags)


LABELS = ["1", "2.5", "4", "4.5", "6"]


class TestCurve:
    def test_is_what_the_model_gives(self, model: LALIC, curve: tuple[Path, dict[str, Any]], images: Path) -> None:
        folder, result = curve
        assert [(r["quality"], Path(r["file"]).name) for r in result["records"]] == [
            (label, name) for label in LABELS for name in ("a.png", "b.png")
        ]
        for record in result["records"]:
            rgb = np.asarray(Image.open(record["file"]))
            quality, pixels = float(record["quality"]), rgb.shape[0] * rgb.shape[1]
            coded = encode_image(model, rgb, quality=quality)
            assert record["bytes"] == coded.num_bytes and record["bpp"] == pytest.approx(8 * coded.num_bytes / pixels)
            with torch.inference_mode():
                out = model(pad(to_tensor(rgb)), quality)
            assert record["bpp-estimated"] == pytest.approx(estimated_bits(out["likelihoods"]) / pixels, abs=1e-7)
            shown = np.asarray(Image.open(folder / "recon" / record["quality"] / Path(record["file"]).name))
            assert record["psnr"] == pytest.approx(psnr(rgb, shown), abs=1e-6)
            assert np.abs(shown.astype(int) - to_rgb8(out["x_hat"][..., : rgb.shape[0], : rgb.shape[1]])).max() <= 1

    @pytest.mark.parametrize("quality", [2.5, 4])
    def test_real_and_estimated_rate_are_as_far_apart_as_with_one_rate(self, model: LALIC, quality: float) -> None:
        rgb = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        several, _ = measure(model, rgb, real=True, estimate=True, quality=quality)
        one, _ = measure(model.at(quality).eval(), rgb, real=True, estimate=True)
        for key in ("bpp", "bpp-estimated", "psnr"):
            assert several[key] == pytest.approx(one[key], rel=2e-3)
        assert several["bpp-gap-percent"] == pytest.approx(one["bpp-gap-percent"], abs=0.2)

    def test_says_quality_and_lambda(self, curve: tuple[Path, dict[str, Any]]) -> None:
        result = curve[1]
        assert result["qualities"] == LABELS
        assert [m["q"] for m in result["models"]] == [1, 2.5, 4, 4.5, 6]
        assert [m["loss"] for m in result["models"]] == [
            {"metric": "mse", "lambda": pytest.approx(lambda_at("mse", float(label)))} for label in LABELS
        ]
        assert len({m["fingerprint"] for m in result["models"]}) == 1
        assert result["images"]["used"] == 2
        rates = result["results"]["bpp"]
        assert rates == sorted(rates) and len(set(rates)) == 5

    def test_the_table(self, bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        evaluate(bundle, images, tmp_path, "-q", "6", "1.234")
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split()[:3] == ["quality", "lambda", "bpp"]
        assert [row.split()[:2] for row in rows] == [["6", "0.0483"], ["1.234", f"{lambda_at('mse', 1.234):.4g}"]]

    def test_all_rungs_without_q(self, images: Path, tmp_path: Path) -> None:
        weights = save_rates(rates_model(2, rungs=(2, 3, 4)), tmp_path / "w.safetensors")
        result = evaluate(weights, images, tmp_path)
        assert result["qualities"] == ["2", "3", "4"]
        assert [m["loss"] for m in result["models"]] == [None] * 3  # a file that does not tell its metric

    def test_float32_and_half(self, model: LALIC, bundle: Path, images: Path, tmp_path: Path) -> None:
        result = evaluate(bundle, images, tmp_path, "--real", "--arithmetic", "float32", "-q", "3.3")
        rgb = np.asarray(Image.open(images / "a.png"))
        strings = model.compress(pad(to_tensor(rgb)), 3.3)["strings"]
        assert result["records"][0]["bytes"] == sum(len(s) for (s,) in strings)
        assert evaluate(bundle, images, tmp_path, "--half", "-q", "3.3")["results"]["bpp"][0] > 0


class TestWhatReadsIt:
    def test_curve_with_its_qualities(self, curve: tuple[Path, dict[str, Any]]) -> None:
        read = read_curve(curve[0] / "result.json")
        assert read.points == [1, 2.5, 4, 4.5, 6] and read.bpp == curve[1]["results"]["bpp"]

    def test_bdrate_and_plot(
        self, curve: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        result, once = curve[0] / "result.json", {**curve[1]}
        # A random model's pictures do not get better with its rate.
        once["results"] = {**once["results"], "psnr": [20.0, 22, 24, 25, 28], "psnr-rgb": [20.0, 22, 24, 25, 28]}
        twice = {**once, "results": {**once["results"], "bpp": [2 * bpp for bpp in once["results"]["bpp"]]}}
        for name, data in (("once", once), ("twice", twice)):
            (tmp_path / f"{name}.json").write_text(json.dumps(data))
        files = [str(tmp_path / "twice.json"), "--anchor", str(tmp_path / "once.json")]
        assert bdrate([*files, "--metric", "psnr"]) == 0
        assert "+100.00" in capsys.readouterr().out
        assert plot([str(result), "-o", str(tmp_path / "rd.svg")]) == 0

    def test_report(self, curve: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        assert report([str(curve[0] / "result.json"), "-o", str(tmp_path / "r.html")]) == 0
        page = (tmp_path / "r.html").read_text()
        assert "LALIC at quality 2.5: " in page and f"{lambda_at('mse', 2.5):g}" in page
        assert page.count("data:image/webp") == 2 * (1 + 2 * len(LABELS))

    def test_a_damaged_quality_is_left_out(self, curve: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        for wrong in (None, "x", True, float("nan")):
            result = json.loads((curve[0] / "result.json").read_text())
            result["models"][1]["q"] = wrong
            (tmp_path / "r.json").write_text(json.dumps(result))
            assert read_curve(tmp_path / "r.json").points == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("qualities", "message"),
        [
            (["1", "2.5", "2.50"], r"quality 2\.5 is given twice \(-q\)"),
            (["1", "6.001"], r"quality 6\.001 is not one of the model: it has 1 to 6"),
            (["0"], "quality 0 is not one of the model: it has 1 to 6"),
            (["low"], "quality 'low' is not a number such as 3 or"),
            (["2.5001"], r"quality 2\.5001 has more than three decimals"),
        ],
    )
    def test_qualities(self, bundle: Path, images: Path, tmp_path: Path, qualities: list[str], message: str) -> None:
        with pytest.raises(LalicError, match=message) as caught:
            evaluate(bundle, images, tmp_path, "-q", *qualities)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    def test_weights_of_one_rate(self, images: Path, tmp_path: Path) -> None:
        weights = save_rates(tiny_model(), tmp_path / "one.safetensors")
        with pytest.raises(LalicError, match=r"1 checkpoints .* but 3 labels .*one\.safetensors has one rate$"):
            evaluate(weights, images, tmp_path, "-q", "1", "2.5", "6")
        result = evaluate(weights, images, tmp_path, "-q", "2.5")
        assert result["qualities"] == ["2.5"] and "q" not in result["models"][0]  # a label, as ever

    @pytest.mark.parametrize("kind", ["bundle", "file"])
    def test_not_alone(self, bundle: Path, images: Path, tmp_path: Path, kind: str) -> None:
        one = save_rates(tiny_model(), tmp_path / "one.safetensors")
        several = bundle if kind == "bundle" else bundle / "model.safetensors"
        with pytest.raises(LalicError, match=f"{several.name} has several rates, .* evaluate it alone"):
            main(["-p", str(one), str(several), "-i", str(images), "--result", str(tmp_path / "r.json")])
        assert not (tmp_path / "r.json").exists()


class TestGoesOn:
    def test_after_a_kill(self, bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Interrupted in the second of three qualities; a record is of one quality alone."""
        count, measure = 0, Session.measure

        def counted(session: Session, rgb: Any) -> Any:
            nonlocal count
            if count == 3:
                raise KeyboardInterrupt
            count += 1
            return measure(session, rgb)

        whole = evaluate(bundle, images, tmp_path, "-q", "1", "2.5", "6")
        monkeypatch.setattr(Session, "measure", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(bundle, images, tmp_path, "-q", "1", "2.5", "6")
        assert count == 3
        count = -10
        again = evaluate(bundle, images, tmp_path, "-q", "1", "2.5", "6")
        assert count == -7, "three of six were measured before"
        for key in ("bpp", "psnr"):
            assert again["results"][key] == whole["results"][key]
        assert [r["bpp"] for r in again["records"]] == [r["bpp"] for r in whole["records"]]


def test_compare(bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-o", str(tmp_path / "out"), "--formats", "--files", "--weights", str(bundle)]
    assert compare([str(images / "a.png"), *flags, "--quality", "4.3"]) == 0
    assert f"LALIC, lalic-mse-vbr at quality 4.3 (lambda {lambda_at('mse', 4.3):.4g})" in capsys.readouterr().out
    assert (tmp_path / "out/a-compared.lalic").read_bytes()[4] == 3
    with pytest.raises(LalicError, match="it has 1 to 6"):
        compare([str(images / "a.png"), *flags, "--quality", "6.5"])
