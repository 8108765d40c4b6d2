"""The optimiser step, the schedule, validation, logs and whole small runs, in this process.

Runs that are killed, and runs of several processes, are in test_resume.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lalic.data_prep import shard
from PIL import Image
from torch import Tensor, nn

from lalic import train
from lalic.config import LossSection, RunConfig, StageSection, TrainSection, read_config
from lalic.durations import duration
from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.training import checkpoint, environment, inputs, step
from lalic.training.distributed import SharedError, on_first_rank, seed_from, start_processes
from lalic.training.engine import keep_out_of_ddp
from lalic.training.schedule import plan
from lalic.training.step import TrainStep
from lalic.training.tracking import keep_until
from lalic.training.validate import validate

TINY: dict[str, Any] = {
    "N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)
}  # fmt: skip

CONFIG = """
model: {{N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}}
data: {{shards: {shards}, workers: 0, val: {val}, val_crop: 64}}
loss: {{metric: mse, quality: 3}}
train: {{batch_size: 4, cpu_threads: 1}}
stages:
- {{steps: 4, lr: 1e-3, crop: 64}}
- {{epochs: 1, lr: 1e-4, crop: 128}}
validate: {{every: 3}}
checkpoint: {{every: 2, keep: 2}}
log: {{every: 1, images: 2}}
"""
"""12 images, 9 of them as large as the second stage's crop: 4 + 3 steps."""


def write_images(folder: Path) -> None:
    """Small photograph-like PNGs: smooth colours and a little noise."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(12):
        size = [(200, 150), (160, 128), (130, 200), (128, 96)][i % 4]
        colours = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = smooth + generator.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")


def write_data(folder: Path) -> Path:
    """Images, two shards of them, and a config of a run of 7 steps; returns the config's path."""
    write_images(folder / "images")
    arguments = ["--input", str(folder / "images"), "--output", str(folder / "shards")]
    shard.main([*arguments, "--min-side", "64", "--shard-size", "300000", "--workers", "1"])
    (folder / "val").mkdir()
    for i in (0, 1, 3):
        shutil.copy(folder / "images" / f"{i:02d}.png", folder / "val")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(shards=folder / "shards", val=folder / "val"))
    return path


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state in singletons; conftest.py puts torch's switches back."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(config_path: Path, folder: Path, *settings: str) -> int:
    return train.main(["--config", str(config_path), f"run.dir={folder}", *settings])


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def stepper(train_section: TrainSection | None = None, seed: int = 0, **model: Any) -> TrainStep:
    section = train_section or TrainSection(batch_size=4, cpu_threads=1)
    accelerator = start_processes(section)
    torch.manual_seed(seed)
    return TrainStep(accelerator, LALIC(**TINY), section, LossSection(metric="mse", quality=3), seed)


