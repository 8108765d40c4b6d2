"""A step does not wait for the device, and is left out all the same when it is not finite.

The lag of CUDA, where a step's verdict is read one step later, is set by hand here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from test_resume import assert_identical
from test_train import TINY, config_path, own_process_state, pixels, records, run, stepper  # noqa: F401 -- fixtures
from torch.utils._python_dispatch import TorchDispatchMode

from lalic.config import LossSection, TrainSection
from lalic.model import LALIC
from lalic.training import checkpoint, step
from lalic.training.distributed import start_processes
from lalic.training.step import TrainStep

READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_to_cpu")


class CountReads(TorchDispatchMode):
    """Counts the operators that give a value of a tensor to Python: on CUDA each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def lagging(lag: int, **train_settings: Any) -> TrainStep:
    section = TrainSection(batch_size=4, cpu_threads=1, **train_settings)
    accelerator = start_processes(section)
    torch.manual_seed(0)
    return TrainStep(accelerator, LALIC(**TINY), section, LossSection(metric="mse", quality=3), 0, lag=lag)


def take(ours: TrainStep, number: int, **more: Any) -> Any:
    return ours([{"x": pixels(4, seed=number), "bad": 0}], step=number, lr=1e-4, **more)


def state(ours: TrainStep) -> list[torch.Tensor]:
    """All that a step changes: weights, quantiles, moments and step counts of both optimisers."""
    optimizers = [o for s in ours.state_dict().values() for p in s["state"].values() for o in p.values()]
    return [t.clone() for t in (*ours.bare.state_dict().values(), *optimizers)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def break_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.rate_distortion

    def broken(*arguments: Any) -> dict[str, torch.Tensor]:
        terms = original(*arguments)
        return {**terms, "loss": terms["loss"] * float("nan")}

    monkeypatch.setattr(step, "rate_distortion", broken)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "gradient_checkpointing": True}], ids=["fp32", "bf16"])
def test_no_value_goes_to_the_host_within_a_step(settings: dict[str, Any]) -> None:
    ours = lagging(1, **settings)
    take(ours, 0)
    with CountReads() as reads:
        take(ours, 1)
    assert reads.seen == []


def test_reads_are_seen_where_there_are_any() -> None:
    """CompressAI's own bottleneck asks for the order of the dimensions; so would a loss that is printed."""
    with CountReads() as reads:
        EntropyBottleneck(4)(torch.zeros(2, 4, 1, 1))
    assert len(reads.seen) >= 8
    with CountReads() as reads:
        float(torch.ones(1).sum())
    assert len(reads.seen) == 1


def test_the_lag_changes_no_bit() -> None:
    states = []
    for lag in (0, 1, 2):
        ours = lagging(lag)
        for number in range(3):
            take(ours, number)
        ours.verdicts.settle()
        states.append(state(ours))
    assert same(states[0], states[1]) and same(states[0], states[2])


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_broken_step_is_no_step_and_the_next_one_is(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, step counts and quantiles as if the broken step had not been there."""
    ours, other = lagging(lag), lagging(lag)
    take(ours, 0)
    before = state(ours)
    with monkeypatch.context() as patch:
        break_loss(patch)
        result = take(ours, 1)
    assert float(result.left_out) == 1 and same(state(ours), before)
    take(ours, 2)
    ours.verdicts.settle()
    assert [s.step for s in ours.verdicts.unseen] == [1] and ours.verdicts.in_row == 0
    assert "step 2 (loss nan, gradient norm nan on this rank)" in str(ours.verdicts.unseen[0])
    for number in (0, 2):
        take(other, number)
    assert same(state(ours), state(other)) and not same(state(ours), before)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_too_many_broken_steps_halt_at_the_same_step_with_any_lag(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued behind the third broken step is not applied, though it is good."""
    ours = lagging(lag)
    ours.verdicts.limit = 3
    take(ours, 0)
    before = state(ours)
    with monkeypatch.context() as patch:
        break_loss(patch)
        for number in (1, 2, 3):
            assert ours.verdicts.halted_at is None
            take(ours, number)
    for number in range(4, 4 + lag):
        assert ours.verdicts.halted_at is None
        take(ours, number)
    assert (ours.verdicts.halted_at, ours.verdicts.in_row) == (4, 3)
    ours.verdicts.settle()
    assert (ours.verdicts.halted_at, ours.verdicts.in_row) == (4, 3)
    assert [s.step for s in ours.verdicts.unseen] == [1, 2, 3] and same(state(ours), before)
    ours.verdicts.restart()
    take(ours, 4)
    assert not same(state(ours), before)


def test_a_good_step_ends_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = lagging(1)
    ours.verdicts.limit = 2
    for number in range(6):
        with monkeypatch.context() as patch:
            if number % 2:
                break_loss(patch)
            take(ours, number)
    ours.verdicts.settle()
    assert ours.verdicts.halted_at is None and len(ours.verdicts.unseen) == 3


@pytest.fixture
def always_lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainStep.__init__

    def init(self: TrainStep, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **{**more, "lag": 1})

    monkeypatch.setattr(TrainStep, "__init__", init)


def test_a_run_with_a_lag_ends_with_the_same_bits(
    config_path: Any,  # noqa: F811
    tmp_path: Any,
    request: pytest.FixtureRequest,
) -> None:
    settings = ["log.every=3", "data.val="]
    assert run(config_path, tmp_path / "at-once", *settings) == 0
    request.getfixturevalue("always_lagging")
    assert run(config_path, tmp_path / "lag", *settings) == 0
    runs = [tmp_path / "at-once", tmp_path / "lag"]
    for name in ("model.pt", "optimizer.pt", "rng.pt"):
        a, b = (torch.load(checkpoint.find_checkpoint(r) / name, weights_only=True) for r in runs)
        assert_identical(a, b, name)
    losses = [[(r["step"], r["loss"]) for r in records(folder)] for folder in runs]
    assert losses[0] == losses[1] and [number for number, _ in losses[0]] == [3, 4, 6, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_is_not_waited_for(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    ours = stepper(TrainSection(batch_size=4, precision=precision))
    assert ours.accelerator.device.type == "cuda" and ours.verdicts.lag == 1
    x = pixels(4).pin_memory()
    for number in range(2):
        ours([{"x": x, "bad": 0}], step=number, lr=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            ours([{"x": x, "bad": 0}], step=number, lr=1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours.verdicts.settle()
    assert float(ours.engine.state_dict()["state"][0]["step"]) == 5
