"""A limit on what goes over the network, shared by all connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """Token buckets for bytes and for requests per second; None: no limit.

    A request waits until no debt is left, and its answer's bytes are a new debt. So the mean rate stays at the
    limit, however many connections there are, and a file larger than one second's share still comes through.
    """

    def __init__(
        self,
        bytes_per_second: float | None = None,
        requests_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes, self._requests = bytes_per_second, requests_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_for_bytes = self._free_for_requests = clock()

    def before_request(self) -> None:
        """Wait for this request's turn."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._free_for_bytes, self._free_for_requests)
            if self._requests is not None:
                self._free_for_requests = turn + 1 / self._requests
        if turn > now:
            self._sleep(turn - now)

    def took(self, size: int) -> None:
        """`size` bytes have come."""
        if self._bytes is not None:
            with self._lock:
                self._free_for_bytes = max(self._clock(), self._free_for_bytes) + size / self._bytes