def pixels(count: int, side: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8)


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a batch and the whole batch draw other noise; without it they must give the same gradients."""
    from compressai.entropy_models import EntropyModel

    def quantize(self: Any, inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        return inputs

    monkeypatch.setattr(EntropyModel, "quantize", quantize)


def test_equals_the_published_two_optimiser_recipe() -> None:
    """Three steps beside the recipe written out: Adam 1e-4 and 1e-3, clip 1.0 between the two backwards."""
    ours = stepper()
    torch.manual_seed(0)
    model = LALIC(**TINY).train()
    named = dict(model.named_parameters())
    main = [named[n] for n in sorted(named) if not n.endswith("quantiles")]
    quantiles = [named[n] for n in sorted(named) if n.endswith("quantiles")]
    optimizer, aux_optimizer = torch.optim.Adam(main, lr=1e-4), torch.optim.Adam(quantiles, lr=1e-3)
    for i in range(3):
        x8 = pixels(4, seed=i)
        result = ours([{"x": x8, "bad": 0}], step=i, lr=1e-4)
        x = x8 / 255
        torch.manual_seed(seed_from(0, i, 0))
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        output = model(x)
        rate = sum(torch.log(p).sum() / (-np.log(2) * 4 * 64 * 64) for p in output["likelihoods"].values())
        loss = 0.0067 * 255**2 * nn.functional.mse_loss(output["x_hat"], x) + rate
        loss.backward()
        norm = nn.utils.clip_grad_norm_(main, 1.0)
        optimizer.step()
        aux = model.aux_loss()
        aux.backward()
        aux_optimizer.step()
        assert float(norm) > 1.0  # the clip is at work
        assert float(result.values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(result.values["gradient_norm"]) == pytest.approx(float(norm), rel=1e-3)
        assert float(result.values["aux"]) == pytest.approx(float(aux.detach()), rel=1e-6)
    for name, p in ours.bare.named_parameters():
        # Adam moves a weight by up to the learning rate whatever its gradient, so rounding shows in a few.
        difference = (p.detach() - named[name].detach()).abs()
        assert float(difference.mean()) < 2e-6, name
        if name.endswith("quantiles"):
            torch.testing.assert_close(p, named[name], rtol=1e-6, atol=1e-6)


def test_clip_sees_the_main_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stepper()
    seen: list[list[Tensor]] = []
    clip = nn.utils.clip_grad_norm_

    def spy(parameters: Any, largest: float) -> Tensor:
        seen.append(list(parameters))
        # Left-over gradients of the quantiles must not count either.
        for q in ours.bare.quantiles():
            q.grad = torch.full_like(q, 1e6)
        before = torch.stack([p.grad.norm() for p in seen[-1]]).norm()
        norm = clip(parameters, largest)
        assert float(norm) == pytest.approx(float(before), rel=1e-5)
        after = torch.stack([p.grad.norm() for p in seen[-1]]).norm()
        assert float(after) == pytest.approx(1.0, rel=1e-3)
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    result = ours([{"x": pixels(4), "bad": 0}], step=0, lr=1e-4)
    everything = {id(p) for p in ours.bare.parameters()}
    assert {id(p) for p in seen[0]} == everything - {id(q) for q in ours.bare.quantiles()}
    assert float(result.values["gradient_norm"]) < 1e5


def test_quantiles_learn_from_the_auxiliary_loss_alone() -> None:
    """Other images, other noise: the same quantiles, nearer to where their loss wants them."""
    results = []
    for seed in (0, 1):
        ours = stepper(TrainSection(batch_size=4, cpu_threads=1, aux_lr=0.5))
        before = [q.detach().clone() for q in ours.bare.quantiles()]
        ours.seed = seed
        batches = ([{"x": pixels(4, seed=i + 10 * seed), "bad": 0}] for i in range(4))
        aux = [float(ours(batch, step=i, lr=1e-12).values["aux"]) for i, batch in enumerate(batches)]
        assert aux == sorted(aux, reverse=True) and aux[-1] < 0.995 * aux[0]
        after = [q.detach().clone() for q in ours.bare.quantiles()]
        assert all(float((a - b).abs().max()) > 1 for a, b in zip(after, before, strict=True))
        results.append(after)
    # The main optimiser moves the bottleneck by 1e-12 a step, and with it the auxiliary loss a little.
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_accumulation_equals_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    x = pixels(4)
    gradients = []
    for parts in (1, 2, 4):
        ours = stepper(TrainSection(batch_size=4, accumulation=parts, cpu_threads=1, clip=0.0))
        for i, part in enumerate(x.chunk(parts)):
            ours._backward({"x": part}, 0, i, parts)
        gradients.append([p.grad.clone() for p in ours.main_parameters])
    for some in gradients[1:]:
        for a, b in zip(gradients[0], some, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-9)


def test_accumulated_values_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    x = pixels(4)
    values = []
    for parts in (1, 2):
        ours = stepper(TrainSection(batch_size=4, accumulation=parts, cpu_threads=1))
        values.append(ours([{"x": part, "bad": 0} for part in x.chunk(parts)], step=0, lr=1e-4).values)
    for name in values[0]:
        assert float(values[0][name]) == pytest.approx(float(values[1][name]), rel=1e-3), name


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for enabled in (False, True):
        ours = stepper(TrainSection(batch_size=2, cpu_threads=1, gradient_checkpointing=enabled))
        blocks = [m for m in ours.bare.modules() if hasattr(m, "gradient_checkpointing")]
        assert blocks and all(m.gradient_checkpointing is enabled for m in blocks)
        ours._backward({"x": pixels(2)}, 0, 0, 1)
        gradients.append([p.grad.clone() for p in ours.main_parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_stays_out_of_the_entropy_models() -> None:
    ours = stepper(TrainSection(batch_size=2, cpu_threads=1, precision="bf16"))
    inside: set[torch.dtype] = set()
    outside: dict[str, torch.dtype] = {}

    def note_dtype(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if "entropy_bottleneck" in name or "gaussian_conditional" in name:
                for i, value in enumerate((*arguments, *output)):
                    if isinstance(value, Tensor):
                        outside[f"{name}.{i}"] = value.dtype
            elif isinstance(module, nn.Linear) and name.startswith("g_a."):
                inside.add(output.dtype)

        return hook

    for name, module in ours.bare.named_modules():
        module.register_forward_hook(note_dtype(name))
    result = ours([{"x": pixels(2), "bad": 0}], step=0, lr=1e-4)
    assert inside == {torch.bfloat16}
    assert len(outside) > 5 and set(outside.values()) == {torch.float32}
    assert {p.dtype for p in ours.bare.parameters()} == {torch.float32}
    reference = stepper(TrainSection(batch_size=2, cpu_threads=1))
    expected = reference([{"x": pixels(2), "bad": 0}], step=0, lr=1e-4)
    assert float(result.values["loss"]) == pytest.approx(float(expected.values["loss"]), rel=0.02)
    assert float(result.values["loss"]) != float(expected.values["loss"])


def test_noise_belongs_to_the_step() -> None:
    """Whatever was drawn before: the same step draws the same noise, another step another."""
    losses = []
    for number, drawn in ((3, 0), (3, 17), (4, 0)):
        ours = stepper()
        torch.rand(drawn)
        losses.append(float(ours([{"x": pixels(4), "bad": 0}], step=number, lr=1e-4).values["bpp_y"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_applied_that_is_not_finite(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stepper()
    ours([{"x": pixels(4), "bad": 0}], step=0, lr=1e-4)
    weights = {k: v.clone() for k, v in ours.bare.state_dict().items()}
    moments = json.dumps(ours.engine.state_dict()["state"][0]["exp_avg"].tolist())
    if where == "loss":
        original = step.rate_distortion

        def broken(*arguments: Any) -> dict[str, Tensor]:
            terms = original(*arguments)
            return {**terms, "loss": terms["loss"] * float("nan")}

        monkeypatch.setattr(step, "rate_distortion", broken)
    else:
        ours.main_parameters[0].register_hook(lambda g: g + float("inf"))
    assert float(ours([{"x": pixels(4), "bad": 0}], step=1, lr=1e-4).left_out) == 1
    assert all(torch.equal(v, weights[k]) for k, v in ours.bare.state_dict().items())
    assert json.dumps(ours.engine.state_dict()["state"][0]["exp_avg"].tolist()) == moments


def test_only_the_quantiles_are_kept_out_of_ddp() -> None:
    model = LALIC(**TINY)
    keep_out_of_ddp(model, model.quantiles())
    left_out = set(model._ddp_params_and_buffers_to_ignore)
    assert left_out == {n for n, _ in model.named_parameters(remove_duplicate=False) if n.endswith(".quantiles")}


def test_a_later_rank_leaves_the_first_one_time_to_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends the first rank as soon as another has ended."""
    slept: list[float] = []
    monkeypatch.setattr(train.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--config", str(tmp_path / "missing.yaml"), "run.dir=r"]) == 2
    assert sum(slept) >= 5 and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "train.precision"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
    ],
)
def test_the_launcher_may_not_contradict_the_config(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LalicError, match=words):
        start_processes(TrainSection())


