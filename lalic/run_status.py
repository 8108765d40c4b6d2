"""Where a run stands, from the files in its folder alone; nothing is written, locked or imported from torch.

The folder may be another machine's, half a copy, or written to at this moment: what is missing or damaged is None.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lalic.config import RunConfig, read_config
from lalic.errors import LalicError
from lalic.run_records import Record, number, parse_line, sane, whole
from lalic.training import checkpoint
from lalic.training.events import FILE as EVENTS
from lalic.training.events import read_events
from lalic.training.run_folder import CONFIG, DONE, LOCK, LOG, STOP, is_held

State = Literal["new", "running", "stopped", "failed", "finished"]

_QUIET = 1800.0
"""Seconds that a run may say nothing, however often it should: a validation or a checkpoint may take so long."""

_RECENT = 20
"""Log lines that the speed is taken from."""


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint on the disk."""

    step: int
    problem: str | None
    """What is wrong with it, None when it is complete (its checksums are not compared)."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands; None where the folder does not tell."""

    run: str
    state: State
    detail: str = ""
    """The state in words: what stopped it, what failed."""
    step: int = 0
    """Steps that are done, as far as was logged."""
    total_steps: int | None = None
    stage: int | None = None
    stages: int | None = None
    loss: float | None = None
    """This, bpp and psnr: means of the newest log line."""
    bpp: float | None = None
    psnr: float | None = None
    validation: dict[str, Any] | None = None
    """Step, loss, bpp, psnr ... of the newest one."""
    best: dict[str, Any] | None = None
    """The same of the one with the least loss."""
    images_per_second: float | None = None
    data_wait_share: float | None = None
    memory_gib: float | None = None
    eta_seconds: float | None = None
    """Time that the steps to come would take at the speed of the last log lines."""
    skipped_steps: int = 0
    bad_samples: int = 0
    """Of the newest log line's steps."""
    rollbacks: int = 0
    restarts: int = 0
    """How often the run was resumed."""
    checkpoints: tuple[SavedStep, ...] = ()
    """Newest first."""
    last_checkpoint: int | None = None
    """Step of the newest complete one."""
    last_event: dict[str, Any] | None = None
    world_size: int | None = None
    host: str | None = None
    """Of the first rank."""
    job: str | None = None
    metric: str | None = None
    lmbda: float | None = None
    """Of a run with a single rate."""
    lambdas: dict[str, float] | None = None
    """Of a run on a range of rates, by rung: {"1": 0.0018, ...}. Its validation, best and rungs have one entry each."""
    rungs: dict[str, Any] | None = None
    """Loss (not weighed), bpp, psnr ... of every rung in the newest log line."""
    updated: float | None = None
    """Seconds since 1970: the last sign of life."""


def read_status(run: str | Path) -> RunStatus:
    """Where the run in this folder stands. Raises LalicError when it is no run folder.

    Never call it in the process that trains in `run`: POSIX drops a process's lock when it closes the file once.
    """
    run = Path(run)
    if not any((run / name).exists() for name in (CONFIG, LOG, EVENTS, DONE, LOCK, checkpoint.FOLDER)):
        raise LalicError(f"{run} is no run folder" if run.is_dir() else f"no such run folder: {run}")
    config = _config(run)
    lines, validations = _log(run)
    events = [sane(event) for event in read_events(run)]
    saved = _checkpoints(run)
    last_checkpoint = next((c.step for c in saved if c.problem is None), None)
    meta = _meta(run, last_checkpoint)
    starts = [event for event in events if event["kind"] in ("started", "resumed")]
    start: Record = starts[-1] if starts else {}
    line: Record = lines[-1] if lines else {}
    health: Record = kept if isinstance(kept := meta.get("health"), dict) else {}
    total = whole(start, "total_steps") or whole(meta, "total_steps")
    times = [t for record in (line, *events[-1:], *validations[-1:]) if (t := number(record, "time")) is not None]
    updated = max(times, default=None) or _changed(run)
    # A checkpoint is of an earlier step, and may come last: it is written while the run goes on, or ends.
    telling = [event for event in events if event["kind"] not in ("checkpoint", "checkpoint_failed")]
    step = _step(run, lines, telling, last_checkpoint)
    seconds = _seconds_per_step(lines, start)
    state, detail = _state(run, telling, start, step, updated, _log_interval(config, seconds))
    validated = [v for v in validations if number(v, "loss") is not None]
    best = min(validated, key=lambda v: v["loss"]) if validated else meta.get("best")
    known = _without_kind(validations[-1]) if validations else meta.get("metrics")
    return RunStatus(
        run=str(run),
        state=state,
        detail=detail,
        step=step,
        total_steps=total,
        stage=whole(line, "stage") or whole(meta, "stage"),
        stages=len(config.stages) if config else None,
        loss=number(line, "loss"),
        bpp=number(line, "bpp"),
        psnr=number(line, "psnr"),
        validation=known if isinstance(known, dict) else None,
        best=_without_kind(best) if isinstance(best, dict) else None,
        images_per_second=number(line, "images_per_second"),
        data_wait_share=number(line, "data_wait_share"),
        memory_gib=number(line, "memory_gib"),
        eta_seconds=None if seconds is None or total is None else seconds * max(0, total - step),
        skipped_steps=max(whole(line, "skipped_steps_total") or 0, whole(health, "skipped") or 0),
        bad_samples=whole(line, "bad_samples") or 0,
        rollbacks=max(whole(line, "rollbacks") or 0, whole(health, "rollbacks") or 0),
        restarts=sum(event["kind"] == "resumed" for event in events),
        checkpoints=saved,
        last_checkpoint=last_checkpoint,
        last_event=events[-1] if events else None,
        world_size=whole(start, "world_size") or whole(meta, "world_size"),
        host=start.get("host") if isinstance(start.get("host"), str) else None,
        job=start.get("job") if isinstance(start.get("job"), str) else None,
        metric=config.loss.metric if config else None,
        lmbda=config.loss.multiplier if config and not config.loss.rungs else None,
        lambdas=_lambdas(config) if config else None,
        rungs=rungs if isinstance(rungs := line.get("rungs"), dict) else None,
        updated=updated,
    )


