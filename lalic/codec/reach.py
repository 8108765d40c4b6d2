"""Which weights are in reach of the codec, without opening any: names, places and fingerprints of bundles.

Nothing here imports torch or asks a server, so that `lalic info` answers at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lalic.codec.bitstream import LalicFile
from lalic.errors import LalicError
from lalic.fetch import VARIABLE, candidates, search_path
from lalic.fetch_cache import cached_bundles, without_suffix
from lalic.release_builtin import DEFAULT_QUALITY, builtin_bundle, builtin_bundles, builtin_names, none_built_in
from lalic.release_files import CONFIG, read_config


class Found(NamedTuple):
    """Weights on this machine."""

    path: Path
    where: str
    """In words: "built in", "in the cache", or the place that was searched."""


def named() -> list[Path]:
    """What LALIC_WEIGHTS and ./release hold: bundles and weights files."""
    return [candidate for place in search_path() for candidate in candidates(place)]


def in_reach() -> Iterator[Found]:
    """All weights on this machine, in the order in which they are asked for a file's fingerprint."""
    for place in search_path():
        yield from (Found(path, f"in {place}") for path in candidates(place))
    yield from (Found(path, "in the cache") for path in cached_bundles())
    yield from (Found(path, "built in") for path in builtin_bundles())


def matches(hexadecimal: object, file: LalicFile) -> bool:
    """Whether a model's fingerprint is the one that a file names."""
    return str(hexadecimal).startswith(file.fingerprint.hex())


def at_hand(file: LalicFile) -> str:
    """Whether the weights that decode a file are on this machine, in words, by what bundles say of themselves."""
    try:
        found = list(in_reach())
    except LalicError as error:
        return f"not looked for: {error}"
    unknown = 0
    for path, where in found:
        if not (path / CONFIG).is_file():
            unknown += 1  # a weights file: its fingerprint is known once it is loaded
            continue
        try:
            config = read_config(path)
        except (LalicError, OSError):
            continue
        if matches(config["fingerprint"], file):
            return f"{config.get('name') or path.name}, {where}"
    more = f" ({unknown} weights file{'s' if unknown > 1 else ''} in {VARIABLE} not looked into)" if unknown else ""
    return f"not at hand{more}: `lalic decompress` needs --weights or {VARIABLE}"


def weights_of_quality(quality: int | None) -> Path:
    """Weights to compress with where none are named.

    What LALIC_WEIGHTS and ./release hold, if that is anything: the only one, or the one of the quality. Else the
    built-in ones. Without a `quality`, DEFAULT_QUALITY, or the built-in one that is nearest to it. Raises LalicError
    that lists what there is.
    """
    found = named()
    if not found:
        if os.environ.get(VARIABLE):
            raise LalicError(f"{VARIABLE} is set, but there are no weights in what it names: unset it, or name others")
        return _built_in(quality)
    if quality is None and len(found) == 1:
        return found[0]
    wanted = DEFAULT_QUALITY if quality is None else quality
    fitting = [path for path in found if _quality(path) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(str(path) for path in found[:6]) + (", ..." if len(found) > 6 else "")
    several = "several" if fitting else "none"
    built_in = next((n for n in builtin_names() if n == f"lalic-mse-q{wanted}"), "")
    raise LalicError(
        f"which weights to compress with? {several} of quality {wanted} in reach ({there}): choose with --weights"
        f"{' or --quality' if quality is None else ''}"
        f"{f' (--weights {built_in} takes the built-in ones)' if built_in and not fitting else ''}"
    )


def built_in_qualities() -> dict[int, str]:
    """Names of the built-in bundles by their rung."""
    return {q: name for name in builtin_names() if (q := _label(name)) is not None}


def _built_in(quality: int | None) -> Path:
    names = built_in_qualities()
    if not names:
        raise none_built_in()
    nearest = min(names, key=lambda q: (abs(q - DEFAULT_QUALITY), -q))
    wanted = nearest if quality is None else quality
    if wanted not in names:
        there = ", ".join(map(str, sorted(names)))
        raise LalicError(f"there are no built-in weights of quality {wanted}: choose with --quality among {there}")
    path = builtin_bundle(names[wanted])
    assert path is not None
    return path


def _quality(path: Path) -> int | None:
    """The rung of weights: what a bundle says, or a weights file's name; None where neither tells."""
    if not (path / CONFIG).is_file():
        return _label(without_suffix(path.name))
    try:
        quality = read_config(path).get("quality")
    except (LalicError, OSError):
        return None
    return quality if isinstance(quality, int) else None


def _label(name: str) -> int | None:
    match = re.fullmatch(r"lalic-(mse|ms-ssim)-q([1-6])", name)
    return int(match[2]) if match else None