def test_the_launcher_may_agree_with_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    accelerator = start_processes(TrainSection(precision="bf16", accumulation=2))
    assert accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 1


def test_an_error_of_the_first_rank_is_everybodys() -> None:
    accelerator = Accelerator(cpu=True)

    def fails() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")

    with pytest.raises(SharedError, match="No space left on device: /full/disk"):
        on_first_rank(accelerator, fails)


def test_stages_in_steps_and_epochs() -> None:
    stages = (
        StageSection(lr=1e-3, crop=256, epochs=3),
        StageSection(lr=1e-4, crop=256, steps=7),
        StageSection(lr=1e-4, crop=512, epochs=2),
    )
    schedule = plan(stages, 8, {256: 100, 512: 33}.__getitem__)
    # 300 positions are 37.5 batches; 7 steps use 56 of 100 positions, so one epoch; 66 positions are 8.25 batches.
    assert [(s.first_step, s.steps, s.first_epoch, s.samples) for s in schedule.stages] == [
        (0, 38, 0, 100),
        (38, 7, 4, 100),
        (45, 9, 5, 33),
    ]
    assert schedule.total_steps == 54
    assert [s.number for s in schedule.remaining(0)] == [1, 2, 3]
    assert [s.number for s in schedule.remaining(38)] == [2, 3]
    assert [s.number for s in schedule.remaining(44)] == [2, 3]
    assert schedule.remaining(54) == ()


