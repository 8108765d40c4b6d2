"""Steps that are not finite, and data that fail on one rank: nothing of them reaches the weights, nothing is lost.

The runs are started by test_resume.py, which can break steps and data. The config's run has 7 steps of two stages, a
checkpoint every 2 and a validation every 3.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_identical, in_turn, launch_two
from test_train import config_path, records  # noqa: F401 -- a fixture

from lalic.files import sha256_of, write_json
from lalic.training import checkpoint

SETTINGS = ["data.val=", "health.max_skipped=2", "checkpoint.keep=9"]
"""Two broken steps in a row are too many."""

LATER = ["stages=[{steps: 9, lr: 1e-3, crop: 64}]"]


def final(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the meta.json of a run's newest checkpoint."""
    newest = checkpoint.find_checkpoint(run)
    names = ("model.pt", "optimizer.pt", "rng.pt")
    return {n: torch.load(newest / n, weights_only=True) for n in names}, checkpoint.read_meta(newest)


def assert_same_run(run: Path, reference: Path) -> None:
    (ours, meta), (theirs, other) = final(run), final(reference)
    assert_identical(ours, theirs, run.name)
    assert {**meta, "versions": None} == {**other, "versions": None}
    values = [[(r["step"], r["loss"], r["aux"], r["lr"]) for r in records(r)] for r in (run, reference)]
    assert values[0] == values[1]


def move_on(run: Path, step: int, to: int) -> None:
    """Make the checkpoint of `step`, the run's only one, that of step `to`: the same weights, other data to come."""
    folder = checkpoint.folder_of(run, to)
    os.rename(checkpoint.folder_of(run, step), folder)
    for name, change in ((checkpoint.META, {"step": to}), (checkpoint.MANIFEST, None)):
        content = json.loads((folder / name).read_text())
        if change:
            content |= change
        else:
            entry = content["files"][checkpoint.META]
            entry |= {"bytes": (folder / checkpoint.META).stat().st_size, "sha256": sha256_of(folder / checkpoint.META)}
        write_json(folder / name, content)


