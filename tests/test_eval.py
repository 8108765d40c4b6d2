"""lalic.eval: every flag, every number against an independent one, and no folder that ends in silence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lalic.codec.coder import pad
from lalic.errors import LalicError
from lalic.eval import averages, main, reconstruction_names
from lalic.measure import measure
from lalic.metrics import to_tensor
from lalic.model import LALIC, load_weights, published_state_dict
from lalic.plot import read_curve

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
SIZES = {"b.png": (64, 100), "sub/a.png": (40, 40), "sub/c.png": (70, 64)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = []
    for seed, spread in ((0, 1), (1, 40)):
        torch.manual_seed(seed)
        model = LALIC(**TINY)
        with torch.no_grad():
            model.g_a[-1].weight.mul_(spread)
        paths.append(folder / f"lalic-mse-q{seed + 1}.pth")
        torch.save(published_state_dict(model), paths[-1])
    return paths


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def evaluate(checkpoints: list[Path], images: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    result = tmp_path / "result.json"
    arguments = ["-m", "LALIC", "-p", *map(str, checkpoints), "-i", str(images), "--result", str(result)]
    assert main([*arguments, *flags]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(result.read_text(), parse_constant=refuse)


def rgb_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def report(checkpoints: list[Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("real")
    flags = ("-q", "low", "high", "-o", str(folder / "recon"), "--real", "--verbose", "-c", "ans")
    return {**evaluate(checkpoints, images, folder, *flags), "folder": folder}


def test_the_folder_of_the_result_is_made(checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
    evaluate(checkpoints[:1], images, tmp_path / "made" / "here")
    assert (tmp_path / "made/here/result.json").exists()


class TestReal:
    def test_published_tools_can_read_it(self, report: dict[str, Any]) -> None:
        assert report["name"] == "LALIC"
        assert isinstance(report["description"], str)
        for key in ("bpp", "psnr", "enc_time", "dec_time"):
            assert [type(v) for v in report["results"][key]] == [float, float]
        assert set(report["results"]) >= {"psnr-unrounded", "ms-ssim", "ms-ssim-db", "peak-memory-bytes"}
        for record in report["records"]:
            assert {"file", "quality", "bpp", "psnr", "enc_time", "dec_time"} <= set(record)
        curve = read_curve(report["folder"] / "result.json")
        assert curve.bpp == report["results"]["bpp"]

    def test_one_record_for_each_image_and_checkpoint(self, report: dict[str, Any], images: Path) -> None:
        seen = [(r["quality"], r["file"]) for r in report["records"]]
        assert seen == [(q, str(images / name)) for q in ("low", "high") for name in sorted(SIZES)]

    def test_bytes_are_those_of_the_model(self, report: dict[str, Any], checkpoints: list[Path]) -> None:
        for path, label in zip(checkpoints, ("low", "high"), strict=True):
            model = load_weights(path)
            model.update()
            for record in (r for r in report["records"] if r["quality"] == label):
                rgb = rgb_of(Path(record["file"]))
                strings = model.compress(pad(to_tensor(rgb)))["strings"]
                size = sum(len(s) for (s,) in strings)
                assert record["bytes"] == size
                assert record["bpp"] == pytest.approx(8 * size / rgb.shape[0] / rgb.shape[1], abs=1e-8)

    def test_quality_is_that_of_the_written_picture(self, report: dict[str, Any], images: Path) -> None:
        skimage = pytest.importorskip("skimage.metrics")
        for record in report["records"]:
            name = Path(record["file"]).relative_to(images)
            written = rgb_of(report["folder"] / "recon" / record["quality"] / name)
            psnr = skimage.peak_signal_noise_ratio(rgb_of(Path(record["file"])), written, data_range=255)
            assert record["psnr"] == pytest.approx(psnr, abs=1e-6)
            assert record["psnr-unrounded"] == pytest.approx(record["psnr"], abs=0.1)

    def test_averages(self, report: dict[str, Any]) -> None:
        low = [r for r in report["records"] if r["quality"] == "low"]
        assert report["results"]["bpp"][0] == pytest.approx(np.mean([r["bpp"] for r in low]), abs=1e-7)
        assert report["results"]["psnr"][0] == pytest.approx(np.mean([r["psnr"] for r in low]), abs=1e-7)
        times = [r["enc_time"] for r in low[1:]]
        assert report["results"]["enc_time"][0] == pytest.approx(np.mean(times), abs=1e-7)

    def test_small_images_have_no_ms_ssim(self, report: dict[str, Any]) -> None:
        assert report["results"]["ms-ssim-db"] == [None, None]

    def test_environment(self, report: dict[str, Any]) -> None:
        environment = report["environment"]
        assert environment["torch"] == torch.__version__
        assert environment["threads"] == torch.get_num_threads()
        assert environment["device"] == "cpu"


class TestEstimate:
    def test_rate_by_hand(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        report = evaluate(checkpoints[:1], images, tmp_path)
        model = load_weights(checkpoints[0])
        for record in report["records"]:
            rgb = rgb_of(Path(record["file"]))
            with torch.no_grad():
                likelihoods = model(pad(to_tensor(rgb)))["likelihoods"]
            bits = sum(-np.log2(p.double().numpy()).sum() for p in likelihoods.values())
            assert record["bpp"] == pytest.approx(bits / rgb.shape[0] / rgb.shape[1], rel=1e-6)
        assert "enc_time" not in report["results"]
        assert report["results"]["forward_time"][0] > 0
        assert report["qualities"] == ["lalic-mse-q1"]

    def test_both_and_their_gap(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        report = evaluate(checkpoints[:1], images, tmp_path, "--both", "-q", "x")
        estimate = evaluate(checkpoints[:1], images, tmp_path, "-q", "x")
        real = evaluate(checkpoints[:1], images, tmp_path, "-q", "x", "--real")
        results = {k: v[0] for k, v in report["results"].items()}
        assert results["bpp"] == real["results"]["bpp"][0]
        assert results["bpp-estimated"] == estimate["results"]["bpp"][0]
        gap = 100 * (results["bpp"] / results["bpp-estimated"] - 1)
        assert results["bpp-gap-percent"] == pytest.approx(gap, abs=1e-4)
        # Nine strings end in up to 8 bytes of coder state each; the rest of the gap is the tables' precision.
        for record in report["records"]:
            estimated = record["bpp-estimated"] * record["width"] * record["height"] / 8
            assert 0.98 * estimated < record["bytes"] < 1.05 * estimated + 9 * 8

    def test_half_precision(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        full = evaluate(checkpoints[:1], images, tmp_path, "--real")
        half = evaluate(checkpoints[:1], images, tmp_path, "--real", "--half")
        assert half["environment"]["precision"].startswith("bfloat16")
        assert half["results"]["psnr-unrounded"] != full["results"]["psnr-unrounded"]
        assert half["results"]["psnr"][0] == pytest.approx(full["results"]["psnr"][0], abs=0.5)


class TestFolders:
    def test_unreadable_image_is_skipped_and_told(
        self, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / "good.png")
        data = (folder / "good.png").read_bytes()
        (folder / "cut.png").write_bytes(data[: len(data) // 2])
        report = evaluate(checkpoints, folder, tmp_path)
        assert [s["file"] for s in report["skipped"]] == [str(folder / "cut.png")]
        assert report["images"]["used"] == 1
        assert len(report["records"]) == 2
        assert "1 of 2 images could not be read" in capsys.readouterr().out
        assert report["results"]["forward_time"][0] == report["records"][0]["forward_time"]

    def test_gray_and_cmyk(self, checkpoints: list[Path], tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        rgb = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(rgb).convert("L").save(folder / "gray.png")
        Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
        report = evaluate(checkpoints[:1], folder, tmp_path, "-o", str(tmp_path / "r"), "-q", "a")
        assert len(report["records"]) == 2
        assert rgb_of(tmp_path / "r" / "a" / "gray.png").shape == (30, 20, 3)

    def test_equal_names_do_not_overwrite(self) -> None:
        root = Path("images")
        names = ["a.jpg", "a.webp", "b.jpg", "sub/a.png"]
        out = reconstruction_names([root / n for n in names], root)
        assert [str(n) for n in out] == ["a.jpg.png", "a.webp.png", "b.png", "sub/a.png"]

    def test_bundle_and_run_labels(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        from lalic.release import open_weights, write_bundle

        bundle = write_bundle(open_weights(checkpoints[0]), tmp_path)
        report = evaluate([bundle], images, tmp_path)
        assert report["qualities"] == ["lalic-mse-q1"]
        assert report["models"][0]["loss"] == {"metric": "mse", "lambda": 0.0018}


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-p", "W", "-q", "1", "2", "-i", "I"], "1 checkpoints .* 2 labels"),
            (["-p", "W", "W", "-q", "1", "1", "-i", "I"], "several checkpoints"),
            (["-p", "W", "-q", "../1", "-i", "I"], "cannot name a folder"),
            (["-p", "missing.pth", "-i", "I"], "no such checkpoint: missing.pth"),
            (["-p", "W", "-i", "nowhere"], "nowhere"),
            (["-p", "W", "-i", "E"], "no image"),
            (["-p", "W", "-i", "B"], "none of the 1 images"),
            (["-p", "T", "-i", "I"], "text.pth"),
        ],
        ids=["labels", "repeated", "path", "checkpoint", "folder", "empty", "unreadable", "text"],
    )
    def test_one_line(
        self, checkpoints: list[Path], images: Path, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        empty, bad, text = tmp_path / "empty", tmp_path / "bad", tmp_path / "text.pth"
        empty.mkdir()
        bad.mkdir()
        (bad / "a.png").write_bytes(b"not an image")
        text.write_text("<html>")
        places = {"W": checkpoints[0], "I": images, "E": empty, "B": bad, "T": text}
        with pytest.raises(LalicError, match=message) as caught:
            main([str(places.get(a, a)) for a in arguments])
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_is_never_silently_ignored(self, checkpoints: list[Path], images: Path) -> None:
        with pytest.raises(LalicError, match="no CUDA device"):
            main(["-p", str(checkpoints[0]), "-i", str(images), "--cuda"])

    def test_unknown_architecture_and_coder(self, checkpoints: list[Path], images: Path) -> None:
        for extra in (["-m", "ELIC"], ["-c", "huffman"]):
            with pytest.raises(SystemExit) as caught:
                main(["-p", str(checkpoints[0]), "-i", str(images), *extra])
            assert caught.value.code == 2


class TestAverages:
    def test_first_time_and_infinities_are_left_out(self) -> None:
        rows = [
            {"bpp": 1.0, "psnr": math.inf, "enc_time": 9.0},
            {"bpp": 2.0, "psnr": 30.0, "enc_time": 1.0},
            {"bpp": 3.0, "psnr": 32.0, "enc_time": 2.0},
        ]
        assert averages(rows) == {"bpp": 2.0, "psnr": 31.0, "enc_time": 1.5}

    def test_one_image_is_timed(self) -> None:
        assert averages([{"bpp": 1.0, "enc_time": 9.0}])["enc_time"] == 9.0


def test_identical_picture_is_infinite(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_weights(checkpoints[0])
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    perfect = {"x_hat": to_tensor(rgb), "likelihoods": {"y": torch.full((8,), 0.5)}}
    monkeypatch.setattr(type(model), "forward", lambda self, x: perfect)
    row, reconstruction = measure(model, rgb, real=False, estimate=True)
    assert row["psnr"] == math.inf
    assert row["bpp"] == 8 / 4096
    assert np.array_equal(reconstruction, rgb)
