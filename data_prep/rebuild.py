"""From a manifest and any source of the images: the very same shards and index, byte for byte.

The manifest fixes the place of every byte, so samples may come in any order: each one whose sum is in the manifest is
written where it belongs (parts.py). A shard that is full is summed, brought to the disk and gets its name. What is in
a part when the program is killed is not fetched again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lalic.data.index import INDEX_NAME
from lalic.errors import LalicError
from lalic.files import fsync_folder

from .frozen import Manifest
from .index_file import IndexedShard, write_index
from .output import LocalFolder, full_disk_in_one_line, local_disk
from .parts import Parts, in_order
from .places import output_folder
from .report import Progress, write_table
from .state import JobState
from .wanted import Find, Lookup, Wanted
from .writer import EXTENSIONS

MISSING_NAME = "missing.csv"

logger = logging.getLogger("lalic.data_prep")

_FORMAT = 1
_BLOCK = 4 << 20


def run_rebuild(
    manifest_path: str | Path,
    finders: Iterable[Find],
    output: str | Path,
    *,
    label: str,
    workers: int,
    staging: str | Path | None = None,
    endpoint: str | None = None,
) -> None:
    """Make the shards of a manifest in the folder or URL `output`, or finish what an earlier run began there.

    Args:
        finders: ways to the images, each asked for what those before it did not have.
        label: what messages call the source.
        workers: threads that sum.
        staging: a folder of this machine for the shards under way, needed when `output` is a URL.

    Raises LalicError: a bad manifest, samples that the source does not have (all others are done then, and
    missing.csv lists them), an output folder of another job, a full disk.
    """
    folder = output_folder(output, endpoint)
    if isinstance(folder, LocalFolder):
        under_way = folder.folder
    elif staging is None:
        raise LalicError(f"--output {output}: shards are made in any order, name a local folder for them by --staging")
    else:
        under_way = Path(staging)
    manifest = Manifest.load(manifest_path)
    job = {"format": _FORMAT, "prefix": manifest.prefix, "manifest_sha256": manifest.sha256}
    rebuild: Rebuild | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(
                full_disk_in_one_line(
                    *local_disk(folder, staging), lambda: f"{rebuild.done if rebuild else 0} samples are safe"
                )
            )
            state = stack.enter_context(JobState.open(folder, job))
            if not isinstance(folder, LocalFolder):
                local = LocalFolder(under_way, "--staging")
                local.prepare("")
                stack.enter_context(local.held(f".{manifest.prefix}.lock"))
            rebuild = stack.enter_context(Rebuild(manifest, state, under_way, max(1, workers)))
            rebuild.run(finders)
            rebuild.finish(label)
    except KeyboardInterrupt:
        logger.info("what is written is safe: run the same command again to go on")
        raise


class Rebuild:
    """One run: the samples that are not there yet, and the parts that they go to."""

    def __init__(self, manifest: Manifest, state: JobState, folder: Path, workers: int) -> None:
        self.manifest, self.state, self.output = manifest, state, state.output
        self.parts = Parts(folder, manifest)
        self.pool = ThreadPoolExecutor(workers)
        self.finisher = ThreadPoolExecutor(1)
        self.finishing: list[tuple[int, Future[None]]] = []
        self.pending = np.ones(len(manifest), bool)
        self.other_bytes = np.zeros(len(manifest), bool)
        """An image of that key came, with another sum."""
        self.open_samples = np.diff(manifest.first)
        """(S,) samples that each shard still lacks."""
        self.by_sum = Lookup(np.ascontiguousarray(manifest.sample_sha256[:, :8]).view("<i8")[:, 0])
        self.wanted = Wanted(manifest.keys, manifest.size, self.pending, self.other_bytes)
        self.made = 0
        self._began = time.monotonic()

    def __enter__(self) -> Rebuild:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.finisher.shutdown(cancel_futures=True)
        self.parts.close_all()

    @property
    def done(self) -> int:
        """Samples that are in their place."""
        return len(self.manifest) - int(self.open_samples.sum())

    def run(self, finders: Iterable[Find]) -> None:
        """Take up what is there, then what the sources have."""
        self._take_up()
        if self.done == len(self.manifest) and not self.finishing:
            return
        if self.done:
            logger.info("going on with %d of %d samples", self.done, len(self.manifest))
        with Progress(len(self.manifest), self.done, "rebuilding") as progress:
            for find in finders:
                if not self.pending.any():
                    break
                for (key, data), digest in in_order(self.pool, _sum, find(self.wanted)):
                    self._take(key, data, digest)
                    progress.reach(self.done, shards=self.made)
            self._wait(0)

    def finish(self, label: str) -> None:
        """Write the index, or the table of what is missing; say how it went."""
        manifest, where = self.manifest, self.output.where
        missing = int(np.count_nonzero(self.pending))
        if missing:
            self._report_missing(label, missing)
        amount = f"{len(manifest)} images in {len(manifest.shard_sha256)} shards"
        if not self.made and self.output.size(MISSING_NAME) is None and self.state.is_complete(INDEX_NAME):
            print(f"{where}: complete before this run, {amount}; nothing to do")
            return
        write_index(self.output, manifest.prefix, manifest.seed, manifest.min_side, self._indexed())
        self.state.complete(INDEX_NAME)
        self.output.remove(MISSING_NAME)
        print(f"{where}: {amount}, as in the manifest; this run took {time.monotonic() - self._began:.1f} s")

    def _take_up(self) -> None:
        unfinished = []
        for shard, size in enumerate(self.manifest.shard_bytes.tolist()):
            if self.output.size(self.manifest.shard_name(shard)) == size:
                # It got its name after its sum was right.
                self.pending[self.manifest.first[shard] : self.manifest.first[shard + 1]] = False
                self.open_samples[shard] = 0
            elif self.parts.path(shard).exists():
                unfinished.append(shard)
        with Progress(len(unfinished), what="looking through what is there", unit="shards") as progress:
            for number, shard in enumerate(unfinished):
                for sample in self.parts.found(shard, self.pool):
                    self._mark(shard, sample)
                self._finish_if_full(shard)
                progress.reach(number + 1, images=self.done)

    def _take(self, key: str, data: bytes, digest: bytes) -> None:
        """Write an image wherever the manifest has its sum."""
        places = [
            sample
            for sample in self.by_sum.find(int.from_bytes(digest[:8], "little", signed=True))
            if self.manifest.sample_sha256[sample].tobytes() == digest and len(data) == self.manifest.size[sample]
        ]
        for sample in self.wanted.samples(key):
            self.other_bytes[sample] = sample not in places
        for sample in places:
            if self.pending[sample]:
                shard = self.manifest.shard_of(sample)
                self.parts.write(shard, sample, data)
                self._mark(shard, sample)
                self._finish_if_full(shard)

    def _mark(self, shard: int, sample: int) -> None:
        self.pending[sample] = False
        self.open_samples[shard] -= 1

    def _finish_if_full(self, shard: int) -> None:
        if not self.open_samples[shard]:
            self._wait(1)
            self.parts.close(shard)
            self.finishing.append((shard, self.finisher.submit(self._finish_shard, shard)))

    def _wait(self, most: int) -> None:
        """Let at most so many shards be on their way to the disk."""
        while len(self.finishing) > most:
            _, future = self.finishing.pop(0)
            future.result()
            self.made += 1

    def _finish_shard(self, shard: int) -> None:
        """Runs beside the arrival of samples: sum, fsync, name."""
        name, part = self.manifest.shard_name(shard), self.parts.path(shard)
        if self.parts.sum_of(shard) != self.manifest.shard_sha256[shard]:
            part.unlink()
            raise LalicError(
                f"{name}: its samples are those of the manifest, but its sum is not: the manifest was edited "
                "(or this disk does not give back what was written); get the manifest again as it was published"
            )
        if isinstance(self.output, LocalFolder):
            os.replace(part, self.output.folder / name)
            fsync_folder(self.output.folder)
            return
        with open(part, "rb") as file, self.output.open(name) as target:
            while block := file.read(_BLOCK):
                target.write(block)
        part.unlink()

    def _report_missing(self, label: str, missing: int) -> None:
        other = int(np.count_nonzero(self.other_bytes & self.pending))
        kinds = [f"{missing - other} not found"] * (missing > other) + [f"{other} with other bytes"] * (other > 0)
        write_table(self.output, MISSING_NAME, ["id", "source", "shard", "reason"], self._missing_rows())
        shards = int(np.count_nonzero(self.open_samples == 0))
        raise LalicError(
            f"--input {label}: {missing} of {len(self.manifest)} samples could not be had ({', '.join(kinds)}; each in "
            f"{self.output.path(MISSING_NAME)}); {shards} of {len(self.open_samples)} shards are done, all else is "
            "kept: mend the input, or name another one that has them, and run the command again"
        )

    def _missing_rows(self) -> Iterator[list[str]]:
        for sample in np.flatnonzero(self.pending).tolist():
            reason = "other bytes" if self.other_bytes[sample] else "not found"
            manifest = self.manifest
            yield [manifest.key(sample), manifest.source(sample), str(manifest.shard_of(sample)), reason]

    def _indexed(self) -> Iterator[IndexedShard]:
        manifest = self.manifest
        for shard, sha256 in enumerate(manifest.shard_sha256):
            samples = range(int(manifest.first[shard]), int(manifest.first[shard + 1]))
            entries = (_index_entry(manifest, sample) for sample in samples)
            yield IndexedShard(manifest.shard_name(shard), int(manifest.shard_bytes[shard]), sha256, entries)


def _sum(arrival: tuple[str, bytes]) -> bytes:
    return hashlib.sha256(arrival[1]).digest()


def _index_entry(manifest: Manifest, sample: int) -> dict[str, Any]:
    return {
        "key": manifest.key(sample),
        "ext": EXTENSIONS[manifest.extension[sample]],
        "offset": int(manifest.offset[sample]),
        "size": int(manifest.size[sample]),
        "width": int(manifest.width[sample]),
        "height": int(manifest.height[sample]),
    }
