"""RUN/events.jsonl: what happened to a run since its first start, one JSON object a line, only ever added to.

    {"time": 1764230400.0, "kind": "checkpoint", "step": 2000, "host": "node7", "rank": 0, "world_size": 16, ...facts}

log.jsonl is cut back where a resumed run does steps again; this file is not: it is the history of interruptions.

    started            a new run: total_steps, init_from      skipped        a step that was not finite
    resumed            total_steps, world_size_before,        rollback       from_step, to_step
                       changed                                stopped        reason
    checkpoint         stopped_seconds, write_seconds, bytes  stalled        ranks, message
    checkpoint_failed  error                                  failed         error
                                                              finished
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("lalic.train")

FILE = "events.jsonl"


class EventLog:
    """Adds lines to a run's events.jsonl. Any rank may: a line is one write to the end of the file.

    A line that cannot be written (a full disk, no folder) is reported once and ends nothing.
    """

    def __init__(self, run: Path, *, rank: int = 0, world_size: int = 1):
        self.path = run / FILE
        self.rank, self.world_size = rank, world_size
        self._complained = False
        self._before = 0
        with suppress(OSError):
            self._before = self.path.stat().st_size

    def own(self) -> list[dict[str, Any]]:
        """The events since this was made, of all ranks."""
        return read_events(self.path.parent, self._before)

    def record(self, kind: str, step: int | None = None, **facts: Any) -> None:
        """Write one event, down to the disk; `step` counts the steps that are done."""
        event = {"time": round(time.time(), 3), "kind": kind, "step": step, "host": socket.gethostname()}
        event |= {"rank": self.rank, "world_size": self.world_size, **facts}
        try:
            _append(self.path, json.dumps({key: _plain(value) for key, value in event.items()}))
        except OSError as error:
            if not self._complained:
                logger.error("%s cannot be written any more: %s", self.path, error.strerror or error)
            self._complained = True


_current: EventLog | None = None


def begin(run: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """From here `record` writes to this run's file. Call it once the folder is held: till then it may be another's."""
    global _current
    _current = EventLog(run, rank=rank, world_size=world_size)


def end() -> None:
    """From here `record` does nothing."""
    global _current
    _current = None


def record(kind: str, step: int | None = None, **facts: Any) -> None:
    """`EventLog.record` of the run of this process, if there is one."""
    if _current is not None:
        _current.record(kind, step, **facts)


def record_failure(step: int, *, kind: str = "failed", **facts: Any) -> None:
    """Record "failed" or "stalled", unless one of them has been recorded since `begin`.

    When one rank fails, the others fail after it, on connections that are closed: what they say is not the cause.
    """
    if _current is not None and not {"failed", "stalled"} & {event["kind"] for event in _current.own()}:
        _current.record(kind, step, **facts)


def _plain(value: Any) -> Any:
    """JSON has no numbers that are not finite; here they are what one wants to read: "nan", "inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        # A line that a kill has cut stays alone; what follows begins on a line of its own.
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        text = (("\n" if cut else "") + line + "\n").encode()
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_events(run: Path, start: int = 0) -> list[dict[str, Any]]:
    """The events of a run, oldest first; lines that a kill has cut are passed over. Empty when there are none.

    `start`: bytes of the file to leave out.
    """
    try:
        lines = (run / FILE).read_bytes()[start:].splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("kind"), str):
            events.append(event)
    return events
