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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("lalic.train")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_LOOK_EVERY = 1.0
"""Seconds between two looks for the file while the main thread waits."""


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
    The signal's name stands in it: a job script tells by that a stop that the scheduler wants from one by hand.
    """

    def __init__(self, stop_file: Path, *, spread: bool = False):
        self._file, self._spread = stop_file, spread
        self._interrupted = False
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
        """What asked this rank to stop; None while nothing did."""
        if self._reason is None and self._file.exists():
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
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt  # Ctrl-C for the second time: at once, without a checkpoint
            self._interrupted = True
        if self._reason is None:
            self._reason = signal.Signals(number).name
            if self._spread:
                with contextlib.suppress(OSError):
                    self._file.write_text(f"{self._reason}\n")
        self._raise_once()
