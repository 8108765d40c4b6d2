"""The frozen manifest: what a set of shards consists of, in one file that can be published.

    # {"manifest": "lalic", "version": 1, "prefix": ..., "shard_size": ..., "seed": ..., "min_side": ...,
    #  "samples": n, "shards": [[bytes, sha256, samples], ...]}                               (all of it in one line)
    id,sha256,width,height,shard,place,offset,bytes,ext,source
    train/000002b66c9c498e,5d41...,1024,768,0,0,512,301245,jpg,train/000002b66c9c498e.jpg

`id` is the key in the shard, `shard` its number, `place` the sample's number in the shard, `offset` its first byte in
the tar. `source` is where the image was found, relative to the input; in it `%`, `#`, `"`, commas, control characters
and bytes that are no UTF-8 are written as %XX, so a row is a line and no field needs quotes.
`pandas.read_csv(path, comment="#", keep_default_na=False)` reads it.

The same shards give the same rows, wherever and however they were made; compressed (a name that ends in .gz), the same
bytes too, as far as the same zlib is used.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from urllib.parse import unquote_to_bytes

from lalic.errors import LalicError

from .places import output_file
from .state import ShardRecord

VERSION = 1
COLUMNS = ("id", "sha256", "width", "height", "shard", "place", "offset", "bytes", "ext", "source")

_LEVEL = 6
_ESCAPED = re.compile('[\x00-\x1f\x7f%#",\ud800-\udfff]')


class ShardSum(NamedTuple):
    """One shard as the manifest's head has it."""

    bytes: int
    sha256: str
    samples: int


def write_manifest(
    where: str | Path,
    options: dict[str, Any],
    shards: list[ShardSum],
    records: Iterable[ShardRecord],
    endpoint: str | None = None,
) -> str:
    """Write the manifest to a file or URL, atomically, one shard in memory at a time.

    Args:
        options: holds prefix, shard_size, seed and min_side.
        shards: the sums of all shards.
        records: the same shards with their samples, in order.

    Returns the SHA-256 of what is written, before compression. Raises LalicError when the records do not hold what
    is needed.
    """
    folder, name = output_file(where, endpoint)
    head = {
        "manifest": "lalic",
        "version": VERSION,
        **{option: options[option] for option in ("prefix", "shard_size", "seed", "min_side")},
        "samples": sum(shard.samples for shard in shards),
        "shards": shards,
    }
    digest = hashlib.sha256()
    with folder.open(name) as file, _compressed(file, name) as write:

        def put(text: str) -> None:
            data = text.encode()
            digest.update(data)
            write(data)

        put(f"# {json.dumps(head)}\n{','.join(COLUMNS)}\n")
        number = 0
        for record in records:
            if record.shard is not None:
                put("".join(_row(number, place, sample) for place, sample in enumerate(record.samples)))
                number += 1
    return digest.hexdigest()


def escape_source(source: str) -> str:
    """The source as a manifest has it."""
    return _ESCAPED.sub(_escape, source)


def unescape_source(text: bytes) -> str:
    """The source as it was, in Python's form of file names (`surrogateescape`)."""
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def _row(shard: int, place: int, sample: dict[str, Any]) -> str:
    if "source" not in sample:
        raise LalicError(
            f"shard {shard} was made by an older version, which did not note where its images came from; for a "
            "manifest, make the shards anew in another --output"
        )
    numbers = f"{sample['width']},{sample['height']},{shard},{place},{sample['offset']},{sample['size']}"
    return f"{sample['key']},{sample['sha256']},{numbers},{sample['ext']},{escape_source(sample['source'])}\n"


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", errors))


@contextmanager
def _compressed(file: IO[bytes], name: str) -> Iterator[Callable[[bytes], object]]:
    if not name.endswith(".gz"):
        yield file.write
        return
    # Neither time nor name in the header: they would make every run differ.
    packed = gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=cast(Any, file), mtime=0)
    yield packed.write
    packed.close()
