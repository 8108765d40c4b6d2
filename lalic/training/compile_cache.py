"""What a process that was killed leaves in torch.compile's cache: half a file, which no later one replaces.

For the CPU, torch lets the compiler write to a file's final name, and compiles nothing of which there is a file. After
a kill in between, as a cluster's, every later run on this machine would fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEADER = 64
_SECTIONS = struct.Struct("<40xQ10xHH2x")
"""Of an ELF header: where the table of sections begins, the size of an entry, how many there are."""


def remove_half_written(cache: Path) -> list[Path]:
    """Remove the objects and libraries in torch's cache folder that are not whole. Returns their paths."""
    return _remove(cache, (path for kind in ("o", "so") for path in cache.glob(f"*/*.{kind}") if not _is_whole(path)))


def remove_precompiled_headers(folder: Path) -> list[Path]:
    """Remove all of them, for one cannot tell the whole ones; they are made anew. Returns their paths."""
    return _remove(folder, folder.glob("*.gch"))


def _remove(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Remove those that no process is compiling now."""
    removed = []
    for path in paths:
        with _unless_locked(folder, path) as free:
            if free:
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its table of sections, which linkers write last."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER)
            end = file.seek(0, os.SEEK_END)
    except FileNotFoundError:  # another rank has just removed it
        return True
    if len(header) < _HEADER or header[:4] != b"\x7fELF":
        return False
    begin, size, number = _SECTIONS.unpack(header)
    return bool(begin >= _HEADER and end >= begin + size * number)


@contextlib.contextmanager
def _unless_locked(folder: Path, path: Path) -> Iterator[bool]:
    """Whether nobody else is compiling it, nor begins to meanwhile; torch's locks bear the first part of its name."""
    try:
        lock = os.open(folder / "locks" / f"{path.name.split('.')[0]}.lock", os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)
