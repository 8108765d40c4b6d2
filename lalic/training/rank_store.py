"""The beats of all ranks, in the key-value store that the process group was started with.

That store is a TCP server in the launcher, or in rank 0 where there is no launcher's, whatever the backend of the
collectives. Each rank has a connection of its own to it, because the process group's is taken while it waits, and a
thread that uses it: a server that does not answer blocks that thread and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerInTime
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from lalic.training.standing import Beat

T = TypeVar("T")

_CONNECT = timedelta(seconds=60)

Request = tuple[Callable[[Store], object], "Future[object]"]


class RankStore:
    """Publishes this rank's beats, and reads those of all ranks when it is asked to."""

    def __init__(self, rank: int, world_size: int, beat: Callable[[int], Beat], interval: float):
        """`beat(number)` makes the beats, of which one is published every `interval` seconds."""
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._rank, self._keys = rank, [str(i) for i in range(world_size)]
        self._beat, self._interval = beat, interval
        self._number = 0
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="beats", daemon=True)

    def start(self) -> None:
        """Connect and publish the first beat. RuntimeError when there is no such store."""
        host, port = self.address.rsplit(":", 1)
        server = TCPStore(host, int(port), is_master=False, timeout=_CONNECT, wait_for_workers=False)
        # A launcher that starts all processes once more keeps its store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"lalic/beats/{attempt}", server)
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        self._requests.put(None)

    def read(self, patience: float) -> dict[int, Beat | None] | None:
        """The last beat of every rank, None for those that have none; None when the store does not answer."""
        return self._ask(self._read, patience)

    def claim(self, patience: float) -> bool:
        """True for the first rank that asks; also when the store does not answer."""
        return self._ask(lambda store: store.add("claimed", 1), patience) in (1, None)

    def _read(self, store: Store) -> dict[int, Beat | None]:
        if store.check(self._keys):
            texts: list[bytes | None] = [*store.multi_get(self._keys)]
        else:
            texts = [store.get(key) if store.check([key]) else None for key in self._keys]
        return {rank: Beat.decode(text) if text is not None else None for rank, text in enumerate(texts)}

    def _ask(self, action: Callable[[Store], T], patience: float) -> T | None:
        answer: Future[T] = Future()
        self._requests.put((action, answer))  # type: ignore[arg-type]
        try:
            return answer.result(patience)
        except (RuntimeError, NoAnswerInTime):
            return None

    def _serve(self) -> None:
        due = 0.0
        while True:
            request: Request | None
            try:
                request = self._requests.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                with contextlib.suppress(RuntimeError):  # the server is gone: a run that stands still will say so
                    self._publish()
                due = time.monotonic() + self._interval
                continue
            if request is None:
                return
            action, answer = request
            try:
                answer.set_result(action(self._store))
            except Exception as error:
                answer.set_exception(error)

    def _publish(self) -> None:
        self._number += 1
        self._store.set(str(self._rank), self._beat(self._number).encode())
