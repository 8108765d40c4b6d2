"""Byte ranges of shards, read directly: no tar is scanned, no sample but the wanted one is touched."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from lalic.data.images import ImageError
from lalic.data.index import ShardIndex
from lalic.errors import LalicError

MAX_OPEN_SHARDS = 128
"""File handles that one process keeps open."""


class ShardReader:
    """Reads byte ranges of shards; keeps handles open, and opens its own after a fork."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._process = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_process": -1, "_open": OrderedDict()}

    def read(self, sample: int) -> bytes:
        """The image's bytes. ImageError when they are cut short, LalicError when the shard is not there."""
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

    def _handle(self, shard: int) -> int:
        if self._process != os.getpid():
            # Inherited handles belong to the parent, which may close them and have the numbers used again.
            self._process, self._open = os.getpid(), OrderedDict()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.index.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def __del__(self) -> None:
        if self._process == os.getpid():
            for handle in self._open.values():
                os.close(handle)
