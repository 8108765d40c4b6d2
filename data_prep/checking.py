"""All shards of a folder against its index: what is checked once, and the shards in parallel."""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lalic.data.index import INDEX_NAME, ShardIndex
from lalic.errors import LalicError

from .frozen import Manifest
from .output import LocalFolder, OutputFolder
from .parts import in_order
from .places import readable_folder
from .remote_output import ServedFolder
from .report import Progress
from .shard_check import ExpectedSample, ShardTask, check_shard
from .workers import begin_worker
from .writer import EXTENSIONS

logger = logging.getLogger("lalic.data_prep")

_MB = 10**6


def check_shards(
    where: str | Path,
    *,
    workers: int,
    quick: bool = False,
    decode: bool = False,
    manifest: str | Path | None = None,
    endpoint: str | None = None,
) -> int:
    """Print a line for every problem of the shards in a folder or URL, and the number of problems, which is returned.

    Raises LalicError when there is no index to check against.
    """
    folder = readable_folder(where, endpoint)
    index, extensions = _load_index(folder)
    frozen = Manifest.load(manifest, "--manifest") if manifest is not None else None
    problems = _Problems()
    if isinstance(folder, ServedFolder):
        logger.info("%s cannot be listed: files that the index does not name are not looked for", folder.where)
    problems.take(_unknown_files(folder, index))
    problems.take(_duplicated_keys(index))
    if frozen is not None:
        problems.take(_differences(frozen, index))
    total = int(index.shard_bytes.sum())
    if quick:
        for number, size in enumerate(index.shard_bytes.tolist()):
            problems.take(_file_problem(folder, index.names[number], size))
    else:
        with Progress(total // _MB, what="checking", unit="MB") as progress, _pool(workers) as pool:
            done = 0
            tasks = _tasks(where, endpoint, folder, index, extensions, frozen, decode, problems)
            for task, lines in _checked(pool, tasks, workers):
                problems.take(f"{task.name}: {line}" for line in lines)
                done += task.size
                progress.reach(done // _MB, problems=problems.count)
    amount = f"{len(index)} images in {len(index.names)} shards, {total / 1e6:.1f} MB"
    depth = "names and sizes only" if quick else "every image decoded" if decode else "every byte read"
    print(f"{folder.where}: {problems.count or 'no'} problem{'s' * (problems.count != 1)}; {amount}; {depth}")
    return problems.count


@dataclass
class _Problems:
    count: int = 0

    def take(self, lines: Iterator[str]) -> None:
        for line in lines:
            # Above the bar, not through it.
            tqdm.write(" ".join(line.split()))
            self.count += 1


def _load_index(folder: OutputFolder) -> tuple[ShardIndex, np.ndarray]:
    """The index, and the number in EXTENSIONS of every sample's extension (255: another one)."""
    if isinstance(folder, LocalFolder):
        index = ShardIndex.load(folder.folder)
    else:
        try:
            text = folder.read(INDEX_NAME)
        except FileNotFoundError:
            raise LalicError(f"{folder.path(INDEX_NAME)} is missing: run data_prep/shard.py to its end") from None
        with tempfile.TemporaryDirectory() as copy:
            (Path(copy) / INDEX_NAME).write_bytes(text)
            index = ShardIndex.load(copy)
        del text
    numbers = {name: number for number, name in enumerate(EXTENSIONS)}
    extensions = bytearray()

    def take(item: dict[str, Any]) -> None:
        if "samples" not in item and "shards" not in item:
            extensions.append(numbers.get(str(item.get("ext")), 255))

    json.loads(folder.read(INDEX_NAME), object_hook=take)
    return index, np.frombuffer(extensions, np.uint8)


def _unknown_files(folder: OutputFolder, index: ShardIndex) -> Iterator[str]:
    """Shards and leavings of shards that the index does not name."""
    known = set(index.names)
    prefixes = {name.rpartition("-")[0] + "-" for name in known if "-" in name}
    for name in folder.names():
        visible = name.removeprefix(".")
        if name not in known and any(visible.startswith(prefix) for prefix in prefixes) and ".tar" in name:
            hidden = visible != name
            yield f"{name}: {'left over by a run that did not end' if hidden else 'is not in ' + INDEX_NAME}"


def _duplicated_keys(index: ShardIndex) -> Iterator[str]:
    hashes = np.fromiter((hash(index.key(sample)) for sample in range(len(index))), np.int64, len(index))
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        one, other = int(order[place]), int(order[place + 1])
        if index.key(one) == index.key(other):
            yield f"{_shard(index, other)}: key {index.key(other)} is also in {_shard(index, one)}"


def _differences(manifest: Manifest, index: ShardIndex) -> Iterator[str]:
    """Where the index is not that of the manifest; the sums of the samples are compared as they are read."""
    names = tuple(manifest.shard_name(shard) for shard in range(len(manifest.shard_sha256)))
    if names != index.names:
        yield f"{INDEX_NAME}: has {len(index.names)} shards, the manifest {len(names)}, or other names"
    for name, sha256, size, *other in zip(
        names, manifest.shard_sha256, manifest.shard_bytes, index.shard_sha256, index.shard_bytes, strict=False
    ):
        if [sha256, size] != other:
            yield f"{name}: its sum or size in {INDEX_NAME} is not that of the manifest"
    if len(manifest) != len(index):
        yield f"{INDEX_NAME}: has {len(index)} samples, the manifest {len(manifest)}"
        return
    for field in ("offset", "size", "width", "height"):
        for sample in np.flatnonzero(getattr(manifest, field) != getattr(index, field)).tolist():
            ours, theirs = getattr(index, field)[sample], getattr(manifest, field)[sample]
            yield f"{_shard(index, sample)}: {index.key(sample)} has {field} {ours}, in the manifest {theirs}"
    for sample in range(len(index)):
        if index.key(sample) != manifest.key(sample):
            yield f"{_shard(index, sample)}: has {index.key(sample)}, the manifest {manifest.key(sample)}"


def _shard(index: ShardIndex, sample: int) -> str:
    return index.names[index.shard[sample]]


def _file_problem(folder: OutputFolder, name: str, expected: int) -> Iterator[str]:
    size = folder.size(name)
    if size is None:
        yield f"{name}: is missing"
    elif size == 0:
        yield f"{name}: is empty"
    elif size != expected:
        yield f"{name}: has {size} bytes, {INDEX_NAME} says {expected}"


def _tasks(
    where: str | Path,
    endpoint: str | None,
    folder: OutputFolder,
    index: ShardIndex,
    extensions: np.ndarray,
    manifest: Manifest | None,
    decode: bool,
    problems: _Problems,
) -> Iterator[ShardTask]:
    """One task per shard that is there; only that shard's part of the index goes to a worker."""
    first = index.first
    same_samples = manifest is not None and len(manifest) == len(index)
    for number, name in enumerate(index.names):
        size = folder.size(name)
        if not size:
            problems.take(_file_problem(folder, name, int(index.shard_bytes[number])))
            continue
        samples = [
            ExpectedSample(
                index.key(sample),
                EXTENSIONS[extensions[sample]] if extensions[sample] < len(EXTENSIONS) else "",
                int(index.offset[sample]),
                int(index.size[sample]),
                int(index.width[sample]),
                int(index.height[sample]),
                manifest.sample_sha256[sample].tobytes() if manifest is not None and same_samples else b"",
            )
            for sample in range(int(first[number]), int(first[number + 1]))
        ]
        yield ShardTask(
            str(where),
            endpoint,
            name,
            size,
            int(index.shard_bytes[number]),
            index.shard_sha256[number],
            samples,
            decode,
        )


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    if not workers:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _checked(pool: Executor | None, tasks: Iterator[ShardTask], workers: int) -> Iterator[tuple[ShardTask, list[str]]]:
    if pool is None:
        return ((task, check_shard(task)) for task in tasks)
    return in_order(pool, check_shard, tasks, ahead=2 * workers)
