"""The processes of a DataLoader: how they begin, what ends them, and what is said when one dies."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
from multiprocessing.context import ForkContext

from lalic.data.images import describe_error
from lalic.errors import LalicError

OF_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that the main process alone answers."""

# Seconds after which a worker notices that the main process was killed.
_LOOK_FOR_THE_TRAINER = 1.0


class SharedFlag:
    """As much of multiprocessing.Event as a DataLoader uses, without a lock.

    A worker asks the event before every batch. One that is killed in that moment would keep the event's lock, and the
    main process, which sets the event to end its workers, would wait for it for ever.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # anonymous and shared: a forked process has the same

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


class Forking(ForkContext):
    """Processes are forked, whatever this Python's default is; an event is a `SharedFlag`."""

    def Event(self) -> SharedFlag:  # type: ignore[override]
        return SharedFlag()


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore what is sent to the whole process group or job step; the main process decides what it means.

    On SIGTERM it finishes its step and saves a checkpoint, for which it needs its workers. Only the SIGTERM that
    it sends itself, when it does not want them any more, ends them. When it is gone they end within seconds, also in
    the middle of a shard that comes slowly.
    """
    for stop in OF_THE_TRAINER - {signal.SIGTERM}:
        signal.signal(stop, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # SIGTERM stays blocked, in every thread, so that this thread alone takes it.
        threading.Thread(target=_end_at_request_of, args=(parent.pid,), daemon=True).start()


def _end_at_request_of(process: int | None) -> None:
    while os.getppid() == process:
        sent = signal.sigtimedwait({signal.SIGTERM}, _LOOK_FOR_THE_TRAINER)
        if sent is not None and sent.si_pid == process:
            break
    os._exit(0)


def worker_failure(error: Exception) -> LalicError | None:
    """The one line for torch's RuntimeError about a dead worker process, None for any other error.

    torch raises it from a signal handler, so it can appear anywhere in the main process while a loader is in use,
    not only where a batch is asked for. Workers are killed by the kernel for memory, or by a bus error when shared
    memory is full.
    """
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return None
    return LalicError(
        f"a data loading process died ({describe_error(error)}): "
        "probably no memory or no room in /dev/shm; use fewer workers"
    )
