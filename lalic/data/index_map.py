"""A large index parsed once on a machine: its arrays in a file that every process maps.

    CACHE/index/<sha256 of index.json>/  about.json, NAME.npy ...   written aside and renamed, so whole or absent

With 9 million samples the JSON takes half a minute and 2 GB to parse and the arrays 0.5 GB; mapped, they take
milliseconds, and the pages that are touched are shared by all ranks and workers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lalic.data.index_json import parse_index
from lalic.files import cache_folder, fsync_folder, sha256_of, write_json

logger = logging.getLogger("lalic.data")

Arrays = dict[str, np.ndarray]

_ABOUT = "about.json"
# Raised when the arrays of the same index.json change.
_FORMAT = 1


def mapped(path: Path) -> tuple[Path | None, dict[str, Any], Arrays]:
    """The map of the index at `path`, made when it is not there yet, and what it holds.

    Where no file can be kept (no room, a read-only home) the arrays stay in memory, and the path is None. Raises
    LalicError as `parse_index`.
    """
    folder = cache_folder() / "index" / f"{sha256_of(path)}-{_FORMAT}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            try:
                return folder, *open_map(folder)
            except (OSError, ValueError, KeyError, TypeError):
                logger.info("reading %s (%.0f MB), once on this machine", path, path.stat().st_size / 1e6)
                _write_map(folder, *parse_index(path))
        return folder, *open_map(folder)
    except OSError as error:
        logger.warning("%s: the index cannot be kept there (%s), it stays in memory", folder, error.strerror or error)
        return None, *parse_index(path)


def open_map(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """The shards' names and sums, and the samples' arrays, mapped. OSError, ValueError, KeyError or TypeError when
    there is no map or a damaged one.
    """
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    # A plain view: numpy's memmap class is slow to index.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in about["arrays"]}
    if {name: len(array) for name, array in arrays.items()} != about["arrays"]:
        raise ValueError(f"{folder}: arrays of another length")
    return about, arrays


def _write_map(folder: Path, about: dict[str, Any], arrays: Arrays) -> None:
    # The lock is held: what lies under these names was left by a process that was killed, or is damaged.
    temporary = folder.with_name(f"{folder.name}.tmp")
    for leaving in (temporary, folder):
        shutil.rmtree(leaving, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        write_json(temporary / _ABOUT, {**about, "arrays": {name: len(array) for name, array in arrays.items()}})
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
