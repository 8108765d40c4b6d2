"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """Where what can be made again is kept: LALIC_CACHE_DIR, or `lalic` in XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("LALIC_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lalic"


@contextmanager
def atomic_open(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; it takes the name `path` once everything is on the disk.

    When the body raises, the temporary file is removed and whatever stood at `path` before stays.
    """
    path = Path(path)
    # The process number keeps two writers of one path apart; the last rename wins, both files are whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: str | Path) -> None:
    """Make the names in `folder` (a rename, a new file) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """One process at a time is in here for `folder`, which must exist; the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_open(path, "w") as file:
        file.write(text)


def json_text(value: Any) -> str:
    """`value` as indented JSON with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` atomically as indented JSON with a final newline."""
    write_text(path, json_text(value))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in bounded memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
