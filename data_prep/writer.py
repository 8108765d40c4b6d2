"""One shard: a plain tar whose every byte follows from its samples, with its sum and byte ranges.

The headers are those of Python's own tarfile. webdataset's TarWriter is a thin layer over the same module, but tells
no offsets and takes owner, mode and time from defaults that are its own.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from typing import IO, Any

from .validation import Checked

BLOCK = tarfile.BLOCKSIZE
LEAST_SHARD_SIZE = 2 * tarfile.RECORDSIZE
MOST_SAMPLE_BYTES = 8**11 - 1
"""What the size field of a plain header can say."""

EXTENSIONS = ("jpg", "png", "webp")

# What sources.make_keys gives: no dot, so nothing leads out of a folder, and WebDataset cuts at none.
SAFE_KEY = re.compile(r"(?!__)[A-Za-z0-9_-][A-Za-z0-9_/-]{0,94}")


class ShardWriter:
    """Writes samples into `file` as they come; `close()` gives the entry for the index."""

    def __init__(self, file: IO[bytes], name: str, most: int) -> None:
        """`most`: bytes that the finished tar shall not exceed."""
        self.name, self.most = name, most
        self.samples: list[dict[str, Any]] = []
        self._file = file
        self._size = 0
        self._digest = hashlib.sha256()

    def has_room(self, checked: Checked) -> bool:
        """Whether the sample fits; the first one always does."""
        return not self.samples or tar_size(self._size + BLOCK + padded(len(checked.data))) <= self.most

    def add(self, key: str, checked: Checked, source: str) -> None:
        """`source`: where the image came from, for the manifest. ValueError for a key that no tar should hold."""
        size = len(checked.data)
        self._write(member_header(key, checked.extension, size))
        offset = self._size
        self._write(checked.data)
        self._write(bytes(padded(size) - size))
        self.samples.append(
            {
                "key": key,
                "ext": checked.extension,
                "offset": offset,
                "size": size,
                "width": checked.width,
                "height": checked.height,
                "sha256": checked.sha256,
                "source": source,
            }
        )

    def close(self) -> dict[str, Any]:
        """End the tar (the file stays open) and describe it."""
        self._write(bytes(tar_size(self._size) - self._size))
        return {
            "name": self.name,
            "bytes": self._size,
            "sha256": self._digest.hexdigest(),
            "samples": self.samples,
        }

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)


def member_header(key: str, extension: str, size: int) -> bytes:
    """The 512 bytes before a sample. Owner, group and time are zero, the mode is 0644.

    USTAR: one header block per sample and no extension records. Raises ValueError for a key that would not be safe
    to unpack, or a size that does not fit.
    """
    if not SAFE_KEY.fullmatch(key) or extension not in EXTENSIONS or not 0 < size <= MOST_SAMPLE_BYTES:
        raise ValueError(f"{key!r}.{extension} of {size} bytes cannot stand in a shard")
    member = tarfile.TarInfo(f"{key}.{extension}")
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padded(size: Any) -> Any:
    """`size`, a number or an array of them, filled up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def tar_size(end: Any) -> Any:
    """Bytes of a tar (or of many) whose last sample ends, filled up, at `end`: two empty blocks, then whole records."""
    return -(-(end + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
