"""Many requests under way at once, whose answers come in the order in which they were asked for."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Fetcher(Generic[T, R]):
    """Threads that call `fetch`. They are daemons: a program that is stopped does not wait for a slow server."""

    def __init__(self, fetch: Callable[[T], R], connections: int, ahead: int | None = None) -> None:
        """`ahead`: at most so many answers wait or are under way (default: two for each connection)."""
        self.fetch, self.connections = fetch, connections
        self.ahead = ahead or 2 * connections
        self._tasks: queue.SimpleQueue[tuple[T, Future[R]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def stream(self, items: Iterable[T]) -> Generator[R, None, None]:
        """Yield `fetch(item)` for every item, in order; an exception comes in its item's place."""
        waiting: deque[Future[R]] = deque()
        remaining = iter(items)
        try:
            while True:
                for item in remaining:
                    waiting.append(self.submit(item))
                    if len(waiting) >= self.ahead:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Let the threads end once they are through with what they are at."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads = []

    def submit(self, item: T) -> Future[R]:
        """`fetch(item)`, as soon as a connection is free."""
        if len(self._threads) < self.connections:
            thread = threading.Thread(target=self._work, daemon=True, name="fetch")
            self._threads.append(thread)
            thread.start()
        future: Future[R] = Future()
        self._tasks.put((item, future))
        return future

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            item, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.fetch(item))
            except BaseException as error:
                future.set_exception(error)
