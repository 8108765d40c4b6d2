"""Checkpoints are written behind the back of the training loop, by one thread of the first rank.

    step ── snapshot ─► step ── step ── step ── ...        the loop: stands still for the copy alone
                └─► serialise, sync, read back, rename, prune        the thread

One write at a time: a snapshot that is due while one is being written waits for it, since both need the same memory.
A write that fails is told once and leaves nothing behind. The thread is a daemon, which holds no process up; whoever
ends the run calls `close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lalic.errors import LalicError, is_out_of_memory
from lalic.training import checkpoint, events
from lalic.training.snapshot import HostCopy
from lalic.training.summed import Abandoned

logger = logging.getLogger("lalic.train")

PATIENCE = 60.0
"""Seconds that a run which ends with an error waits for the write under way."""

_LAST_MOMENT = 5.0
"""Seconds for a write that is given up to notice it."""


@dataclass(frozen=True)
class Written:
    """What became of one save."""

    step: int
    stopped: float
    """Seconds for which the step stood still."""
    seconds: float | None = None
    """Of writing; None while it goes on."""
    bytes: int = 0
    error: str | None = None
    """Why there is no such checkpoint."""

    @property
    def good(self) -> bool:
        """Whether the checkpoint is on the disk, complete and read back."""
        return self.seconds is not None and self.error is None


class CheckpointWriter:
    """Writes the checkpoints of one run folder."""

    def __init__(self, run: Path):
        self.run = run
        self.last: Written | None = None
        """The last save that was asked for."""
        self._copies = HostCopy()
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()

    def start(
        self,
        step: int,
        *,
        tensors: Mapping[str, Any],
        texts: Mapping[str, str],
        meta: Mapping[str, Any],
        prune: Callable[[Path, int], None],
        must: bool = False,
        began: float | None = None,
    ) -> None:
        """Copy the state and begin to write it; `prune(run, step)` follows when the checkpoint is in place.

        `tensors`, `texts` and `meta` as for `checkpoint.save`; nothing of them may change afterwards but the tensors.
        `began`: the time.perf_counter at which the step stopped for this. A failure is logged, and the run goes on;
        with `must` the caller asks `must_be_written`, which tells it.
        """
        began = time.perf_counter() if began is None else began
        if self.writing:
            logger.info("the checkpoint of step %d waits until that of step %d is written", step, self._step)
        self.wait()
        try:
            copies = self._copies.take(tensors)
        except RuntimeError as error:
            if not (is_out_of_memory(error) or "out of memory" in str(error)):
                raise
            self._fail(Written(step, time.perf_counter() - began), "no host memory for a copy of the state", must)
            return
        save = Written(step, time.perf_counter() - began)
        self.last = save

        def work() -> None:
            started = time.perf_counter()
            try:
                path = checkpoint.save(
                    self.run, step, tensors=copies, texts=texts, meta=meta, abandoned=self._abandoned.is_set
                )
            except Abandoned:
                self.last = replace(save, error="it was given up")
                return
            except Exception as error:  # whatever it is, the run is worth more than this checkpoint
                if not isinstance(error, OSError):
                    logger.exception("an error that nobody has foreseen")
                self._fail(save, describe(error), must)
                return
            size = sum(file.stat().st_size for file in path.iterdir())
            done = replace(save, seconds=time.perf_counter() - started, bytes=size)
            logger.info("%s", told(path, done))
            seconds = {"stopped_seconds": round(done.stopped, 3), "write_seconds": round(done.seconds or 0.0, 3)}
            events.record("checkpoint", step, **seconds, bytes=size)
            try:
                prune(self.run, step)
            except OSError as error:
                logger.warning("old checkpoints could not be deleted: %s", describe(error))
            self.last = done

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def host_bytes(self) -> int:
        """Memory that the copies take, from the first save on."""
        return self._copies.nbytes

    def wait(self) -> Written | None:
        """Wait for the write under way; what became of the last save."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.last

    def failed(self, step: int) -> bool:
        """Wait; whether the checkpoint of `step` was begun and did not come about."""
        last = self.wait()
        return last is not None and last.step == step and not last.good

    def must_be_written(self, step: int) -> None:
        """Wait, and raise LalicError when the checkpoint of `step` is not on the disk."""
        last = self.wait()
        if last is None or last.step != step or not last.good:
            reason = last.error if last is not None and last.step == step else "it was not asked for"
            raise LalicError(f"{self._failed(step)}: {reason}; older checkpoints are intact")

    def close(self, kind: type[BaseException] | None = None) -> None:
        """At the end of the run, with the type of the error that ends it, if one does.

        Without one the write under way is waited for; with one for a minute at most, lest a disk that hangs hide
        the error; when the user interrupts, not at all. What is given up leaves nothing behind but a temporary folder
        at worst, which the next start of the run removes.
        """
        thread = self._thread
        if thread is None:
            return
        if kind is None:
            thread.join()
        elif issubclass(kind, Exception):
            thread.join(PATIENCE)
        self._abandoned.set()
        thread.join(_LAST_MOMENT)

    @property
    def _step(self) -> int | None:
        return self.last.step if self.last else None

    def _failed(self, step: int) -> str:
        return f"the checkpoint of step {step} could not be written to {self.run}"

    def _fail(self, save: Written, reason: str, must: bool) -> None:
        self.last = replace(save, error=reason)
        events.record("checkpoint_failed", save.step, error=reason)
        if not must:
            logger.error("%s: %s; the run goes on", self._failed(save.step), reason)


def told(path: Path, save: Written) -> str:
    """The log line of a checkpoint."""
    return (
        f"checkpoint {path}: the step stood still for {save.stopped:.2f} s, written in {save.seconds:.2f} s, "
        f"{save.bytes / 1e6:.0f} MB"
    )


def describe(error: Exception) -> str:
    """One line on why a write failed."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