def test_learning_rates_are_those_of_the_formulas() -> None:
    stages = (
        StageSection(lr=3e-3, crop=256, steps=20, warmup=4, decay="cosine", lr_end=1e-4),
        StageSection(lr=1e-3, crop=256, steps=10, decay="linear", lr_end=0.0),
        StageSection(lr=2e-4, crop=256, steps=5, warmup=5),
        StageSection(lr=1e-4, crop=256, steps=3),
    )
    first, second, third, last = plan(stages, 8, lambda crop: 100).stages
    assert [first.lr_at(s) for s in range(4)] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3], rel=1e-12)
    assert first.lr_at(4) == 3e-3
    assert first.lr_at(12) == pytest.approx((3e-3 + 1e-4) / 2, rel=1e-12)  # half of the sixteen steps of the decay
    quarter = 1e-4 + 2.9e-3 * (1 + 0.5**0.5) / 2
    assert first.lr_at(8) == pytest.approx(quarter, rel=1e-12)
    falling = [first.lr_at(s) for s in range(4, 20)]
    assert falling == sorted(falling, reverse=True) and 1e-4 < falling[-1] < 1.4e-4
    assert [second.lr_at(20 + s) for s in range(10)] == pytest.approx([1e-3 - s * 1e-4 for s in range(10)], rel=1e-12)
    assert [third.lr_at(30 + s) for s in range(5)] == pytest.approx([4e-5, 8e-5, 1.2e-4, 1.6e-4, 2e-4], rel=1e-12)
    assert {last.lr_at(s) for s in (35, 36, 37)} == {1e-4}


def test_a_warm_up_longer_than_its_stage_is_refused() -> None:
    """In epochs, only the images tell how long a stage is."""
    stages = (StageSection(lr=1e-3, crop=256, steps=5), StageSection(lr=1e-3, crop=256, epochs=1, warmup=14))
    with pytest.raises(LalicError, match=r"stages\.1\.warmup must be at most the 13 steps of the stage, not 14"):
        plan(stages, 8, lambda crop: 100)


