"""What an evaluation has measured so far, so that one that was killed does not measure it again.

`RESULT.progress/` holds a file of JSON lines for each process. A line is one picture with one checkpoint; its key is
a hash of everything that the numbers depend on: the weights, the picture's bytes, the settings, versions and machine.
So a line is used again exactly where it would be measured again alike, and there is nothing to be said on the command
line. The folder is removed when the result is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lalic.files import sha256_of
from lalic.measure import Row


class Journal:
    """The progress of one process, and what all of them left when they were killed; no `result`: keeps nothing."""

    def __init__(self, result: Path | None, rank: int):
        self.folder = result.with_name(f"{result.name}.progress") if result else None
        self._rank = rank
        self._file: IO[str] | None = None

    def entries(self) -> dict[str, dict[str, Any]]:
        """{key: {"record", "reconstruction"}} of all lines that are whole."""
        entries = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder else []:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    key, record = entry.pop("key"), entry["record"]
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # half a line: its process was killed while it wrote
                if isinstance(record, dict):
                    entries[key] = entry
        return entries

    def append(self, key: str, record: Row, reconstruction: str | None) -> None:
        """Keep one record; `reconstruction` is the SHA-256 of the picture that was written, if one was."""
        if self.folder is None:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / f"process{self._rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._file.write("\n")  # after half a line
        self._file.write(json.dumps({"key": key, "reconstruction": reconstruction, "record": record}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Forget everything: the result is complete, or is to be measured anew."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def key_of(settings: Mapping[str, Any], image_sha256: str) -> str:
    """The key of one picture under `settings`, whatever its file is called."""
    text = json.dumps([dict(settings), image_sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ImageSums:
    """SHA-256 of pictures' files, computed once for all checkpoints; "" where a file cannot be read."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """SHA-256 of a file's bytes."""
        if path not in self._known:
            try:
                self._known[path] = sha256_of(path)
            except OSError:
                self._known[path] = ""
        return self._known[path]
