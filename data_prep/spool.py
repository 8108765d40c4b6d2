"""What was fetched for a shard that is not finished yet, so that a kill does not make it be fetched again.

    SCRATCH/spool/PLACE-SIZE-SHA256

PLACE is the file's place in the job's order. A file that a kill or a power cut left half written does not have
the size or the sum that its name tells, and is fetched again; so nothing needs to be flushed to the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]{64})")
_TEMPORARY = re.compile(r"\.\d+-\d+")


class Spool:
    """A folder of fetched files. `get` and `put` may be called in many threads, each place in one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.stat().st_size == int(match[2]):
                self._names[int(match[1])] = path.name
            # What has another name is somebody else's.
            elif match or _TEMPORARY.fullmatch(path.name):
                path.unlink()
        self._unchecked = set(self._names)
        """Places of files from an earlier run whose sums nobody has looked at."""

    def get(self, place: int) -> str | None:
        """Path of the file that was fetched for `place`, None if there is none that is whole."""
        with self._lock:
            name = self._names.get(place)
        if name is None:
            return None
        path = self.folder / name
        if place in self._unchecked:
            self._unchecked.discard(place)
            if hashlib.sha256(path.read_bytes()).hexdigest() != name.rpartition("-")[2]:
                self._drop(place)
                return None
        return str(path)

    def put(self, place: int, data: bytes) -> str:
        """Keep `data` for `place`, in place of what was kept before; returns its path."""
        name = f"{place}-{len(data)}-{hashlib.sha256(data).hexdigest()}"
        path = self.folder / name
        # Another thread may still be at the same file, for a reader that is gone.
        temporary = self.folder / f".{place}-{threading.get_ident()}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            before = self._names.get(place)
            self._names[place] = name
        if before not in (None, name):
            (self.folder / str(before)).unlink(missing_ok=True)
        return str(path)

    def drop_before(self, place: int) -> None:
        """Remove what was kept for places before `place`."""
        with self._lock:
            places = [kept for kept in self._names if kept < place]
        for kept in places:
            self._drop(kept)

    def remove(self) -> None:
        """Remove all of it, and the folder when nothing else is in it."""
        self._names.clear()
        with suppress(OSError):
            for path in self.folder.iterdir():
                if _NAME.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _drop(self, place: int) -> None:
        with self._lock:
            name = self._names.pop(place, None)
        if name is not None:
            (self.folder / name).unlink(missing_ok=True)
