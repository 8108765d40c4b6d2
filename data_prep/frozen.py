"""A manifest that was read and checked, held in arrays: about 140 bytes a sample, and no Python object per sample."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from array import array
from binascii import unhexlify
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from lalic.errors import LalicError
from lalic.remote import is_url

from .manifest import COLUMNS, VERSION, unescape_source
from .writer import BLOCK, EXTENSIONS, MOST_SAMPLE_BYTES, SAFE_KEY, padded, tar_size

# Small enough for the processor's cache: twice as fast as 8 MiB.
_PART = 256 << 10
_MOST_HEAD = 64 << 20
_MOST_SIDE = 1 << 24
_MOST_DIGITS = 18
_HEX = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ONE_KEY = SAFE_KEY.pattern.encode()
_KEYS = re.compile(rb"(?:%b\n)*" % _ONE_KEY)
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f#\"]")
_NUMBERS = ("width", "height", "shard", "place", "offset", "bytes")


class Names:
    """Many short texts in one piece of memory."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q")

    def extend(self, names: Sequence[bytes]) -> None:
        end = len(self._text)
        for name in names:
            end += len(name)
            self._ends.append(end)
        self._text += b"".join(names)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._text[self._ends[number - 1] if number else 0 : self._ends[number]])


@dataclass(frozen=True, eq=False)
class Manifest:
    """n samples in S shards; samples 0..n-1 run through the shards in order."""

    prefix: str
    seed: int
    min_side: int
    sha256: str
    """Of the text of the manifest."""
    shard_bytes: np.ndarray
    """(S,) int64."""
    shard_sha256: tuple[str, ...]
    first: np.ndarray
    """(S + 1,) int64: shard s holds samples first[s] to first[s + 1] - 1."""
    offset: np.ndarray
    """(n,) int64, first byte of the image in its tar."""
    size: np.ndarray
    """(n,) int64, bytes of the image."""
    width: np.ndarray
    """(n,) int64."""
    height: np.ndarray
    """(n,) int64."""
    extension: np.ndarray
    """(n,) uint8, number in EXTENSIONS."""
    sample_sha256: np.ndarray
    """(n, 32) uint8."""
    keys: Names
    sources: Names
    """Escaped, as in the file."""

    @classmethod
    def load(cls, path: str | Path, flag: str = "--from-manifest") -> Manifest:
        """Read and check a manifest, compressed or not. `flag`: what messages call the option that gave `path`.

        Raises LalicError: missing, cut, damaged, not a manifest, or a row that cannot be (naming its line).
        """
        remedy = "get the file again as it was published"
        try:
            with open(path, "rb") as file:
                return _Reader(_unpacked(file)).read()
        except FileNotFoundError:
            what = "is a URL: fetch the file first" if is_url(path) else "no such file"
            raise LalicError(f"{flag} {path}: {what}") from None
        except _ManifestError as error:
            raise LalicError(f"{flag} {path}: {error}; {remedy}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise LalicError(f"{flag} {path}: is damaged or cut short ({error}); {remedy}") from error
        except OSError as error:
            raise LalicError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error

    def __len__(self) -> int:
        return len(self.size)

    def shard_name(self, shard: int) -> str:
        return f"{self.prefix}-{shard:06d}.tar"

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def key(self, sample: int) -> str:
        return self.keys[sample].decode()

    def source(self, sample: int) -> str:
        return unescape_source(self.sources[sample])


class _ManifestError(Exception):
    """What is wrong, without the file's name."""


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        return file
    return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), _PART)


