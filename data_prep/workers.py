"""Run a check on many files, on many processes, in order; a process that dies takes at most one file with
it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import NamedTuple

from lalic.errors import LalicError

from .validation import Checked

Check = Callable[[str], Checked]

# Files per process that are read ahead: enough to ride over one slow file, few enough to hold their bytes.
_AHEAD = 8


class _Task(NamedTuple):
    path: str
    future: Future[Checked] | None
    pool: Executor | None


class Workers:
    """A pool of processes for `check`, which must be picklable. `count` 0: everything in this process.

    `threads`: threads instead, for a check that leaves Python's lock alone for most of its time; no bytes have to go
    through a pipe then, but a crash of the decoder ends the program.
    """

    def __init__(self, check: Check, count: int, threads: bool = False) -> None:
        self.check, self.count, self.threads = check, count, threads
        self._pool: Executor | None = None
        self._single: ProcessPoolExecutor | None = None
        """One process, for the files that were under way when the pool broke."""

    def stream(self, paths: Iterable[str]) -> Generator[Checked, None, None]:
        """Yield `check(path)` for every path, in order."""
        if not self.count:
            yield from map(self.check, paths)
            return
        waiting: deque[_Task] = deque()
        remaining = iter(paths)
        try:
            while True:
                for path in remaining:
                    waiting.append(self._submit(path))
                    if len(waiting) > self.count * _AHEAD:
                        break
                if not waiting:
                    return
                yield self._result(waiting.popleft())
        finally:
            for task in waiting:
                if task.future:
                    task.future.cancel()

    def close(self) -> None:
        """Let go of the processes; what they were at is dropped."""
        self._close_pool()
        if self._single:
            self._single.shutdown(wait=False, cancel_futures=True)
            self._single = None

    def _close_pool(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _submit(self, path: str) -> _Task:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count) if self.threads else _new_pool(self.count)
        try:
            return _Task(path, self._pool.submit(self.check, path), self._pool)
        except BrokenProcessPool:
            self._close_pool()
            return _Task(path, None, None)

    def _result(self, task: _Task) -> Checked:
        if task.future is not None:
            try:
                return task.future.result()
            except BrokenProcessPool:
                # Every task of that pool ends here; by the second one, a new pool is at work.
                if self._pool is task.pool:
                    self._close_pool()
        return self._check_alone(task.path)

    def _check_alone(self, path: str) -> Checked:
        """Check one file with nothing beside it: if the process dies again, the file is the cause."""
        if self._single is None:
            self._single = _new_pool(1)
        try:
            return self._single.submit(self.check, path).result()
        except BrokenProcessPool:
            self._single = _new_pool(1)
        try:
            self._single.submit(os.getpid).result()
        except BrokenProcessPool:
            raise LalicError(
                "the worker processes die at once: free some memory, or use --workers 0 to see why"
            ) from None
        return Checked(reason="crashes the decoder")


def _new_pool(count: int) -> ProcessPoolExecutor:
    # Fresh processes rather than forks: a fork would copy the locks of the progress bar's thread as they are.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=begin_worker)


def begin_worker() -> None:
    # Ctrl-C reaches the whole terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process when its parent is gone: after a SIGKILL nobody else would tell it to."""
    wait([sentinel])
    os._exit(1)
