"""Choices near a border: what two machines could decide differently, decided by the encoder and listed in the file.

An *event* is one value that lies so close to the border between two decisions that another machine's rounding could
put it on the other side. Events are numbered in the order of coding: 2 p for the scale of element p of y, 2 p + 1
for its mean, p counting all elements from 0. Its choice is 0 for the neighbour below the border, 1 for the one above.
The list holds a varint (LEB128, as everywhere in a .lalic file) for every event, in ascending order:

    2 (number - number of the event before - 1) + choice          the number before the first is -1

The decoder finds the events that its own values lie close to, and compares: what lies within half the encoder's
tolerance must be listed, and nothing is listed that lies beyond twice of it. Rounding is ten thousand times smaller
than the tolerance, so an honest file always fits, and a list has room for nothing but what an encoder wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lalic.errors import LalicError

SCALE, MEAN = 0, 1
"""Kinds of events."""

_LONGEST = 6
"""Bytes of the longest varint: enough for the events of 65535 x 65535 pixels."""


class Near(NamedTuple):
    """Values of one part of y that lie near a border, in ascending order of their position.

    Attributes:
        positions: (n,) in the part, in the order of coding.
        distances: (n,) from the border, as multiples of the encoder's tolerance.
        choices: (n,) what these values themselves would choose, 0 or 1.
    """

    positions: NDArray[np.int64]
    distances: NDArray[np.float64]
    choices: NDArray[np.int64]


class Recorder:
    """The encoder's side: lists every event within the tolerance."""

    reach = 1.0
    """Multiples of the tolerance up to which events are looked for."""

    def __init__(self) -> None:
        self._numbers: list[NDArray[np.int64]] = []
        self._choices: list[NDArray[np.int64]] = []

    def settle(self, first: int, kind: int, near: Near) -> NDArray[np.int64]:
        """The choices (n,) for the events of a part whose first element is number `first`: those that were taken."""
        self._numbers.append(2 * (first + near.positions) + kind)
        self._choices.append(near.choices)
        return near.choices

    def listed(self) -> bytes:
        """The list as it is stored."""
        if not self._numbers:
            return b""
        numbers, choices = np.concatenate(self._numbers), np.concatenate(self._choices)
        order = np.argsort(numbers)
        return _write(numbers[order], choices[order])


class Replay:
    """The decoder's side: takes the choices of a list, and lets nothing pass that no encoder lists."""

    reach = 2.0

    def __init__(self, listed: bytes, elements: int):
        """`elements`: of y in this picture. LalicError when the list is malformed or reaches beyond them."""
        self._numbers, self._choices = _read(listed, 2 * elements)
        self._taken = 0

    def settle(self, first: int, kind: int, near: Near) -> NDArray[np.int64]:
        """The listed choices (n,) of the part's events; LalicError where list and values do not fit."""
        numbers = 2 * (first + near.positions) + kind
        places = np.searchsorted(self._numbers, numbers)
        inside = places < len(self._numbers)
        found = np.zeros(len(numbers), dtype=bool)
        found[inside] = self._numbers[places[inside]] == numbers[inside]
        if np.any(~found & (near.distances < 0.5)):
            raise damaged("a value is missing that lies on a border")
        self._taken += int(found.sum())
        choices = near.choices.copy()
        choices[found] = self._choices[places[found]]
        return choices

    def finish(self) -> None:
        """LalicError unless every listed event was one."""
        if self._taken != len(self._numbers):
            raise damaged("it holds values that lie on no border")


def damaged(reason: str) -> LalicError:
    """What is wrong with a list, of values or of the machine that finds others."""
    return LalicError(
        f"the file's list of exceptions does not fit what this machine computes: {reason}. The file is damaged, or "
        "it was written with other weights or another version of lalic"
    )


def _write(numbers: NDArray[np.int64], choices: NDArray[np.int64]) -> bytes:
    values = 2 * (np.diff(numbers, prepend=-1) - 1) + choices
    out = bytearray()
    for value in values.tolist():
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _read(listed: bytes, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers and choices; all at once, since a hostile list is as long as its file."""
    raw = np.frombuffer(listed, dtype=np.uint8)
    if not raw.size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    last = np.flatnonzero(raw < 0x80)
    if not last.size or last[-1] != raw.size - 1:
        raise damaged("it is cut off")
    if last.size > end:
        raise damaged("it is longer than the picture")
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > _LONGEST or np.any((lengths > 1) & (raw[last] == 0)):
        raise damaged("a number in it is malformed")
    shifts = 7 * (np.arange(raw.size) - np.repeat(first, lengths))
    values = np.add.reduceat((raw & 0x7F).astype(np.int64) << shifts, first)
    numbers = np.cumsum((values >> 1) + 1) - 1
    # A gap is far below 2^63, so a sum that overflows shows as a step down.
    if numbers[-1] >= end or np.any(np.diff(numbers, prepend=-1) < 0):
        raise damaged("it reaches beyond the picture")
    return numbers, values & 1