def test_published_recipe_has_the_published_length(root: Path) -> None:
    config = read_config(root / "configs" / "lalic.yaml")
    schedule = plan(config.stages, config.train.batch_size, lambda crop: 400_000)
    assert [s.steps for s in schedule.stages] == [2_000_000, 200_000, 200_000]
    assert [s.first_epoch for s in schedule.stages] == [0, 40, 44]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> Path:
    """A run of 7 steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(config_path, folder) == 0
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return folder


def test_a_run_leaves_what_it_promises(finished: Path, config_path: Path) -> None:
    assert json.loads((finished / "DONE").read_text())["step"] == 7
    assert read_config(finished / "config.yaml").stages == read_config(config_path).stages
    assert [r["step"] for r in records(finished)] == list(range(1, 8))
    assert [r["stage"] for r in records(finished)] == [1] * 4 + [2] * 3
    assert [r["lr"] for r in records(finished)] == [1e-3] * 4 + [1e-4] * 3
    assert [r["step"] for r in records(finished, "validation")] == [3, 6, 7]
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(finished))
    best = min(records(finished, "validation"), key=lambda r: r["loss"])
    assert meta["best"] == {"step": best["step"], "loss": best["loss"]}
    assert (meta["step"], meta["stage"], meta["position"], meta["world_size"]) == (7, 2, 12, 1)
    assert meta["loss"] == {"metric": "mse", "lambda": 0.0067}
    assert meta["metrics"]["step"] == 7 and meta["metrics"]["psnr"] > 0
    assert meta["versions"]["torch"] == torch.__version__.split("+")[0] or meta["versions"]["torch"]
    # Saved at 2, 3 (best), 4, 6, 7; the two newest and the best stay.
    assert set(checkpoint.steps_on_disk(finished)) == {7, 6} | {best["step"]}


def test_training_lowers_the_loss(finished: Path) -> None:
    losses = [r["loss"] for r in records(finished)]
    assert losses[3] < 0.9 * losses[0]


def test_model_of_a_checkpoint_loads(finished: Path) -> None:
    path = checkpoint.find_checkpoint(finished)
    model = checkpoint.load_model(path)
    assert not model.training and model.config == LALIC(**TINY).config
    state = torch.load(path / "model.pt", weights_only=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_finished_run_says_so(finished: Path, config_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.pt")}
    with caplog.at_level(logging.INFO):
        assert run(config_path, finished) == 0
    assert "is finished: nothing to do" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.pt")} == before


def test_tensorboard_holds_the_run(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    names = {"loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr", "aux", "lr", "images_per_second"}
    assert {f"train/{name}" for name in names | {"gradient_norm", "data_wait_share", "bad_samples"}} <= tags
    assert {"validation/loss", "validation/psnr", "validation/bpp"} <= tags
    losses = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in board.Scalars("train/loss")]
    assert losses == [(r["step"], r["loss"]) for r in records(finished)]
    pictures = board.Tags()["images"]
    assert len(pictures) == 2
    event = board.Images(pictures[0])[-1]
    assert (event.step, event.width, event.height) == (7, 128, 64)  # original beside reconstruction


def test_log_line_reads_well(config_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(config_path, tmp_path / "r", "stages=[{steps: 2, lr: 1e-3, crop: 64}]", "log.every=2", "data.val=")
    (line,) = [m for m in caplog.messages if m.startswith("step ")]
    pattern = (
        r"step 2/2 \(100\.0 %\) stage 1/1 loss \d+\.\d+ bpp \d+\.\d+ psnr \d+\.\d+ aux \d+\.\d+ "
        r"gnorm \d+\.\d+ lr 1\.0e-03 \d+\.\d img/s wait \d+ % eta 0:00:00"
    )
    import re

    assert re.fullmatch(pattern, line), line


def test_ms_ssim_run(config_path: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "small")
    large = tmp_path / "large"
    large.mkdir()
    for path in sorted((tmp_path / "small").iterdir())[:2]:
        Image.open(path).resize((200, 200)).save(large / path.name)
    shard.main(["--input", str(large), "--output", str(tmp_path / "shards"), "--min-side", "64", "--workers", "1"])
    settings = ["loss.metric=ms-ssim", "stages=[{steps: 1, lr: 1e-4, crop: 192}]", f"data.shards={tmp_path}/shards"]
    settings += ["data.val_crop=192", "train.batch_size=2", f"data.val={large}"]
    assert run(config_path, tmp_path / "run", *settings) == 0
    (record,) = records(tmp_path / "run")
    expected = 8.73 * (1 - record["ms_ssim"]) + record["bpp"]
    assert record["loss"] == pytest.approx(expected, rel=1e-4)
    (record,) = records(tmp_path / "run", "validation")
    assert record["loss"] == pytest.approx(8.73 * (1 - record["ms_ssim"]) + record["bpp"], rel=1e-4)


def test_ms_ssim_validation_on_a_small_image_is_refused(config_path: Path, tmp_path: Path) -> None:
    settings = ["loss.metric=ms-ssim", "stages=[{steps: 1, lr: 1e-4, crop: 192}]", "data.val_crop="]
    with pytest.raises(LalicError, match=r"data\.val|crop of 192"):
        run(config_path, tmp_path / "run", *settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.shards=/nowhere"], r"/nowhere.*no such folder of shards"),
        (["data.val=/nowhere"], r"/nowhere.*no such folder"),
        (["stages.1.crop=192"], r"crop of 192 is larger than every image.*at most 150"),
        (["train.init_from=/nowhere.pth"], r"/nowhere\.pth"),
        (["train.batch_size=6", "train.accumulation=4"], r"not a multiple of 4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_the_first_step(
    settings: list[str], words: str, config_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(LalicError, match=words) as error:
        run(config_path, tmp_path / "run", *settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_needs_a_folder(config_path: Path) -> None:
    with pytest.raises(LalicError, match=r"run\.dir="):
        train.main(["--config", str(config_path)])


def test_cut_shard_is_named(config_path: Path, tmp_path: Path) -> None:
    shutil.copytree(config_path.parent / "shards", tmp_path / "shards")
    tar = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(LalicError, match=tar.name):
        run(config_path, tmp_path / "run", f"data.shards={tmp_path}/shards")


def test_another_run_in_the_folder_is_refused(finished: Path, config_path: Path) -> None:
    with pytest.raises(LalicError, match=r"run\.seed \(0 -> 5\).*another run\.dir"):
        run(config_path, finished, "run.seed=5")


def test_other_samples_under_the_same_run_are_refused(finished: Path, config_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "DONE").unlink()
    arguments = ["--input", str(config_path.parent / "images"), "--output", str(tmp_path / "shards"), "--seed", "9"]
    shard.main([*arguments, "--min-side", "64", "--workers", "1"])
    with pytest.raises(LalicError, match="does not hold the samples"):
        run(config_path, folder, f"data.shards={tmp_path}/shards")


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_fine_tuning_starts_from_weights(kind: str, finished: Path, config_path: Path, tmp_path: Path) -> None:
    path = checkpoint.find_checkpoint(finished)
    source = {"run": finished, "checkpoint": path, "file": path / "model.pt"}[kind]
    config = read_config(config_path, [f"train.init_from={source}"])
    model = inputs.new_model(config)
    expected = torch.load(path / "model.pt", weights_only=True)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_weights_of_another_architecture_are_refused(finished: Path, config_path: Path) -> None:
    config = read_config(config_path, [f"train.init_from={finished}", "model.depths=[1, 1, 2, 1]"])
    with pytest.raises(LalicError, match=r"another architecture .*depths"):
        inputs.new_model(config)


def save_tiny(run_folder: Path, number: int) -> Path:
    return checkpoint.save(
        run_folder,
        number,
        tensors={"model.pt": {"w": torch.full((1000,), float(number))}},
        texts={"config.yaml": "x: 1\n"},
        meta={"step": number},
    )


def test_newest_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LalicError, match="has no checkpoint"):
        checkpoint.find_checkpoint(tmp_path)
    paths = [save_tiny(tmp_path, i) for i in (1, 2, 3, 4, 5)]
    assert checkpoint.find_checkpoint(tmp_path) == paths[4]
    os.truncate(paths[4] / "model.pt", 100)
    flipped = bytearray((paths[3] / "model.pt").read_bytes())
    flipped[1500] ^= 1
    (paths[3] / "model.pt").write_bytes(flipped)
    (paths[2] / "MANIFEST.json").write_text('{"files": ')
    assert checkpoint.find_checkpoint(tmp_path) == paths[1]
    assert [m.count("passed over") for m in caplog.messages] == [1, 1, 1]
    assert "bytes instead of" in caplog.messages[0] and "SHA-256" in caplog.messages[1]
    assert checkpoint.find_checkpoint(tmp_path, 1) == paths[0]
    with pytest.raises(LalicError, match="is damaged"):
        checkpoint.find_checkpoint(tmp_path, 4)
    with pytest.raises(LalicError, match=r"no checkpoint of step 9 \(there are: 1, 2, 3, 4, 5\)"):
        checkpoint.find_checkpoint(tmp_path, 9)
    for path in paths:
        (path / "MANIFEST.json").unlink()
    with pytest.raises(LalicError, match="none of the 5 checkpoints"):
        checkpoint.find_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, 1)
    (path / "model.pt").unlink()
    save_tiny(tmp_path, 1)
    assert checkpoint.problem(path) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for i in range(1, 8):
        save_tiny(tmp_path, i)
    (checkpoint.folder_of(tmp_path, 7) / "model.pt").unlink()
    checkpoint.prune(tmp_path, 7, keep=2, protected=[3])
    # 7 is damaged: it counts as none of the two, and stays as evidence.
    assert checkpoint.steps_on_disk(tmp_path) == [7, 6, 5, 3]
    for i in (5, 6):
        (checkpoint.folder_of(tmp_path, i) / "MANIFEST.json").unlink()
    checkpoint.prune(tmp_path, 7, keep=2)
    assert checkpoint.steps_on_disk(tmp_path) == [7, 6, 5, 3]  # the only complete one is not deleted


def test_half_a_save_is_cleaned_up(tmp_path: Path) -> None:
    save_tiny(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".saving-step-00000002"
    leftover.mkdir()
    (leftover / "model.pt").write_bytes(b"half")
    assert checkpoint.steps_on_disk(tmp_path) == [1]
    checkpoint.remove_leftovers(tmp_path)
    assert not leftover.exists()


def test_a_full_disk_costs_one_checkpoint(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The save at step 4 fails: the run goes on. The last one fails as well: it ends in one line."""
    original = checkpoint._sync
    failing = {4, 7}

    def full(descriptor: int) -> None:
        written = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name
        if int(written.rsplit("-", 1)[-1]) in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(LalicError, match=r"step 7 could not be written .*No space left.*are intact"):
        run(config_path, tmp_path / "run", "data.val=")
    assert "step 4 could not be written" in caplog.text and "the run goes on" in caplog.text
    assert checkpoint.steps_on_disk(tmp_path / "run") == [6, 2]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob(".*")] == []
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step-00000006"