class _Reader:
    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.numbers = {name: array("q") for name in _NUMBERS}
        self.extension = bytearray()
        self.sha256 = bytearray()
        self.keys, self.sources = Names(), Names()
        self.key_hashes = array("q")

    def read(self) -> Manifest:
        head = self._head()
        rest = b""
        while part := self.file.read(_PART):
            self.digest.update(part)
            lines = (rest + part).split(b"\n")
            rest = lines.pop()
            if len(rest) > _PART:
                raise _ManifestError(f"line {self._line(len(lines))} is endless")
            if len(self.keys) + len(lines) > head["samples"]:
                # Not after the last one: what a few kilobytes unpack to need not fit in memory.
                raise _ManifestError(f"has more rows than the {head['samples']} of its first line: edited")
            self._take(lines)
        if rest:
            raise _ManifestError("is cut short in its last line")
        if len(self.keys) != head["samples"]:
            raise _ManifestError(f"has {len(self.keys)} rows, its first line says {head['samples']}: cut or edited")
        return self._finish(head)

    def _head(self) -> dict[str, Any]:
        line = self.file.readline(_MOST_HEAD)
        titles = self.file.readline(1000)
        self.digest.update(line + titles)
        try:
            head = json.loads(line.removeprefix(b"#")) if line.startswith(b"#") else None
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict) or head.get("manifest") != "lalic":
            raise _ManifestError("is no manifest of this program: its first line is another one")
        if head.get("version") != VERSION:
            raise _ManifestError(f"has version {head.get('version')!r}, this program reads {VERSION}")
        if titles != ",".join(COLUMNS).encode() + b"\n":
            raise _ManifestError(f"has other columns than {', '.join(COLUMNS)}")
        wanted = {"seed": 1 << 64, "min_side": _MOST_SIDE, "samples": 1 << 40, "shard_size": 1 << 62}
        for name, most in wanted.items():
            if type(head.get(name)) is not int or not 0 <= head[name] < most:
                raise _ManifestError(f"its first line has {name} {head.get(name)!r}")
        if not isinstance(head.get("prefix"), str) or not _PREFIX.fullmatch(head["prefix"]):
            raise _ManifestError(f"its first line has the prefix {head.get('prefix')!r}")
        shards = head.get("shards")
        if not isinstance(shards, list) or not shards or not all(map(_is_shard, shards)):
            raise _ManifestError("its first line has no valid list of shards")
        if sum(shard[2] for shard in shards) != head["samples"]:
            raise _ManifestError("its first line counts other samples in all than in its shards")
        return head

    def _take(self, lines: list[bytes]) -> None:
        if not lines:
            return
        rows = [line.split(b",") for line in lines]
        wrong = next((number for number, row in enumerate(rows) if len(row) != len(COLUMNS)), None)
        if wrong is not None:
            raise _ManifestError(f"line {self._line(wrong)} has {len(rows[wrong])} fields, not {len(COLUMNS)}")
        columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
        self._check_text(columns)
        for name, numbers in self.numbers.items():
            column = columns[name]
            if max(map(len, column)) > _MOST_DIGITS or not b"".join(column).isdigit() or b"" in column:
                wrong = next(i for i, x in enumerate(column) if not x.isdigit() or len(x) > _MOST_DIGITS)
                raise _ManifestError(f"line {self._line(wrong)} has {name} {_shown(column[wrong])}")
            numbers.extend(map(int, column))
        self.extension += bytes(map(_EXTENSION_NUMBERS.__getitem__, columns["ext"]))
        self.sha256 += unhexlify(b"".join(columns["sha256"]))
        self.key_hashes.extend(map(hash, columns["id"]))
        self.keys.extend(columns["id"])
        self.sources.extend(columns["source"])

    def _check_text(self, columns: Mapping[str, Sequence[bytes]]) -> None:
        checks = {
            "id": lambda x: re.fullmatch(_ONE_KEY, x),
            "sha256": lambda x: re.fullmatch(rb"[0-9a-f]{64}", x),
            "ext": lambda x: x in _EXTENSION_NUMBERS,
            "source": lambda x: x and not _CONTROL.search(x),
        }
        sums = b"".join(columns["sha256"])
        fine = {
            # One match over all of them is ten times faster than one for each.
            "id": _KEYS.fullmatch(b"\n".join(columns["id"]) + b"\n"),
            "sha256": set(map(len, columns["sha256"])) == {64} and re.fullmatch(rb"[0-9a-f]*", sums),
            "ext": set(columns["ext"]) <= _EXTENSION_NUMBERS.keys(),
            "source": b"" not in columns["source"] and not _CONTROL.search(b"\n".join(columns["source"])),
        }
        for name, is_fine in fine.items():
            if not is_fine:
                wrong = next(number for number, value in enumerate(columns[name]) if not checks[name](value))
                raise _ManifestError(f"line {self._line(wrong)} has {name} {_shown(columns[name][wrong])}")

    def _line(self, row: int) -> int:
        """Number in the file of a row of the part that is read."""
        return 3 + len(self.keys) + row

    def _finish(self, head: dict[str, Any]) -> Manifest:
        numbers = {name: np.frombuffer(values, np.int64) for name, values in self.numbers.items()}
        shards = head["shards"]
        first = np.concatenate([[0], np.cumsum([shard[2] for shard in shards])]).astype(np.int64)
        shard_bytes = np.array([shard[0] for shard in shards], np.int64)
        self._check_keys()
        _check_layout(numbers, first, shard_bytes)
        return Manifest(
            prefix=head["prefix"],
            seed=head["seed"],
            min_side=head["min_side"],
            sha256=self.digest.hexdigest(),
            shard_bytes=shard_bytes,
            shard_sha256=tuple(shard[1] for shard in shards),
            first=first,
            offset=numbers["offset"],
            size=numbers["bytes"],
            width=numbers["width"],
            height=numbers["height"],
            extension=np.frombuffer(self.extension, np.uint8),
            sample_sha256=np.frombuffer(self.sha256, np.uint8).reshape(-1, 32),
            keys=self.keys,
            sources=self.sources,
        )

    def _check_keys(self) -> None:
        hashes = np.frombuffer(self.key_hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for number in same.tolist():
            one, other = int(order[number]), int(order[number + 1])
            if self.keys[one] == self.keys[other]:
                raise _ManifestError(f"lines {3 + one} and {3 + other} have the same id {_shown(self.keys[one])}")


def _check_layout(numbers: dict[str, np.ndarray], first: np.ndarray, shard_bytes: np.ndarray) -> None:
    """Every number follows from the sizes; one that does not was edited."""

    def demand(fine: np.ndarray, what: str) -> None:
        if not fine.all():
            row = int(np.argmin(fine))
            raise _ManifestError(
                f"line {3 + row} {what} (its {', '.join(f'{n} {v[row]}' for n, v in numbers.items())})"
            )

    counts = np.diff(first)
    demand(numbers["shard"] == np.repeat(np.arange(len(counts)), counts), "is not in the shard where it should be")
    demand(numbers["place"] == np.arange(first[-1]) - np.repeat(first[:-1], counts), "is not in its place")
    size = numbers["bytes"]
    demand((size > 0) & (size <= MOST_SAMPLE_BYTES), "has an impossible size")
    for side in (numbers["width"], numbers["height"]):
        demand((side > 0) & (side <= _MOST_SIDE), "has an impossible width or height")
    steps = BLOCK + padded(size)
    ends = np.cumsum(steps)
    ends_in_shard = ends - np.repeat(ends[first[:-1]] - steps[first[:-1]], counts)
    demand(numbers["offset"] == ends_in_shard - padded(size), "has an offset that does not follow from the sizes")
    expected = tar_size(ends_in_shard[first[1:] - 1])
    if (expected != shard_bytes).any():
        shard = int(np.argmax(expected != shard_bytes))
        raise _ManifestError(f"shard {shard} has {shard_bytes[shard]} bytes, its samples need {expected[shard]}")


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, list) or len(shard) != 3:
        return False
    size, sha256, samples = shard
    numbers = type(size) is int and type(samples) is int and 0 < size < 1 << 60 and 0 < samples < 1 << 40
    return numbers and isinstance(sha256, str) and bool(_HEX.fullmatch(sha256))


def _shown(value: bytes) -> str:
    return repr(value[:80].decode("utf-8", "backslashreplace"))


_EXTENSION_NUMBERS = {extension.encode(): number for number, extension in enumerate(EXTENSIONS)}
