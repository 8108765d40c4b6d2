"""Ways from a manifest's samples to their bytes, in whatever `--input` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .opening import open_source
from .sources import Source
from .wanted import Find


def finders(source: Source | str | Path | Sequence[str], workers: int) -> Iterator[Find]:
    """First by name, and twice more what came damaged; then, since files may have been renamed, all others by bytes.

    `workers`: threads that read files of this machine.
    """
    opened = open_source(source) if isinstance(source, (str, Path, Sequence)) else source
    opened.readers = max(1, workers)
    yield opened.find
    for _ in range(opened.looks - 1):
        yield lambda wanted: opened.find(changed) if (changed := wanted.changed()) else iter(())
    yield lambda wanted: opened.find_others(wanted.sizes())
