"""Sources of single files with known names, in the seeded order; and those of this machine."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lalic.data.images import suffix_of, walk_files
from lalic.data.order import shuffled
from lalic.errors import LalicError

from .keys import make_keys
from .parts import in_order
from .sources import SUFFIXES, Candidate, Cursor
from .validation import Checked, open_regular


class Files:
    """Files whose names are known before any is read: `names`, in input order, relative to the source."""

    def __init__(
        self,
        label: str,
        names: Sequence[str],
        ignored: Counter[str] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        """`keys`: those of `names`, where they need not be made."""
        self.label, self.names = label, names
        self.ignored: Counter[str] = ignored or Counter()
        self.count: int | None = len(names)
        self.readers = self.looks = 1
        self.order = np.arange(len(names))
        self._keys = keys

    @property
    def keys(self) -> Sequence[str]:
        if self._keys is None:
            self._keys = make_keys(self.names)
        return self._keys

    def identity(self) -> dict[str, Any]:
        """The names and their order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        return {"images": len(self.names), "images_sha256": digest.hexdigest()}

    def prepare(self, scratch: Path, limit: int | None, seed: int) -> None:
        self.order = candidate_order(len(self.names), limit, seed)

    def second_look(self, candidate: Candidate, checked: Checked) -> Candidate | None:
        return None

    def finished(self, position: int) -> None: ...

    def close(self) -> None: ...

    def note(self) -> str:
        return ""

    def _numbers(self, keys: Collection[str]) -> list[int]:
        """Places in `names` of the samples that are called by one of `keys`."""
        return [number for number, key in enumerate(self.keys) if key in keys]


class LocalFiles(Files):
    """Files below a folder of this machine."""

    def __init__(
        self,
        label: str,
        root: str | Path,
        names: Sequence[str],
        ignored: Counter[str] | None = None,
        keys: Sequence[str] | None = None,
        *,
        listed: bool = False,
    ) -> None:
        """`listed`: whether the names were found in the folder, so that every one had a folder to lie in."""
        super().__init__(label, names, ignored, keys)
        self.root, self.listed = str(root), listed
        self._root_was = _folder_at(self.root)

    def candidates(self, position: int, cursor: Cursor | None) -> Generator[Candidate, None, None]:
        for place in range(position, len(self.order)):
            number = int(self.order[place])
            name = self.names[number]
            yield Candidate(name, (self.keys[number],), os.path.join(self.root, name))

    def second_look(self, candidate: Candidate, checked: Checked) -> Candidate | None:
        """A file that cannot be read is left out; but where its folder went away, so did the images behind it."""
        if checked.reason == "cannot be read":
            folder = os.path.dirname(candidate.path)
            if _folder_at(self.root) != self._root_was or (self.listed and not os.path.isdir(folder)):
                raise LalicError(
                    f"--input {self.label}: the folder {folder} is gone or another one since this run began (a drive "
                    "that is no longer mounted?); put it back and run the same command again"
                )
        return None

    def find(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        return self._read(self._numbers(keys))

    def find_others(self, sizes: Collection[int]) -> Iterator[tuple[str, bytes]]:
        paths = (os.path.join(self.root, name) for name in self.names)
        return self._read([number for number, path in enumerate(paths) if _size(path) in sizes])

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        with ThreadPoolExecutor(self.readers) as pool:
            paths = (os.path.join(self.root, self.names[number]) for number in numbers)
            for number, (_, data) in zip(numbers, in_order(pool, _content, paths), strict=True):
                if data is not None:
                    yield self.keys[number], data


def _folder_at(path: str) -> tuple[int, int] | None:
    """What lies at `path`: an empty mount point is another folder than what was mounted on it."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _content(path: str) -> bytes | None:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError:
        return None


def list_folder(root: Path) -> LocalFiles:
    """The images of a folder, sorted by path. Files with other suffixes are passed over."""
    names = []
    ignored: Counter[str] = Counter()
    for name in walk_files(root):
        if suffix_of(name) in SUFFIXES:
            names.append(name)
        else:
            ignored[other_kind(name)] += 1
    # By bytes: the same order in every locale.
    return LocalFiles(str(root), root, sorted(names, key=os.fsencode), ignored, listed=True)


def other_kind(name: str) -> str:
    """What a file that has no image's suffix is counted as."""
    suffix = suffix_of(name)
    return f"{suffix} files" if suffix else "files without a suffix"


def candidate_order(count: int, limit: int | None, seed: int) -> np.ndarray:
    """(count,) int64: the first `limit` candidates shuffled, then the others in input order."""
    first = min(count, limit or count)
    return np.concatenate([shuffled(first, seed), np.arange(first, count)])
