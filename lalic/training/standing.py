"""Where the ranks of a run stand, and which of them the others wait for.

A rank's place is its phase of a step. In the order in which a run goes through them, for steps that are done:

    starting ─► [validation] ─► [checkpoint] ─► waiting for data ─► step ─► the same with one step more

The ranks that are furthest back are those that the others wait for. Ages are measured by the clock of the rank they
are about and sent as they are, so the clocks of machines need not agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

STARTING, VALIDATION, CHECKPOINT, DATA, STEP = PHASES = (
    "starting", "validation", "checkpoint", "waiting for data", "step"
)  # fmt: skip

_MOST_NAMED = 8
"""Ranks that a line names one by one."""


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    number: int
    """Counts the beats of the rank: one that stays the same is a rank that does not speak any more."""
    host: str
    phase: str
    step: int
    """Steps that are done."""
    waiting: bool
    """It does nothing itself but wait for the other ranks, as far as that is known."""
    since: float
    """Seconds since 1970 on the clock of its host: when its main thread came here."""
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
        """Grows as the run goes on; the same for ranks that wait for each other alone."""
        return self.step, PHASES.index(self.phase), self.waiting


Beats = Mapping[int, Beat | None]
"""By rank; None where there was none yet."""


@dataclass(frozen=True)
class Stall:
    """Some ranks hold up all others."""

    ranks: tuple[int, ...]
    """The ranks to look at."""
    message: str
    """One line that names them."""


def find_stall(before: Beats, now: Beats, tolerance: float) -> Stall | None:
    """Who is to blame that a rank stands still, from what all ranks have said some time apart.

    None while one that the others wait for is still within the limit of its phase. `tolerance`: seconds by which the
    age of a beat may be behind.
    """
    silent = [rank for rank, beat in now.items() if beat is None or beat == before.get(rank)]
    if silent:
        texts = {rank: _silent(now[rank]) for rank in silent}
        why = "silent: stopped, or its machine or its network is gone"
        return Stall(tuple(silent), _line(texts, len(now), why))
    beats = {rank: beat for rank, beat in now.items() if beat is not None}
    last = min(beat.place for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if beat.place == last}
    if any(beat.age < beat.limit - tolerance for beat in behind.values()):
        return None
    texts = {rank: f"{beat.host}, {where(beat)}" for rank, beat in behind.items()}
    if len(behind) < len(now):
        why = "the other ranks wait for it" if len(behind) == 1 else "the other ranks wait for them"
    elif len(now) == 1:
        why = "it stands still"
    else:
        why = "no rank is behind the others: their network or their devices hang"
    return Stall(tuple(behind), _line(texts, len(now), why))


def where(beat: Beat) -> str:
    """What a rank does and since when, for a line of text."""
    doing = {
        STARTING: f"starting after step {beat.step}" if beat.step else "starting",
        VALIDATION: f"in the validation after step {beat.step}",
        CHECKPOINT: f"in the checkpoint of step {beat.step}",
        DATA: f"waiting for the data of step {beat.step + 1}",
        STEP: f"in step {beat.step + 1}",
    }[beat.phase]
    return f"{doing} since {_clock(beat.since)} ({beat.age:.0f} s)"


def _silent(beat: Beat | None) -> str:
    if beat is None:
        return "never heard of"
    return f"{beat.host}, not heard of since {_clock(beat.since + beat.age)}, then {where(beat)}"


def _line(texts: Mapping[int, str], ranks: int, why: str) -> str:
    """E.g. "stalled: rank 3 of 16 (node7, in step 12 since ...), ...: why"."""
    named = [f"rank {rank} of {ranks} ({text})" for rank, text in list(texts.items())[:_MOST_NAMED]]
    more = len(texts) - len(named)
    return f"stalled: {', '.join(named)}{f' and {more} more' if more else ''}: {why}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
