"""The samples of a manifest that are still to be had, and looking them up without an object for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from .frozen import Names


class Wanted(Collection[str]):
    """The keys of the samples that are still to be had: shrinks while they come, in the order of the shards."""

    def __init__(
        self, keys: Names, size: np.ndarray, pending: np.ndarray, other_bytes: np.ndarray, lookup: Lookup | None = None
    ) -> None:
        self._keys, self._size, self._pending, self._other_bytes = keys, size, pending, other_bytes
        self._lookup = lookup or Lookup(np.fromiter((hash(keys[i]) for i in range(len(keys))), np.int64, len(keys)))

    def samples(self, key: str) -> list[int]:
        """The samples (one, or none) of a key, whether they have come or not."""
        name = key.encode("utf-8", "surrogateescape")
        return [sample for sample in self._lookup.find(hash(name)) if self._keys[sample] == name]

    def changed(self) -> Wanted:
        """Those that came with other bytes: perhaps they were damaged on their way."""
        pending = self._pending & self._other_bytes
        return Wanted(self._keys, self._size, pending, self._other_bytes, self._lookup)

    def sizes(self) -> set[int]:
        """Bytes of the samples that are wanted."""
        return set(np.unique(self._size[self._pending]).tolist())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and any(self._pending[sample] for sample in self.samples(key))

    def __iter__(self) -> Iterator[str]:
        for sample in range(len(self._keys)):
            if self._pending[sample]:
                yield self._keys[sample].decode()

    def __len__(self) -> int:
        return int(np.count_nonzero(self._pending))


Find = Callable[[Wanted], Iterable[tuple[str, bytes]]]
"""Of the samples that are wanted, those that a source has: (key, bytes) in any order, unchecked."""


class Lookup:
    """From a 64-bit number to the places where it stands, in 16 bytes each."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]

    def find(self, number: int) -> list[int]:
        place = int(self._sorted.searchsorted(np.int64(number)))
        found = []
        while place < len(self._sorted) and self._sorted[place] == number:
            found.append(int(self._order[place]))
            place += 1
        return found
