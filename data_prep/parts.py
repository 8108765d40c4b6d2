"""Shards under way whose samples arrive in any order: each is written at its final place, and found again.

A part is a file of the shard's full size with holes. What a killed run left in it counts again when it has the right
header and the right sum; nothing else notes what is there, so nothing else can be wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from pathlib import Path
from typing import TypeVar

from lalic.files import sha256_of

from .frozen import Manifest
from .writer import BLOCK, EXTENSIONS, member_header

A = TypeVar("A")
B = TypeVar("B")

_MOST_OPEN = 128
_AHEAD = 16


class Parts:
    """The unfinished shards of one manifest in a folder of this machine."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: OrderedDict[int, int] = OrderedDict()

    def path(self, shard: int) -> Path:
        """The manifest's sum is in the name: what was begun for another one is never taken up."""
        return self.folder / f".{self.manifest.shard_name(shard)}.{self.manifest.sha256[:16]}.part"

    def header(self, sample: int) -> bytes:
        manifest = self.manifest
        extension = EXTENSIONS[manifest.extension[sample]]
        return member_header(manifest.key(sample), extension, int(manifest.size[sample]))

    def write(self, shard: int, sample: int, data: bytes) -> None:
        """Put a sample at its place. The gaps are holes, which read as the zeros that belong there."""
        handle = self._handle(shard)
        start = int(self.manifest.offset[sample]) - BLOCK
        remaining = memoryview(self.header(sample) + data)
        while remaining:
            written = os.pwrite(handle, remaining, start)
            start, remaining = start + written, remaining[written:]

    def found(self, shard: int, pool: Executor) -> Iterator[int]:
        """Yield the samples that an earlier run left whole."""
        if not self.path(shard).exists():
            return
        handle = self._handle(shard)
        samples = range(int(self.manifest.first[shard]), int(self.manifest.first[shard + 1]))
        # A hole has no header, so what is not there is not read.
        begun = (sample for sample in samples if self._has_header(handle, sample))
        for sample, whole in in_order(pool, lambda sample: self._is_whole(handle, sample), begun):
            if whole:
                yield sample

    def sum_of(self, shard: int) -> str:
        """Write what is in memory to the disk, and read all of it."""
        self.close(shard)
        with open(self.path(shard), "rb+") as file:
            os.fsync(file.fileno())
        return sha256_of(self.path(shard))

    def close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))

    def close_all(self) -> None:
        for shard in list(self._open):
            self.close(shard)

    def _handle(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        handle = os.open(self.path(shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._open[shard] = handle
        size = int(self.manifest.shard_bytes[shard])
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, size)
        return handle

    def _has_header(self, handle: int, sample: int) -> bool:
        return os.pread(handle, BLOCK, int(self.manifest.offset[sample]) - BLOCK) == self.header(sample)

    def _is_whole(self, handle: int, sample: int) -> bool:
        data = os.pread(handle, int(self.manifest.size[sample]), int(self.manifest.offset[sample]))
        return hashlib.sha256(data).digest() == self.manifest.sample_sha256[sample].tobytes()


def in_order(
    pool: Executor, function: Callable[[A], B], items: Iterable[A], ahead: int = _AHEAD
) -> Iterator[tuple[A, B]]:
    """Yield (item, function(item)) in order, computed in `pool`, at most `ahead` items before they are asked for."""
    remaining = iter(items)
    waiting: list[tuple[A, Future[B]]] = [(item, pool.submit(function, item)) for item in islice(remaining, ahead)]
    while waiting:
        item, future = waiting.pop(0)
        yield item, future.result()
        waiting += [(item, pool.submit(function, item)) for item in islice(remaining, 1)]
