"""Weights of several rates: the bundle of all rates, and bundles of one rate that are folded out of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rates_samples import RUNGS, loss_of, metrics_of, rates_model, write_rates_run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_export import tiny_model, weights_of
from test_export_several import check, files_of, write_run
from test_release import write_result
from test_verify_bundle import edit_config, edit_tensors, failure, sum_again

import lalic
from lalic import export as export_module
from lalic import release_builtin
from lalic.codec.bitstream import parse
from lalic.errors import LalicError
from lalic.export import main
from lalic.ladder import MSE, loss_name
from lalic.model import LALIC, fingerprint, load_weights, published_state_dict
from lalic.release import Weights, open_weights, write_bundle
from lalic.release_files import verify_bundle
from lalic.release_rates import range_loss
from lalic.verify import main as verify
from lalic.verify_bundle import check_bundle

FILES = ["README.md", "SHA256SUMS", "config.json", "metrics.json", "model.safetensors", "reference.lalic"]


@pytest.fixture(scope="module")
def model() -> LALIC:
    return rates_model()


@pytest.fixture(scope="module")
def run(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rates_run(tmp_path_factory.mktemp("runs") / "demo", model)


@pytest.fixture(scope="module")
def _released(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of all rates and the six of one rate, as commands write them."""
    output = tmp_path_factory.mktemp("released")
    assert main(["--run", str(run), "--output", str(output)]) == 0
    assert main(["--run", str(run), "--output", str(output), "--quality", *map(str, RUNGS)]) == 0
    return output


@pytest.fixture
def released(_released: Path, tmp_path: Path) -> Path:
    """Seven bundles to do harm to."""
    return Path(shutil.copytree(_released, tmp_path / "release"))


@pytest.fixture
def bundle(_released: Path, tmp_path: Path) -> Path:
    """A bundle of all rates to do harm to."""
    return Path(shutil.copytree(_released / "lalic-mse-vbr", tmp_path / "one" / "lalic-mse-vbr"))


def config_of(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "config.json").read_text()))


