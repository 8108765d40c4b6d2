"""One shard against its part of the index, read once from end to end."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from lalic.data.images import MAX_PIXELS, ImageError, decode_rgb
from lalic.errors import LalicError

from .headers import upright_size
from .places import readable_folder
from .validation import image_extension
from .writer import BLOCK, padded


class ExpectedSample(NamedTuple):
    """What the index says of a sample."""

    key: str
    ext: str
    """Empty when the index names none that this program writes."""
    offset: int
    size: int
    width: int
    height: int
    sha256: bytes
    """From a manifest; empty without one."""


class ShardTask(NamedTuple):
    """One shard to check."""

    where: str
    endpoint: str | None
    name: str
    size: int
    """Bytes that it has."""
    indexed_size: int
    indexed_sha256: str
    samples: list[ExpectedSample]
    decode: bool


def check_shard(task: ShardTask) -> list[str]:
    """What is wrong with the shard, a line each."""
    try:
        return list(_problems(task))
    except FileNotFoundError:
        return ["is missing"]
    except (OSError, LalicError) as error:
        return [f"cannot be read: {error}"]


def _problems(task: ShardTask) -> Iterator[str]:
    if task.size != task.indexed_size:
        what = "is cut short: it" if task.size < task.indexed_size else "is too long: it"
        yield f"{what} has {task.size} bytes, the index says {task.indexed_size}"
    if not task.samples:
        yield "holds no sample by the index"
    reader = _Reader(readable_folder(task.where, task.endpoint).blocks(task.name))
    end = 0
    for sample in sorted(task.samples, key=lambda sample: sample.offset):
        header = sample.offset - BLOCK
        if header < end or sample.offset % BLOCK:
            yield f"{sample.key}: offset {sample.offset} lies within the sample before it, or is no whole block"
            continue
        yield from _unindexed(reader, header)
        block, data = reader.take(BLOCK), reader.take(sample.size)
        end = sample.offset + padded(sample.size)
        if len(data) < sample.size:
            ends = f"the shard ends at {reader.position}, the sample at {sample.offset + sample.size}"
            yield f"{sample.key}: is cut off, {ends}"
            break
        padding = reader.take(end - reader.position)
        yield from (f"{sample.key}: {problem}" for problem in _sample_problems(sample, block, data, task.decode))
        if padding.strip(b"\0"):
            yield f"{sample.key}: the bytes that fill its last block are not zero"
    yield from _unindexed(reader, task.size)
    if task.samples and end + 2 * BLOCK > task.size:
        yield "has no end: a tar ends with two empty blocks"
    if reader.sha256() != task.indexed_sha256:
        yield "sha256 is another than in the index: bytes were changed"


def _sample_problems(sample: ExpectedSample, block: bytes, data: bytes, decode: bool) -> Iterator[str]:
    yield from _header_problems(sample, block)
    if sample.sha256 and hashlib.sha256(data).digest() != sample.sha256:
        yield "sha256 is another than in the manifest"
    try:
        extension = image_extension(data, sample.key)
        if sample.ext and extension != sample.ext:
            yield f"extension is {sample.ext}, its bytes are {extension}"
        size = upright_size(data, extension, sample.key, MAX_PIXELS)
        if size != (sample.width, sample.height):
            yield f"is {size[0]}x{size[1]}, the index says {sample.width}x{sample.height}"
        if decode:
            height, width, _ = decode_rgb(data, sample.key).shape
            if (width, height) != size:
                yield f"decodes to {width}x{height}"
    except ImageError as error:
        yield f"{error.reason}" + (f" ({error.detail})" if error.detail else "")


def _header_problems(sample: ExpectedSample, block: bytes) -> Iterator[str]:
    if not block.strip(b"\0"):
        yield f"no tar header before offset {sample.offset}"
        return
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        yield f"the tar header before offset {sample.offset} is damaged ({error})"
        return
    if not member.isreg():
        yield f"its tar header is not that of a file (type {member.type!r})"
    key, _, extension = member.name.rpartition(".")
    if key != sample.key:
        yield f"its tar header has the name {member.name!r}"
    elif not sample.ext:
        yield f"the index has none of the known extensions, its tar header {extension!r}"
    elif extension != sample.ext:
        yield f"its tar header has the extension {extension!r}, the index {sample.ext!r}"
    if member.size != sample.size:
        yield f"its tar header has {member.size} bytes, the index {sample.size}"


def _unindexed(reader: _Reader, stop: int) -> Iterator[str]:
    """What stands between two samples, or behind the last, where zeros or nothing should be."""
    start = reader.position
    found: list[tuple[int, bytes]] = []
    while reader.position < stop and (block := reader.take(min(BLOCK, stop - reader.position))):
        if len(found) < 2 and block.strip(b"\0"):
            found.append((reader.position - len(block), block))
    if not found:
        return
    place, block = found[0]
    try:
        name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
        yield f"holds {name!r} at {place}, which is not in the index"
    except tarfile.HeaderError:
        yield f"holds bytes at {place} that belong to no sample (between {start} and {stop})"


class _Reader:
    """The bytes of a file one after the other, and the sum of all that was given out or is left."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block = memoryview(b"")
        self._digest = hashlib.sha256()
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        parts = []
        while count > 0:
            if not self._block:
                self._block = memoryview(next(self._blocks, b""))
                self._digest.update(self._block)
                if not self._block:
                    break
            parts.append(self._block[:count])
            self._block = self._block[count:]
            count -= len(parts[-1])
        data = b"".join(parts)
        self.position += len(data)
        return data

    def sha256(self) -> str:
        for block in self._blocks:
            self._digest.update(block)
        return self._digest.hexdigest()
