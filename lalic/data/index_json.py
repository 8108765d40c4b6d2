"""Parse `index.json` straight into arrays, without a Python object per sample.

    {"version": 1, "prefix": ..., "seed": ..., "min_side": ...,
     "shards": [{"name", "bytes", "sha256", "samples": [{"key", "ext", "offset", "size", "width",
     "height"}]}]}

`offset` and `size` are the byte range of the image within its tar; width and height are those of the upright
image (EXIF orientation applied).
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from lalic.data.images import describe_error
from lalic.errors import LalicError

INDEX_VERSION = 1

_SAMPLE_NUMBERS = ("offset", "size", "width", "height")


def parse_index(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The shards' names, sizes and sums, and the samples' arrays, as `ShardIndex` has them.

    Beyond the arrays (about 60 bytes a sample) only the file's text is in memory, twice for a moment: 0.2 GB and 3 s
    for a million samples.

    Raises:
        LalicError: missing, not JSON, another version, a field missing or of the wrong type, a sample outside its
            shard.
    """
    remedy = "run data_prep/shard.py to its end, or copy the file again"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LalicError(f"{path} is missing: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LalicError(f"{path} cannot be read ({error}): {remedy}") from error
    reader = _IndexReader()
    try:
        document = json.loads(text, object_hook=reader.take)
        del text
        return reader.finish(document)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LalicError(f"{path} is not JSON, probably cut short ({error}): {remedy}") from error
    except _SchemaError as error:
        raise LalicError(f"{path} is not a valid shard index ({error}): {remedy}") from error
    except ValueError as error:  # a number of thousands of digits
        raise LalicError(f"{path} is not a valid shard index ({describe_error(error)}): {remedy}") from error


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
                raise _SchemaError(f"sample {reprlib.repr(key)}: {field} is {reprlib.repr(value)}")
            numbers.append(value)
        try:
            self.keys += key.encode()
        except UnicodeEncodeError:
            raise _SchemaError(f"key {reprlib.repr(key)} is not valid Unicode") from None
        self.key_end.append(len(self.keys))

    def _take_shard(self, item: dict[str, Any]) -> _Shard:
        name, size, sha256, samples = (item.get(field) for field in ("name", "bytes", "sha256", "samples"))
        if not isinstance(name, str) or not _is_plain(name):
            raise _SchemaError(f"a shard's name is {reprlib.repr(name)}, a plain file name was expected")
        if type(size) is not int or not isinstance(sha256, str) or not sha256.isascii():
            raise _SchemaError(f"shard {name}: bytes or sha256 is missing")
        if not 0 <= size < 1 << 62:
            raise _SchemaError(f"shard {name}: bytes is {reprlib.repr(size)}")
        count = len(self.key_end) - self.taken
        if not isinstance(samples, list) or len(samples) != count or any(x is not None for x in samples):
            raise _SchemaError(f"shard {name}: samples is not a list of samples")
        self.taken += count
        return _Shard(name, size, sha256, count)

    def finish(self, document: object) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if not isinstance(document, dict) or not isinstance(document.get("shards"), list):
            raise _SchemaError("it has no list of shards")
        if document.get("version") != INDEX_VERSION:
            version = document.get("version")
            raise _SchemaError(f"version {reprlib.repr(version)}, this program reads version {INDEX_VERSION}")
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
        about = {
            "names": names,
            "shard_sha256": sha256,
            "fingerprint": _fingerprint(names, sha256, counts, offset, size),
        }
        return about, {
            "shard_bytes": shard_bytes,
            "shard": shard_of_sample,
            "offset": offset,
            "size": size,
            "width": np.frombuffer(self.numbers["width"], np.int64).astype(np.int32),
            "height": np.frombuffer(self.numbers["height"], np.int64).astype(np.int32),
            "keys_utf8": np.frombuffer(self.keys, np.uint8),
            "key_end": np.frombuffer(self.key_end, np.int64),
        }


def _is_plain(name: str) -> bool:
    """Whether this is a file's name: no path, nothing hidden, no control characters, valid Unicode."""
    return name.isprintable() and bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name


def _fingerprint(names: tuple[str, ...], sha256: tuple[str, ...], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256("\n".join((*names, *sha256)).encode())
    for values in arrays:
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()