def _state(
    run: Path, events: Sequence[Record], start: Record, step: int, updated: float | None, interval: float | None
) -> tuple[State, str]:
    held = is_held(run)
    quiet = max(_QUIET, 10 * (interval or 0.0))
    age = None if updated is None else time.time() - updated
    if held:
        if (run / STOP).exists():
            return "running", "asked to stop"
        if age is not None and age > quiet:
            return "running", "but it has said nothing for longer than it should"
        return "running", "" if step else "no step yet"
    if (run / DONE).exists():
        return "finished", ""
    last: Record = events[-1] if events else {}
    if last.get("kind") in ("failed", "stalled"):
        return "failed", str(last.get("error") or last.get("message") or last["kind"])
    if last.get("kind") == "stopped":
        return "stopped", str(last.get("reason", ""))
    if not events and not step:
        return "new", ""
    # Not held, as far as can be seen: another machine's lock may be out of sight.
    elsewhere = held is None or start.get("host") != socket.gethostname()
    if elsewhere and age is not None and age < quiet:
        return "running", "as its last sign of life suggests"
    return "stopped", "ended without a word: killed, or its machine is gone"


def _lambdas(config: RunConfig) -> dict[str, float] | None:
    rungs = config.loss.rungs
    return dict(zip(map(str, rungs), config.loss.lambdas, strict=True)) if rungs else None


def _config(run: Path) -> RunConfig | None:
    try:
        return read_config(run / CONFIG)
    except (LalicError, OSError, ValueError, RecursionError):  # of another version, or cut
        return None


def _log(run: Path) -> tuple[list[Record], list[Record]]:
    """The newest lines of training, and all of validation."""
    try:
        lines = (run / LOG).read_bytes().splitlines()
    except OSError:
        return [], []
    train: list[Record] = []
    for line in reversed(lines):
        if len(train) == _RECENT:
            break
        if (record := parse_line(line)) is not None and record.get("kind") == "train":
            train.insert(0, record)
    # Millions of steps have many lines; only those that can be one are parsed.
    candidates = (parse_line(line) for line in lines if b'"validation"' in line)
    return train, [record for record in candidates if record is not None and record.get("kind") == "validation"]


def _checkpoints(run: Path) -> tuple[SavedStep, ...]:
    try:
        steps = checkpoint.steps_on_disk(run)
    except OSError:
        return ()
    return tuple(SavedStep(step, _problem(checkpoint.folder_of(run, step))) for step in steps)


def _problem(folder: Path) -> str | None:
    try:
        return checkpoint.problem(folder, contents=False)
    except RecursionError:
        return "it cannot be read"


def _meta(run: Path, step: int | None) -> Record:
    with suppress(LalicError, RecursionError):
        if step is not None:
            return sane(checkpoint.read_meta(checkpoint.folder_of(run, step)))
    return {}


def _step(run: Path, lines: Sequence[Record], events: Sequence[Record], last_checkpoint: int | None) -> int:
    """That of the newest line, of whichever file."""
    newest = [
        (number(record, "time") or 0.0, step)
        for record in (*lines[-1:], *events[-1:])
        if (step := whole(record, "step")) is not None
    ]
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        done = whole(json.loads((run / DONE).read_text()), "step")
        if done is not None:
            return done
    return max(newest)[1] if newest else last_checkpoint or 0


def _seconds_per_step(lines: Sequence[Record], start: Record) -> float | None:
    """Between the newest log lines since the run was started last, with all that is done between them."""
    begun = number(start, "time") or 0.0
    points = [(t, line["step"]) for line in lines if (t := number(line, "time")) is not None and t >= begun]
    if len(points) > 1 and points[-1][1] > points[0][1]:
        return (points[-1][0] - points[0][0]) / (points[-1][1] - points[0][1])
    return number(lines[-1], "step_seconds") if lines else None


def _log_interval(config: RunConfig | None, seconds: float | None) -> float | None:
    return None if config is None or seconds is None else config.log.every * seconds


def _changed(run: Path) -> float | None:
    times = []
    for name in (LOG, EVENTS, DONE, checkpoint.FOLDER, CONFIG):
        with suppress(OSError):
            times.append((run / name).stat().st_mtime)
    return max(times, default=None)


def _without_kind(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("kind", "time")}
