"""RUN/events.jsonl, the history of a run, and what the log tells of the ranks."""

from __future__ import annotations

import json
import logging
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lives import in_turn
from test_resume import launch_two
from test_train import config_path, own_process_state, records  # noqa: F401 -- fixtures

from lalic.config import read_config
from lalic.run_history import read_history
from lalic.status import read_status
from lalic.training import events, tracking
from lalic.training.schedule import plan
from lalic.training.step import StepResult
from lalic.training.tracking import Tracker


def test_one_object_a_line(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path, rank=3, world_size=8)
    log.record("checkpoint", 2000, stopped_seconds=1.5)
    log.record("skipped", 2001, loss=float("nan"), gradient_norm=float("inf"))
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["kind"], first["step"], first["rank"], first["world_size"]) == ("checkpoint", 2000, 3, 8)
    assert first["stopped_seconds"] == 1.5 and first["host"] and first["time"] <= second["time"]
    assert (second["loss"], second["gradient_norm"]) == ("nan", "inf")
    assert events.read_events(tmp_path) == [first, second]


@pytest.mark.parametrize("cut", [b'{"kind": "checkp', b"\xff\xfe\n", b"[1, 2]\n", b'"kind"\n', b"[" * 100_000, b"\n\n"])
def test_what_a_kill_has_cut_is_passed_over(cut: bytes, tmp_path: Path) -> None:
    log = events.EventLog(tmp_path)
    log.record("started", 0)
    with open(tmp_path / events.FILE, "ab") as file:
        file.write(cut)
    log.record("resumed", 4)
    assert [event["kind"] for event in events.read_events(tmp_path)] == ["started", "resumed"]


def test_full_disk_is_told_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / events.FILE).symlink_to("/dev/full")
    log = events.EventLog(tmp_path)
    log.record("started", 0)
    log.record("checkpoint", 2)
    assert [("cannot be written" in m, "No space left" in m) for m in caplog.messages] == [(True, True)]


def test_nothing_is_recorded_of_a_run_that_is_not_held(tmp_path: Path) -> None:
    events.record("failed", 0, error="another process is training here")
    assert list(tmp_path.iterdir()) == []
    events.begin(tmp_path)
    events.record("started", 0)
    events.end()
    events.record("failed", 0)
    assert [event["kind"] for event in events.read_events(tmp_path)] == ["started"]


def test_the_first_failure_is_the_cause_of_the_others(tmp_path: Path) -> None:
    """Ranks that fail because another one did say nothing; the same failure of the next start is told again."""
    for start in (1, 2):
        events.begin(tmp_path)
        events.record_failure(3, error=f"{start}: no such file")
        events.record_failure(3, error="connection closed")
        events.end()
    assert [event["error"] for event in events.read_events(tmp_path)] == ["1: no such file", "2: no such file"]


LONGER = ["stages=[{steps: 9, lr: 1e-3, crop: 64}]", "data.val=", "health.max_skipped=2", "checkpoint.keep=9"]

ORDERS: list[dict[str, Any]] = [
    {"run": "whole", "kill": "step", "at": 3, "written": 2, "settings": LONGER},
    {"run": "whole", "kill": "SIGUSR1", "at": 3, "broken": [3], "settings": LONGER},
    {"run": "whole", "broken": [3, 4], "settings": LONGER},
    {"run": "killed", "kill": "step", "at": 3, "written": 2, "settings": LONGER},
    {"run": "stopped", "kill": "SIGTERM", "at": 4, "settings": LONGER},
    {"run": "failed", "broken": [3, 4], "settings": [*LONGER, "health.on_nonfinite=stop"]},
    {"run": "refused", "settings": ["data.shards=/nowhere"]},
]


