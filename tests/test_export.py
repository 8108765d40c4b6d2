"""Release bundles: complete, verifiable, the same model in both files, and never half written."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lalic import release_contents
from lalic.card import PUBLISHED_IMAGES, model_card
from lalic.errors import LalicError
from lalic.export import main
from lalic.files import sha256_of
from lalic.model import LALIC, fingerprint, load_weights, published_state_dict
from lalic.release import Weights, open_weights, write_bundle
from lalic.release_files import verify_bundle
from lalic.training.checkpoint import save

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
FILES = [
    "README.md",
    "SHA256SUMS",
    "config.json",
    "lalic-mse-q3.pth",
    "metrics.json",
    "model.safetensors",
    "reference.lalic",
]


def tiny_model(seed: int = 0) -> LALIC:
    torch.manual_seed(seed)
    return LALIC(**TINY).eval()


def weights_of(model: LALIC, **fields: Any) -> Weights:
    values = {"step": 1000, "loss": {"metric": "mse", "lambda": 0.0067}, "metrics": {"psnr": 21.5, "bpp": 0.4}}
    return Weights(model, "run", "run/step-00001000", **{**values, **fields})


@pytest.fixture(scope="module")
def model() -> LALIC:
    return tiny_model()


@pytest.fixture(scope="module")
def _bundle(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(weights_of(model), tmp_path_factory.mktemp("release"))


@pytest.fixture
def bundle(_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to do harm to."""
    return Path(shutil.copytree(_bundle, tmp_path / "release" / _bundle.name))


