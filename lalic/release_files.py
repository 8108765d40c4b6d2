"""What every reader of a release bundle relies on: the names of its files, its configuration and its checksums."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalic.errors import LalicError, for_terminal
from lalic.files import sha256_of

FORMAT = 1
SUMS = "SHA256SUMS"
CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
CARD = "README.md"
METRICS = "metrics.json"
EVALUATION = "evaluation.json"
REFERENCE = "reference.lalic"

FLOAT32, FLOAT16 = "float32", "float16"
"""Of model.safetensors: float32 stands beside a .pth of the same numbers, float16 alone (a compact bundle)."""

OF_A_HUB = frozenset({".gitattributes", ".git", ".cache"})
"""What git and a model hub's client put beside the files of a bundle; nothing here reads them."""

MOST_CONFIG = 1 << 20
"""Bytes of a config.json or SHA256SUMS that is still believed to be one."""


def verify_bundle(folder: str | Path, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Check a bundle's files against its SHA256SUMS and return its config.

    `only` limits the check to some files, which must be listed. Raises LalicError naming the first file
    that is missing, damaged or not listed.
    """
    folder = Path(folder)
    sums = read_sums(folder)
    wanted = [*sums] if only is None else [*only]
    unlisted = [n for n in (CONFIG, SAFETENSORS, *(only or ())) if n not in sums]
    if only is None:
        unlisted += strangers(folder, sums)
    if unlisted:
        name = for_terminal(unlisted[0])
        raise LalicError(f"{folder / SUMS} does not list {name}: the bundle is not as it was released")
    for name in wanted:
        file = folder / name
        if not file.is_file():
            raise LalicError(f"{folder} is incomplete: {name} is missing; get the bundle again")
        if sha256_of(file) != sums[name]:
            raise LalicError(f"{file} is damaged: its SHA-256 is not the one in {SUMS}; get the bundle again")
    return read_config(folder)


def strangers(folder: Path, sums: dict[str, str]) -> list[str]:
    """Names in the bundle's folder that its sums do not list."""
    return sorted(f.name for f in folder.iterdir() if f.name not in {*sums, SUMS} | OF_A_HUB)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a bundle, not checked against its sum; LalicError when it is not one."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("fingerprint"), str):
        raise LalicError(f"{folder / CONFIG} is not the configuration of a release bundle")
    if config.get("format") != FORMAT:
        raise LalicError(f"{folder} has bundle format {config.get('format')}, this program reads format {FORMAT}")
    return config


def read_json(path: Path, most: int = MOST_CONFIG) -> Any:
    """A JSON file of `most` bytes at most; LalicError when it cannot be read."""
    try:
        if path.stat().st_size > most:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        return json.loads(path.read_text(encoding="utf-8"))
    # Nested a thousand times, brackets end in a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise LalicError(f"{path} cannot be read: {error}") from error


def read_sums(folder: Path) -> dict[str, str]:
    """The sums that a bundle was written with, by file name; LalicError when it has none that can be read."""
    try:
        if (folder / SUMS).stat().st_size > MOST_CONFIG:
            raise ValueError("too large")
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LalicError(f"{folder} is not a release bundle: it has no readable {SUMS}") from error
    return parse_sums(text, str(folder / SUMS))


def parse_sums(text: str, name: str) -> dict[str, str]:
    """SHA-256 by file name, from what `sha256sum` prints for files of one folder; `name` stands in the LalicError."""
    sums: dict[str, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([A-Za-z0-9][A-Za-z0-9._-]*)", line)
        if not match or match[2] in sums:
            what = "a file's second line" if match else "not a checksum and a file name"
            raise LalicError(f"{name} is damaged: {for_terminal(line[:80])!r} is {what}")
        sums[match[2]] = match[1]
    return sums


def read_extra(folder: Path, name: str, empty: Any) -> Any:
    """A JSON file that a bundle may lack, checked against its sum; `empty` when it is not there."""
    if not (folder / name).exists():
        return empty
    verify_bundle(folder, only=(name,))
    found = read_json(folder / name)
    return found if isinstance(found, type(empty)) else empty
