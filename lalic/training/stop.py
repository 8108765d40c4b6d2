"""Asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, or by a file RUN/STOP where signals do not reach.

The run then finishes its step, saves a checkpoint and exits with status 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("lalic.train")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_LOOK_EVERY = 1.0
"""Seconds between two looks for the file."""


_PR_SET_PDEATHSIG = 1
"""Of prctl(2), in linux/prctl.h."""


def stop_with_launcher() -> None:
    """Take the end of the launcher for a SIGTERM; without one, do nothing.

    A launcher that is killed leaves its ranks behind. They would train on, unseen, in a folder that the next start
    needs.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class StopNow(BaseException):
    """Asked to stop within `StopRequest.at_once`. No Exception, so that nothing takes it for a failure of its own."""


class StopRequest:
    """Context manager that catches the signals and looks for the file.

    `spread`: a signal to this rank also makes the file, for ranks that wait for their data and would not hear of it.
    """

    def __init__(self, stop_file: Path, *, spread: bool = False):
        self._file, self._spread = stop_file, spread
        self._looked = 0.0
        self._reason: str | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stop", daemon=True)

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """What asked this rank to stop; None while nothing did. The file is looked for once a second."""
        if self._reason is None and time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            if self._file.exists():
                self._reason = f"{self._file} exists"
        return self._reason

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal or the file raises StopNow in the block, once: for what may wait for long, and can be given up."""
        self._at_once = True
        try:
            if self._reason is not None:
                self._raise_once()
            yield
        finally:
            self._at_once = False

    def _watch(self) -> None:
        """Look for the file while the main thread waits; a signal takes it out of what it waits in."""
        while not self._over.wait(_LOOK_EVERY):
            if self._at_once and self.reason is not None:
                with contextlib.suppress(ProcessLookupError):  # the main thread is just ending
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _raise_once(self) -> None:
        if self._at_once:
            self._at_once = False
            raise StopNow

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt  # Ctrl-C for the second time: at once, without a checkpoint
        if self._reason is None:
            self._reason = signal.Signals(number).name
            if self._spread:
                with contextlib.suppress(OSError):
                    self._file.touch()
        self._raise_once()
