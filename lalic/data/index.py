"""`index.json`, the table of contents of a folder of shards, held in arrays.

    {"version": 1, "prefix": ..., "seed": ..., "min_side": ...,
     "shards": [{"name", "bytes", "sha256", "samples": [{"key", "ext", "offset", "size", "width",
     "height"}]}]}

`offset` and `size` are the byte range of the image within its tar; width and height are those of the upright
image (EXIF orientation applied).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lalic.errors import LalicError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
_SHARD_REMEDY = "copy it again or run data_prep/shard.py again"

_SAMPLE_NUMBERS = ("offset", "size", "width", "height")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a folder of shards, as arrays: no Python object per sample.

    S shards, n samples; sample ids 0..n-1 run through the shards in order.
    """

    folder: Path
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
    keys_utf8: bytes
    key_end: np.ndarray
    """(n,) int64, where each key ends in `keys_utf8`."""
    fingerprint: str
    """SHA-256 over the shards' names and sums and the byte ranges: equal iff the samples are."""

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Read and check `folder/index.json`.

        The samples go into arrays while the JSON is parsed, so beyond the arrays (about 60 bytes a sample)
        only the file's text is in memory, twice for a moment: 0.2 GB and 3 s for a million samples.

        Raises:
            LalicError: missing, not JSON, another version, a field missing or of the wrong type, a sample
                outside its shard.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        remedy = "run data_prep/shard.py to its end, or copy the file again"
        if not folder.is_dir():
            raise LalicError(f"{folder}: no such folder of shards (make one with data_prep/shard.py)")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise LalicError(f"{path} is missing: {remedy}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LalicError(f"{path} cannot be read ({error}): {remedy}") from error
        reader = _IndexReader()
        try:
            document = json.loads(text, object_hook=reader.take)
        except (json.JSONDecodeError, RecursionError) as error:
            raise LalicError(f"{path} is not JSON, probably cut short ({error}): {remedy}") from error
        except _SchemaError as error:
            raise LalicError(f"{path} is not a valid shard index ({error}): {remedy}") from error
        del text
        try:
            return reader.finish(document, folder)
        except _SchemaError as error:
            raise LalicError(f"{path} is not a valid shard index ({error}): {remedy}") from error

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, sample: int) -> str:
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.keys_utf8[start : int(self.key_end[sample])].decode()

    def shard_path(self, shard: int) -> Path:
        return self.folder / self.names[shard]

    def describe(self, sample: int) -> str:
        """`KEY in SHARD.tar`, for messages."""
        return f"{self.key(sample)} in {self.names[int(self.shard[sample])]}"

    def eligible(self, min_side: int) -> np.ndarray:
        """int64 ids of the samples whose shorter side is at least `min_side` pixels, ascending."""
        return np.flatnonzero(np.minimum(self.width, self.height) >= min_side)

    def largest_side(self) -> int:
        """The largest shorter side of all samples: the largest square crop that any image allows."""
        return int(np.minimum(self.width, self.height).max(initial=0))

    def check_files(self) -> None:
        """Raise LalicError naming the first shard that is missing or has another size than indexed."""
        for name, expected in zip(self.names, self.shard_bytes.tolist(), strict=True):
            path = self.folder / name
            try:
                actual = path.stat().st_size
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                what = "is missing" if missing else f"cannot be read ({error.strerror})"
                raise LalicError(f"shard {path} {what}: {_SHARD_REMEDY}") from error
            if actual != expected:
                raise LalicError(
                    f"shard {path} is damaged or cut short: it has {actual} bytes, {INDEX_NAME} says "
                    f"{expected}: {_SHARD_REMEDY}"
                )


class _SchemaError(Exception):
    """What is wrong with an index, without the file's name."""


class _Shard:
    """What stays of one shard's JSON object once its samples are in the arrays."""

    def __init__(self, name: str, size: int, sha256: str, samples: int) -> None:
        self.name, self.size, self.sha256, self.samples = name, size, sha256, samples


