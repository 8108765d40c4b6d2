"""Where the results go: a folder of this machine, or any place that fsspec can write to. One interface for both.

A file appears under its name only when it is whole. On this machine that is a temporary name, fsync and rename; on
object stores an upload that is committed at its end; elsewhere a temporary name and a move.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from lalic.errors import LalicError
from lalic.files import atomic_open

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


BLOCK = 4 << 20
"""Bytes that are read at once."""


class OutputFolder(ABC):
    """A folder of results. Names within it are relative, with '/'."""

    def __init__(self, where: str) -> None:
        self.where = where
        """As messages call it."""

    def path(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.where.rstrip('/')}/{name}"

    @abstractmethod
    def prepare(self, state: str) -> None:
        """Make the folder and `state` in it, where the place has folders. Raises LalicError for a file."""

    @abstractmethod
    def held(self, lock: str) -> AbstractContextManager[None]:
        """Keep other processes out; `lock` is the name of what says so. LalicError when one is in already."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file for writing that takes its name when the block ends, and leaves nothing when it raises."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file, FileNotFoundError without one."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None without one."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """The files directly in this folder or in one below it, sorted, those of killed writers among them."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; none there is fine."""

    @abstractmethod
    def remove_uploads(self, pattern: re.Pattern[str]) -> None:
        """Give up what a killed writer began to upload under names that match, where that can be seen."""

    @contextmanager
    def open_text(self, name: str) -> Iterator[IO[str]]:
        """As `open`, for UTF-8 text."""
        with self.open(name) as file:
            # No TextIOWrapper: it closes what it wraps when it is collected, and closing an upload commits it.
            yield cast(IO[str], codecs.getwriter("utf-8")(file))

    def write_text(self, name: str, text: str) -> None:
        with self.open(name) as file:
            file.write(text.encode())

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's bytes in blocks, FileNotFoundError without one."""
        yield self.read(name)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file in hexadecimal, FileNotFoundError without one."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def full_disk_in_one_line(flag: str, where: str, safe: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a full disk into a LalicError; `flag` named `where`, `safe()` says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise LalicError(
            f"{flag} {where}: cannot be written on ({error.strerror}), {safe()}: "
            "make room and run the same command again"
        ) from error


class LocalFolder(OutputFolder):
    """A folder of this machine (or of a file system that it has mounted)."""

    def __init__(self, folder: Path, flag: str = "--output") -> None:
        """`flag`: what messages call the option that named it."""
        super().__init__(str(folder))
        self.folder, self.flag = folder, flag

    def prepare(self, state: str) -> None:
        try:
            (self.folder / state).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise LalicError(f"{self.flag} {self.where}: is not a folder") from error

    @contextmanager
    def held(self, lock: str) -> Iterator[None]:
        with open(self.folder / lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LalicError(
                    f"{self.flag} {self.where}: another process is writing shards into it; wait for it to end"
                ) from None
            except OSError as error:
                # Some network file systems have no locks; there the user has to take care.
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return atomic_open(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def blocks(self, name: str) -> Iterator[bytes]:
        with open(self.folder / name, "rb") as file:
            while block := file.read(BLOCK):
                yield block

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                found = [entry.name for entry in entries if not entry.is_dir()]
        except FileNotFoundError:
            return []
        return sorted(str(PurePosixPath(folder, name)) for name in found)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_uploads(self, pattern: re.Pattern[str]) -> None:
        pass


def local_disk(output: OutputFolder, staging: str | Path | None) -> tuple[str, str]:
    """The option, and the folder of this machine, that a job writes into."""
    if isinstance(output, LocalFolder):
        return "--output", output.where
    return "--staging", str(staging or tempfile.gettempdir())
