"""Compact bundles: the learned numbers alone, in float16, and a model that is exactly these."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import model, run_folder, tiny_model, weights_of  # noqa: F401 -- fixtures among them
from test_release import write_result
from test_verify_bundle import edit_config, edit_tensors, failure, sum_again

import lalic
from lalic.config import LossSection
from lalic.errors import LalicError
from lalic.export import main
from lalic.model import LALIC, fingerprint, published_state_dict
from lalic.model.lalic import LALIC as Network
from lalic.release import in_precision, open_weights, write_bundle
from lalic.training.inputs import new_model
from lalic.verify_bundle import check_bundle

# ruff: noqa: F811 -- fixtures are arguments of the same name

KERNEL = "latent_codec.y.latent_codec.y1.context_prediction.weight"
FILES = ["README.md", "SHA256SUMS", "config.json", "metrics.json", "model.safetensors", "reference.lalic"]


def rounded_by_numpy(model: LALIC) -> LALIC:
    """What float16 makes of a model, by other means than the program's."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.from_numpy(parameter.numpy().astype(np.float16).astype(np.float32)))
    return other


@pytest.fixture(scope="module")
def _compact(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(in_precision(weights_of(model), "float16"), tmp_path_factory.mktemp("compact"))


@pytest.fixture
def compact(_compact: Path, tmp_path: Path) -> Path:
    """A compact bundle to do harm to."""
    return Path(shutil.copytree(_compact, tmp_path / "release" / _compact.name))


def full_of(bundle: Path, output: Path) -> Path:
    assert main(["--checkpoint", str(bundle), "--output", str(output)]) == 0
    return output / bundle.name


class TestContents:
    def test_files(self, compact: Path) -> None:
        assert sorted(f.name for f in compact.iterdir()) == FILES
        assert len({f.stat().st_mode for f in compact.iterdir()}) == 1

    def test_every_parameter_once_in_float16(self, model: LALIC, compact: Path) -> None:
        found = load_file(compact / "model.safetensors")
        parameters = dict(model.named_parameters())
        short = {n.replace("latent_codec.hyper.h_a.", "h_a.").replace("latent_codec.hyper.h_s.", "h_s.") for n in found}
        assert short == set(found), "the hyper transforms have their short names"
        masks = [n for n in published_state_dict(model) if n.endswith(".mask")]
        assert masks and not set(masks) & set(found)
        assert len(found) == len({id(p) for p in parameters.values()})
        kernels = [n for n in found if n.endswith("context_prediction.weight")]
        assert len(kernels) == len(masks)
        for name in kernels:
            whole = parameters[name].detach().numpy().astype(np.float16)
            seen = [(row, column) for row in range(5) for column in range(5) if (row + column) % 2]
            for place, (row, column) in enumerate(seen):
                assert np.array_equal(found[name][:, :, place].numpy(), whole[:, :, row, column])
            assert found[name].shape == (*whole.shape[:2], len(seen)) and len(seen) == 12
        hidden = sum(13 * parameters[n].shape[0] * parameters[n].shape[1] for n in kernels)
        assert sum(t.numel() for t in found.values()) == sum(p.numel() for p in parameters.values()) - hidden
        assert {t.dtype for t in found.values()} == {torch.float16}
        size = (compact / "model.safetensors").stat().st_size
        assert size < 2 * sum(p.numel() for p in parameters.values()) + 200 * len(found)

    def test_the_model_is_the_rounded_numbers(self, model: LALIC, compact: Path) -> None:
        expected = rounded_by_numpy(model)
        for place in (compact, compact / "model.safetensors"):
            loaded = open_weights(place).model
            assert fingerprint(loaded) == fingerprint(expected) != fingerprint(model)
            assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {torch.float32}
            state, truth = published_state_dict(loaded), published_state_dict(expected)
            assert state.keys() == truth.keys() and all(torch.equal(state[n], truth[n]) for n in truth)
        x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(lalic.load(compact)(x)["x_hat"], expected(x)["x_hat"])

    def test_config(self, model: LALIC, compact: Path, tmp_path: Path) -> None:
        config = json.loads((compact / "config.json").read_text())
        assert (config["precision"], config["fingerprint"]) == ("float16", fingerprint(rounded_by_numpy(model)))
        assert config["model"] == model.config == open_weights(compact).model.config
        assert json.loads((write_bundle(weights_of(model), tmp_path) / "config.json").read_text())["precision"] == (
            "float32"
        )

    def test_numbers_that_float16_does_not_reach(self, model: LALIC, tmp_path: Path) -> None:
        large = copy.deepcopy(model)
        with torch.no_grad():
            large.g_s[0].bias[1] = 1e5
        torch.save(published_state_dict(large), tmp_path / "lalic-mse-q3.pth")
        arguments = ["--checkpoint", str(tmp_path / "lalic-mse-q3.pth"), "--output", str(tmp_path / "release")]
        with pytest.raises(LalicError, match=r"holds 100000 in g_s\.0\.bias, and float16 ends at 65504"):
            main([*arguments, "--precision", "float16"])
        assert not (tmp_path / "release").exists()
        assert main(arguments) == 0

    def test_nan_is_told_as_such(self, model: LALIC, tmp_path: Path) -> None:
        bad = copy.deepcopy(model)
        with torch.no_grad():
            bad.g_s[0].bias[1] = float("nan")
        with pytest.raises(LalicError, match=r"not finite, in g_s\.0\.bias"):
            write_bundle(in_precision(weights_of(bad), "float16"), tmp_path)

    @pytest.mark.parametrize("name", ["context_prediction.mask", "entropy_bottleneck.target", "scale_bound"])
    def test_a_constant_that_would_be_lost(self, model: LALIC, name: str, tmp_path: Path) -> None:
        other = copy.deepcopy(model)
        buffer = next(b for n, b in other.named_buffers() if n.endswith(name))
        buffer.mul_(1.5)
        with pytest.raises(LalicError, match=rf"has another \S*{name} than this program: export it as float32"):
            write_bundle(in_precision(weights_of(other), "float16"), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_an_incomplete_float32_file_is_none(self, model: LALIC, tmp_path: Path) -> None:
        """Only a compact file may lack constants: a float32 one that does is damaged."""
        state = {n: t for n, t in published_state_dict(model).items() if not n.endswith(".mask")}
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(LalicError, match="another architecture"):
            open_weights(tmp_path / "x.pth")

    def test_a_run_may_start_from_it(self, model: LALIC, compact: Path) -> None:
        arguments: Any = SimpleNamespace(
            train=SimpleNamespace(init_from=str(compact)),
            model=SimpleNamespace(arguments=lambda: model.config),
            loss=LossSection(quality=3),
        )
        assert fingerprint(new_model(arguments)) == fingerprint(rounded_by_numpy(model))


class TestBothForms:
    def test_the_full_form_of_a_compact_bundle(self, model: LALIC, compact: Path, tmp_path: Path) -> None:
        full = full_of(compact, tmp_path / "full")
        state = torch.load(full / "lalic-mse-q3.pth", weights_only=True)
        truth = published_state_dict(rounded_by_numpy(model))
        assert list(state) == list(truth) and all(torch.equal(state[n], truth[n]) for n in truth)
        fresh = Network(**model.config)
        assert fresh.load_state_dict(state, strict=True) and fingerprint(fresh) == open_weights(compact).fingerprint
        assert all(check.passed for check in check_bundle(full))
        assert "float32, all numbers rounded to float16" in (full / "README.md").read_text()

    def test_and_back(self, compact: Path, tmp_path: Path) -> None:
        full = full_of(compact, tmp_path / "full")
        main(["--checkpoint", str(full), "--precision", "float16", "--output", str(tmp_path / "again")])
        sums = [(folder / "SHA256SUMS").read_text() for folder in (compact, tmp_path / "again" / compact.name)]
        assert sums[0] == sums[1]

    def test_what_was_measured_on_other_numbers_is_left_out(self, model: LALIC, tmp_path: Path) -> None:
        (tmp_path / "kodak.json").touch()
        weights = weights_of(model, evaluations=[{"dataset": "kodak", "coding": "real", "images": 1, "metrics": {}}])
        assert in_precision(weights, "float32").evaluations == weights.evaluations
        assert in_precision(weights, "float16").evaluations == []

    def test_what_was_measured_on_them_comes_in(self, compact: Path, tmp_path: Path) -> None:
        rounded = open_weights(compact).model
        result = str(write_result(tmp_path / "kodak.json", tiny_model(1), rounded))
        arguments = ["--output", str(compact.parent), "--force"]
        main(["--checkpoint", str(compact), "--precision", "float16", "--eval", result, *arguments])
        assert sorted(f.name for f in compact.iterdir()) == sorted([*FILES, "evaluation.json"])
        text = (compact / "README.md").read_text()
        assert "| PSNR (dB, RGB, 8-bit) | 31.5000 |" in text
        assert all(check.passed is not False for check in check_bundle(compact))
        full = full_of(compact, tmp_path / "full")
        assert "31.5000" in (full / "README.md").read_text()

    def test_of_a_run(self, run_folder: Path, tmp_path: Path) -> None:
        main(["--run", str(run_folder), "--precision", "float16", "--output", str(tmp_path / "weights")])
        bundle = tmp_path / "weights" / "lalic-mse-q4"
        assert sorted(f.name for f in bundle.iterdir()) == FILES
        text = (bundle / "README.md").read_text()
        assert "before the weights were rounded to float16" in text and "| weights | those of the last step, float16 |"


class TestCard:
    def test_of_a_compact_bundle(self, compact: Path) -> None:
        text = (compact / "README.md").read_text()
        assert "| weights | float16 |" in text and "contains what\nrounding costs" in text
        assert ".pth` is a plain state dict" not in text and "lalic-mse-q3.pth" not in text

    def test_licence_follows_the_flags(self, compact: Path, tmp_path: Path) -> None:
        arguments = ["--checkpoint", str(compact), "--output", str(tmp_path)]
        with pytest.raises(LalicError, match="--license other needs --license-note"):
            main([*arguments, "--license", "other"])
        main([*arguments, "--license", "other", "--license-note", "Research\nuse only"])
        card = tmp_path / compact.name / "README.md"
        assert "license: other\n" in card.read_text()
        assert "\nResearch use only. The program: MIT. If you use LALIC, cite" in card.read_text()
        # Exported again without a word about it, the weights have the licence that they had.
        main(["--checkpoint", str(card.parent), "--output", str(tmp_path / "again")])
        assert "\nResearch use only. The program: MIT." in (tmp_path / "again" / compact.name / "README.md").read_text()
        main([*arguments, "--license", "cc-by-4.0", "--force"])
        assert "\nThe weights: `cc-by-4.0`. The program: MIT. If" in card.read_text()
        main([*arguments, "--license", "mit", "--force"])
        assert "\nMIT. If you use LALIC" in card.read_text()


class TestVerify:
    def test_good(self, compact: Path) -> None:
        checks = [(c.name, c.passed) for c in check_bundle(compact)]
        names = ["files", "sums", "config", "weights", "published", "reference"]
        assert checks == [(name, None if name == "published" else True) for name in names]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s["g_a.0.bias"].add_(1e-2), "have fingerprint"),
            (lambda s: s["g_a.0.bias"].fill_(float("inf")), "not finite, in g_a.0.bias"),
            (lambda s: s.update({"g_a.0.bias": s["g_a.0.bias"].float()}), "is torch.float32, not float16"),
            (lambda s: s.update({"g_a.0.bias": s["g_a.0.bias"].bfloat16()}), "is torch.bfloat16, not float16"),
            (lambda s: s.pop("g_s.0.bias"), "does not fit"),
            (lambda s: s.update({"g_a.0.surprise": torch.zeros(2).half()}), "does not fit"),
            (lambda s: s.update({"g_a.0.bias": torch.zeros(9).half()}), "does not fit"),
            (lambda s: s.update({KERNEL: s[KERNEL][..., :11].contiguous()}), "does not fit"),
        ],
        ids=["changed", "infinite", "one in float32", "one in bfloat16", "missing", "more", "shape", "kernel"],
    )
    def test_tensors(self, compact: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
        edit_tensors(compact, change)
        sum_again(compact)
        assert failure(compact)[0] == "weights" and words in failure(compact)[1]

    @pytest.mark.parametrize("name", ["context_prediction.mask", "entropy_bottleneck.target", "conv5x5_reparam.weight"])
    def test_a_constant_does_not_belong_into_it(self, model: LALIC, compact: Path, name: str) -> None:
        found, tensor = next((n, t) for n, t in published_state_dict(model).items() if n.endswith(name))
        edit_tensors(compact, lambda s: s.update({found: tensor.half()}))
        sum_again(compact)
        assert failure(compact) == ("weights", f"model.safetensors has other tensors than a release: {found}")

    @pytest.mark.parametrize(("told", "words"), [("float32", "there is no lalic-mse-q3.pth"), ("int4", "no precision")])
    def test_another_precision_is_told(self, compact: Path, told: str, words: str) -> None:
        edit_config(compact, precision=told)
        sum_again(compact)
        assert failure(compact)[0] == "config" and words in failure(compact)[1]

    def test_float32_numbers_that_are_told_as_float16(self, model: LALIC, compact: Path) -> None:
        state = {n: t.float() for n, t in load_file(compact / "model.safetensors").items()}
        save_file(state, compact / "model.safetensors")
        sum_again(compact)
        assert failure(compact)[0] == "weights" and "not float16" in failure(compact)[1]

    def test_a_pth_does_not_belong_into_it(self, compact: Path, tmp_path: Path) -> None:
        full = full_of(compact, tmp_path / "full")
        shutil.copy(full / "lalic-mse-q3.pth", compact)
        sum_again(compact)
        assert failure(compact) == ("config", "lalic-mse-q3.pth does not belong into a bundle of float16 weights")

    def test_a_full_bundle_told_as_float16(self, compact: Path, tmp_path: Path) -> None:
        full = full_of(compact, tmp_path / "full")
        edit_config(full, precision="float16")
        sum_again(full)
        assert failure(full)[0] == "config"
        (full / "lalic-mse-q3.pth").unlink()
        sum_again(full)
        assert failure(full)[0] == "weights" and "is torch.float32, not float16" in failure(full)[1]

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "reference.lalic"])
    def test_flipped_byte(self, compact: Path, name: str) -> None:
        data = bytearray((compact / name).read_bytes())
        data[len(data) // 2] ^= 1
        (compact / name).write_bytes(data)
        assert failure(compact)[0] == "sums"
