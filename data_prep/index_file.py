"""Writing index.json; lalic/data/index.py reads it and says what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from lalic.data.index import INDEX_NAME, INDEX_VERSION

from .output import OutputFolder

_FIELDS = ("key", "ext", "offset", "size", "width", "height")


class IndexedShard(NamedTuple):
    """One shard; the samples hold at least the fields of the index."""

    name: str
    bytes: int
    sha256: str
    samples: Iterable[dict[str, Any]]


def write_index(output: OutputFolder, prefix: str, seed: int, min_side: int, shards: Iterable[IndexedShard]) -> None:
    """Write the index atomically, one line per sample, as it goes: that of a large job need not fit in memory."""
    head = {"version": INDEX_VERSION, "prefix": prefix, "seed": seed, "min_side": min_side}
    with output.open_text(INDEX_NAME) as file:
        file.write(json.dumps(head)[:-1] + ', "shards": [')
        separator = "\n"
        for shard in shards:
            entry = {"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256}
            file.write(separator + json.dumps(entry)[:-1] + ', "samples": [\n ')
            lines = (json.dumps({name: sample[name] for name in _FIELDS}) for sample in shard.samples)
            file.write(",\n ".join(lines))
            file.write("\n]}")
            separator = ",\n"
        file.write("\n]}\n")