class TestContents:
    def test_files(self, bundle: Path) -> None:
        assert sorted(f.name for f in bundle.iterdir()) == FILES
        assert bundle.name == "lalic-mse-q3"
        modes = {stat.S_IMODE(f.stat().st_mode) for f in bundle.iterdir()}
        assert len(modes) == 1, "one file is readable for fewer people than the others"

    def test_sha256sum_agrees(self, bundle: Path) -> None:
        if not shutil.which("sha256sum"):
            pytest.skip("no sha256sum here")
        done = subprocess.run(
            ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(": OK") == len(FILES) - 1

    def test_pth_is_the_published_layout(self, model: LALIC, bundle: Path) -> None:
        state = torch.load(bundle / "lalic-mse-q3.pth", weights_only=True)
        expected = published_state_dict(model)
        assert list(state) == list(expected)
        assert all(torch.equal(state[n], expected[n]) and state[n].dtype == expected[n].dtype for n in state)
        assert torch.equal(state["h_a.0.weight"], state["latent_codec.hyper.h_a.0.weight"])

    def test_safetensors_holds_every_tensor_once(self, bundle: Path) -> None:
        state = torch.load(bundle / "lalic-mse-q3.pth", weights_only=True)
        once = load_file(bundle / "model.safetensors")
        twice = [n for n in state if n.startswith(("latent_codec.hyper.h_a.", "latent_codec.hyper.h_s."))]
        assert twice
        assert set(once) == set(state) - set(twice)
        assert all(torch.equal(once[n], state[n]) for n in once)

    def test_both_files_give_the_same_model(self, model: LALIC, bundle: Path) -> None:
        x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        outputs = []
        for path in (bundle, bundle / "model.safetensors", bundle / "lalic-mse-q3.pth"):
            loaded = load_weights(path)
            assert fingerprint(loaded) == fingerprint(model)
            with torch.no_grad():
                outputs.append(loaded(x)["x_hat"])
        with torch.no_grad():
            expected = model(x)["x_hat"]
        assert all(torch.equal(o, expected) for o in outputs)

    def test_config(self, model: LALIC, bundle: Path) -> None:
        config = json.loads((bundle / "config.json").read_text())
        assert config["model"] == model.config
        assert fingerprint(LALIC(**config["model"])) != config["fingerprint"] == fingerprint(model)
        assert config["loss"] == {"metric": "mse", "lambda": 0.0067}
        assert (config["quality"], config["step"], config["name"]) == (3, 1000, "lalic-mse-q3")
        assert config["versions"]["torch"] == torch.__version__

    def test_metrics_are_valid_json(self, model: LALIC, tmp_path: Path) -> None:
        folder = write_bundle(weights_of(model, metrics={"psnr": float("inf"), "bpp": 0.5}), tmp_path)
        assert json.loads((folder / "metrics.json").read_text()) == {"psnr": None, "bpp": 0.5}

    def test_off_the_ladder(self, model: LALIC, tmp_path: Path) -> None:
        folder = write_bundle(weights_of(model, loss={"metric": "ms-ssim", "lambda": 9.5}), tmp_path)
        assert folder.name == "lalic-ms-ssim-lambda9.5"
        assert json.loads((folder / "config.json").read_text())["quality"] is None


class TestCard:
    def test_says_what_it_is(self, model: LALIC, bundle: Path) -> None:
        text = (bundle / "README.md").read_text()
        assert text.startswith("---\nlicense: mit\n")
        for part in (fingerprint(model), "0.0067", "quality 3", "1,000 steps", "21.5", "arXiv:2502.05741"):
            assert part in text
        for file in ("model.safetensors", "lalic-mse-q3.pth", "config.json"):
            assert f"{sha256_of(bundle / file)}  {file}" in text

    @pytest.mark.parametrize(
        ("dims", "images", "warned"),
        [
            ([96, 144, 256, 320, 256, 192], PUBLISHED_IMAGES, False),
            ([96, 144, 256, 320, 256, 192], 1000, True),
            ([8, 12, 16, 32, 16, 8], PUBLISHED_IMAGES, True),
        ],
        ids=["published", "short", "small"],
    )
    def test_is_honest(self, model: LALIC, bundle: Path, dims: list[int], images: int, warned: bool) -> None:
        config = json.loads((bundle / "config.json").read_text())
        config["model"] = {**config["model"], "dims": dims, "depths": [2, 4, 6, 6]}
        text = model_card(config, {}, {"crops seen": images}, model, {})
        assert ("This is not the published codec" in text) == warned


class TestVerification:
    def test_good(self, bundle: Path) -> None:
        assert verify_bundle(bundle)["name"] == "lalic-mse-q3"

    @pytest.mark.parametrize("name", [f for f in FILES if f != "SHA256SUMS"])
    def test_flipped_byte(self, bundle: Path, name: str) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        with pytest.raises(LalicError, match=f"{name} is damaged"):
            verify_bundle(bundle)

    @pytest.mark.parametrize("name", [f for f in FILES if f != "SHA256SUMS"])
    def test_missing_file(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        with pytest.raises(LalicError, match=f"{name} is missing"):
            verify_bundle(bundle)

    def test_file_that_was_added(self, bundle: Path) -> None:
        (bundle / "extra.pth").write_bytes(b"x")
        with pytest.raises(LalicError, match=r"does not list extra\.pth"):
            verify_bundle(bundle)

    def test_no_sums(self, bundle: Path) -> None:
        (bundle / "SHA256SUMS").unlink()
        with pytest.raises(LalicError, match="not a release bundle"):
            verify_bundle(bundle)

    @pytest.mark.parametrize("line", ["nonsense", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 63}  a"])
    def test_sums_that_are_none(self, bundle: Path, line: str) -> None:
        with open(bundle / "SHA256SUMS", "a") as file:
            file.write(line + "\n")
        with pytest.raises(LalicError, match="SHA256SUMS is damaged"):
            verify_bundle(bundle)

    def test_open_checks_the_weights(self, bundle: Path) -> None:
        assert open_weights(bundle).name == "lalic-mse-q3"
        data = bytearray((bundle / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (bundle / "model.safetensors").write_bytes(data)
        with pytest.raises(LalicError, match="damaged"):
            open_weights(bundle)


class TestWriting:
    def test_again_changes_nothing(self, model: LALIC, bundle: Path) -> None:
        before = bundle.stat().st_ino
        assert write_bundle(weights_of(model), bundle.parent) == bundle
        assert bundle.stat().st_ino == before

    def test_another_model_needs_force(self, bundle: Path) -> None:
        other = weights_of(tiny_model(1))
        before = (bundle / "SHA256SUMS").read_text()
        with pytest.raises(LalicError, match="--force"):
            write_bundle(other, bundle.parent)
        assert (bundle / "SHA256SUMS").read_text() == before
        write_bundle(other, bundle.parent, force=True)
        assert verify_bundle(bundle)["fingerprint"] == fingerprint(other.model)
        assert [f.name for f in bundle.parent.iterdir()] == [bundle.name]

    def test_damaged_bundle_is_not_taken_for_the_same(self, model: LALIC, bundle: Path) -> None:
        (bundle / "metrics.json").write_text("{}")
        with pytest.raises(LalicError, match="--force"):
            write_bundle(weights_of(model), bundle.parent)

    def test_failure_leaves_what_was_there(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(release_contents, "model_card", fail)
        with pytest.raises(OSError, match="No space"):
            write_bundle(weights_of(tiny_model(1)), bundle.parent, force=True)
        verify_bundle(bundle)
        assert [f.name for f in bundle.parent.iterdir()] == [bundle.name]


@pytest.fixture
def run_folder(model: LALIC, tmp_path: Path) -> Path:
    """Two checkpoints as training writes them, the first one the better, and a damaged third."""
    run = tmp_path / "runs" / "demo"
    config = "train:\n  batch_size: 4\n  precision: fp32\nstages:\n- {steps: 2000, lr: 0.0001, crop: 128}\n"
    for step in (500, 1000, 1500):
        meta = {
            "step": step,
            "model": model.config,
            "loss": {"metric": "mse", "lambda": 0.013},
            "best": {"step": 500, "loss": 1.5},
            "metrics": {"psnr": 20 + step / 1000},
        }
        folder = save(run, step, tensors={"model.pt": model.state_dict()}, texts={"config.yaml": config}, meta=meta)
    (folder / "model.pt").write_bytes(b"damaged")
    return run


class TestCommand:
    def test_of_a_run(self, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "release"
        assert main(["--run", str(run_folder), "--output", str(output)]) == 0
        assert capsys.readouterr().out.strip() == str(output / "lalic-mse-q4")
        assert verify_bundle(output / "lalic-mse-q4")["step"] == 1000
        assert json.loads((output / "lalic-mse-q4" / "metrics.json").read_text()) == {"psnr": 21.0}

    def test_of_a_chosen_step(self, run_folder: Path, tmp_path: Path) -> None:
        main(["--run", str(run_folder), "--output", str(tmp_path), "--step", "500"])
        assert verify_bundle(tmp_path / "lalic-mse-q4")["step"] == 500

    def test_of_the_best_step(self, run_folder: Path, tmp_path: Path) -> None:
        main(["--run", str(run_folder), "--output", str(tmp_path), "--best"])
        assert verify_bundle(tmp_path / "lalic-mse-q4")["step"] == 500

    def test_of_the_best_step_that_is_there(self, run_folder: Path, tmp_path: Path) -> None:
        """The best one could not be written; what was measured on its own weights tells the next."""
        for step, loss in ((600, 1.7), (700, 1.6)):
            meta = json.loads((run_folder / "checkpoints" / "step-00001000" / "meta.json").read_text())
            meta |= {"step": step, "metrics": {"step": step, "loss": loss}}
            weights = torch.load(run_folder / "checkpoints" / "step-00001000" / "model.pt", weights_only=True)
            save(run_folder, step, tensors={"model.pt": weights}, texts={}, meta=meta)
        (run_folder / "checkpoints" / "step-00000500" / "MANIFEST.json").unlink()
        main(["--run", str(run_folder), "--output", str(tmp_path), "--best"])
        assert verify_bundle(tmp_path / "lalic-mse-q4")["step"] == 700

    def test_card_tells_the_training(self, run_folder: Path, tmp_path: Path) -> None:
        main(["--run", str(run_folder), "--output", str(tmp_path)])
        text = (tmp_path / "lalic-mse-q4" / "README.md").read_text()
        for part in ("crops seen: 4,000", "steps 2000, learning rate 0.0001, crop 128", "saw 4,000 crops", "21.0000"):
            assert part in text

    def test_cannot_contradict_the_run(self, run_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match=r"was trained with mse, lambda 0\.013"):
            main(["--run", str(run_folder), "--output", str(tmp_path), "--quality", "6"])

    def test_runs_and_checkpoints_are_weights_too(self, run_folder: Path) -> None:
        assert open_weights(run_folder).step == 1000
        assert open_weights(run_folder / "checkpoints" / "step-00000500").step == 500
        with pytest.raises(LalicError, match=r"step-00001500 is damaged: model\.pt"):
            open_weights(run_folder / "checkpoints" / "step-00001500")

    def test_of_published_weights(self, model: LALIC, tmp_path: Path) -> None:
        path = tmp_path / "lalic-ms-ssim-q5.pth.tar"
        torch.save({"state_dict": published_state_dict(model)}, path)
        assert main(["--checkpoint", str(path), "--output", str(tmp_path / "release")]) == 0
        config = verify_bundle(tmp_path / "release" / "lalic-ms-ssim-q5")
        assert config["loss"] == {"metric": "ms-ssim", "lambda": 31.73}
        assert config["step"] is None

    def test_of_weights_that_say_nothing(self, model: LALIC, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(published_state_dict(model), path)
        with pytest.raises(LalicError, match="--quality or --lambda"):
            main(["--checkpoint", str(path), "--output", str(tmp_path)])
        main(["--checkpoint", str(path), "--output", str(tmp_path), "--lambda", "0.02"])
        assert verify_bundle(tmp_path / "lalic-mse-lambda0.02")["quality"] is None

    @pytest.mark.parametrize("kind", ["missing", "text", "other", "folder"])
    def test_what_is_no_checkpoint(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "lalic-mse-q1.pth"
        if kind == "text":
            path.write_text("<html>")
        elif kind == "other":
            torch.save({"conv.weight": torch.zeros(3, 3)}, path)
        elif kind == "folder":
            path.mkdir()
        with pytest.raises(LalicError) as caught:
            main(["--checkpoint", str(path), "--output", str(tmp_path / "release")])
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert not (tmp_path / "release").exists()

    def test_run_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match="no such run folder"):
            main(["--run", str(tmp_path / "nowhere")])
