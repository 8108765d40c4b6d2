"""The exponential moving average of the weights: its arithmetic, its way into checkpoints, validation and bundles."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_train import TINY, config_path, own_process_state, pixels, records, run, stepper  # noqa: F401 -- fixtures
from test_verdicts import break_loss

from lalic import export
from lalic.codec.cli import main as codec
from lalic.config import LossSection, TrainSection, read_config
from lalic.data.images import list_images
from lalic.errors import LalicError
from lalic.model import LALIC, load_weights
from lalic.release import open_weights
from lalic.training import checkpoint, inputs
from lalic.training.engine import DDPEngine
from lalic.training.step import TrainStep
from lalic.training.validate import validate

DECAY = 0.9


def with_average(**settings: Any) -> TrainStep:
    return stepper(TrainSection(batch_size=4, cpu_threads=1, ema=DECAY, **settings))


def take(ours: TrainStep, number: int) -> None:
    ours([{"x": pixels(4, seed=number), "bad": 0}], step=number, lr=1e-2)


def numbers(model: LALIC) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def test_against_the_formula_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches of the warm-up, and a step in between that is not finite."""
    ours = with_average()
    assert ours.average is not None
    expected, updates = numbers(ours.bare), 0
    for number in range(10):
        if number == 6:  # long after the beginning
            updates = 88
            ours.average._updates.fill_(updates)
        if number == 3:
            with monkeypatch.context() as patch:
                break_loss(patch)
                take(ours, number)
            continue
        take(ours, number)
        decay = min(DECAY, (1 + updates) / (10 + updates))
        updates += 1
        weights = numbers(ours.bare)
        expected = {name: decay * e + (1 - decay) * weights[name] for name, e in expected.items()}
        assert ours.average.updates == updates
    assert decay == DECAY
    moved = 0.0
    for name, value in numbers(ours.average.model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        moved = max(moved, float(np.abs(value - weights[name]).max()))
    assert moved > 1e-3  # the average is not simply the weights


def test_a_step_that_is_left_out_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = with_average()
    assert ours.average is not None
    take(ours, 0)
    before = {k: v.clone() for k, v in ours.average.model.state_dict().items()}
    break_loss(monkeypatch)
    take(ours, 1)
    assert all(torch.equal(v, before[k]) for k, v in ours.average.model.state_dict().items())
    assert ours.average.updates == 1


def test_it_does_not_touch_the_training() -> None:
    plain, averaged = stepper(), with_average()
    for number in range(3):
        take(plain, number)
        take(averaged, number)
    for a, b in zip(plain.bare.parameters(), averaged.bare.parameters(), strict=True):
        assert torch.equal(a, b)
    # Nor does the optimiser know of it.
    assert averaged.average is not None and isinstance(averaged.engine, DDPEngine)
    own = {id(p) for p in averaged.average.model.parameters()}
    known = {id(p) for group in averaged.engine.optimizer.param_groups for p in group["params"]}
    assert not own & (known | {id(p) for p in averaged.bare.parameters()})


def test_the_layout_is_that_of_the_model() -> None:
    """Merged kernels are those of the averaged branches, not an average of merged kernels."""
    ours = with_average()
    assert ours.average is not None
    for number in range(2):
        take(ours, number)
    state, averaged = ours.bare.state_dict(), ours.average.model.state_dict()
    assert list(state) == list(averaged)
    assert [v.shape for v in state.values()] == [v.shape for v in averaged.values()]
    other = LALIC(**TINY)
    other.load_state_dict(averaged)
    assert all(torch.equal(v, averaged[k]) for k, v in other.state_dict().items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> Path:  # noqa: F811
    """A run of 7 steps with averaged weights."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert run(config_path, folder, f"train.ema={DECAY}") == 0
    return folder


def test_validation_measures_the_average(finished: Path, config_path: Path) -> None:  # noqa: F811
    path = checkpoint.find_checkpoint(finished)
    meta = checkpoint.read_meta(path)
    assert meta["ema"] == {"decay": DECAY, "updates": 7}
    images = list_images(config_path.parent / "val")
    loss = LossSection(metric="mse", quality=3)
    found = {}
    for kind in ("ema", "raw"):
        model = checkpoint.load_model(path, kind)  # type: ignore[arg-type]
        found[kind], _ = validate(Accelerator(cpu=True), model, images, loss, crop=64)
    last = records(finished, "validation")[-1]
    assert last["weights"] == "ema"
    assert last["loss"] == pytest.approx(found["ema"]["loss"], rel=1e-6)
    assert last["loss"] != pytest.approx(found["raw"]["loss"], rel=1e-3)


def test_turned_on_and_off_in_a_resumed_run(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    short = "stages=[{{steps: {}, lr: 1e-3, crop: 64}}]"
    settings = ["data.val=", "checkpoint.keep=9"]
    run(config_path, tmp_path, short.format(2), *settings)
    assert not checkpoint.has_average(checkpoint.find_checkpoint(tmp_path))
    run(config_path, tmp_path, short.format(3), *settings, "train.ema=0.5")
    assert "train.ema is new to this run: the average begins with the weights" in caplog.text
    # One update from the weights of step 2: 0.1 of them and 0.9 of those of step 3.
    two, three, average = (
        numbers(checkpoint.load_model(checkpoint.folder_of(tmp_path, step), kind))  # type: ignore[arg-type]
        for step, kind in ((2, "raw"), (3, "raw"), (3, "ema"))
    )
    for name, value in average.items():
        np.testing.assert_allclose(value, 0.1 * two[name] + 0.9 * three[name], rtol=1e-5, atol=1e-6, err_msg=name)
    run(config_path, tmp_path, short.format(4), *settings)
    assert "train.ema is off: the averaged weights of the checkpoint are left behind" in caplog.text
    path = checkpoint.find_checkpoint(tmp_path)
    assert path.name == "step-00000004" and not checkpoint.has_average(path)


def test_rollback_takes_the_average_back(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights that are good at step 2 and spoilt at step 3: what is left of them in the average is nothing."""
    original, seen = TrainStep.__call__, {}

    def spoilt(self: TrainStep, *arguments: Any, step: int, **more: Any) -> Any:
        assert self.average is not None
        if step == 2:
            seen["before"] = {k: v.clone() for k, v in self.average.model.state_dict().items()}
            result = original(self, *arguments, step=step, **more)
            with torch.no_grad():
                for p in self.average.model.parameters():
                    p += 1
                self.main_parameters[0].fill_(float("nan"))
            return result
        if step == 4:
            seen["after"] = {k: v.clone() for k, v in self.average.model.state_dict().items()}
        return original(self, *arguments, step=step, **more)

    monkeypatch.setattr(TrainStep, "__call__", spoilt)
    settings = ["stages=[{steps: 6, lr: 1e-3, crop: 64}]", "data.val=", "health.max_skipped=1", "train.ema=0.5"]
    assert run(config_path, tmp_path, *settings) == 0
    assert "back to the weights of" in caplog.text
    assert all(torch.equal(v, seen["before"][k]) for k, v in seen["after"].items())


class TestWhatIsTaken:
    def test_export(self, finished: Path, tmp_path: Path) -> None:
        """Averaged unless raw is asked for; the bundle says which, and has no metrics of the other."""
        path = checkpoint.find_checkpoint(finished)
        for arguments, kind in (([], "ema"), (["--weights", "ema"], "ema"), (["--weights", "raw"], "raw")):
            out = tmp_path / "-".join(["out", *arguments])
            export.main(["--run", str(finished), "--output", str(out), *arguments])
            bundle = out / "lalic-mse-q3"
            config = json.loads((bundle / "config.json").read_text())
            assert config["weights"] == kind
            state = torch.load(path / {"ema": "ema.pt", "raw": "model.pt"}[kind], weights_only=True)
            for name, p in load_weights(bundle).named_parameters():
                # Export zeroes what the checkerboard's mask hides.
                if "context_prediction" not in name:
                    assert torch.equal(p, state[name]), name
            card, metrics = (bundle / "README.md").read_text(), json.loads((bundle / "metrics.json").read_text())
            assert ("exponential moving average" in card) == (kind == "ema")
            assert ("decay of the averaged weights: 0.9" in card) == (kind == "ema")
            assert ("psnr" in metrics) == (kind == "ema")
            assert open_weights(bundle).kind == kind

    def test_export_of_what_has_no_average(self, finished: Path, tmp_path: Path) -> None:
        path = checkpoint.find_checkpoint(finished)
        arguments = ["--checkpoint", str(path / "model.pt"), "--output", str(tmp_path), "--quality", "3"]
        with pytest.raises(LalicError, match="holds one kind of weights only"):
            export.main([*arguments, "--weights", "ema"])
        export.main(arguments)
        assert json.loads((tmp_path / "lalic-mse-q3" / "config.json").read_text())["weights"] is None
        meta = {**checkpoint.read_meta(path), "ema": None}
        raw = torch.load(path / "model.pt", weights_only=True)
        plain = checkpoint.save(tmp_path / "run", 1, tensors={"model.pt": raw}, texts={}, meta=meta)
        with pytest.raises(LalicError, match="no averaged weights: it was trained without"):
            open_weights(plain, "ema")
        assert open_weights(plain).kind == "raw"

    def test_evaluation_and_compression(self, finished: Path, tmp_path: Path, config_path: Path) -> None:  # noqa: F811
        state = torch.load(checkpoint.find_checkpoint(finished) / "ema.pt", weights_only=True)
        for place in (finished, checkpoint.find_checkpoint(finished)):
            weights = open_weights(place)
            assert weights.kind == "ema"
            assert all(torch.equal(p, state[n]) for n, p in weights.model.named_parameters())
        picture = list_images(config_path.parent / "val")[0]
        coded = tmp_path / "x.lalic"
        assert codec(["compress", str(picture), str(coded), "--weights", str(finished)]) == 0
        assert codec(["decompress", str(coded), str(tmp_path / "y.png"), "--weights", str(finished)]) == 0
        # The file names the averaged weights: those of the last step are another model.
        raw = checkpoint.find_checkpoint(finished) / "model.pt"
        with pytest.raises(LalicError, match="another model"):
            codec(["decompress", str(coded), str(tmp_path / "z.png"), "--weights", str(raw)])

    @pytest.mark.parametrize("whole", [True, False], ids=["run", "checkpoint"])
    def test_fine_tuning_starts_from_the_average(
        self,
        whole: bool,
        finished: Path,
        config_path: Path,  # noqa: F811
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO)
        path = checkpoint.find_checkpoint(finished)
        config = read_config(config_path, [f"train.init_from={finished if whole else path}"])
        state = torch.load(path / "ema.pt", weights_only=True)
        assert all(torch.equal(p, state[n]) for n, p in inputs.new_model(config).named_parameters())
        assert f"weights from {path}, averaged" in caplog.text
