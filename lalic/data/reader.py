"""The bytes of one sample: from a folder, from whole shards in a cache, or from elsewhere range by range.

No tar is scanned, no sample but the wanted one is touched.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lalic.data.ahead import ahead
from lalic.data.cache import ShardCache, check_size, missing
from lalic.data.images import ImageError
from lalic.data.index import INDEX_NAME, ShardIndex
from lalic.errors import LalicError
from lalic.remote import Patience, Remote, RemoteError, RemoteMissing

MAX_OPEN_SHARDS = 128
"""File handles that one process keeps open."""

REQUESTS = 16
"""Ranges that one process asks a server for at the same time."""

_SHARD_REMEDY = "copy it again or run data_prep/shard.py again"


class Reader(ABC):
    """Where the samples' bytes come from. Pickled or forked, it opens its own files and connections."""

    cache: ShardCache | None = None
    """The cache that has to be filled in advance."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def check(self, window: int) -> None:
        """Raise LalicError for what can be known to fail before anything is read."""
        return

    def expect(self, samples: Sequence[int]) -> None:
        """These are read next, in this order."""
        return

    @abstractmethod
    def read(self, sample: int) -> bytes:
        """The image's bytes. ImageError when they are cut short, LalicError when they cannot be had."""

    def read_again(self, sample: int) -> bytes | None:
        """The bytes of a sample that could not be decoded, when they may be better now. Raises as `read`."""
        return None

    @property
    def advice(self) -> str:
        """What to do about bad samples."""
        return f"check the shards with python data_prep/verify.py {self.index.folder}"


class LocalReader(Reader):
    """Reads shards in a folder; keeps handles open."""

    def __init__(self, index: ShardIndex) -> None:
        super().__init__(index)
        self._process = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_process": -1, "_open": OrderedDict()}

    def check(self, window: int) -> None:
        """Raise LalicError naming the first shard that is missing or has another size than indexed."""
        # In threads: a file system that many machines share answers slowly, but to many at once.
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(self._check_file, range(len(self.index.names))):
                pass

    def read(self, sample: int) -> bytes:
        shard = int(self.index.shard[sample])
        try:
            handle = self._handle(shard)
            data = os.pread(handle, int(self.index.size[sample]), int(self.index.offset[sample]))
        except OSError as error:
            path = self.index.shard_path(shard)
            raise LalicError(f"shard {path} cannot be read any more: {error.strerror or error}") from error
        if len(data) != self.index.size[sample]:
            raise ImageError(self.index.key(sample), "cut short", "its shard ends before it")
        return data

    def _check_file(self, shard: int) -> None:
        try:
            self._check_size(shard, os.stat(self.index.shard_path(shard)).st_size)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"cannot be read ({error.strerror})"
            raise LalicError(f"shard {self.index.shard_path(shard)} {what}: {_SHARD_REMEDY}") from error

    def _check_size(self, shard: int, actual: int) -> None:
        expected = int(self.index.shard_bytes[shard])
        if actual != expected:
            raise LalicError(
                f"shard {self.index.shard_path(shard)} is damaged or cut short: it has {actual} bytes, {INDEX_NAME} "
                f"says {expected}: {_SHARD_REMEDY}"
            )

    def _handle(self, shard: int) -> int:
        if self._process != os.getpid():
            # Inherited handles belong to the parent, which may close them and have the numbers used again.
            self._process, self._open = os.getpid(), OrderedDict()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        handle = self._open[shard] = os.open(self.index.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        # The first rank has seen all shards before the start, but perhaps not this machine's copies.
        self._check_size(shard, os.fstat(handle).st_size)
        return handle

    def __del__(self) -> None:
        if self._process == os.getpid():
            for handle in self._open.values():
                os.close(handle)


class CachedReader(Reader):
    """Reads whole shards that a cache on the disk fetches."""

    cache: ShardCache

    def __init__(self, cache: ShardCache) -> None:
        super().__init__(cache.index)
        self.cache = cache

    def check(self, window: int) -> None:
        self.cache.check(window)

    def read(self, sample: int) -> bytes:
        shard = int(self.index.shard[sample])
        # Opened for every sample, a few microseconds: an open handle would keep a removed file on the disk.
        handle = self.cache.open(shard)
        try:
            return os.pread(handle, int(self.index.size[sample]), int(self.index.offset[sample]))
        except OSError as error:
            raise LalicError(f"{self.cache.folder} cannot be read any more: {error.strerror or error}") from error
        finally:
            os.close(handle)

    def read_again(self, sample: int) -> bytes | None:
        return self.read(sample) if self.cache.was_damaged(int(self.index.shard[sample])) else None


class RangeReader(Reader):
    """Reads the samples' byte ranges from elsewhere, those of a micro-batch at once."""

    def __init__(self, index: ShardIndex, remote: Remote) -> None:
        super().__init__(index)
        self.remote = remote
        self._expected: deque[int] = deque()
        self._answers: Iterator[Future[bytes]] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "remote": self.remote, "_expected": deque(), "_answers": iter(())}

    def expect(self, samples: Sequence[int]) -> None:
        self._expected = deque(samples)
        self._answers = ahead(self._read, samples, REQUESTS)

    def read(self, sample: int) -> bytes:
        if self._expected and self._expected[0] == sample:
            self._expected.popleft()
            return next(self._answers).result()
        return self._read(sample)

    def read_again(self, sample: int) -> bytes | None:
        # The index has no sums of samples: whether the shard is the one of the index is asked when one is bad.
        check_size(self.index, self.remote, int(self.index.shard[sample]))
        return self._read(sample)

    def _read(self, sample: int) -> bytes:
        shard, start = int(self.index.shard[sample]), int(self.index.offset[sample])
        try:
            return self.remote.read(self.index.names[shard], start, start + int(self.index.size[sample]))
        except RemoteMissing as error:
            raise missing(self.index, self.remote, shard) from error
        except RemoteError:
            # That the shard is too short says more than that a range cannot be had.
            with suppress(RemoteError):
                check_size(self.index, replace(self.remote, patience=Patience(attempts=1)), shard)
            raise