def pictures(model: LALIC, quality: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat and scaled latents of one random picture."""
    x = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, quality)["x_hat"], model.scaled_latents(x, quality)


class TestAllRates:
    def test_files_and_config(self, model: LALIC, bundle: Path) -> None:
        assert sorted(f.name for f in bundle.iterdir()) == FILES
        config = verify_bundle(bundle)
        assert (config["name"], config["quality"], config["step"]) == ("lalic-mse-vbr", [1, 6], 1000)
        assert config["loss"] == loss_of() and config["model"] == model.config
        assert config["fingerprint"] == fingerprint(model) and "folded" not in config
        assert json.loads((bundle / "metrics.json").read_text()) == metrics_of(1000)

    def test_round_trip(self, model: LALIC, bundle: Path) -> None:
        weights = open_weights(bundle)
        assert weights.loss == loss_of() and weights.model.config == model.config
        state = load_file(bundle / "model.safetensors")
        assert {"rates.gain", "rates.inverse_gain", "rates.rungs"} < set(state)
        for quality in (1, 2.75, 6):
            assert torch.equal(pictures(weights.model, quality)[0], pictures(model, quality)[0])

    def test_compact(self, model: LALIC, run: Path, tmp_path: Path) -> None:
        """Rounded to float16, gains included; the full form of it is the same model."""
        flags = ["--output", str(tmp_path), "--precision", "float16"]
        assert main(["--run", str(run), *flags]) == 0
        bundle = tmp_path / "lalic-mse-vbr"
        assert sorted(f.name for f in bundle.iterdir()) == FILES
        state = load_file(bundle / "model.safetensors")
        assert {t.dtype for t in state.values()} == {torch.float16}
        assert state["rates.rungs"].tolist() == [*RUNGS]
        found = open_weights(bundle)
        assert found.model.rates is not None and model.rates is not None
        expected = model.rates.gain.detach().numpy().astype(np.float16).astype(np.float32)
        assert np.array_equal(found.model.rates.gain.detach().numpy(), expected)
        assert found.fingerprint == config_of(bundle)["fingerprint"] != fingerprint(model)
        assert all(c.passed is not False for c in check_bundle(bundle))
        assert main(["--checkpoint", str(bundle), "--output", str(tmp_path / "full")]) == 0
        full = open_weights(tmp_path / "full" / "lalic-mse-vbr")
        assert (full.fingerprint, full.precision) == (found.fingerprint, "float32")
        assert sorted(f.name for f in (tmp_path / "full" / "lalic-mse-vbr").iterdir()) == FILES

    def test_a_bundle_gives_the_same_bundle(self, bundle: Path, tmp_path: Path) -> None:
        assert main(["--checkpoint", str(bundle), "--output", str(tmp_path / "again")]) == 0
        again = tmp_path / "again" / bundle.name / "SHA256SUMS"
        assert again.read_text() == (bundle / "SHA256SUMS").read_text()

    def test_reference_is_a_file_of_a_quality(self, bundle: Path) -> None:
        file = parse((bundle / "reference.lalic").read_bytes(), "x")
        assert (file.version, file.image.quality) == (3, 3.5)
        assert file.model_name.startswith("lalic-mse-vbr (fingerprint ")

    def test_card(self, model: LALIC, bundle: Path) -> None:
        text = (bundle / "README.md").read_text()
        for part in (
            "one model for all qualities from 1 to 6 of the ladder",
            "lambda = 0.0018 to 0.0483",
            "lambda * 255^2 * MSE + bpp, divided by the root of lambda",
            f"lalic compress photo.png photo.lalic --weights {bundle.name} --quality 4.3",
            f"-p {bundle.name} -q 1 2 3 4 5 6 ",
            'encode_image(model, read_rgb("photo.png"), quality=4.3)',
            f"lalic export --checkpoint {bundle.name} --quality 1 2 3 4 5 6 --output FOLDER",
            "| quality | lambda | loss | bpp | PSNR (dB) | MS-SSIM |",
            "| 4 | 0.013 | 5.0000 | 1.0000 | 25.0000 | 0.9000 |",
            "on 12 images at step 1,000",
            "- optimiser: muon",
            "learning rate 0.001 (warm-up 50, cosine to 0)",
            fingerprint(model),
        ):
            assert part in text, part
        assert ".pth` is" not in text and "{" not in text.split("```bibtex")[0]

    def test_card_without_validation(self, model: LALIC, tmp_path: Path) -> None:
        bundle = write_bundle(Weights(model, "x", "x.pth", loss=range_loss("mse", RUNGS)), tmp_path)
        assert "| quality | lambda |\n|---|---|\n| 1 | 0.0018 |\n" in (bundle / "README.md").read_text()

    def test_part_of_the_ladder(self, tmp_path: Path) -> None:
        rungs = (3, 4)
        run = write_rates_run(tmp_path / "runs" / "narrow", rates_model(rungs=rungs), (10,))
        assert main(["--run", str(run), "--output", str(tmp_path)]) == 0
        config = config_of(tmp_path / "lalic-mse-vbr")
        assert config["quality"] == [3, 4] and config["loss"]["lambdas"] == [MSE[3], MSE[4]]
        assert "--quality 3.5" in (tmp_path / "lalic-mse-vbr" / "README.md").read_text()
        assert main(["--run", str(run), "--output", str(tmp_path), "--quality", "4"]) == 0
        assert config_of(tmp_path / "lalic-mse-q4")["loss"] == {"metric": "mse", "lambda": MSE[4]}
        with pytest.raises(LalicError, match=r"quality 5 is not one of the model: it has 3 to 4"):
            main(["--run", str(run), "--output", str(tmp_path), "--quality", "5"])

    def test_ms_ssim(self, tmp_path: Path) -> None:
        run = write_rates_run(tmp_path / "r", rates_model(metric="ms-ssim"), (10,), metric="ms-ssim")
        assert main(["--run", str(run), "--output", str(tmp_path), "--quality", "6"]) == 0
        assert main(["--run", str(run), "--output", str(tmp_path)]) == 0
        assert sorted(p.name for p in tmp_path.glob("lalic-*")) == ["lalic-ms-ssim-q6", "lalic-ms-ssim-vbr"]
        assert verify([str(tmp_path)]) == 0

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_of_a_weights_file(self, model: LALIC, suffix: str, tmp_path: Path) -> None:
        """A release name tells the metric; any other file needs to be told."""
        state = {n: t for n, t in published_state_dict(model).items() if not n.startswith("latent_codec.hyper.h_")}
        for name in ("lalic-mse-vbr", "lalic-mse-q3", "weights"):
            path = tmp_path / f"{name}{suffix}"
            torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        assert main(["--checkpoint", str(tmp_path / f"lalic-mse-vbr{suffix}"), "--output", str(tmp_path / "a")]) == 0
        for name in ("lalic-mse-q3", "weights"):
            arguments = ["--checkpoint", str(tmp_path / f"{name}{suffix}"), "--output", str(tmp_path / "b")]
            with pytest.raises(LalicError, match=r"does not say what it was trained for: add --metric$"):
                main(arguments)
        main([*arguments, "--metric", "ms-ssim"])
        assert config_of(tmp_path / "a" / "lalic-mse-vbr")["loss"] == loss_of()
        assert config_of(tmp_path / "b" / "lalic-ms-ssim-vbr")["loss"] == loss_of(metric="ms-ssim")


class TestFolded:
    def test_names_and_sums(self, released: Path) -> None:
        names = [*(f"lalic-mse-q{rung}" for rung in RUNGS), "lalic-mse-vbr"]
        assert sorted(p.name for p in released.iterdir()) == ["SHA256SUMS", *names]
        assert check(released) == files_of(released)

    def test_config_and_metrics(self, model: LALIC, released: Path) -> None:
        prints = set()
        for rung in RUNGS:
            bundle = released / f"lalic-mse-q{rung}"
            config = verify_bundle(bundle)
            assert config["loss"] == {"metric": "mse", "lambda": MSE[rung]} and config["quality"] == rung
            assert "rungs" not in config["model"] and config["step"] == 1000
            assert config["folded"] == {
                "name": "lalic-mse-vbr",
                "quality": [1, 6],
                "fingerprint": fingerprint(model),
            }
            metrics = json.loads((bundle / "metrics.json").read_text())
            assert (metrics["psnr"], metrics["bpp"], metrics["step"]) == (21 + rung, rung / 4, 1000)
            assert "rungs" not in metrics
            prints.add(config["fingerprint"])
        assert len(prints) == 6 and fingerprint(model) not in prints

    def test_published_layout(self, released: Path) -> None:
        """The .pth file loads strictly into a model of one rate, without our own reading of names."""
        for rung in RUNGS:
            state = torch.load(released / f"lalic-mse-q{rung}" / f"lalic-mse-q{rung}.pth", weights_only=True)
            assert not [name for name in state if name.startswith("rates")]
            config = config_of(released / f"lalic-mse-q{rung}")
            fresh = LALIC(**config["model"])
            assert list(state) == list(published_state_dict(fresh))
            torch.nn.Module.load_state_dict(fresh, state, strict=True)
            assert fingerprint(fresh) == config["fingerprint"]

    @pytest.mark.parametrize("rung", RUNGS)
    def test_agrees_with_the_model_of_all_rates(self, model: LALIC, released: Path, rung: int) -> None:
        """To 1e-5 of what it computes with: latents first, which quantisation would turn into whole steps."""
        one = load_weights(released / f"lalic-mse-q{rung}")
        _, expected = pictures(model, rung)
        _, found = pictures(one)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        y_hat = torch.randn(1, 32, 4, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            painted = model.g_s(model._unscaled(y_hat, rung)), one.g_s(y_hat)
        assert float((painted[0] - painted[1]).abs().max()) <= 1e-5 * max(1.0, float(painted[0].abs().max()))

    def test_verify(self, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 60), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
        assert verify([str(released), "--image", str(tmp_path / "photo.png")]) == 0
        out = capsys.readouterr().out
        assert out.count("tensors in the published layout, the same numbers in both files") == 6
        assert out.count("several rates have no .pth") == 1 and "70 x 60 at quality 3.5: " in out
        assert "qualities 1 to 6" in out and "agrees with all 7 bundles" in out

    def test_card(self, model: LALIC, released: Path) -> None:
        text = (released / "lalic-mse-q5" / "README.md").read_text()
        assert "| folded from | `lalic-mse-vbr`, one model for the qualities 1 to 6, at quality 5;" in text
        assert fingerprint(model) in text and "lambda = 0.025 (quality 5 of the ladder)" in text
        assert "| psnr | 26.0000 |" in text and "rungs" not in text

    def test_from_the_bundle_of_all_rates(self, released: Path, tmp_path: Path) -> None:
        """The same bundles, byte for byte, as from the run."""
        arguments = ["--checkpoint", str(released / "lalic-mse-vbr"), "--output", str(tmp_path / "again")]
        assert main([*arguments, "--quality", "2", "6"]) == 0
        for rung in (2, 6):
            sums = [folder / f"lalic-mse-q{rung}" / "SHA256SUMS" for folder in (released, tmp_path / "again")]
            assert sums[0].read_text() == sums[1].read_text()

    def test_by_name(self, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LALIC_WEIGHTS", str(released))
        assert main(["--checkpoint", "lalic-mse-vbr", "--output", str(tmp_path / "x"), "--quality", "3"]) == 0
        assert config_of(tmp_path / "x" / "lalic-mse-q3") == config_of(released / "lalic-mse-q3")

    def test_compact(self, run: Path, tmp_path: Path) -> None:
        """Folded first, then rounded; its full form has the .pth file, and still says what it was folded from."""
        flags = ["--output", str(tmp_path), "--precision", "float16"]
        assert main(["--run", str(run), *flags, "--quality", "1", "4"]) == 0
        assert check(tmp_path) == files_of(tmp_path) and len(files_of(tmp_path)) == 12
        compact = tmp_path / "lalic-mse-q4"
        assert main(["--checkpoint", str(compact), "--output", str(tmp_path / "full")]) == 0
        full = tmp_path / "full" / "lalic-mse-q4"
        assert (full / "lalic-mse-q4.pth").exists()
        for key in ("fingerprint", "folded"):
            assert config_of(full)[key] == config_of(compact)[key]
        assert verify([str(tmp_path), str(full)]) == 0

    def test_best_and_step(self, run: Path, tmp_path: Path) -> None:
        for flags in (["--best"], ["--step", "500"]):
            main(["--run", str(run), "--output", str(tmp_path), "--quality", "2", *flags])
            assert config_of(tmp_path / "lalic-mse-q2")["step"] == 500
            assert json.loads((tmp_path / "lalic-mse-q2" / "metrics.json").read_text())["psnr"] == 22.5

    def test_force(self, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = write_rates_run(tmp_path / "other", rates_model(1))
        arguments = ["--run", str(other), "--output", str(released), "--quality", "2", "3"]
        before = (released / "SHA256SUMS").read_text()
        assert main(arguments) == 1
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(err) == 2 and "quality 2 is not exported" in err[0] and "--force" in err[1]
        assert (released / "SHA256SUMS").read_text() == before
        assert main([*arguments, "--force"]) == 0
        assert check(released) == files_of(released)
        assert (
            config_of(released / "lalic-mse-q3")["folded"]["fingerprint"]
            != config_of(released / "lalic-mse-q4")["folded"]["fingerprint"]
        )

    def test_a_failure_leaves_the_others_whole(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write = export_module.write_bundle

        def full_disk(weights: Weights, *args: Any, **flags: Any) -> Path:
            if weights.loss.get("lambda") == MSE[2]:
                raise OSError(28, "No space left on device")
            return write(weights, *args, **flags)

        monkeypatch.setattr(export_module, "write_bundle", full_disk)
        assert main(["--run", str(run), "--output", str(tmp_path), "--quality", "1", "2", "3"]) == 1
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(err) == 1 and "quality 2 is not exported" in err[0] and "No space left" in err[0]
        assert sorted(p.name for p in tmp_path.glob("lalic-*")) == ["lalic-mse-q1", "lalic-mse-q3"]
        assert check(tmp_path) == files_of(tmp_path)
        assert verify([str(tmp_path)]) == 0


    @pytest.mark.parametrize("library", ["torch", "safetensors"])
    def test_a_full_disk_that_the_libraries_tell_in_their_own_way(
        self,
        run: Path,
        tmp_path: Path,
        library: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As they do on a full disk: torch.save raises RuntimeError, save_file SafetensorError."""
        from lalic import release_contents

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("unexpected pos 1 vs 0") if library == "torch" else SafetensorError("I/O error")

        monkeypatch.setattr(*((torch, "save") if library == "torch" else (release_contents, "save_file")), fail)
        assert main(["--run", str(run), "--output", str(tmp_path), "--quality", "1", "2"]) == 1
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(err) == 2 and all("the weights cannot be written" in line and "MiB are free" in line for line in err)
        assert not list(tmp_path.glob("*lalic-*"))


class TestSeveralRuns:
    def test_a_range_beside_single_rates(self, run: Path, tmp_path: Path) -> None:
        single = write_run(tmp_path / "single", 3)
        assert main(["--run", str(single), str(run), "--output", str(tmp_path / "release")]) == 0
        assert check(tmp_path / "release") == files_of(tmp_path / "release")
        names = sorted(p.name for p in (tmp_path / "release").glob("lalic-*"))
        assert names == ["lalic-mse-q3", "lalic-mse-vbr"]

    def test_two_ranges_are_one_name(self, run: Path, tmp_path: Path) -> None:
        other = write_rates_run(tmp_path / "other", rates_model(1), (10,))
        with pytest.raises(LalicError, match=r"are both lalic-mse-vbr: leave one of them out"):
            main(["--run", str(run), str(other), "--output", str(tmp_path / "release")])
        with pytest.raises(LalicError, match="--quality and --lambda are for one run"):
            main(["--run", str(run), str(other), "--output", str(tmp_path / "release"), "--quality", "1"])
        assert not (tmp_path / "release").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--quality", "7"], r"quality 7 is not one of the model: it has 1 to 6"),
            (["--quality", "0.5"], r"quality 0.5 is not one of the model: it has 1 to 6"),
            (["--quality", "nan"], r"quality 'nan' is not a number"),
            (["--quality", "1-6"], r"quality '1-6' is not a number .*: --quality 1 2 3"),
            (["--quality", "4.3"], r"a bundle of one rate has a whole quality, not 4\.3"),
            (["--quality", "1", "2.5"], r"a bundle of one rate has a whole quality, not 2\.5"),
            (["--quality", "1", "9"], r"quality 9 is not one of the model"),
            (["--quality", "3", "1", "3"], r"--quality names 3 twice"),
            (["--lambda", "0.01"], r"has several rates, whose lambdas are those of the ladder: leave --lambda out"),
            (["--metric", "ms-ssim"], r"was trained with mse, not with ms-ssim: leave --metric out"),
            (["--weights", "ema"], r"ema"),
        ],
    )
    def test_of_a_range(self, run: Path, tmp_path: Path, flags: list[str], words: str) -> None:
        with pytest.raises(LalicError, match=words) as caught:
            main(["--run", str(run), "--output", str(tmp_path / "release"), *flags])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "release").exists()

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--quality", "4.3"], r"has one rate, lalic-mse-q3: it has no quality 4\.3"),
            (["--quality", "3", "4"], r"has one rate, lalic-mse-q3: it cannot be exported at several qualities"),
            (["--quality", "7"], r"--quality 7 is not on the ladder, which has 1 to 6"),
            (["--quality", "inf"], r"quality 'inf' is not a number"),
            (["--quality", "4"], r"was trained with mse, lambda 0\.0067"),
        ],
    )
    @pytest.mark.parametrize("kind", ["run", "bundle"])
    def test_of_one_rate(self, tmp_path: Path, kind: str, flags: list[str], words: str) -> None:
        if kind == "run":
            source = ["--run", str(write_run(tmp_path / "single", 3))]
        else:
            source = ["--checkpoint", str(write_bundle(weights_of(tiny_model()), tmp_path / "one"))]
        with pytest.raises(LalicError, match=words) as caught:
            main([*source, "--output", str(tmp_path / "release"), *flags])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "release").exists()
        assert main([*source, "--output", str(tmp_path / "release"), "--quality", "3"]) == 0, "the label that it has"

    def test_a_loss_that_is_not_that_of_the_model(self, model: LALIC, tmp_path: Path) -> None:
        weights = Weights(model, "x", "x", loss=loss_of((1, 2)))
        with pytest.raises(LalicError, match=r"the loss is one of the qualities \[1, 2\]"):
            write_bundle(weights, tmp_path)
        weights.loss = {"metric": "mse", "lambda": 0.0067}
        with pytest.raises(LalicError, match="the loss is one of one rate"):
            write_bundle(weights, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_names(self) -> None:
        assert (
            loss_name(loss_of()) == "lalic-mse-vbr" and loss_name({"metric": "mse", "lambda": 0.025}) == "lalic-mse-q5"
        )
        with pytest.raises(KeyError):
            loss_name({"metric": "mse"})
        with pytest.raises(LalicError, match=r"quality 7 of the model is not on the ladder, which has 1 to 6"):
            range_loss("mse", (6, 7))


class TestVerify:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"quality": [1, 5]}, "quality is [1, 5], but [1, 6] by model and loss"),
            ({"quality": 3}, "quality is 3, but [1, 6] by model and loss"),
            ({"name": "lalic-mse-q3"}, "is named 'lalic-mse-q3'"),
            ({"loss": {"metric": "mse", "lambda": 0.0067}}, "the loss is one of one rate"),
            ({"loss": loss_of((1, 5))}, "the loss is one of the qualities [1, 5]"),
            (
                {"loss": {**loss_of(), "lambdas": [1, 2, 3, 4, 5, 6]}},
                "the loss is one of the qualities [1, 6] with lambda",
            ),
            ({"loss": {**loss_of(), "lambdas": None}}, "does not say model and loss"),
            ({"loss": {**loss_of(), "lambdas": ["a"]}}, "does not say model and loss"),
            ({"loss": {"metric": "mse", "lambdas": loss_of()["lambdas"]}}, "does not say model and loss: 'quality'"),
        ],
        ids=str,
    )
    def test_config_that_contradicts_itself(self, bundle: Path, changes: dict[str, Any], words: str) -> None:
        edit_config(bundle, **changes)
        sum_again(bundle)
        assert failure(bundle)[0] == "config" and words in failure(bundle)[1]

    @pytest.mark.parametrize(
        ("rungs", "check", "words"),
        [
            ([1, 2, 3, 4, 5], "config", "the model is one of the qualities [1, 5]"),
            ([2, 3, 4, 5, 6, 7], "config", "quality 7 of the model is not on the ladder"),
            ([1, 2, 3, 4, 5, 5], "config", "rungs must be two or more whole numbers in a row"),
            ("123456", "config", "rungs must be whole numbers, got '123456'"),
            ([1, "2"], "config", "rungs must be whole numbers, got [1, '2']"),
            (None, "config", "the loss is one of several rates, but the model has one"),
        ],
    )
    def test_rungs_of_the_config(self, bundle: Path, rungs: Any, check: str, words: str) -> None:
        edit_config(bundle, model=config_of(bundle)["model"] | {"rungs": rungs})
        sum_again(bundle)
        assert failure(bundle)[0] == check and words in failure(bundle)[1]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s["rates.gain"].add_(1e-3), "have fingerprint"),
            (lambda s: s["rates.inverse_gain"].fill_(float("nan")), "not finite, in rates.inverse_gain"),
            (lambda s: s.update({"rates.gain": s["rates.gain"][:5].clone()}), "does not fit"),
            (lambda s: s.update({"rates.gain": s["rates.gain"][:, :31].clone()}), "does not fit"),
            (lambda s: s.pop("rates.gain"), "does not fit"),
            (lambda s: s.pop("rates.rungs"), "has rungs None, but config.json says [1, 2, 3, 4, 5, 6]"),
            (lambda s: s["rates.rungs"].add_(1), "has rungs [2, 3, 4, 5, 6, 7], but config.json says [1, 2"),
            (lambda s: s["rates.rungs"].fill_(1), "does not fit"),
            (lambda s: s.update({"rates.rungs": torch.tensor([])}), "does not fit"),
            (lambda s: s.update({"rates.more": torch.zeros(1)}), "does not fit"),
            (lambda s: [s.pop(f"rates.{n}") for n in ("gain", "inverse_gain", "rungs")], "has rungs None"),
        ],
        ids=[
            *("changed", "nan", "rows", "columns", "no gain", "no rungs", "other rungs", "equal rungs", "empty rungs"),
            *("more", "no rates"),
        ],
    )
    def test_gains(self, bundle: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
        edit_tensors(bundle, change)
        sum_again(bundle)
        assert failure(bundle)[0] == "weights" and words in failure(bundle)[1]
        with pytest.raises(LalicError) as caught:
            open_weights(bundle)
        assert "\n" not in str(caught.value)

    def test_gains_in_a_bundle_of_one_rate(self, released: Path, model: LALIC) -> None:
        bundle = released / "lalic-mse-q3"
        gains = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("rates.")}
        edit_tensors(bundle, lambda state: state.update(gains))
        sum_again(bundle)
        assert failure(bundle)[0] == "weights" and "but config.json says None" in failure(bundle)[1]
        with pytest.raises(LalicError, match=r"another architecture than config\.json tells"):
            open_weights(bundle)

    def test_a_pth_file_beside_gains(self, bundle: Path, released: Path) -> None:
        shutil.copy(released / "lalic-mse-q3" / "lalic-mse-q3.pth", bundle / "lalic-mse-vbr.pth")
        sum_again(bundle)
        assert failure(bundle) == ("config", "lalic-mse-vbr.pth does not belong into a bundle of several rates")

    def test_a_folded_bundle_without_pth(self, released: Path) -> None:
        (released / "lalic-mse-q3" / "lalic-mse-q3.pth").unlink()
        sum_again(released / "lalic-mse-q3")
        assert failure(released / "lalic-mse-q3") == ("config", "there is no lalic-mse-q3.pth")

    @pytest.mark.parametrize("harm", ["folded", "one bit", "cut", "results"])
    def test_reference(self, bundle: Path, released: Path, harm: str) -> None:
        file = bundle / "reference.lalic"
        if harm == "folded":
            shutil.copy(released / "lalic-mse-q3" / "reference.lalic", file)
        elif harm == "results":
            edit_config(bundle, reference=config_of(bundle)["reference"] | {"psnr": 3.0})
        else:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data if harm == "one bit" else data[:-1])
        sum_again(bundle)
        assert failure(bundle)[0] == "reference"

    @pytest.mark.parametrize("name", [f for f in FILES if f != "SHA256SUMS"])
    def test_flipped_byte(self, bundle: Path, name: str) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        assert failure(bundle)[0] == "sums"


