"""Which weights decode a file: those given, or those whose fingerprint the file names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lalic.codec.bitstream import LalicFile
from lalic.codec.reach import in_reach, matches
from lalic.errors import LalicError
from lalic.fetch import HUB, VARIABLE, from_hub, is_name, search_path
from lalic.fetch_cache import cached_bundles
from lalic.release import Weights, open_weights
from lalic.release_builtin import builtin_bundle, builtin_names
from lalic.release_files import CONFIG, read_config
from lalic.remote import without_password

log = logging.getLogger("lalic.codec")


def weights_for(file: LalicFile, name: str, given: str | Path | None) -> Weights:
    """Weights that decode `file` (called `name` in messages).

    With `given` (anything that `open_weights` takes), those, or LalicError when they are another model's. Without, what
    LALIC_WEIGHTS names, the bundles in ./release, those in the cache and those that come with the package are searched
    for the fingerprint, then the one of the file's label below LALIC_HUB_URL.
    """
    if given is not None:
        weights = open_weights(given)
        found = weights.fingerprint
        if not matches(found, file):
            raise LalicError(
                f"{name} was written with {file.model_name}, but {given} is another model: "
                f"{weights.name} (fingerprint {found[: len(file.fingerprint) * 2]})"
            )
        return weights
    searched = [*map(str, search_path()), *(["the cache"] if cached_bundles() else [])]
    searched += ["the built-in ones"] if builtin_names() else []
    damaged: LalicError | None = None
    for candidate in _in_reach(file, searched):
        named = False
        try:
            if (candidate / CONFIG).exists():
                if not matches(read_config(candidate)["fingerprint"], file):
                    continue
                named = True
            weights = open_weights(candidate)
        except LalicError as error:
            # One damaged bundle must not hide the right one.
            if named:
                damaged = error
            else:
                log.warning("passed over: %s", error)
            continue
        if matches(weights.fingerprint, file):
            return weights
    if damaged is not None:
        raise LalicError(f"{name} needs {file.model_name}: {damaged}") from damaged
    where = f"not found in {', '.join(searched)}" if searched else f"no ./release and no {VARIABLE} to search"
    raise LalicError(
        f"{name} needs {file.model_name}: {where}{_lost(file)}; give it with --weights or name its place in {VARIABLE}"
    )


def _lost(file: LalicFile) -> str:
    """A hint where the built-in weights of the file's label were installed and are gone."""
    try:
        builtin_bundle(file.model_name.split()[0])
    except LalicError as error:
        return f"; {error}"
    return ""


def _in_reach(file: LalicFile, searched: list[str]) -> Iterator[Path]:
    """Places on this machine, then the hub's bundle of the file's label, which is added to `searched`."""
    yield from (found.path for found in in_reach())
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
