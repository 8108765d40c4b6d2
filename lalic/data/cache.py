"""Whole shards from elsewhere, kept on the disk and checked before anything is read of them.

    Remote --ranges, in parallel--> KEY.part --size, sha256, fsync, rename--> KEY.tar --> handles for readers

All ranks and workers of a machine, and several runs, share one folder (lalic.data.room): one process fetches a shard,
the others wait for it. What a killed process left of a shard is gone on with, and believed no more than the server is.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lalic.data.ahead import ahead
from lalic.data.index import INDEX_NAME, ShardIndex
from lalic.data.room import IDLE, Part, Room
from lalic.errors import LalicError
from lalic.files import sha256_of
from lalic.remote import Remote, RemoteMissing, without_password
from lalic.sizes import size_text

logger = logging.getLogger("lalic.data")

CHUNK = 8 << 20
"""Bytes of one request."""
AHEAD = 8
"""Requests under way for one shard."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DIGEST = re.compile(r"[0-9a-f]{64}")
# A server or proxy in trouble may misstate a length.
_SIZE_QUESTIONS = 4


class ShardCache:
    """The shards of one index in a folder that others use too. May be used in threads and after a fork."""

    def __init__(self, index: ShardIndex, remote: Remote, folder: Path, size: int) -> None:
        """Raises LalicError when the folder cannot be used, or for a shard without a sum in the index."""
        self.index, self.remote, self.folder = index, remote, folder
        for name, digest in zip(index.names, index.shard_sha256, strict=True):
            if not _DIGEST.fullmatch(digest):
                raise LalicError(
                    f"shard {name} at {remote.shown} has no valid sha256 in {INDEX_NAME}, so it cannot be checked: "
                    "make the index again, or read without a cache (data.cache_size=0)"
                )
        with self._errors():
            self._room = Room(folder, size)
        self._compared: set[int] = set()

    @property
    def used(self) -> int:
        """Bytes in the folder, those under way included."""
        return self._room.used()

    def check(self, window: int) -> None:
        """Raise LalicError when there is no room for the shards of two windows.

        Workers are ahead of the training: they read of one window when others still read of the window before it, and
        with less room every sample there could cost a shard.
        """
        # Of Python's numbers: sizes in a damaged index may add up to more than 64 bits hold.
        needed = sum(np.sort(self.index.shard_bytes)[::-1][: 2 * window].tolist())
        if needed > self._room.limit:
            raise LalicError(
                f"data.cache_size is {self._room.limit} bytes, but the shards of two windows (data.window={window}) "
                f"have up to {needed} bytes ({size_text(needed)}): give at least that much, or read without a cache "
                "(data.cache_size=0)"
            )

    def holds(self, shard: int) -> bool:
        return self._room.whole(self._key(shard)).exists()

    def want(self, shards: Iterable[int]) -> None:
        """Note that these are wanted; the last ones are the last to go."""
        self._room.want(map(self._key, shards))

    def open(self, shard: int) -> int:
        """A handle to read from, fetched when it is not there. The file may lose its name: close the handle soon.

        Raises:
            LalicError: missing or damaged where it comes from, no room on the disk.
            RemoteError: the server fails or refuses.
        """
        path, size = self._room.whole(self._key(shard)), int(self.index.shard_bytes[shard])
        with self._errors():
            while True:
                try:
                    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    self.fetch(shard)
                    continue
                if os.fstat(handle).st_size == size:
                    return handle
                os.close(handle)
                self._discard(path, shard)

    def fetch(self, shard: int, *, in_advance: bool = False, pulse: Callable[[], None] = lambda: None) -> bool:
        """Bring a shard here; whether it came, or was here. Raises as `open`.

        Another process that needs the room may have removed it again by then.

        Args:
            in_advance: it is not needed yet: rather than wait for another process that fetches it, or push out what
                was wanted a moment ago, give up.
            pulse: called between requests; what it raises ends this, and the next one goes on from there.
        """
        key, idle = self._key(shard), IDLE if in_advance else 0.0
        with self._errors():
            while not self.holds(shard):
                part = self._room.claim(key, idle=idle)
                if part is not None:
                    try:
                        self._fill(part, shard, idle, pulse)
                        return True
                    finally:
                        part.close()
                elif in_advance:
                    return self.holds(shard)
                else:
                    self._room.wait(key)
                    pulse()
        return True

    def was_damaged(self, shard: int) -> bool:
        """Compare the file here with its sum, once in this process; when they differ it is removed."""
        if shard in self._compared:
            return False
        self._compared.add(shard)
        path = self._room.whole(self._key(shard))
        with self._errors():
            try:
                before = os.stat(path)
                if sha256_of(path) == self.index.shard_sha256[shard]:
                    return False
                # Another process may have noticed too, and fetched it again by now.
                if os.path.samestat(before, os.stat(path)):
                    self._discard(path, shard)
            except FileNotFoundError:
                pass
        return True

    def _key(self, shard: int) -> str:
        return f"{self.index.shard_sha256[shard]}-{int(self.index.shard_bytes[shard])}"

    def _discard(self, path: Path, shard: int) -> None:
        logger.warning("%s, shard %s, was damaged on the disk: it is fetched again", path, self.index.names[shard])
        path.unlink(missing_ok=True)

    def _fill(self, part: Part, shard: int, idle: float, pulse: Callable[[], None]) -> None:
        expected = self.index.shard_sha256[shard]
        logger.debug("fetching %s", without_password(self.remote.url(self.index.names[shard])))
        try:
            # Before half a gigabyte is fetched in vain.
            check_size(self.index, self.remote, shard)
            if self._download(part, shard, idle, pulse) != expected:
                # Once more from its first byte: what was here before, or what came, was not right.
                os.ftruncate(part.handle, 0)
                found = self._download(part, shard, idle, pulse)
                if found != expected:
                    part.remove()
                    what = f"its sha256 is {found}, {INDEX_NAME} says {expected}"
                    raise _damaged(self.index, self.remote, shard, what)
        except RemoteMissing as error:
            raise missing(self.index, self.remote, shard) from error
        finally:
            if os.fstat(part.handle).st_size == 0:
                part.remove()
        part.finish(self._room.whole(self._key(shard)))

    def _download(self, part: Part, shard: int, idle: float, pulse: Callable[[], None]) -> str:
        """Fetch what is missing at the end of the part; the sum of all of it."""
        name, size = self.index.names[shard], int(self.index.shard_bytes[shard])
        digest = hashlib.sha256()
        done = 0
        while block := os.pread(part.handle, 1 << 20, done):
            digest.update(block)
            done += len(block)
        if done > size:
            os.ftruncate(part.handle, 0)
            done, digest = 0, hashlib.sha256()

        def request(start: int) -> bytes:
            return self.remote.read(name, start, min(start + CHUNK, size))

        for answer in ahead(request, range(done, size, CHUNK), AHEAD):
            data = answer.result()
            digest.update(data)
            self._write(part, data, done, idle)
            done += len(data)
            pulse()
        return digest.hexdigest()

    def _write(self, part: Part, data: bytes, start: int, idle: float) -> None:
        """Write at `start`; on a full disk other files go."""
        rest, deadline = memoryview(data), time.monotonic() + 2 * idle
        while rest:
            try:
                written = os.pwrite(part.handle, rest, start)
                rest, start = rest[written:], start + written
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._room.free(part, idle):
                    if time.monotonic() > deadline:
                        part.remove()
                        raise
                    time.sleep(0.5)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the disk says, in one line."""
        try:
            yield
        except OSError as error:
            remedy = "see that data.cache is a folder on a local disk that this user may write to"
            if error.errno in _FULL:
                remedy = "free some, or give a smaller data.cache_size, another data.cache, or data.cache_size=0"
            raise LalicError(f"the cache of shards {self.folder}: {error.strerror or error}: {remedy}") from error


def check_size(index: ShardIndex, remote: Remote, shard: int) -> None:
    """Raise LalicError when a shard has another size where it comes from than in the index."""
    size, expected = None, int(index.shard_bytes[shard])
    for _ in range(_SIZE_QUESTIONS):
        try:
            size = remote.info(index.names[shard]).size
        except RemoteMissing as error:
            raise missing(index, remote, shard) from error
        if size in (None, expected):
            return
    raise _damaged(index, remote, shard, f"it has {size} bytes, {INDEX_NAME} says {expected}")


def missing(index: ShardIndex, remote: Remote, shard: int) -> LalicError:
    """The error for a shard that is not where it should be."""
    return LalicError(
        f"shard {index.names[shard]} is missing at {remote.shown}: copy it there again, or see whether {INDEX_NAME} is "
        "the one of these shards"
    )


def _damaged(index: ShardIndex, remote: Remote, shard: int, what: str) -> LalicError:
    return LalicError(f"shard {index.names[shard]} at {remote.shown} is damaged: {what}; copy it there again")