class _IndexReader:
    """A JSON object hook. Objects arrive innermost first, so samples precede their shard, in file order."""

    def __init__(self) -> None:
        self.numbers = {field: array("q") for field in _SAMPLE_NUMBERS}
        self.keys = bytearray()
        self.key_end = array("q")
        self.taken = 0
        """Samples that belong to a shard already seen."""

    def take(self, item: dict[str, Any]) -> object:
        if "samples" in item:
            return self._take_shard(item)
        if "shards" in item:
            return item
        self._take_sample(item)
        return None

    def _take_sample(self, item: dict[str, Any]) -> None:
        key = item.get("key")
        if not isinstance(key, str) or not key:
            raise _SchemaError(f"sample {len(self.key_end)} has no key")
        for field, numbers in self.numbers.items():
            value = item.get(field)
            least = 0 if field == "offset" else 1
            bits = 31 if field in ("width", "height") else 62
            if type(value) is not int or not least <= value < 1 << bits:
                raise _SchemaError(f"sample {key!r}: {field} is {value!r}")
            numbers.append(value)
        try:
            self.keys += key.encode()
        except UnicodeEncodeError:
            raise _SchemaError(f"key {key!r} is not valid Unicode") from None
        self.key_end.append(len(self.keys))

    def _take_shard(self, item: dict[str, Any]) -> _Shard:
        name, size, sha256, samples = (item.get(field) for field in ("name", "bytes", "sha256", "samples"))
        if not isinstance(name, str) or not name or name.startswith(".") or "/" in name or "\\" in name:
            raise _SchemaError(f"a shard's name is {name!r}, a plain file name was expected")
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            raise _SchemaError(f"shard {name}: bytes or sha256 is missing")
        count = len(self.key_end) - self.taken
        if not isinstance(samples, list) or len(samples) != count or any(x is not None for x in samples):
            raise _SchemaError(f"shard {name}: samples is not a list of samples")
        self.taken += count
        return _Shard(name, size, sha256, count)

    def finish(self, document: object, folder: Path) -> ShardIndex:
        if not isinstance(document, dict) or not isinstance(document.get("shards"), list):
            raise _SchemaError("it has no list of shards")
        if document.get("version") != INDEX_VERSION:
            version = document.get("version")
            raise _SchemaError(f"version {version!r}, this program reads version {INDEX_VERSION}")
        shards = document["shards"]
        if not all(isinstance(shard, _Shard) for shard in shards) or self.taken != len(self.key_end):
            raise _SchemaError("the list of shards holds something else")
        if sum(shard.samples for shard in shards) != self.taken:
            raise _SchemaError("samples lie outside the list of shards")
        names = tuple(shard.name for shard in shards)
        if len(set(names)) != len(names):
            raise _SchemaError("two shards have the same name")

        counts = np.array([shard.samples for shard in shards], np.int64)
        shard_bytes = np.array([shard.size for shard in shards], np.int64)
        shard_of_sample = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        offset = np.frombuffer(self.numbers["offset"], np.int64)
        size = np.frombuffer(self.numbers["size"], np.int64)
        outside = np.flatnonzero(offset + size > shard_bytes[shard_of_sample])
        if len(outside):
            name = names[shard_of_sample[outside[0]]]
            raise _SchemaError(f"sample {outside[0]} lies outside its shard {name}")
        sha256 = tuple(shard.sha256 for shard in shards)
        return ShardIndex(
            folder=folder,
            names=names,
            shard_bytes=shard_bytes,
            shard_sha256=sha256,
            shard=shard_of_sample,
            offset=offset,
            size=size,
            width=np.frombuffer(self.numbers["width"], np.int64).astype(np.int32),
            height=np.frombuffer(self.numbers["height"], np.int64).astype(np.int32),
            keys_utf8=bytes(self.keys),
            key_end=np.frombuffer(self.key_end, np.int64),
            fingerprint=_fingerprint(names, sha256, counts, offset, size),
        )


def _fingerprint(names: tuple[str, ...], sha256: tuple[str, ...], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256("\n".join((*names, *sha256)).encode())
    for values in arrays:
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()
