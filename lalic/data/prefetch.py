"""Shards are in the cache before they are needed: one thread beside the training of every rank.

The thread keeps the shards of the window at the loader's position and of the next window in the cache. Ranks and runs
that share a cache share the work: what another process fetches is left to it.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import islice

from lalic.data.cache import ShardCache
from lalic.data.order import EpochOrder
from lalic.remote import RemoteError, RemoteRefused
from lalic.sizes import size_text

logger = logging.getLogger("lalic.data")

WINDOWS = 2
"""Windows in the cache: the one that is read and the next one; `ShardCache.check` sees that they fit."""

_POLL = 0.2
_WANT = 1.0
_REPORT = 60.0
_REST = 10.0
"""Seconds before a server that failed all attempts is asked again."""


class Prefetch:
    """Runs from `start` to `stop`. `position` is where the loader is; whoever advances it calls `check`, too.

    Start it after the worker processes are forked, so that no lock is in its hands then.
    """

    def __init__(self, cache: ShardCache, order: EpochOrder, position: int, end: int) -> None:
        self.cache, self.order, self.position, self.end = cache, order, position, end
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._wanted: list[int] = []
        self._noted = self._reported = 0.0
        self._fetched = 0

    def start(self) -> None:
        self._wanted = self._look_ahead()
        self._note()
        self._reported = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Return soon, even when a server is silent: then the thread ends with its request."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def check(self) -> None:
        """Raise what ended the thread."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wanted = self._look_ahead()
                self._pulse()
                if not self._fetch_one():
                    self._stopping.wait(_POLL)
        except _Stopped:
            pass
        except BaseException as error:  # the training loop gets it
            self._error = error

    def _look_ahead(self) -> list[int]:
        """Shard numbers, the nearest window first."""
        windows = islice(self.order.windows_from(self.position, self.end), WINDOWS)
        return list(dict.fromkeys(shard for window in windows for shard in window.tolist()))

    def _fetch_one(self) -> bool:
        """Whether there was one to fetch, so that others may follow."""
        for shard in self._wanted:
            if self.cache.holds(shard):
                continue
            try:
                if self.cache.fetch(shard, in_advance=True, pulse=self._pulse):
                    self._fetched += int(self.cache.index.shard_bytes[shard])
                    return True
            except RemoteRefused:
                raise
            except RemoteError as error:
                # The shards that are here may last until the server is back; who needs this one sees to it then.
                logger.warning("%s; the run goes on while its shards last", error)
                self._stopping.wait(_REST)
        return False

    def _pulse(self) -> None:
        if self._stopping.is_set():
            raise _Stopped
        now = time.monotonic()
        if now - self._noted >= _WANT:
            self._note()
        if now - self._reported >= _REPORT:
            self._report(now)

    def _note(self) -> None:
        # The farthest first: when room is short, they are the first to go.
        self.cache.want(reversed(self._wanted))
        self._noted = time.monotonic()

    def _report(self, now: float) -> None:
        if self._fetched:
            here = sum(map(self.cache.holds, self._wanted))
            rate = size_text(int(self._fetched / (now - self._reported)))
            logger.info("%d of %d shards of these two windows are here; %s/s", here, len(self._wanted), rate)
        self._fetched, self._reported = 0, now


class _Stopped(Exception):
    """Asked to stop in the middle of a shard."""
