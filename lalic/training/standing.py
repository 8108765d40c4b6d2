"""Where the ranks of a run stand, and which of them the others wait for.

A rank's place is its phase of a step. In the order in which a run goes through them, with `step` steps done:

    starting ─► [validation] ─► [checkpoint] ─► waiting for data ─► step ─► the same with one step more

The ranks that are furthest back are those that the others wait for. Ages are measured by the clock of the rank they
are about, so the clocks of machines need not agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

STARTING, VALIDATION, CHECKPOINT, DATA, STEP = "starting", "validation", "checkpoint", "waiting for data", "step"
PHASES = (STARTING, VALIDATION, CHECKPOINT, DATA, STEP)

_MOST_NAMED = 8
"""Ranks that a line names one by one."""


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    number: int
    """Counts the beats of the rank: where it stays the same, the rank does not speak any more."""
    host: str
    phase: str
    step: int
    """Steps that are done."""
    waiting: bool
    """It does nothing itself but wait for the other ranks, as far as that is known."""
    since: float
    """Seconds since 1970 by the clock of its host, when it came here or last moved."""
    age: float
    """Seconds from then to this beat."""
    limit: float
    """Seconds that it may stay here."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        values = json.loads(text)
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def place(self) -> tuple[int, int, bool]:
        """Grows as the run goes on."""
        return self.step, PHASES.index(self.phase), self.waiting


@dataclass(frozen=True)
class Stall:
    """What holds up a run."""

    ranks: tuple[int, ...]
    """The ranks that the others wait for; none when it is not known."""
    message: str
    """One line that names them, their hosts and what they did."""


def find_stall(
    before: Mapping[int, Beat | None], now: Mapping[int, Beat | None], *, tolerance: float, ranks: int | None = None
) -> Stall | None:
    """Whose fault it is that a rank stands still, from what the ranks have said some time apart.

    None while a rank that the others wait for is within the limit of its phase, so that nothing is wrong.

    Args:
        before, now: the last beat of every rank, None where there was none yet.
        tolerance: seconds by which the age in a beat may be behind.
        ranks: how many there are, when `now` does not hold all.
    """
    total = ranks or len(now)
    silent = [rank for rank, beat in now.items() if beat is None or beat == before.get(rank)]
    if silent:
        texts = {rank: _silent(now[rank]) for rank in silent}
        return Stall(tuple(silent), _line(texts, total, "stopped, or the machine or its network is gone"))
    beats = {rank: beat for rank, beat in now.items() if beat is not None}
    last = min(beat.place for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if beat.place == last}
    if any(beat.age < beat.limit - tolerance for beat in behind.values()):
        return None
    if len(behind) < len(now):
        why = "the other ranks wait for it"
    elif total == 1:
        why = "nothing moves"
    elif len(now) < total:
        why = "what the other ranks do is not known"
    else:
        why = "all ranks are at the same place: the network, a device or a shared disk hangs"
    return Stall(tuple(behind), _line({rank: f"{b.host}, {where(b)}" for rank, b in behind.items()}, total, why))


def where(beat: Beat) -> str:
    """What a rank does and since when, in words."""
    doing = {
        STARTING: f"starting after step {beat.step}" if beat.step else "starting",
        VALIDATION: f"validation after step {beat.step}",
        CHECKPOINT: f"checkpoint of step {beat.step}",
        DATA: f"waiting for data of step {beat.step + 1}",
        STEP: f"step {beat.step + 1}",
    }[beat.phase]
    return f"{doing} since {_clock(beat.since)}, {beat.age:.0f} s"


def _silent(beat: Beat | None) -> str:
    if beat is None:
        return "has never spoken"
    return f"{beat.host}, silent since {_clock(beat.since + beat.age)}, last seen: {where(beat)}"


def _line(texts: Mapping[int, str], total: int, why: str) -> str:
    """E.g. "stalled: rank 3 of 16 (node7, step 12 since 2026-11-27 09:30:00, 1800 s): the other ranks wait for it"."""
    named = [f"rank {rank} of {total} ({text})" for rank, text in sorted(texts.items())[:_MOST_NAMED]]
    more = len(texts) - len(named)
    return f"stalled: {', '.join(named)}{f' and {more} more' if more else ''}: {why}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
