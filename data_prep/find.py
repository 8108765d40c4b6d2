"""Ways from a manifest's samples to their bytes, in whatever `--input` names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .parts import in_order
from .rebuild import Find
from .sources import Listing, list_inputs, make_keys


def finders(source: str, workers: int) -> Iterator[Find]:
    """First by name, then, since files may have been moved or renamed, all others by their bytes."""
    listing = list_inputs(source)
    keys = make_keys(listing.paths)
    yield partial(_named, listing, keys, workers)
    yield partial(_others, listing, keys, workers)


def _named(listing: Listing, keys: list[str], workers: int, wanted: Collection[str]) -> Iterable[tuple[str, bytes]]:
    chosen = [number for number, key in enumerate(keys) if key in wanted]
    return _read_all(listing, keys, chosen, workers)


def _others(listing: Listing, keys: list[str], workers: int, wanted: Collection[str]) -> Iterable[tuple[str, bytes]]:
    chosen = [number for number, key in enumerate(keys) if key not in wanted]
    return _read_all(listing, keys, chosen, workers)


def _read_all(listing: Listing, keys: list[str], chosen: list[int], workers: int) -> Iterator[tuple[str, bytes]]:
    with ThreadPoolExecutor(max(1, workers)) as pool:
        paths = (os.path.join(listing.root, listing.paths[number]) for number in chosen)
        for number, (_, data) in zip(chosen, in_order(pool, _read, paths), strict=True):
            if data is not None:
                yield keys[number], data


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None
