"""What a list names: paths, URLs, or ids of OpenImages, in a text file or a CSV, perhaps gzipped.

    a first line with ImageID among its columns          CSV of OpenImages; every id once, in order
    lines like train/f9e0434389a1d4dd or f9e0434389a1d4dd   ids (the list format of OpenImages' downloader)
    lines with scheme://                                  URLs
    else                                                  paths

The first line decides, and the others have to be of its kind. '#' begins a comment line, except in a CSV.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, cast, overload

import numpy as np

from lalic.errors import LalicError
from lalic.remote import is_url

SUBSETS = ("train", "validation", "test", "challenge2018")

_ID = re.compile(r"[0-9a-fA-F]{16}")
_LISTED_ID = re.compile(rf"(?:({'|'.join(SUBSETS)})/)?([0-9a-fA-F]{{16}})")
_ID_COLUMN, _SUBSET_COLUMN = "ImageID", "Subset"
_GZIP = b"\x1f\x8b"


class ImageIds(Sequence[str]):
    """Names of OpenImages' files, `train/f9e0434389a1d4dd.jpg`, in 9 bytes each.

    subset: (n,) uint8, place in SUBSETS. ids: (n,) uint64.
    """

    def __init__(self, subset: np.ndarray, ids: np.ndarray, suffix: str = ".jpg") -> None:
        self.subset, self.ids, self.suffix = subset, ids, suffix

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> ImageIds: ...
    def __getitem__(self, number: int | slice) -> str | ImageIds:
        if isinstance(number, slice):
            return ImageIds(self.subset[number], self.ids[number], self.suffix)
        return f"{SUBSETS[self.subset[number]]}/{int(self.ids[number]):016x}{self.suffix}"

    def keys(self) -> ImageIds:
        """The samples' keys: ids are plain and unique, so these are the names without their suffix."""
        return ImageIds(self.subset, self.ids, "")


@dataclass
class Listed:
    """A list's entries, each once, in its order."""

    kind: str
    """`paths`, `URLs` or `ids`."""
    entries: Sequence[str] = ()
    ignored: Counter[str] = field(default_factory=Counter)


def read_list(file: IO[bytes], label: str, subset: str | None) -> Listed:
    """Read a list to its end; ids of 9 bytes each stay in memory, of paths and URLs the text.

    Args:
        file: need not be seekable.
        label: for messages.
        subset: OpenImages' subset; of ids that name another one themselves, those of this one are taken.

    Raises LalicError when it is no list, cut short, or holds lines of several kinds.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
    try:
        if buffered.peek(2)[:2] == _GZIP:
            buffered = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=buffered)), 1 << 20)
        if b"\0" in buffered.peek(1 << 16)[: 1 << 16]:
            raise LalicError(f"--input {label}: is not a text file with one path per line")
        text = io.TextIOWrapper(buffered, "utf-8", "surrogateescape", newline="")
        return _read_text(text, label, subset)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LalicError(f"--input {label}: is damaged or cut short ({error}); get it again") from error
    except csv.Error as error:
        raise LalicError(f"--input {label}: is not a CSV as OpenImages has them ({error})") from error


def _read_text(text: io.TextIOWrapper, label: str, subset: str | None) -> Listed:
    first = text.readline().removeprefix("\N{BYTE ORDER MARK}")
    header = next(csv.reader([first]), [])
    if _ID_COLUMN in header:
        return _read_csv(text, header, label, subset)
    lines = _entries(first, text, label)
    _, leading = next(lines, (0, ""))
    if not leading:
        return Listed("paths")
    text_lines = _chain(leading, lines)
    if _LISTED_ID.fullmatch(leading):
        return _ids(((*_split_id(line, number, label),) for number, line in text_lines), subset)
    kind = "URLs" if is_url(leading) else "paths"
    once: dict[str, None] = {}
    count = 0
    for number, line in text_lines:
        if is_url(line) != (kind == "URLs"):
            raise LalicError(f"--input {label}: line {number} is none of the {kind} that the list begins with")
        once[line.strip() if kind == "URLs" else line] = None
        count += 1
    ignored = Counter({f"{kind} listed before": count - len(once)} if len(once) < count else {})
    return Listed(kind, list(once), ignored)


def _entries(first: str, text: Iterable[str], label: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of all that is neither empty nor a comment."""
    for number, line in enumerate(_chain_text(first, text), 1):
        if "\0" in line:
            raise LalicError(f"--input {label}: is not a text file with one path per line")
        line = line.removesuffix("\n").rstrip("\r")
        if line.strip() and not line.startswith("#"):
            yield number, line


def _chain_text(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _chain(first: str, rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield 1, first
    yield from rest


def _split_id(line: str, number: int, label: str) -> tuple[str, str]:
    match = _LISTED_ID.fullmatch(line.strip())
    if match is None:
        raise LalicError(
            f"--input {label}: line {number} is no id of OpenImages (16 hexadecimal digits, perhaps with "
            f"one of {', '.join(SUBSETS)} and '/' before them): {line[:60]!r}"
        )
    return match[1] or "", match[2]


def _read_csv(text: io.TextIOWrapper, header: list[str], label: str, subset: str | None) -> Listed:
    column = header.index(_ID_COLUMN)
    subset_column = header.index(_SUBSET_COLUMN) if _SUBSET_COLUMN in header else None
    least = max(column, subset_column or 0)

    def pairs() -> Iterator[tuple[str, str]]:
        rows = csv.reader(text)
        for row in rows:
            if not row:
                continue
            if len(row) <= least or not _ID.fullmatch(row[column]):
                raise LalicError(
                    f"--input {label}: line {rows.line_num + 1} has no id of 16 hexadecimal digits under {_ID_COLUMN}"
                )
            of = row[subset_column] if subset_column is not None else ""
            if of and of not in SUBSETS:
                raise LalicError(f"--input {label}: line {rows.line_num + 1} is of an unknown subset, {of[:60]!r}")
            yield of, row[column]

    return _ids(pairs(), subset)


def _ids(pairs: Iterable[tuple[str, str]], subset: str | None) -> Listed:
    """Each id once. `pairs`: the subset that the list gives ('' if it does not) and the id."""
    places = {name: place for place, name in enumerate(SUBSETS)}
    default = subset or SUBSETS[0]
    subsets, ids = array("B"), array("Q")
    before = ""
    rows = others = 0
    for of, text in pairs:
        rows += 1
        if text == before:  # an image's annotations follow one another: most repetitions end here
            continue
        before = text
        if of and subset and of != subset:
            others += 1
            continue
        subsets.append(places[of or default])
        ids.append(int(text, 16))
    subset_of, id_of = np.array(subsets, np.uint8), np.array(ids, np.uint64)
    first = [np.flatnonzero(subset_of == place) for place in range(len(SUBSETS))]
    first = [where[np.unique(id_of[where], return_index=True)[1]] for where in first]
    kept = np.sort(np.concatenate(first))
    ignored: Counter[str] = Counter()
    if others:
        ignored["ids of other subsets"] = others
    if rows - others > len(kept):
        ignored["rows of ids listed before"] = rows - others - len(kept)
    return Listed("ids", ImageIds(subset_of[kept], id_of[kept]), ignored)
