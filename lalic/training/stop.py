"""Asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, or by a file RUN/STOP where signals do not reach.

The run then finishes its step, saves a checkpoint and exits with status 0.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("lalic.train")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopNow(BaseException):
    """Asked to stop within `StopRequest.at_once`. No Exception, so that nothing takes it for a failure of its own."""


class StopRequest:
    """Context manager that catches the signals; `stop_file` is looked for on the rank that is given one."""

    def __init__(self, stop_file: Path | None):
        self._file = stop_file
        self._looked = 0.0
        self._reason: str | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """What asked this rank to stop; None while nothing did. The file is looked for once a second."""
        if self._reason is None and self._file is not None and time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            if self._file.exists():
                self._reason = f"{self._file} exists"
        return self._reason

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises StopNow in the block, once: for what may wait for long, and can be given up."""
        self._at_once = True
        try:
            if self._reason is not None:
                self._raise_once()
            yield
        finally:
            self._at_once = False

    def _raise_once(self) -> None:
        if self._at_once:
            self._at_once = False
            raise StopNow

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt  # Ctrl-C for the second time: at once, without a checkpoint
        self._reason = self._reason or signal.Signals(number).name
        self._raise_once()
