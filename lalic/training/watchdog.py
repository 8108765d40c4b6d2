"""Ends a run that stands still, with one line that names the rank the others wait for.

A rank whose data never come, a stopped process, a machine that is gone, a collective that never ends: without this
the others would wait for ever. Every rank tells the watchdog what it is about to do (`enter`), and a thread of it
publishes that as a beat. While all goes well nobody reads them. A rank whose main thread stands longer in a phase
than the phase may take reads the beats of all ranks. When those that are furthest back are within their limits, it
goes on waiting. Else the line is written to stderr and to RUN/events.jsonl, by the first rank that finds it, the
ranks it names show where they stand, and all end with status STALLED, whereupon the launcher ends what is left.

Nothing here is a collective or asks the device, so it works with every backend.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType

from lalic.training import events
from lalic.training.rank_store import RankStore
from lalic.training.standing import CHECKPOINT, STARTING, VALIDATION, Beat, Stall, find_stall, where

logger = logging.getLogger("lalic.train")

STALLED = 75
"""Exit status of a rank that found the run stalled; sysexits.h has it as "try again"."""

SLOW = 3600.0
"""Least seconds for what may take long: the start, the first step of a stage (which may compile), one validation
image, one checkpoint."""

_MARGIN = timedelta(minutes=10)
_LAST_WORDS = 10.0
"""Most seconds for writing them: stderr or the disk may be what hangs."""


@dataclass(frozen=True)
class _Standing:
    """Where the main thread is."""

    phase: str
    step: int
    limit: float
    waiting: bool
    since: float
    moved: float
    """As `since`, by the monotonic clock."""


class Watchdog:
    """Watches the main thread of this process, from the `with` on; with `timeout` None it does nothing."""

    def __init__(self, timeout: float | None, *, rank: int = 0, world_size: int = 1):
        self.timeout, self.rank, self.world_size = timeout, rank, world_size
        self._tick = min(10.0, max(0.05, (timeout or 0) / 20))
        self._patience = min(10.0, max(1.0, (timeout or 0) / 4))
        self._store: RankStore | None = None
        self._slow_step = 0
        self._woke = 0.0
        self._earlier: tuple[float, dict[int, Beat | None] | None] | None = None
        self._over = threading.Event()
        self._main = threading.main_thread()
        self.enter(STARTING, 0)

    def __enter__(self) -> Watchdog:
        global _current
        _current = self
        if self.timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._over.set()
        if self._store:
            self._store.stop()

    def connect(self) -> None:
        """Exchange beats with the other ranks; call it once the process group is there."""
        if self.timeout is None or self.world_size == 1:
            return
        store = RankStore(self.rank, self.world_size, self._beat, self._tick)
        try:
            store.start()
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            logger.warning("rank %d that stands still could not be told from others: %s", self.rank, reason)
            return
        self._store = store

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins a phase (lalic.training.standing), after `step` steps of the run."""
        if phase == STARTING:
            self._slow_step = step
        slow = phase in (VALIDATION, CHECKPOINT) or step == self._slow_step
        limit = self.timeout or 0.0
        self._standing = _Standing(
            phase, step, max(limit, SLOW) if slow else limit, False, time.time(), time.monotonic()
        )

    def moved(self, *, waiting: bool = False) -> None:
        """The main thread gets on within its phase; `waiting`: from here it can only wait for other ranks."""
        self._standing = replace(self._standing, waiting=waiting, since=time.time(), moved=time.monotonic())

    @property
    def collective_timeout(self) -> timedelta:
        """How long a collective may take: longer than this waits, which has more to say about it."""
        if self.timeout is None:
            return timedelta(days=365)
        return timedelta(seconds=max(self.timeout, SLOW)) + _MARGIN

    @property
    def step(self) -> int:
        """Steps that are done, as far as the main thread has told."""
        return self._standing.step

    def _beat(self, number: int = 0) -> Beat:
        at = self._standing
        age = time.monotonic() - max(at.moved, self._woke)
        return Beat(
            number, socket.gethostname(), at.phase, at.step, at.waiting, round(at.since, 1), round(age, 3), at.limit
        )

    def _watch(self) -> None:
        assert self.timeout is not None
        last = time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            if now - last > self._tick + self.timeout / 4:
                # This process was stopped and goes on (a suspended job), with others perhaps: time begins anew.
                self._woke, self._earlier = now, None
            stall = self._look(now, self.timeout / 2)
            if stall and not self._over.is_set():
                self._end(stall)
            last = time.monotonic()

    def _look(self, now: float, apart: float) -> Stall | None:
        """What holds up the run, when the main thread has been at one place for too long; beats `apart` seconds apart
        tell the ranks that are silent."""
        own = self._beat()
        left = own.limit - own.age
        if left > apart:
            self._earlier = None
            return None
        if self._store is None:
            return find_stall({}, {self.rank: own}, tolerance=0, ranks=self.world_size) if left <= 0 else None
        if self._earlier is None:
            self._earlier = now, self._store.read(self._patience)
            return None
        taken, before = self._earlier
        if left > 0 or now - taken < 0.9 * apart:
            return None
        beats = self._store.read(self._patience)
        if self._beat().age < own.age:
            return None  # it has just moved
        if beats is None:
            why = f"the store of the run at {self._store.address} does not answer: the first launcher, or rank 0 "
            why += "without one, is stopped, or its machine is gone"
            return Stall((), f"stalled: rank {self.rank} of {self.world_size} ({own.host}, {where(own)}): {why}")
        self._earlier = now, beats
        return find_stall(before, beats, tolerance=3 * self._tick) if before is not None else None

    def _end(self, stall: Stall) -> None:
        """Say it, once for all ranks, and end this process."""
        line = f"{stall.message} (health.stall_timeout={self.timeout:g}); started again, the run resumes"
        speaks = self._store is None or self._store.claim(self._patience)
        words: list[Callable[[], object]] = []
        if self.rank in stall.ranks and (speaks or len(stall.ranks) < self.world_size):
            words.append(lambda: _to_stderr(f"rank {self.rank} stands here, outermost first:\n{self._stack()}"))
        if speaks:
            words.append(lambda: _to_stderr(f"error: {line}\n"))
            facts = {"ranks": list(stall.ranks), "message": stall.message}
            words.append(lambda: events.record_failure(self.step, kind="stalled", **facts))
        threads = [threading.Thread(target=each, daemon=True) for each in words]
        deadline = time.monotonic() + _LAST_WORDS
        for thread in threads:
            thread.start()
            thread.join(max(0.0, deadline - time.monotonic()))
        # The others find it at the same moment; a process that ends before them would break their connections.
        time.sleep(2 * self._tick)
        os._exit(STALLED)

    def _stack(self) -> str:
        """The main thread's. Put together without reading source files, which may lie on the disk that hangs."""
        frame = sys._current_frames().get(self._main.ident or 0)
        lines = []
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
            frame = frame.f_back
        return "".join(reversed(lines))


_current: Watchdog | None = None
"""The one of this process, of which there is one main thread."""


def enter(phase: str, step: int) -> None:
    """`Watchdog.enter` of this process's watchdog, if there is one."""
    if _current is not None:
        _current.enter(phase, step)


def moved() -> None:
    """`Watchdog.moved` of this process's watchdog: for every piece of a long phase that is done."""
    if _current is not None:
        _current.moved()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Around a collective, so that a rank that waits is not taken for one that works."""
    if _current is not None:
        _current.moved(waiting=True)
    try:
        yield
    finally:
        moved()


def _to_stderr(text: str) -> None:
    # Not through sys.stderr: the main thread may hold its lock.
    os.write(2, text.encode(errors="backslashreplace"))
