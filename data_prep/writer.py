"""One shard: a plain tar whose every byte follows from its samples, with its sum and byte ranges.

Python's own tarfile writes it. webdataset's TarWriter is a thin layer over the same module, but tells no
offsets and takes owner, mode and time from defaults that are its own.
"""

from __future__ import annotations

import hashlib
import tarfile
from io import BytesIO
from typing import IO, Any, cast

from .validation import Checked

LEAST_SHARD_SIZE = 2 * tarfile.RECORDSIZE


class ShardWriter:
    """Writes samples into `file` as they come; `close()` gives the entry for the index."""

    def __init__(self, file: IO[bytes], name: str, most: int) -> None:
        """`most`: bytes that the finished tar shall not exceed."""
        self.name, self.most = name, most
        self.samples: list[dict[str, Any]] = []
        self._file = _Summed(file)
        # USTAR: one header block per sample and no extension records. Keys are short enough for it.
        self._tar = tarfile.open(fileobj=cast(IO[bytes], self._file), mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def has_room(self, checked: Checked) -> bool:
        """Whether the sample fits; the first one always does."""
        if not self.samples:
            return True
        end = self._tar.offset + tarfile.BLOCKSIZE + _whole(len(checked.data), tarfile.BLOCKSIZE)
        return _whole(end + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE) <= self.most

    def add(self, key: str, checked: Checked) -> None:
        # Owner, group and time stay at TarInfo's zeros, the mode at 0644.
        member = tarfile.TarInfo(f"{key}.{checked.extension}")
        member.size = len(checked.data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(member, BytesIO(checked.data))
        self.samples.append(
            {
                "key": key,
                "ext": checked.extension,
                "offset": offset,
                "size": len(checked.data),
                "width": checked.width,
                "height": checked.height,
                "sha256": checked.sha256,
            }
        )

    def close(self) -> dict[str, Any]:
        """End the tar (the file stays open) and describe it."""
        self._tar.close()
        return {
            "name": self.name,
            "bytes": self._file.size,
            "sha256": self._file.digest.hexdigest(),
            "samples": self.samples,
        }


class _Summed:
    """What tarfile needs of a file, with the sum of all that was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
