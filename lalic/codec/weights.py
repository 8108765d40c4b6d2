"""Which weights decode a file: those given, or those whose fingerprint the file names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lalic.codec.bitstream import LalicFile
from lalic.errors import LalicError
from lalic.release import CONFIG, Weights, open_weights, read_config

log = logging.getLogger("lalic.codec")

VARIABLE = "LALIC_WEIGHTS"
"""Environment variable: weights file, bundle, or folder of bundles; several are separated as in PATH."""


def weights_for(file: LalicFile, name: str, given: str | Path | None) -> Weights:
    """Weights that decode `file` (called `name` in messages).

    With `given`, those, or LalicError when they are another model's. Without, what LALIC_WEIGHTS names and
    then the bundles in ./release are searched for the fingerprint.
    """
    if given is not None:
        weights = open_weights(given)
        found = weights.fingerprint
        if not _matches(found, file):
            raise LalicError(
                f"{name} was written with {file.model_name}, but {given} is another model: "
                f"{weights.name} (fingerprint {found[: len(file.fingerprint) * 2]})"
            )
        return weights
    searched = []
    for place in search_path():
        searched.append(str(place))
        for candidate in _candidates(place):
            try:
                if (candidate / CONFIG).exists() and not _matches(read_config(candidate)["fingerprint"], file):
                    continue
                weights = open_weights(candidate)
            except LalicError as error:
                # One damaged bundle must not hide the right one.
                log.warning("passed over: %s", error)
                continue
            if _matches(weights.fingerprint, file):
                return weights
    where = f"not found in {', '.join(searched)}" if searched else f"no ./release and no {VARIABLE} to search"
    raise LalicError(f"{name} needs {file.model_name}: {where}; give it with --weights or name its place in {VARIABLE}")


def default_weights() -> Path:
    """Weights to compress with when none are given: LALIC_WEIGHTS or ./release, if they hold exactly one."""
    found = [candidate for place in search_path() for candidate in _candidates(place)]
    if len(found) == 1:
        return found[0]
    reason = f"several are in reach ({', '.join(map(str, found[:4]))})" if found else "none are in reach"
    raise LalicError(f"which weights to compress with? {reason}: give them with --weights or {VARIABLE}")


def search_path() -> list[Path]:
    """Places named by LALIC_WEIGHTS (which must exist), then ./release if it is there."""
    named = [Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    for place in named:
        if not place.exists():
            raise LalicError(f"{VARIABLE} names {place}, which does not exist")
    release = Path("release")
    return [*named, *([release] if release.is_dir() else [])]


def _candidates(place: Path) -> Iterator[Path]:
    """The weights file or bundle itself, or the bundles in a folder."""
    if not place.is_dir() or (place / CONFIG).exists():
        yield place
    else:
        yield from sorted(f for f in place.iterdir() if (f / CONFIG).exists() and not f.name.startswith("."))


def _matches(hexadecimal: object, file: LalicFile) -> bool:
    return str(hexadecimal).startswith(file.fingerprint.hex())