def test_runs_that_are_not_finite(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """Rolled back at once, after a stop in the row, after a kill behind the return, and as another way to the same."""
    settings = [*SETTINGS, *LATER]
    broken: dict[str, Any] = {"broken": [3, 4], "settings": settings}
    orders: list[dict[str, Any]] = [
        {"run": "back", **broken},
        # In the row, and while the checkpoint of its first broken step is the newest.
        {"run": "stopped", **broken, "kill": "SIGTERM", "at": 3},
        {"run": "stopped", **broken},
        {"run": "at-the-end-of-the-row", **broken, "kill": "SIGTERM", "at": 4},
        {"run": "at-the-end-of-the-row", **broken},
        {"run": "killed", **broken, "kill": "step", "at": 5},
        {"run": "killed", **broken},
        {"run": "by-hand", "settings": settings, "kill": "step", "at": 2},
        {"run": "single", "broken": [3, 5], "settings": settings},
    ]
    statuses, said = in_turn(tmp_path, config_path, orders)
    assert statuses == [0, 0, 0, 0, 0, -signal.SIGKILL, 0, -signal.SIGKILL, 0], said
    assert said[0].count("skipped, because it is not finite: step") == 2
    assert "the last 2 steps up to 5 were not finite" in said[0]
    assert (
        f"back to the weights of {tmp_path}/back/checkpoints/step-00000002, and on with the data of step 6" in said[0]
    )
    _, meta = final(tmp_path / "back")
    assert meta["health"] == {"skipped": 2, "rollbacks": 1, "target": 2, "to_target": 1, "left_at": 5, "in_row": 0}
    for run in ("stopped", "at-the-end-of-the-row", "killed"):
        assert_same_run(tmp_path / run, tmp_path / "back")

    # The same by other means: the checkpoint of step 2 goes on with the data of step 6.
    move_on(tmp_path / "by-hand", 2, 5)
    statuses, said = in_turn(tmp_path, config_path, [{"run": "by-hand", "settings": settings}])
    assert statuses == [0], said
    ours, theirs = final(tmp_path / "by-hand")[0], final(tmp_path / "back")[0]
    for name in ("model.pt", "optimizer.pt"):
        assert_identical(ours[name], theirs[name], name)

    assert "back to the weights" not in said[-1]
    tensors, meta = final(tmp_path / "single")
    assert meta["health"]["skipped"] == 2 and meta["health"]["rollbacks"] == 0
    steps = {float(entry["step"]) for entry in tensors["optimizer.pt"]["main"]["state"].values()}
    assert steps == {7.0}  # of nine: Adam has not seen the two
    losses = {r["step"]: (r["loss"], r["skipped_steps"]) for r in records(tmp_path / "single")}
    assert losses[4] == (None, 1) and losses[6] == (None, 1) and losses[5][0] is not None


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        (["health.on_nonfinite=stop"], [3, 4], "health.on_nonfinite=stop"),
        ([], [0, 1], "no checkpoint before them"),
        (["health.max_rollbacks=1"], [3, 4, 5, 6], "after 1 returns to"),
    ],
    ids=["stop", "nothing to go back to", "too often"],
)
def test_a_run_that_is_given_up_ends_in_one_line(
    settings: list[str],
    steps: list[int],
    words: str,
    config_path: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    order = {"run": "run", "broken": steps, "settings": [*SETTINGS, *LATER, *settings]}
    (status,), (said,) = in_turn(tmp_path, config_path, [order])
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in line and "lower the learning rate" in line
    for step in checkpoint.steps_on_disk(tmp_path / "run"):
        model = torch.load(checkpoint.folder_of(tmp_path / "run", step) / "model.pt", weights_only=True)
        assert all(bool(v.isfinite().all()) for v in model.values() if v.is_floating_point())


@pytest.mark.slow
def test_a_step_that_is_broken_on_one_rank_is_skipped_on_both(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    for run, rank in (("first", 0), ("second", 1)):
        order = {"run": run, "broken": [3, 4], "broken_rank": rank, "settings": [*SETTINGS, *LATER]}
        status, said = launch_two(tmp_path, config_path, order)
        assert status == 0, said
        assert said.count("back to the weights of") == 1
    (ours, meta), (theirs, other) = final(tmp_path / "first"), final(tmp_path / "second")
    assert meta["health"]["rollbacks"] == other["health"]["rollbacks"] == 1
    assert_identical(ours["model.pt"], theirs["model.pt"], "model")
    assert_identical(ours["optimizer.pt"], theirs["optimizer.pt"], "optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_fail_on_one_rank_cost_no_step(rank: int, config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    order = {"run": "r", "data": "unreadable", "data_rank": rank, "data_at": 3, "settings": SETTINGS}
    status, said = launch_two(tmp_path, config_path, order)
    assert status != 0
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the shard is gone" + (" (on rank 1)" if rank else ""))
    assert checkpoint.find_checkpoint(tmp_path / "r").name == "step-00000003"


@pytest.mark.slow
@pytest.mark.parametrize(("waiting", "asked"), [(0, 1), (1, 0)])
def test_a_stop_is_heard_by_a_rank_that_waits_for_its_data(
    waiting: int,
    asked: int,
    config_path: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One rank's data of step 4 do not come, the other one is sent SIGTERM in step 3: both save and leave."""
    order = {"run": "r", "data": "late", "data_rank": waiting, "data_at": 3, "settings": SETTINGS}
    status, said = launch_two(tmp_path, config_path, {**order, "rank": asked, "kill": "SIGTERM", "at": 2})
    assert status == 0, said
    assert f"stopped at step 3: SIGTERM on rank {asked}" in said or "STOP exists on rank" in said
    assert checkpoint.find_checkpoint(tmp_path / "r").name == "step-00000003"
