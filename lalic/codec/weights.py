"""Which weights decode a file: those given, or those whose fingerprint the file names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lalic.codec.bitstream import LalicFile
from lalic.errors import LalicError
from lalic.fetch import HUB, VARIABLE, candidates, from_hub, is_name, search_path
from lalic.fetch_cache import cached_bundles
from lalic.release import Weights, open_weights
from lalic.release_files import CONFIG, read_config
from lalic.remote import without_password

log = logging.getLogger("lalic.codec")


def weights_for(file: LalicFile, name: str, given: str | Path | None) -> Weights:
    """Weights that decode `file` (called `name` in messages).

    With `given` (anything that `open_weights` takes), those, or LalicError when they are another model's. Without, what
    LALIC_WEIGHTS names, the bundles in ./release and those in the cache are searched for the fingerprint, then the one
    of the file's label below LALIC_HUB_URL.
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
    searched = [*map(str, search_path()), *(["the cache"] if cached_bundles() else [])]
    for candidate in _in_reach(file, searched):
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
    found = [candidate for place in search_path() for candidate in candidates(place)]
    if len(found) == 1:
        return found[0]
    reason = f"several are in reach ({', '.join(map(str, found[:4]))})" if found else "none are in reach"
    raise LalicError(f"which weights to compress with? {reason}: give them with --weights or {VARIABLE}")


def _in_reach(file: LalicFile, searched: list[str]) -> Iterator[Path]:
    """Places on this machine, then the hub's bundle of the file's label, which is added to `searched`."""
    for place in search_path():
        yield from candidates(place)
    yield from cached_bundles()
    label = file.model_name.split()[0]
    if not (os.environ.get(HUB) and is_name(label)):
        return
    searched.append(without_password(os.environ[HUB]))
    try:
        found = from_hub(label, needed=file.fingerprint.hex())
    except LalicError as error:
        log.warning("passed over: %s", error)
        return
    if found is not None:
        yield found


def _matches(hexadecimal: object, file: LalicFile) -> bool:
    return str(hexadecimal).startswith(file.fingerprint.hex())
