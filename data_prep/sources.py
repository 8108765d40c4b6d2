"""Where the images come from, in one form for all: candidates in a fixed order, with names and keys.

    folder    of this machine                                     files.LocalFiles
    list      paths, URLs or OpenImages ids, a line each, or CSV  lists -> files.LocalFiles, remote_files.RemoteFiles
    bucket    s3://bucket/train/, whatever can be listed          remote_files.RemoteFiles
    tars      x.tar, y.tar.gz, here or elsewhere                  tars.Tars

`opening.open_source` tells which it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .validation import Checked

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

Cursor = dict[str, Any]
"""Where a source goes on; plain JSON, kept in the record of a finished shard."""


@dataclass(frozen=True)
class Candidate:
    """One thing that may become a sample."""

    name: str
    """Relative to the source, with '/'; in left_out.csv, and what the key is made of."""
    keys: tuple[str, ...]
    """What the sample is called: the first that no sample before it has. When all are taken, it is left out."""
    path: str = ""
    """A file of this machine that holds the bytes, unless `data` does."""
    data: bytes | None = None
    outcome: Checked | None = None
    """Set when there are no bytes to check: why it is left out."""
    error: Exception | None = None
    """What ends the job when it comes to this place, and not earlier: a tar that is damaged from here on."""
    cursor: Cursor | None = None
    """For `Source.candidates`, to go on behind this candidate."""


class Source(Protocol):
    """The candidates of a job. Nothing of the result depends on where the source lies or how it is reached."""

    label: str
    """For messages: what --input named."""
    count: int | None
    """Number of candidates; None for tars, which tell at their end."""
    ignored: Counter[str]
    """What is passed over without a look, by kind; for tars it grows while they are read."""

    def identity(self) -> dict[str, Any]:
        """What job.json holds of the input: equal for two sources exactly if a job may go on with the other."""
        ...

    def prepare(self, scratch: Path, limit: int | None, seed: int) -> None:
        """Call before `candidates`. `scratch`: a folder of this machine that survives a kill; the source may keep in
        it what it would not like to fetch again. With `limit` and `seed` the order is fixed.
        """
        ...

    def candidates(self, position: int, cursor: Cursor | None) -> Generator[Candidate, None, None]:
        """Yield the candidates from place `position` of the job's order on. Closing it ends what is under way.

        `cursor`: that of the candidate before `position`; None at the beginning.
        """
        ...

    def second_look(self, candidate: Candidate, checked: Checked) -> Candidate | None:
        """The candidate once more, when it may look better then: bytes from elsewhere can be damaged on their way."""
        ...

    def finished(self, position: int) -> None:
        """A shard that ends before `position` is recorded: what lies before is not asked for again."""
        ...

    def close(self) -> None:
        """All is done: remove what is left in the scratch folder."""
        ...

    def note(self) -> str:
        """For the progress line: what went over the network, such as `12.1 MB/s, 3 retries`; empty if nothing."""
        ...

    readers: int
    """Threads with which `find` reads files of this machine."""

    looks: int
    """How often to call `find` for what is still wanted: bytes from elsewhere can be damaged on their way."""

    def find(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (key, bytes) of the samples that are wanted, in the source's own best order, fetched ahead.

        Those that cannot be had do not come. Bytes are as they lie, unchecked. From tars one key may come
        several times with different bytes (names that share a key): the sum decides which is meant.

        Raises LalicError when the source fails.
        """
        ...

    def find_others(self, sizes: Collection[int]) -> Iterator[tuple[str, bytes]]:
        """Yield the files of one of these sizes, whatever they are called: images may have been renamed.

        Nothing from places where that would be dear.
        """
        ...
