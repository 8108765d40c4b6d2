"""Small shards of noise, on a server that stumbles on demand, and readers of them with little patience."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from bucket_server import Bucket, serve_s3

from lalic.data.cache import ShardCache
from lalic.data.index import ShardIndex
from lalic.data.reader import CachedReader, RangeReader, Reader
from lalic.data.source import load_remote_index
from lalic.remote import Patience, Remote

QUICK = Patience(attempts=8, first_delay=0.01, most_delay=0.05, silence=5.0)


def write_noise(folder: Path, shards: int = 6, size: int = 50_000) -> ShardIndex:
    """Shards of random bytes with one sample each, the whole of it: for what never looks into a shard."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(shards):
        data = random.Random(number).randbytes(size)
        (folder / f"n-{number:06d}.tar").write_bytes(data)
        sample = {"key": f"k{number}", "offset": 0, "size": size, "width": 8, "height": 8}
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"name": f"n-{number:06d}.tar", "bytes": size, "sha256": digest, "samples": [sample]})
    (folder / "index.json").write_text(json.dumps({"version": 1, "shards": entries}))
    return ShardIndex.load(folder)


def put(bucket: Bucket, folder: Path, under: str = "shards") -> None:
    """Copy a folder of shards to the server."""
    for path in folder.iterdir():
        if path.is_file():
            bucket.files[f"{under}/{path.name}"] = path.read_bytes()


def reader(url: str, cache: Path, size: int = 1 << 30, endpoint: str | None = None, patience=QUICK) -> Reader:
    """As `open_shards`, with another patience."""
    remote = Remote(url, endpoint, patience)
    index = load_remote_index(remote, cache)
    return CachedReader(ShardCache(index, remote, cache / "shards", size)) if size else RangeReader(index, remote)


__all__ = ["QUICK", "put", "reader", "serve_s3", "write_noise"]
