"""Which weights are in reach of the codec, without opening any: names, places and fingerprints of bundles.

Nothing here imports torch or asks a server, so that `lalic info` answers at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from lalic.codec.bitstream import LalicFile
from lalic.errors import LalicError
from lalic.fetch import VARIABLE, candidates, search_path
from lalic.fetch_cache import cached_bundles, without_suffix
from lalic.ladder import MSE
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


class Offer(NamedTuple):
    """The qualities that weights have: one rung, or all real numbers of a range."""

    lowest: int
    highest: int

    @property
    def one_rate(self) -> bool:
        """Whether these are weights of one rate."""
        return self.lowest == self.highest

    def has(self, quality: float) -> bool:
        """Whether the weights can code with a quality."""
        return self.lowest <= quality <= self.highest

    def __str__(self) -> str:
        return f"{self.lowest}" if self.one_rate else f"{self.lowest} to {self.highest} in steps of 0.001"


def weights_of_quality(quality: float | None) -> Path:
    """Weights to compress with where none are named.

    What LALIC_WEIGHTS and ./release hold, if that is anything: the only one, or the one of the quality. Else the
    built-in ones. Weights of one rate come before those of several rates, which have every quality of a range. Without
    a `quality`, DEFAULT_QUALITY, or the built-in one that is nearest to it. Raises LalicError that lists what there
    is.
    """
    found = named()
    if not found:
        if os.environ.get(VARIABLE):
            raise LalicError(f"{VARIABLE} is set, but there are no weights in what it names: unset it, or name others")
        return _built_in(quality)
    offers = {path: _offer(path) for path in found}
    if len(found) == 1 and (quality is None or offers[found[0]] is None):
        return found[0]  # what a file does not tell by its name, it tells when it is opened
    wanted = DEFAULT_QUALITY if quality is None else quality
    fitting = _fitting(offers, wanted)
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(_described(*item) for item in list(offers.items())[:6]) + (", ..." if len(found) > 6 else "")
    several = "several" if fitting else "none"
    built_in = _fitting(built_in_offers(), wanted)
    raise LalicError(
        f"which weights to compress with? {several} of quality {wanted:g} in reach ({there}): choose with --weights"
        f"{' or --quality' if quality is None else ''}"
        f"{f' (--weights {built_in[0]} takes the built-in ones)' if built_in and not fitting else ''}"
    )


Key = TypeVar("Key")


def _fitting(offers: Mapping[Key, Offer | None], quality: float) -> list[Key]:
    """The weights of one rate that have the quality; where there are none, those of several rates."""
    fitting = {key: offer for key, offer in offers.items() if offer is not None and offer.has(quality)}
    return [key for key, offer in fitting.items() if offer.one_rate] or list(fitting)


def _described(path: Path, offer: Offer | None) -> str:
    return f"{path}" if offer is None else f"{path}: {offer}"


def built_in_offers() -> dict[str, Offer]:
    """What the built-in bundles have, by their names; those trained for MSE first."""
    offers = {name: _offer_of_name(name) for name in sorted(builtin_names(), key=lambda n: ("ms-ssim" in n, n))}
    folders = {path.name: path for path in builtin_bundles()}
    told = {name: (_offer(folders[name]) if name in folders else None) or offer for name, offer in offers.items()}
    return {name: offer for name, offer in told.items() if offer is not None}


def described_offers(offers: Iterable[Offer]) -> str:
    """In words, `3, 4, 5, 6, or 1 to 6 in steps of 0.001`."""
    rungs = sorted({offer.lowest for offer in offers if offer.one_rate})
    ranges = sorted({offer for offer in offers if not offer.one_rate})
    return ", or ".join(filter(None, [", ".join(map(str, rungs)), ", ".join(map(str, ranges))]))


def _built_in(quality: float | None) -> Path:
    offers = built_in_offers()
    if not offers:
        raise none_built_in()
    wanted = DEFAULT_QUALITY if quality is None else quality
    fitting = _fitting(offers, wanted)
    if not fitting and quality is not None:
        there = described_offers(offers.values())
        raise LalicError(f"there are no built-in weights of quality {quality:g}: choose with --quality among {there}")
    path = builtin_bundle(fitting[0] if fitting else min(offers, key=lambda name: _distance(offers[name])))
    assert path is not None
    return path


def _distance(offer: Offer) -> tuple[int, int]:
    """From DEFAULT_QUALITY; of two that are as near, the higher one counts as nearer."""
    nearest = min(max(DEFAULT_QUALITY, offer.lowest), offer.highest)
    return abs(nearest - DEFAULT_QUALITY), -nearest


def _offer(path: Path) -> Offer | None:
    """What a bundle says, or a weights file's name; None where neither tells."""
    if not (path / CONFIG).is_file():
        return _offer_of_name(without_suffix(path.name))
    try:
        config = read_config(path)
    except (LalicError, OSError):
        return None
    loss = config.get("loss")
    match (loss.get("quality") if isinstance(loss, Mapping) else None, config.get("quality")):
        case [int(lowest), int(highest)], _:
            return Offer(lowest, highest)
        case _, int(quality):
            return Offer(quality, quality)
    return None


def _offer_of_name(name: str) -> Offer | None:
    match = re.fullmatch(r"lalic-(?:mse|ms-ssim)-(?:q([1-6])|vbr)", name)
    if match is None:
        return None
    return Offer(int(match[1]), int(match[1])) if match[1] else Offer(min(MSE), max(MSE))