class TestEvaluations:
    QUALITIES = (1.0, 2.5, 6.0)

    def result(self, path: Path, model: LALIC, **changes: Any) -> Path:
        """As `lalic eval -p lalic-mse-vbr -q 1 2.5 6` writes it: a row for each quality of the same weights."""
        write_result(path, *[model] * len(self.QUALITIES), **changes)
        result = json.loads(path.read_text())
        for row, quality in zip(result["models"], self.QUALITIES, strict=True):
            row["q"] = quality
        path.write_text(json.dumps(result))
        return path

    def test_into_the_bundle_of_all_rates(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        arguments = ["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", "--eval"]
        result = self.result(tmp_path / "kodak.json", model)
        for _ in range(2):  # the second time in place of the first
            assert main([*arguments, str(result)]) == 0
            entries = json.loads((bundle / "evaluation.json").read_text())
            assert [(e["quality"], e["metrics"]["bpp"]) for e in entries] == [(1.0, 0.25), (2.5, 1.25), (6.0, 2.25)]
        text = (bundle / "README.md").read_text()
        assert "| quality | rate (bits per pixel) | PSNR (dB, RGB, 8-bit) | MS-SSIM |" in text
        assert "| 2.5 | 1.2500 | 31.5000 | 0.9700 |" in text and text.count("24 images of kodak") == 1
        assert "| 4 | 0.013 | 5.0000 |" in text, "what validation measured is kept"
        assert all(c.passed is not False for c in check_bundle(bundle))

    def test_front_matter_tells_the_qualities_apart(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        hub = pytest.importorskip("huggingface_hub")
        result = self.result(tmp_path / "kodak.json", model)
        main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", "--eval", str(result)])
        results = hub.ModelCard.load(bundle / "README.md").data.eval_results
        found = {(r.dataset_name, r.metric_value) for r in results if r.metric_type == "bpp"}
        assert found == {("kodak, quality 1", 0.25), ("kodak, quality 2.5", 1.25), ("kodak, quality 6", 2.25)}

    def test_folded_weights_are_others(
        self, model: LALIC, run: Path, released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Numbers of all rates are not those of a folded bundle; its own are found by its fingerprint."""
        main(["--run", str(run), "--output", str(tmp_path / "a"), "--quality", "2"])
        result = self.result(tmp_path / "all.json", model)
        own = write_result(tmp_path / "own.json", load_weights(released / "lalic-mse-q2"))
        flags = ["--run", str(run), "--output", str(tmp_path / "b"), "--quality", "2", "3", "--eval"]
        main([*flags, str(result), str(own)])
        assert "has no numbers of these weights" in caplog.text
        assert not (tmp_path / "b" / "lalic-mse-q3" / "evaluation.json").exists()
        (entry,) = json.loads((tmp_path / "b" / "lalic-mse-q2" / "evaluation.json").read_text())
        assert entry["metrics"]["bpp"] == 0.25 and "quality" not in entry

    def test_stay_out_of_what_is_folded_later(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        result = self.result(tmp_path / "kodak.json", model)
        main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", "--eval", str(result)])
        main(["--checkpoint", str(bundle), "--output", str(tmp_path), "--quality", "2"])
        assert not (tmp_path / "lalic-mse-q2" / "evaluation.json").exists()


def test_built_in(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of all rates among the built-in ones: found by name and verified, beside bundles of one rate."""
    for name in ("LALIC_WEIGHTS", "LALIC_HUB_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "release" / "..")
    installed = tmp_path / "site" / "weights"
    for name in ("lalic-mse-q3", "lalic-mse-vbr"):
        main(["--checkpoint", str(released / name), "--output", str(installed), "--precision", "float16"])
    shutil.rmtree(released)
    monkeypatch.setattr(release_builtin, "builtin_folder", lambda: installed)
    assert release_builtin.builtin_names() == ["lalic-mse-q3", "lalic-mse-vbr"]
    assert lalic.load("lalic-mse-vbr").config["rungs"] == [*RUNGS]
    assert verify(["lalic-mse-vbr", str(installed)]) == 0
    (installed / "lalic-mse-vbr" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LalicError, match=r"the built-in weights lalic-mse-vbr cannot be used .*get them again"):
        open_weights("lalic-mse-vbr")
