"""The history of a run from its folder: curves over steps and over hours, and every interruption.

Read from log.jsonl and events.jsonl alone, as they stand: the run may go on meanwhile, may be another machine's, and a
line may be cut. Hours are those in which the run was alive, from each start to its end (of a run that was killed: to
the last that it wrote); the time between is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from lalic.errors import LalicError
from lalic.run_records import Record, number, parse_line, sane, whole
from lalic.training.events import FILE as EVENTS
from lalic.training.events import read_events

LOG = "log.jsonl"
_FILES = ("config.yaml", LOG, EVENTS, "checkpoints", "DONE")
"""One of these is in every run folder (lalic.training.run_folder; its import would take torch's seconds)."""

TRAINED = ("loss", "bpp", "psnr", "steps_per_second")
VALIDATED = ("loss", "bpp", "psnr")
"""A run on a range of rates also tells these of every rung, as "q1/loss"; the rungs' losses are not weighed."""

Kind = Literal["stopped", "failed", "killed", "rollback"]
KINDS: dict[Kind, str] = {
    "stopped": "stopped as asked",
    "failed": "failed",  # an error, or a stall
    "killed": "killed",  # it ended without a word
    "rollback": "went back",  # to the weights of a checkpoint
}


@dataclass(frozen=True)
class Points:
    """Values at steps, in their order; NaN where a line has none."""

    steps: list[int]
    hours: list[float]
    """Of the run's life when the line was written."""
    values: dict[str, list[float]]

    def __len__(self) -> int:
        return len(self.steps)

    def until(self, over: str, end: float) -> Points:
        """Those up to a step (`over` "steps") or up to hours of life (`over` "hours")."""
        count = sum(x <= end for x in (self.steps if over == "steps" else self.hours))
        return Points(self.steps[:count], self.hours[:count], {name: v[:count] for name, v in self.values.items()})


@dataclass(frozen=True)
class Interruption:
    """A moment at which a run did not simply go on."""

    kind: Kind
    step: int
    """The last step that is known to be done."""
    hours: float
    time: float | None
    """Seconds since 1970."""
    detail: str = ""
    resumed_step: int | None = None
    """Where the run went on; None when it has not."""
    away: float | None = None
    """Seconds until it was started again."""


@dataclass(frozen=True)
class RunHistory:
    """What a run folder tells of the run's life."""

    run: str
    train: Points
    validation: Points
    interruptions: list[Interruption]
    starts: int
    """How often the run was started."""
    hours: float
    """In which it was alive."""
    step: int
    """The last that was logged."""
    stages: list[tuple[int, float, int]] = field(default_factory=list)
    """Stages after the first: step and hours of their first log line, and their number."""

    @property
    def rungs(self) -> list[int]:
        """The rungs that the logs tell of; none for a single rate."""
        names = {*self.train.values, *self.validation.values}
        return sorted({int(name[1:].partition("/")[0]) for name in names if "/" in name})

    def until(self, over: str, end: float) -> RunHistory:
        """The run as it was at a step or after hours of life, so that runs can be compared after equal time."""
        train, validation = (points.until(over, end) for points in (self.train, self.validation))
        return replace(
            self,
            train=train,
            validation=validation,
            interruptions=[one for one in self.interruptions if (one.step if over == "steps" else one.hours) <= end],
            hours=min(self.hours, end) if over == "hours" else train.hours[-1] if len(train) else 0.0,
            step=max((*train.steps[-1:], *validation.steps[-1:]), default=0),
            stages=[stage for stage in self.stages if stage[0 if over == "steps" else 1] <= end],
        )

    def count(self, kind: Kind) -> int:
        """How many interruptions of a kind there were."""
        return sum(each.kind == kind for each in self.interruptions)


@dataclass
class _Life:
    """From a start of the run to its end, in seconds since 1970."""

    start: float
    end: float


def read_history(run: str | Path) -> RunHistory:
    """The history of the run in this folder. Raises LalicError when it is no run folder, or cannot be read."""
    run = Path(run)
    if not any((run / name).exists() for name in _FILES):
        raise LalicError(f"{run} is no run folder" if run.is_dir() else f"no such run folder: {run}")
    lines = _read_log(run / LOG)
    # A step that stands there twice was done again: the later line counts.
    train = _by_step(line for line in lines if line.get("kind") == "train")
    validation = _by_step(line for line in lines if line.get("kind") == "validation")
    events = [event for event in map(sane, read_events(run)) if number(event, "time") is not None]
    lives = _lives(events, train, validation)
    clock = _Clock(lives)
    points = _points(train, clock, TRAINED)
    stages = [(whole(line, "stage") or 1, i) for i, line in enumerate(train)]
    return RunHistory(
        run=str(run),
        train=points,
        validation=_points(validation, clock, VALIDATED),
        interruptions=_interruptions(events, clock),
        starts=sum(event["kind"] in ("started", "resumed") for event in events),
        hours=clock.total,
        step=max((line["step"] for line in (*train[-1:], *validation[-1:])), default=0),
        stages=[(points.steps[j], points.hours[j], b) for (a, _), (b, j) in pairwise(stages) if a != b],
    )


def _read_log(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LalicError(f"{path} cannot be read: {error.strerror}") from error
    return [record for line in lines if (record := parse_line(line)) is not None]


def _by_step(lines: Iterable[Record]) -> list[Record]:
    found = {line["step"]: line for line in lines}
    return [found[step] for step in sorted(found)]


def _points(lines: Sequence[Record], clock: _Clock, names: Sequence[str]) -> Points:
    def value(line: Record, name: str) -> float:
        rung, slash, of_rung = name.partition("/")
        if slash:
            line, name = _rungs(line).get(rung[1:], {}), of_rung
        if name == "steps_per_second":
            seconds = number(line, "step_seconds")
            return 1 / seconds if seconds and seconds > 0 else math.nan
        found = number(line, name)
        return math.nan if found is None else float(found)

    rungs = sorted({rung for line in lines for rung in _rungs(line)})
    names = [*names, *(f"q{rung}/{name}" for rung in rungs for name in VALIDATED)]
    hours: list[float] = []
    for line in lines:
        # A line without a time, or with that of a clock that was set back, stands with the one before it.
        before = hours[-1] if hours else 0.0
        time = number(line, "time")
        hours.append(before if time is None else max(before, clock.hours(time)))
    return Points(
        [line["step"] for line in lines], hours, {name: [value(line, name) for line in lines] for name in names}
    )


def _rungs(line: Record) -> dict[str, Record]:
    """What a log line tells of every rung: {"1": ...}."""
    found = line.get("rungs")
    told = found.items() if isinstance(found, dict) else ()
    return {rung: values for rung, values in told if re.fullmatch("[1-9]", rung) and isinstance(values, dict)}


def _lives(events: Sequence[Record], *logs: Sequence[Record]) -> list[_Life]:
    """One for each start, oldest first, and one before them for log lines that are older than every event."""
    seen = sorted(time for lines in logs for line in lines if (time := number(line, "time")) is not None)
    starts = [event["time"] for event in events if event["kind"] in ("started", "resumed")]
    if seen and (not starts or seen[0] < min(starts)):
        # Its first line was written after the steps that it tells of.
        first = next((line for lines in logs for line in lines if number(line, "time") == seen[0]), {})
        starts.insert(0, seen[0] - first.get("step", 0) * (number(first, "step_seconds") or 0.0))
    signs = sorted([*seen, *(event["time"] for event in events)])
    lives = []
    starts.sort()  # clocks of several machines
    for start, after in pairwise([*starts, math.inf]):
        own = [sign for sign in signs if start <= sign < after]
        lives.append(_Life(start, max(own, default=start)))
    return lives


class _Clock:
    """Hours of life at a moment: time between lives does not count."""

    def __init__(self, lives: Sequence[_Life]):
        self._lives = lives
        self.total = sum(life.end - life.start for life in lives) / 3600

    def end_before(self, time: float) -> float:
        """The last sign of the life before the one that began at `time`."""
        return max((life.end for life in self._lives if life.start < time), default=time)

    def hours(self, time: float) -> float:
        """At `time`, seconds since 1970."""
        return sum(min(max(time - life.start, 0.0), life.end - life.start) for life in self._lives) / 3600


def _interruptions(events: Sequence[Record], clock: _Clock) -> list[Interruption]:
    found: list[Interruption] = []
    ended: Interruption | None = None
    alive = False
    last: int | None = None
    for event in events:
        kind, time, step = event["kind"], event["time"], whole(event, "step") or 0
        if kind in ("started", "resumed"):
            if alive and last is not None:
                end = clock.end_before(time)
                ended = Interruption("killed", max(last, step), clock.hours(end), end)
            if ended is not None:
                found.append(_gone_on(ended, step, time))
            ended, alive, last = None, True, step
        elif kind in ("stopped", "failed", "stalled"):
            if alive or ended is None:  # of several ranks that tell of their end the first counts
                text = event.get("reason") or event.get("error") or event.get("message") or ""
                name: Kind = "stopped" if kind == "stopped" else "failed"
                ended = Interruption(name, step, clock.hours(time), time, " ".join(str(text).split()))
            alive = False
        elif kind == "finished":
            ended, alive = None, False
        else:
            if kind == "rollback":
                back = f"to the weights of step {whole(event, 'to_step')}"
                found.append(Interruption("rollback", step, clock.hours(time), time, back, step))
            last = max(last or 0, step)
    return [*found, ended] if ended is not None else found


def _gone_on(ended: Interruption, step: int, time: float) -> Interruption:
    away = None if ended.time is None else max(0.0, time - ended.time)
    return Interruption(ended.kind, ended.step, ended.hours, ended.time, ended.detail, step, away)
