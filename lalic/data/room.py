"""A folder of whole files of bounded total size, shared by processes that may be killed at any moment.

    FOLDER/KEY.tar     whole and checked; KEY is <sha256>-<bytes>
    FOLDER/KEY.part    being fetched by the process that has a lock on it; a beginning when nobody has
    FOLDER/.lock       held while somebody decides what is removed

A part counts with all the bytes that it will have. The time of a file is when it was last wanted, and what was not
wanted for the longest time goes first. The kernel gives up the locks of a process that dies. Where a file system has no
locks, every process makes parts of its own, and may fetch what another one fetches too.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from lalic.files import fsync_folder

logger = logging.getLogger("lalic.data")

IDLE = 5.0
"""Seconds after which what nobody wants any more makes room for what is not needed yet."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_ENTRY = re.compile(r"[0-9a-f]{64}-(\d+)(\.[0-9a-f]{32})?\.(tar|part)")
# Of a part that cannot be locked: then it is of a process that is gone.
_ABANDONED = 3600.0


class _Entry(NamedTuple):
    path: str
    size: int
    wanted: float
    whole: bool


class Part(NamedTuple):
    """A file to be filled, that nobody else has. `handle` is open for reading and writing."""

    path: Path
    handle: int

    def finish(self, final: Path) -> None:
        """Give it its final name, once everything is on the disk."""
        os.fsync(self.handle)
        os.replace(self.path, final)
        fsync_folder(final.parent)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave what there is of it to whoever wants to go on."""
        # Explicitly: a process forked meanwhile has the handle too and would keep the lock.
        with suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_UN)
        os.close(self.handle)


class Room:
    """One such folder, and how many bytes it may hold."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Make the folder, and make it smaller when it holds more, but for what others want now. Raises OSError."""
        self.folder, self.limit = folder, limit
        self.has_locks = True
        folder.mkdir(parents=True, exist_ok=True)
        with self._deciding():
            self._shrink(limit, IDLE)
        if not self.has_locks:
            logger.warning("%s: this file system has no locks, every process fetches shards for itself", folder)

    def whole(self, key: str) -> Path:
        """Where the file lies when it is there."""
        return self.folder / f"{key}.tar"

    def want(self, keys: Iterable[str]) -> None:
        """Note that these files are wanted; the last ones are the last to go."""
        for key in keys:
            with suppress(OSError):
                os.utime(self.whole(key))

    def claim(self, key: str, *, idle: float = 0.0) -> Part | None:
        """The part to fill, with room for all of it; None while another process has it, or when there is no room.

        For it, files go that were not wanted for `idle` seconds.
        """
        with self._deciding():
            part = self._open_part(key)
            if part is None:
                return None
            here = self.whole(key).exists()
            if here or not self._shrink(self.limit, idle, keep=part.path):
                if here or os.fstat(part.handle).st_size == 0:
                    part.remove()
                part.close()
                return None
            return part

    def wait(self, key: str) -> None:
        """Return when no process fills this part any more; when none does, after a moment."""
        with suppress(FileNotFoundError):
            handle = os.open(self.folder / f"{key}.part", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _lock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB) is False:
                    _lock(handle, fcntl.LOCK_SH)
                    return
            finally:
                os.close(handle)
        time.sleep(0.1)

    def free(self, part: Part, idle: float) -> bool:
        """Remove one file to make room on a full disk; False when there is none."""
        with self._deciding():
            for entry in self._oldest(idle):
                if entry.path != str(part.path) and self._remove(entry):
                    return True
        return False

    def used(self) -> int:
        """Bytes, those that parts will have included."""
        return sum(entry.size for entry in self._entries())

    def _shrink(self, limit: int, idle: float, keep: Path | None = None) -> bool:
        over = self.used() - limit
        if over > 0:
            for entry in self._oldest(idle):
                if entry.path != str(keep) and self._remove(entry):
                    over -= entry.size
                    if over <= 0:
                        break
        return over <= 0

    def _oldest(self, idle: float) -> list[_Entry]:
        # Without a limit of time none is looked at: the clock of a file server may be ahead of ours.
        latest = time.time() - idle if idle else math.inf
        return sorted((e for e in self._entries() if e.wanted <= latest), key=lambda entry: entry.wanted)

    def _entries(self) -> Iterator[_Entry]:
        with os.scandir(self.folder) as found:
            for item in found:
                match = _ENTRY.fullmatch(item.name)
                if match:
                    with suppress(FileNotFoundError):
                        yield _Entry(item.path, int(match[1]), item.stat().st_mtime, match[3] == "tar")

    def _remove(self, entry: _Entry) -> bool:
        """Whether it is gone; a part that somebody fills stays."""
        if not entry.whole and not self._is_abandoned(entry):
            return False
        Path(entry.path).unlink(missing_ok=True)
        logger.debug("%s is removed to make room", entry.path)
        return True

    def _is_abandoned(self, entry: _Entry) -> bool:
        if not self.has_locks:
            return time.time() - entry.wanted > _ABANDONED
        try:
            handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # it has its final name by now
        try:
            return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False and _is(handle, Path(entry.path))
        finally:
            os.close(handle)

    def _open_part(self, key: str) -> Part | None:
        name = f"{key}.part" if self.has_locks else f"{key}.{uuid4().hex}.part"
        path = self.folder / name
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Between the two calls it may have got its final name, and be nobody's.
        if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) is False or not _is(handle, path):
            os.close(handle)
            return None
        os.utime(handle)
        return Part(path, handle)

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.has_locks = _lock(handle, fcntl.LOCK_EX) is not None
            yield
        finally:
            _lock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _lock(handle: int, operation: int) -> bool | None:
    """Whether the lock was had; None on a file system without locks."""
    try:
        fcntl.flock(handle, operation)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is the one that now lies at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