def test_a_write_that_fails_inside_torch_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save turns it into a RuntimeError of its own; /dev/full is a disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    import builtins

    opened = builtins.open

    def on_a_full_disk(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        return opened("/dev/full" if str(path).endswith("model.pt") else path, mode, *arguments, **more)

    monkeypatch.setattr(builtins, "open", on_a_full_disk)
    with pytest.raises(OSError) as error:
        save_tiny(tmp_path, 1)
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_checkpoints_unpickle_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run-by-the-file"),)

    torch.save({"w": Evil()}, tmp_path / "model.pt")
    with pytest.raises(LalicError, match="damaged"):
        checkpoint.load_tensors(tmp_path, "model.pt")
    assert not (tmp_path / "run-by-the-file").exists()


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_until(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_save_does_not_wait_for_git(monkeypatch: pytest.MonkeyPatch) -> None:
    first = environment.versions()
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: pytest.fail("git is asked again"))
    assert environment.versions() == first and first["code"]


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    import random

    state = environment.random_state(torch.device("cpu"))
    torch.save(state, tmp_path / "rng.pt")
    drawn = (torch.rand(3).tolist(), random.random(), np.random.random())
    environment.set_random_state(torch.load(tmp_path / "rng.pt", weights_only=True), torch.device("cpu"))
    assert (torch.rand(3).tolist(), random.random(), np.random.random()) == drawn


@pytest.mark.parametrize("crop", [None, 64, 128])
def test_validation_against_arithmetic(crop: int | None, config_path: Path) -> None:
    """One image at a time, padded by hand, in float64 after the model; a bf16 run is validated in float32."""
    images = sorted((config_path.parent / "images").iterdir())[:4]
    torch.manual_seed(3)
    model = LALIC(**TINY).train()
    model.set_compute_dtype(torch.bfloat16)
    loss = LossSection(metric="mse", quality=6)
    metrics, shown = validate(Accelerator(cpu=True), model, images, loss, crop=crop, pictures=1)
    assert model.training and model.g_s.compute_dtype == torch.bfloat16
    model.eval()
    model.set_compute_dtype(None)
    rows = []
    for path in images:
        rgb = np.asarray(Image.open(path))
        h, w = rgb.shape[:2]
        if crop:
            top, left = max(0, h - crop) // 2, max(0, w - crop) // 2
            rgb = rgb[top : top + crop, left : left + crop]
            h, w = rgb.shape[:2]
        padded = np.pad(rgb, ((0, -h % 64), (0, -w % 64), (0, 0)), mode="edge")
        with torch.no_grad():
            output = model(torch.tensor(padded).permute(2, 0, 1)[None] / 255)
        x_hat = output["x_hat"][0].permute(1, 2, 0).double().numpy()[:h, :w].clip(0, 1)
        mse = ((x_hat - rgb / 255.0) ** 2).mean()
        bpp = sum(-np.log2(p.double().numpy()).sum() for p in output["likelihoods"].values()) / (h * w)
        rows.append((0.0483 * 255**2 * mse + bpp, bpp, mse, -10 * np.log10(mse)))
    expected = np.mean(rows, axis=0)
    found = [metrics[name] for name in ("loss", "bpp", "mse", "psnr")]
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert metrics["images"] == 4 and metrics["ms_ssim"] is None
    (name, picture) = shown[0]
    assert name == "00.png" and picture.shape[0] == 3 and picture.shape[2] % 2 == 0


def test_validation_leaves_ranks_without_an_image_with_the_same_weights(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CompressAI's masked convolution overwrites its weights when it runs; four ranks, one image."""
    from types import SimpleNamespace

    from lalic.training import validate as module

    monkeypatch.setattr(module, "together", lambda accelerator, action: action())
    monkeypatch.setattr(module, "sum_over_ranks", lambda accelerator, table: table)
    image = sorted((config_path.parent / "images").iterdir())[:1]
    states = []
    for rank in (0, 3):
        torch.manual_seed(3)
        model = LALIC(**TINY)
        ranks: Any = SimpleNamespace(
            num_processes=4, process_index=rank, is_main_process=rank == 0, device=torch.device("cpu")
        )
        validate(ranks, model, image, LossSection(metric="mse", quality=3), crop=64)
        states.append(model.state_dict())
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (3725, "1:02:05"), (360_000, "100:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_config_is_what_the_tests_think(config_path: Path) -> None:
    config: RunConfig = read_config(config_path)
    assert config.model.arguments() == {**TINY, "context_rate": 8, "aggregation_rate": 2}
