"""`data.shards`, a folder or the URL of one, to a reader of its samples.

folder                      ─► LocalReader
URL                         ─► ShardCache ─► CachedReader     whole shards, on this machine's disk
URL, data.cache_size: 0     ─► RangeReader                    each sample by itself
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lalic.data.ahead import ahead
from lalic.data.cache import AHEAD, CHUNK, ShardCache
from lalic.data.index import INDEX_NAME, ShardIndex
from lalic.data.reader import CachedReader, LocalReader, RangeReader, Reader
from lalic.errors import LalicError
from lalic.files import atomic_open, cache_folder, write_json
from lalic.remote import Remote, RemoteMissing, is_url

logger = logging.getLogger("lalic.data")

CACHE_SIZE = 100 << 30
"""Bytes of the cache when nobody says otherwise."""

_VERSION = "version.json"
_QUESTIONS = 5


def open_shards(
    shards: str, *, endpoint: str | None = None, cache: str | None = None, cache_size: int | None = None
) -> Reader:
    """Load the index of `shards` and choose how they are read.

    Args:
        shards: a folder, or a URL: http(s)://, s3:// or whatever else fsspec reads.
        endpoint: of an S3-compatible server.
        cache: folder for what comes from a URL; None: LALIC_CACHE_DIR or ~/.cache/lalic.
        cache_size: most bytes of shards in it; 0: none are kept, samples are read one by one; None: CACHE_SIZE.

    Raises:
        LalicError: no such shards, an index that is none, a cache that cannot be used, or settings that a folder of
            this machine has no use for.
    """
    if not is_url(shards):
        given = {"data.endpoint": endpoint, "data.cache": cache, "data.cache_size": cache_size}
        idle = [name for name, value in given.items() if value is not None]
        if idle:
            raise LalicError(
                f"{' and '.join(idle)}: only for shards elsewhere, but data.shards={shards} is a folder of this "
                "machine: take the setting out, or give a URL"
            )
        return LocalReader(ShardIndex.load(shards))
    scheme, _, place = shards.partition("://")
    remote = Remote(f"{scheme}://{place.rstrip('/')}", endpoint)
    folder = Path(cache).expanduser().absolute() if cache is not None else cache_folder()
    index = load_remote_index(remote, folder)
    if cache_size == 0:
        return RangeReader(index, remote)
    return CachedReader(ShardCache(index, remote, folder / "shards", cache_size or CACHE_SIZE))


def load_remote_index(remote: Remote, cache: Path) -> ShardIndex:
    """The index at a URL, fetched once on a machine and again when it has changed there."""
    where = hashlib.sha256(f"{remote.endpoint or ''} {remote.root}".encode()).hexdigest()[:32]
    folder = cache / "remote" / where
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            _fetch_index(remote, folder)
        index = _load(remote, folder)
    except OSError as error:
        raise LalicError(
            f"{folder}: {error.strerror or error}: see that data.cache is a folder with room that this user may "
            "write to"
        ) from error
    return replace(index, folder=remote.shown)


def _load(remote: Remote, folder: Path) -> ShardIndex:
    try:
        return ShardIndex.load(folder)
    except LalicError as error:
        (folder / _VERSION).unlink(missing_ok=True)  # it is not to be found good again
        raise LalicError(f"{remote.shown}/{INDEX_NAME}, kept as {error}") from error


def _fetch_index(remote: Remote, folder: Path) -> None:
    """Make `folder/index.json` what lies at the URL."""
    try:
        version = remote.info(INDEX_NAME)
        # Asked until it says the same twice: a server in trouble may misstate a length, and an index has no sum.
        for _ in range(_QUESTIONS):
            before, version = version, remote.info(INDEX_NAME)
            if version == before:
                break
    except RemoteMissing as error:
        raise LalicError(
            f"{remote.shown}: there is no {INDEX_NAME}, so it is no folder of shards, or not all of it is there yet"
        ) from error
    path, note = folder / INDEX_NAME, folder / _VERSION
    noted = {"size": version.size, "etag": version.etag}
    with suppress(OSError, ValueError):
        same = json.loads(note.read_text(encoding="utf-8")) == noted and path.stat().st_size == version.size
        if same and version.etag:
            return
    logger.info("fetching %s/%s", remote.shown, INDEX_NAME)
    note.unlink(missing_ok=True)
    with atomic_open(path) as file:
        if version.size is None:
            file.write(remote.read(INDEX_NAME))
        else:
            size = version.size
            starts = range(0, size, CHUNK)
            for part in ahead(lambda start: remote.read(INDEX_NAME, start, min(start + CHUNK, size)), starts, AHEAD):
                file.write(part.result())
    write_json(note, noted)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process after the other; on a file system without locks each writes the same."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
