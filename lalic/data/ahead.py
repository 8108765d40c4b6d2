"""A slow function's next results, computed in threads while the present one is used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(action: Callable[[S], T], items: Iterable[S], count: int) -> Iterator[Future[T]]:
    """Yield `action(item)` of every item as a future, in order, while at most `count` of them are computed.

    The threads are daemons and there is no pool: a program that ends does not wait for a server that is silent.
    """
    waiting: deque[Future[T]] = deque()
    for item in items:
        if len(waiting) >= count:
            yield waiting.popleft()
        waiting.append(_begin(action, item))
    while waiting:
        yield waiting.popleft()


def _begin(action: Callable[[S], T], item: S) -> Future[T]:
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action(item))
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
