"""A file whose sum is that of the bytes it was given, and the question whether it holds them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

_PIECE = 1 << 20
"""Bytes that are written or read at once; other threads run while they are summed."""


class Abandoned(Exception):
    """What is being written is not wanted any more, because the process ends."""


class SummedFile:
    """A new file for writing; `abandoned` is asked before every piece."""

    def __init__(self, path: Path, abandoned: Callable[[], bool] = lambda: False):
        self.bytes = 0
        self.error: BaseException | None = None
        """Why a write failed: torch hides it behind an error of its own."""
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 -- closed by __exit__
        self._abandoned = abandoned

    @property
    def sha256(self) -> str:
        """Of what was given so far, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`. Raises OSError, or Abandoned."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                if self._abandoned():
                    raise Abandoned
                self._file.write(piece)
                self._digest.update(piece)
        except BaseException as error:
            self.error = error
            raise
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.close()
            return
        with suppress(OSError):  # what is still buffered finds no room either
            self._file.close()


def save_tensors(value: Any, file: SummedFile) -> None:
    """`torch.save`, with the error of the file itself when writing fails."""
    import torch

    try:
        torch.save(value, cast(IO[bytes], file))
    except RuntimeError as error:
        if file.error is not None:
            raise file.error from error
        raise


def read_back(path: Path, sha256: str, abandoned: Callable[[], bool] = lambda: False) -> None:
    """Raise OSError when a synced file does not hold the bytes with this SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Out of the page cache, so that the bytes come from where they were written, as far as one can ask for it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(_PIECE):
            if abandoned():
                raise Abandoned
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise OSError(errno.EIO, f"{path.name} does not read back as it was written", str(path))
