"""The benchmark of checkpoints: its arithmetic, and that it notices a checkpoint of the wrong state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout_root import ROOT
from test_train import own_process_state  # noqa: F401 -- a fixture

sys.path.insert(0, str(ROOT))

from benchmarks import checkpoint as benchmark
from benchmarks import tables
from lalic.training.snapshot import HostCopy


def arguments(*more: str) -> Any:
    return benchmark.parse(["--model", "demo", "--batch", "1", "--crop", "64", "--rounds", "1", "--steps", "1", *more])


def test_losses_and_shares() -> None:
    turns = [{"stopped_s": s, "lost_s": 2 * s, "bytes": 10.0} for s in (1.0, 3.0, 2.0)]
    row = benchmark.summary(turns, step=0.5, every=1000)
    assert (row["stopped_s"], row["lost_s"], row["lost_steps"]) == (2.0, 4.0, 8.0)
    assert row["share"] == pytest.approx(4 / 504)


def test_every_way_of_saving_is_measured(tmp_path: Path) -> None:
    run = benchmark.Run(arguments("--ema", "0.9"), tmp_path)
    run.step()
    first = benchmark.check(run)
    result = benchmark.measure(run, arguments())
    rows = result["rows"]
    assert set(rows) == set(benchmark.VARIANTS) and result["every"] == run.config.checkpoint.every
    assert all(row["stopped_s"] > 0 and row["lost_s"] >= row["stopped_s"] for row in rows.values())
    weights = sum(p.numel() for p in run.stepper.bare.parameters()) * 4
    # Weights and average, two moments; accelerate knows neither of the average nor of the quantiles' moments.
    assert 4 * weights < rows["asynchronous"]["bytes"] == pytest.approx(rows["synchronous"]["bytes"], rel=0.01)
    assert 3 * weights * 0.98 < rows["save_state"]["bytes"] < rows["torch.save"]["bytes"]
    assert run.writer.host_bytes > 4 * weights and first > 0
    where = {"device": "cpu", "cpu": "C", "threads": 1, "torch": "2", "date": "today", "load_average": 0.5}
    more = {"first_stopped_s": first, "host_bytes": run.writer.host_bytes, "environment": where, "command": "c"}
    text = tables.checkpoint({**result, **more, "settings": vars(arguments())})
    assert all(variant in text for variant in benchmark.VARIANTS)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_is_none_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that go on changing while they are written."""
    import threading

    from lalic.training import checkpoint

    run = benchmark.Run(arguments(), tmp_path)
    stepped, save = threading.Event(), checkpoint.save

    def late(*positional: Any, **more: Any) -> Any:
        assert stepped.wait(100)
        return save(*positional, **more)

    step = run.step

    def step_and_tell() -> float:
        seconds = step()
        stepped.set()
        return seconds

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(run, "step", step_and_tell)
    monkeypatch.setattr(HostCopy, "take", lambda self, state: dict(state))
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match="is not the state that was to be saved"):
        benchmark.check(run)
