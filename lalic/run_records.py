"""The records of a run's log.jsonl and events.jsonl, read with distrust.

A line may be cut, of another program, or hold what no run writes; what is no number is None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

_MOST = 1e15


def parse_line(line: bytes) -> Record | None:
    """A line of log.jsonl; None where it is none, or has no step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return sane(record) if isinstance(record, dict) and whole(record, "step") is not None else None


def sane(value: Any) -> Any:
    """The value with None for every number that no run writes: not finite, or too large to reckon with."""
    if isinstance(value, dict):
        return {key: sane(each) for key, each in value.items()}
    if isinstance(value, float | int) and not abs(value) < _MOST:
        return None
    return value


def number(record: Record, key: str) -> float | None:
    """A number that can be reckoned with; None for anything else."""
    value = sane(record.get(key))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole(record: Record, key: str) -> int | None:
    """A whole number from 0 on; None for anything else."""
    value = number(record, key)
    return value if isinstance(value, int) and value >= 0 else None
