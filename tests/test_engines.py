"""One training program under DDP, ZeRO-1 and ZeRO-2: the same losses, the same skipped steps, one state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import launch
from test_resume import assert_identical

BACKENDS = ("DDP", "ZeRO-1", "ZeRO-2")
STEPS, MIDDLE = 24, 20

Outcome = dict[str, dict[str, Any]]


def orders(folder: Path, elsewhere: Path | None) -> list[dict[str, Any]]:
    """For every backend: all steps at once; from its own middle; from another backend's; with broken steps."""
    wanted: list[dict[str, Any]] = []
    for backend in BACKENDS:
        mine = str(folder / f"{backend}-middle.pt")
        wanted.append({"name": backend, "backend": backend, "last": STEPS, "save_at": MIDDLE, "save_to": mine})
        back = {"back_to": mine, "back_step": MIDDLE} if backend != "DDP" else {}
        wanted.append(
            {"name": f"{backend} resumed", "backend": backend, "first": MIDDLE, "last": STEPS, "from": mine, **back}
        )
        # The first step is broken as well: there are no moments yet.
        wanted.append({"name": f"{backend} broken", "backend": backend, "last": 4, "broken": [0, 2]})
        wanted.append({"name": f"{backend} unclipped", "backend": backend, "last": 2, "train": {"clip": 0.0}})
    for backend, other in zip(BACKENDS, ("ZeRO-2", "DDP", "ZeRO-1"), strict=True):
        source = (elsewhere or folder) / f"{other}-middle.pt"
        name = f"{backend} after another"
        wanted.append({"name": name, "backend": backend, "first": MIDDLE, "last": STEPS, "from": str(source)})
    return wanted


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On two processes; states of the other backends on two."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(folder, 2, orders(folder, None))


@pytest.fixture(scope="session")
def four(two: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On four processes; what is resumed from another backend comes from two."""
    folder = tmp_path_factory.mktemp("four")
    return folder, launch(folder, 4, orders(folder, two[0]))


@pytest.fixture(scope="session")
def one(four: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On one process; what is resumed from another backend comes from four."""
    folder = tmp_path_factory.mktemp("one")
    return folder, launch(folder, 1, orders(folder, four[0]))


@pytest.fixture(
    params=["two", pytest.param("four", marks=pytest.mark.slow), pytest.param("one", marks=pytest.mark.slow)]
)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return request.getfixturevalue(request.param)[1]


def column(values: list[dict[str, float]], name: str) -> list[float]:
    return [v[name] for v in values]


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-4) -> None:
    assert len(ours) == len(theirs) > 0
    for name in ("loss", "bpp", "aux", "gradient_norm"):
        assert column(ours, name) == pytest.approx(
            column(theirs, name), rel=rel if name != "gradient_norm" else 2e-2
        ), name


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("backend", ["ZeRO-1", "ZeRO-2"])
def test_deepspeed_gives_the_losses_of_ddp(outcome: Outcome, backend: str) -> None:
    ours, theirs = outcome[backend], outcome["DDP"]
    assert_close(ours["values"], theirs["values"])
    losses = column(theirs["values"], "loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # something was learnt
    for name, weights in ours["model"].items():
        if name.endswith("quantiles"):
            assert largest(weights, theirs["model"][name]) < 1e-5, name
            assert largest(weights, torch.zeros_like(weights)) > 1
        elif weights.is_floating_point() and weights.numel():
            difference = (weights.double() - theirs["model"][name].double()).abs().mean()
            assert float(difference) < 2e-5, name


@pytest.mark.parametrize("backend", ["ZeRO-1", "ZeRO-2"])
@pytest.mark.parametrize("clipped", [True, False])
def test_the_clip_is_that_of_ddp(outcome: Outcome, backend: str, clipped: bool) -> None:
    """Adam hardly shows it in the weights, so look at the moments, which hold the gradients that it got."""
    order = " broken" if clipped else " unclipped"
    ours, theirs = (outcome[b + order] for b in (backend, "DDP"))
    assert min(column(theirs["values"], "gradient_norm")) > 10  # far above the limit of 1
    squares = 0.0
    for number, state in theirs["optimizer"]["main"]["state"].items():
        mine = outcome[backend + order]["optimizer"]["main"]["state"][number]
        assert mine["exp_avg"].shape == state["exp_avg"].shape
        for moment in ("exp_avg", "exp_avg_sq"):
            assert largest(mine[moment], state[moment]) < 2e-2 * float(state[moment].abs().max()) + 1e-9
        squares += float(state["exp_avg"].double().square().sum())
    assert (squares**0.5 < 0.5) is clipped
    assert ours["optimizer"]["main"]["param_groups"] == theirs["optimizer"]["main"]["param_groups"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_broken_on_one_rank_is_applied_on_none(outcome: Outcome, backend: str) -> None:
    """Loss or gradient of the last rank: not a bit of weights, moments and step counts changes; and on it goes."""
    broken = outcome[f"{backend} broken"]
    assert set(broken["broken"]) == {f"{where} {step}" for where in ("loss", "gradient") for step in (0, 2)}
    for where in ("loss 2", "gradient 2"):
        before, after = broken["broken"][where]
        assert before == after, where
        assert len(set(after[:-1])) == 1, where  # all ranks alike
    # From before the first step on, there is no other way to the same bits than a step that left no trace.
    assert_identical(broken["values"], outcome[backend]["values"][:4], "values")
    steps = [float(s["step"]) for s in broken["optimizer"]["main"]["state"].values()]
    assert set(steps) == {4.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_with_the_same_bits(outcome: Outcome, backend: str) -> None:
    whole, resumed = outcome[backend], outcome[f"{backend} resumed"]
    assert_identical(resumed["values"], whole["values"][MIDDLE:], "values")
    for name in ("model", "optimizer"):
        assert_identical(resumed[name], whole[name], name)
    if backend != "DDP":
        assert_identical(resumed["again"], resumed["values"], "after a rollback")


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_from_another_backend(outcome: Outcome, backend: str) -> None:
    """DDP from ZeRO-2, ZeRO-1 from DDP, ZeRO-2 from ZeRO-1; on other numbers of processes in the slow ones."""
    assert_close(outcome[f"{backend} after another"]["values"], outcome["DDP"]["values"][MIDDLE:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_weights_of_the_checkerboard_stay_zero(outcome: Outcome, backend: str) -> None:
    weights = outcome[backend]["model"]
    masks = [name for name in weights if name.endswith("context_prediction.mask")]
    assert len(masks) == 4
    for name in masks:
        weight, mask = weights[name.replace(".mask", ".weight")], weights[name]
        assert float(weight[mask == 0].abs().max()) == 0
        assert float(weight[mask == 1].abs().min()) > 0


@pytest.mark.slow
def test_the_number_of_processes_changes_no_loss(
    one: tuple[Path, Outcome], two: tuple[Path, Outcome], four: tuple[Path, Outcome]
) -> None:
    for backend in BACKENDS:
        for _, outcome in (two, four):
            assert_close(outcome[backend]["values"], one[1]["DDP"]["values"])
            for name, weights in outcome[backend]["model"].items():
                if name.endswith("quantiles"):
                    assert largest(weights, one[1]["DDP"]["model"][name]) < 1e-5
