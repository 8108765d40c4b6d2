"""Ways from a manifest's samples to their bytes, in whatever `--input` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .opening import open_source
from .rebuild import Find
from .sources import Source


def finders(source: Source | str | Path | Sequence[str], workers: int) -> Iterator[Find]:
    """First by name, then, since files may have been moved or renamed, all others by their bytes.

    `workers`: threads that read files of this machine.
    """
    opened = open_source(source) if isinstance(source, (str, Path, Sequence)) else source
    opened.readers = max(1, workers)
    for _ in range(opened.looks):
        yield opened.find
    yield lambda wanted: opened.find_others(wanted.sizes())
