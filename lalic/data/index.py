"""The table of contents of a folder of shards, held in arrays.

index.json --index_json--> arrays --index_map--> the same arrays, shared by all processes of a machine
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lalic.data.index_json import INDEX_VERSION, parse_index
from lalic.data.index_map import mapped, open_map
from lalic.errors import LalicError, for_terminal

__all__ = ["INDEX_NAME", "INDEX_VERSION", "ShardIndex"]

INDEX_NAME = "index.json"

# From this size on, about 250,000 samples, the arrays go to a file that all processes map.
_MAPPED_FROM = 32 << 20


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a folder of shards, as arrays: no Python object per sample.

    S shards, n samples; sample ids 0..n-1 run through the shards in order.
    """

    folder: Path | str
    """Where the shards are: a folder, or the URL of one."""
    names: tuple[str, ...]
    """File names of the shards."""
    shard_bytes: np.ndarray
    """(S,) int64, file sizes."""
    shard_sha256: tuple[str, ...]
    shard: np.ndarray
    """(n,) int32, shard number, ascending."""
    offset: np.ndarray
    """(n,) int64, first byte of the image in its tar."""
    size: np.ndarray
    """(n,) int64, bytes of the image."""
    width: np.ndarray
    """(n,) int32."""
    height: np.ndarray
    """(n,) int32."""
    keys_utf8: np.ndarray
    """uint8, the keys one after the other."""
    key_end: np.ndarray
    """(n,) int64, where each key ends in `keys_utf8`."""
    fingerprint: str
    """SHA-256 over the shards' names and sums and the byte ranges: equal iff the samples are."""

    map_file: Path | None = None
    """Where the arrays are mapped from; None: they are in this process's memory."""

    @classmethod
    def load(cls, folder: str | Path, *, mapped_from: int = _MAPPED_FROM) -> ShardIndex:
        """Read and check `folder/index.json`.

        An index of `mapped_from` bytes or more is parsed once on a machine; after that its arrays are mapped from a
        file in the cache folder, in milliseconds, and all processes share one copy of them.

        Raises:
            LalicError: as `parse_index`, or no such folder.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        if not folder.is_dir():
            raise LalicError(f"{folder}: no such folder of shards (make one with data_prep/shard.py)")
        if path.is_file() and path.stat().st_size >= mapped_from:
            map_file, about, arrays = mapped(path)
        else:
            map_file, (about, arrays) = None, parse_index(path)
        return _new(cls, folder, about, arrays, map_file)

    def __reduce__(self) -> tuple[Callable[..., ShardIndex], tuple[Any, ...]]:
        # Another process maps the file too, rather than getting a copy of every array.
        if self.map_file is not None:
            return _reopen, (self.folder, self.map_file)
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return type(self), tuple(values)

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def first(self) -> np.ndarray:
        """(S + 1,) int64, the first sample of every shard, and n at the end."""
        return np.searchsorted(self.shard, np.arange(len(self.names) + 1, dtype=self.shard.dtype))

    def key(self, sample: int) -> str:
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.keys_utf8[start : int(self.key_end[sample])].tobytes().decode()

    def shard_path(self, shard: int) -> Path:
        """Of a shard in a folder."""
        return Path(self.folder, self.names[shard])

    def describe(self, sample: int) -> str:
        """`KEY in SHARD.tar`, for messages."""
        return f"{for_terminal(self.key(sample))} in {self.names[int(self.shard[sample])]}"

    def eligible(self, min_side: int) -> np.ndarray:
        """int32 ids (int64 above 2**31 samples) of those whose shorter side is at least `min_side`, ascending."""
        found = np.flatnonzero(np.minimum(self.width, self.height) >= min_side)
        return found.astype(np.int32) if len(self) < 1 << 31 else found

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """(S,) int64, how many of the ascending sample ids lie in each shard."""
        # Of one type: searchsorted would otherwise convert all of `ids`.
        return np.diff(np.searchsorted(ids, self.first.astype(ids.dtype)))

    def largest_side(self) -> int:
        """The largest shorter side of all samples: the largest square crop that any image allows."""
        return int(np.minimum(self.width, self.height).max(initial=0))


def _new(
    cls: type[ShardIndex],
    folder: Path | str,
    about: dict[str, Any],
    arrays: dict[str, np.ndarray],
    map_file: Path | None,
) -> ShardIndex:
    names, sums = tuple(about["names"]), tuple(about["shard_sha256"])
    return cls(
        folder=folder,
        names=names,
        shard_sha256=sums,
        fingerprint=about["fingerprint"],
        map_file=map_file,
        **arrays,
    )


def _reopen(folder: Path | str, map_file: Path) -> ShardIndex:
    return _new(ShardIndex, folder, *open_map(map_file), map_file)