@pytest.fixture(scope="module")
def runs(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("history")
    statuses, said = in_turn(folder, config_path, ORDERS)
    assert statuses == [-signal.SIGKILL, 0, 0, -signal.SIGKILL, 0, 2, 2], said
    return folder


def test_history_of_a_run(runs: Path) -> None:
    """Killed in step 4, asked to stop after it, and a second broken step in a row after the resume."""
    history = events.read_events(runs / "whole")
    assert [(event["kind"], event["step"]) for event in history] == [
        ("started", 0),
        ("checkpoint", 2),
        ("resumed", 2),
        ("skipped", 4),
        ("checkpoint", 4),
        ("stopped", 4),
        ("resumed", 4),
        ("skipped", 5),
        ("rollback", 5),
        ("checkpoint", 6),
        ("checkpoint", 8),
        ("checkpoint", 9),
        ("finished", 9),
    ]
    by_kind = {event["kind"]: event for event in history}
    assert by_kind["started"]["total_steps"] == by_kind["resumed"]["total_steps"] == 9
    assert by_kind["resumed"]["world_size_before"] == 1 and by_kind["resumed"]["changed"] == []
    assert by_kind["skipped"]["loss"] == "nan" and by_kind["skipped"]["broken_rank"] == 0
    assert by_kind["rollback"]["to_step"] == 2
    assert by_kind["stopped"]["reason"] == "SIGUSR1"
    assert by_kind["checkpoint"]["stopped_seconds"] > 0 and by_kind["checkpoint"]["write_seconds"] > 0
    assert {event["world_size"] for event in history} == {1}


def test_interruptions_of_a_run(runs: Path) -> None:
    """As its curves show them: what a kill left is the checkpoint of step 2."""
    history = read_history(runs / "whole")
    found = [(each.kind, each.step, each.resumed_step, each.detail) for each in history.interruptions]
    assert found == [
        ("killed", 2, 2, ""),
        ("stopped", 4, 4, "SIGUSR1"),
        ("rollback", 5, 5, "to the weights of step 2"),
    ]
    assert (history.starts, history.step) == (3, 9)
    hours = [0.0, *history.train.hours, history.hours]
    assert hours == sorted(hours) and history.hours > 0
    (failed,) = read_history(runs / "failed").interruptions
    assert (failed.kind, failed.resumed_step, failed.away) == ("failed", None, None) and "not finite" in failed.detail


def test_log_counts_what_was_skipped(runs: Path) -> None:
    lines = {line["step"]: line for line in records(runs / "whole")}
    assert sorted(lines) == [1, 2, 3, 4, 6, 7, 8, 9]  # a halted step has no line of its own
    assert [lines[s]["skipped_steps_total"] for s in (3, 4, 6, 9)] == [0, 1, 2, 2]
    assert [lines[s]["rollbacks"] for s in (4, 6, 9)] == [0, 1, 1]
    assert sum(line["skipped_steps"] for line in lines.values()) == 2
    assert lines[3]["checkpoint_seconds"] == 0 and lines[7]["checkpoint_seconds"] > 0


def test_state_of_real_runs(runs: Path) -> None:
    states = {name: read_status(runs / name) for name in ("whole", "killed", "stopped", "failed", "refused")}
    assert {name: status.state for name, status in states.items()} == {
        "whole": "finished",
        "killed": "stopped",
        "stopped": "stopped",
        "failed": "failed",
        "refused": "failed",
    }
    whole = states["whole"]
    assert (whole.step, whole.total_steps, whole.restarts, whole.last_checkpoint) == (9, 9, 2, 9)
    assert (whole.skipped_steps, whole.rollbacks, whole.world_size) == (2, 1, 1)
    last = records(runs / "whole")[-1]
    assert (whole.loss, whole.bpp, whole.psnr) == (last["loss"], last["bpp"], last["psnr"])
    assert "without a word" in states["killed"].detail and states["killed"].last_checkpoint == 2
    assert (states["killed"].step, states["stopped"].step, states["stopped"].detail) == (3, 5, "SIGTERM")
    assert "health.on_nonfinite=stop" in states["failed"].detail
    assert "/nowhere" in states["refused"].detail and states["refused"].step == 0


def one_step(loss: float) -> StepResult:
    names = ("loss", "bpp", "psnr", "aux", "gradient_norm")
    return StepResult({name: torch.tensor(loss) for name in names}, torch.tensor(0.0))


def test_figures_of_the_worst_rank(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row of a second rank beside ours: three steps of four seconds, of which ours waits for one."""
    config = read_config(config_path, [f"run.dir={tmp_path}"])
    schedule = plan(config.stages, 4, lambda crop: 12)
    accelerator = Accelerator(cpu=True)
    tracker = Tracker(accelerator, config, schedule)
    tracker.open(0)
    for loss in (1.0, 2.0, 3.0):
        tracker.add(one_step(loss), [{"bad": 1}], seconds=4.0, waited=1.0)
    tracker.saved(2.5)
    other = [12.0, 12.0, 12.0, 12.0, 12.0, 3.0, 4.0, 0.75, 8.0 * 2**30, 16.0 * 2**30]

    def rows(_: Accelerator, row: torch.Tensor) -> torch.Tensor:
        assert row.dtype == torch.float64 and row[:9].tolist()[:8] == [6.0, 6.0, 6.0, 6.0, 6.0, 3.0, 3.0, 0.25]
        return torch.stack((row, torch.tensor(other, dtype=torch.float64)))

    monkeypatch.setattr(tracking, "rows_of_ranks", rows)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    tracker.write(3, schedule.stages[0], skipped=5, rollbacks=2)
    tracker.close()
    (line,) = records(tmp_path)
    assert line["loss"] == pytest.approx(18 / 6)
    assert (line["images_per_second"], line["images_per_second_per_rank"], line["step_seconds"]) == (1.0, 0.5, 4.0)
    assert (line["data_wait_share"], line["data_wait_share_worst"], line["data_wait_worst_rank"]) == (0.5, 0.75, 1)
    assert (line["checkpoint_seconds"], line["bad_samples"], line["skipped_steps"]) == (2.5, 7, 0)
    assert (line["skipped_steps_total"], line["rollbacks"]) == (5, 2)
    assert (line["memory_gib"], line["host_memory_gib"]) == (8.0, 16.0)


def test_memory_is_what_the_kernel_says(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = read_config(config_path, [f"run.dir={tmp_path}"])
    schedule = plan(config.stages, 4, lambda crop: 12)
    tracker = Tracker(Accelerator(cpu=True), config, schedule)
    tracker.open(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    held = b"x" * (300 * 2**20)
    tracker.add(one_step(1.0), [{"bad": 2}], seconds=1.0, waited=0.0)
    with caplog.at_level(logging.INFO):
        tracker.write(1, schedule.stages[0])
    tracker.close()
    (line,) = records(tmp_path)
    assert line["host_memory_gib"] == pytest.approx((before + len(held)) / 2**30, rel=0.1)
    assert "bad 2" in caplog.messages[-1] and "skipped" not in caplog.messages[-1]


@pytest.mark.slow
def test_rank_that_waits_and_rank_that_breaks_are_told(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """On two processes: the loss of rank 1 is what was not finite, and the second rank's event says so."""
    order = {"run": "two", "broken": [3], "broken_rank": 1, "settings": LONGER}
    status, said = launch_two(tmp_path, config_path, order)
    assert status == 0, said
    (skipped,) = [event for event in events.read_events(tmp_path / "two") if event["kind"] == "skipped"]
    assert (skipped["step"], skipped["broken_rank"], skipped["world_size"]) == (4, 1, 2)
    assert "because of the loss of rank 1" in said
    lines = records(tmp_path / "two")
    for line in lines:
        assert line["images_per_second_per_rank"] == pytest.approx(line["images_per_second"] / 2)
        assert line["data_wait_share"] <= line["data_wait_share_worst"] <= 1
        assert line["data_wait_worst_rank"] in (0, 1)
        assert line["host_memory_gib"] > 0
    assert read_status(tmp_path / "two").world_size == 2
