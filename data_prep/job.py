"""The sharding job: candidates in a fixed order, checked in parallel, packed into shards one after the other.

The order is the seeded shuffle of the input. With a limit of N, the first N candidates of the input are
shuffled and those behind them follow as they are, in place of unusable ones: so the shards hold exactly the
first N usable images of the input, although nothing is read twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lalic.data.index import INDEX_NAME
from lalic.errors import LalicError

from .feed import Feed
from .index_file import IndexedShard, write_index
from .keys import free_key
from .manifest import ShardSum, write_manifest
from .opening import open_source
from .output import LocalFolder, full_disk_in_one_line, local_disk
from .places import check_manifest_place, output_folder
from .report import LEFT_OUT_NAME, LeftOut, Progress, write_left_out
from .sources import Cursor, Source
from .state import STATE_FOLDER, JobState, ShardRecord
from .validation import Checked, Limits, check_image
from .workers import Workers
from .writer import ShardWriter

logger = logging.getLogger("lalic.data_prep")

# Part of job.json: raised when the same options would give other bytes than before.
_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """What decides on the result, besides the input; `shard.py --help` says what each means."""

    limit: int | None = None
    shard_size: int = 512 << 20
    min_side: int = 256
    max_pixels: int = 1 << 26
    seed: int = 0
    prefix: str = "shard"
    keep_duplicates: bool = False
    check: str = "full"
    """Of CHECKS in validation.py."""


def run_job(
    source: Source | str | Path | Sequence[str],
    output: str | Path,
    options: Options,
    *,
    workers: int,
    manifest: str | Path | None = None,
    endpoint: str | None = None,
    scratch: str | Path | None = None,
) -> None:
    """Shard `source` into the folder or URL `output`, or finish what an earlier run began there.

    `source` may be what `open_source` takes. `manifest`: also write the frozen manifest to this file or URL.
    `endpoint`: of an S3-compatible server, for the output.
    `scratch`: a folder of this machine for what was fetched and is in no shard yet; needed only when `output` is a URL.
    Raises LalicError for unusable input, an output folder of another job, or a full disk (what is done
    stays).
    """
    folder = output_folder(output, endpoint)
    if manifest is not None:
        check_manifest_place(manifest, folder, (INDEX_NAME, LEFT_OUT_NAME), endpoint)
    limits = Limits(options.min_side, options.max_pixels, options.check)
    if isinstance(source, (str, Path, Sequence)):
        source = open_source(source, limits=limits)
    _log_ignored(source)
    job: dict[str, Any] = {"format": _FORMAT, **source.identity(), **asdict(options)}
    check = partial(check_image, limits=limits)
    # Decoding holds Python's lock for most of its time, reading and hashing let go of it.
    pool = Workers(check, workers, threads=options.check == "headers")
    sharding = None
    try:
        with (
            full_disk_in_one_line(
                *local_disk(folder, scratch),
                lambda: f"{len(sharding.shards) if sharding else 0} finished shards are safe",
            ),
            JobState.open(folder, job) as state,
            tempfile.TemporaryDirectory() as passing,
        ):
            if scratch is not None:
                scratch = Path(scratch) / _scratch_name(folder.where, job)
            else:
                scratch = folder.folder / STATE_FOLDER if isinstance(folder, LocalFolder) else passing
            source.prepare(Path(scratch), options.limit, options.seed)
            sharding = Sharding(state, source, options, pool)
            sharding.run()
            source.close()
            with suppress(OSError):
                Path(scratch).rmdir()  # of this job in --staging; any other one holds more
            sharding.finish()
            if manifest is not None:
                sharding.freeze(manifest, endpoint)
    except KeyboardInterrupt:
        logger.info("finished shards are safe: run the same command again to go on")
        raise
    finally:
        if sharding is not None:
            sharding.feed.close()
        pool.close()
    if source.count is None:
        _log_ignored(source)


def _scratch_name(where: str, job: dict[str, Any]) -> str:
    """A folder of each job's own: what another one has kept for the same place of its order is another image."""
    return f"job-{hashlib.sha256(json.dumps([where, job]).encode()).hexdigest()[:16]}"


def _log_ignored(source: Source) -> None:
    for kind, count in source.ignored.most_common():
        logger.info("passed over: %d %s", count, kind)


class Sharding:
    """One run of a job."""

    def __init__(self, state: JobState, source: Source, options: Options, pool: Workers) -> None:
        self.state, self.source, self.options = state, source, options
        self.feed = Feed(pool, source)
        self.left_out = LeftOut()
        self.kept = self.bytes = self.built = 0
        self.numbers = 0
        """Records in all; the last one may be without a shard."""
        self.shards: list[ShardSum] = []
        self._key_of_digest: dict[bytes, str] = {}
        self._keys: set[str] | None = set() if source.count is None else None
        """Those that are taken, of a source that cannot know all its names beforehand."""
        self._began = time.monotonic()

    def run(self) -> None:
        """Take up what is finished and make what is not, up to the last shard."""
        count, limit = self.source.count, self.options.limit
        first = limit if count is None else min(count, limit or count)
        position = number = 0
        cursor: Cursor | None = None
        with ExitStack() as stack:
            progress: Progress | None = None
            last = False
            while not last:
                record = self.state.finished(number, position)
                if record is None:
                    if progress is None:
                        if number:
                            logger.info("going on after %d finished shards", number)
                        progress = stack.enter_context(Progress(first, position, note=self.source.note))
                    record = self._build(number, position, cursor, progress)
                    self.state.save(number, record)
                    self.source.finished(record.stop)
                    self.built += 1
                self._account(record)
                position, cursor, last, number = record.stop, record.cursor, record.last, number + 1
        self.state.remove_from(number)
        self.numbers = number

    def finish(self) -> None:
        """Write the list of what was left out, then the index, and say how it went."""
        output = self.state.output
        table = output.path(LEFT_OUT_NAME)
        if not self.built and output.size(LEFT_OUT_NAME) is not None and self.state.is_complete(INDEX_NAME):
            print(f"{output.where}: complete before this run, {self._amount()}; nothing to do")
            return
        write_left_out(output, (row for record in self._records() for row in record.left_out))
        if not self.kept:
            # Nothing is worth keeping: when the images have been mended, the same command begins anew.
            self.state.forget()
            raise LalicError(
                f"--input {self.source.label}: no usable image among {self.left_out.reasons.total()} "
                f"({self.left_out.summary() or 'no file with an image as its suffix'}); {table} lists them"
            )
        write_index(output, self.options.prefix, self.options.seed, self.options.min_side, self._indexed())
        self.state.complete(INDEX_NAME)
        if self.options.limit and self.kept < self.options.limit:
            logger.info("the input has only %d usable images, --limit asks for %d", self.kept, self.options.limit)
        print(f"{output.where}: {self._amount()}; this run took {time.monotonic() - self._began:.1f} s")
        if self.left_out.reasons:
            print(f"left out: {self.left_out.reasons.total()} images (each in {table})")
            print("\n".join(self.left_out.lines()))

    def freeze(self, manifest: str | Path, endpoint: str | None) -> None:
        """Write the manifest of what is in the shards."""
        with full_disk_in_one_line("--manifest", str(manifest), lambda: "the shards and their index are complete"):
            digest = write_manifest(manifest, asdict(self.options), self.shards, self._records(), endpoint)
        print(f"{manifest}: manifest of {self.kept} images, sha256 of its rows {digest}")

    def _build(self, number: int, start: int, cursor: Cursor | None, progress: Progress) -> ShardRecord:
        """Make the shard that begins at place `start` of the order."""
        record = ShardRecord(start, start, cursor=cursor)
        self.feed.seek(start, cursor)
        if self._next_usable(record, progress, 0) is None:
            record.last = True
            return record
        name = self.state.shard_name(number)
        with self.state.output.open(name) as file:
            writer = ShardWriter(file, name, self.options.shard_size)
            while not record.last:
                checked = self._next_usable(record, progress, len(writer.samples))
                if checked is None:
                    record.last = True
                elif not writer.has_room(checked):
                    break
                else:
                    key = self._key()
                    writer.add(key, checked, self.feed.candidate.name)
                    self._note(key, checked.sha256)
                    self._advance(record)
                    record.last = self.kept + len(writer.samples) == self.options.limit
            record.shard = writer.close()
            progress.reach(record.stop, **self._counts(record, len(writer.samples)))
        return record

    def _next_usable(self, record: ShardRecord, progress: Progress, samples: int) -> Checked | None:
        """The next usable candidate, which stays next in the feed; those before it go to the record."""
        while (checked := self.feed.peek()) is not None:
            reason, detail = checked.reason, checked.detail
            if not reason and not self.options.keep_duplicates:
                twin = self._key_of_digest.get(bytes.fromhex(checked.sha256))
                if twin is not None:
                    reason, detail = "duplicate", f"same bytes as {twin}"
            if not reason and not self._key():
                reason, detail = "duplicate name", "its tar holds another image of that name before it"
            progress.reach(self.feed.position, **self._counts(record, samples))
            if not reason:
                return checked
            record.left_out.append([self.feed.candidate.name, reason, detail])
            self._advance(record)
        return None

    def _advance(self, record: ShardRecord) -> None:
        self.feed.advance()
        record.stop, record.cursor = self.feed.position, self.feed.cursor

    def _key(self) -> str:
        """Of the next candidate; empty when there is none left for it."""
        return free_key(self.feed.candidate.keys, self._keys or ()) or ""

    def _note(self, key: str, sha256: str) -> None:
        self._key_of_digest[bytes.fromhex(sha256)] = key
        if self._keys is not None:
            self._keys.add(key)

    def _counts(self, record: ShardRecord, samples: int) -> dict[str, int]:
        return {"kept": self.kept + samples, "left_out": self.left_out.reasons.total() + len(record.left_out)}

    def _account(self, record: ShardRecord) -> None:
        self.kept += len(record.samples)
        if record.shard is not None:
            self.shards.append(ShardSum(record.shard["bytes"], record.shard["sha256"], len(record.samples)))
            self.bytes += record.shard["bytes"]
        for sample in record.samples:
            self._note(sample["key"], sample["sha256"])
        for path, reason, detail in record.left_out:
            self.left_out.add(path, reason, detail)

    def _records(self) -> Iterator[ShardRecord]:
        position = 0
        for number in range(self.numbers):
            record = self.state.finished(number, position)
            if record is None:
                raise LalicError(
                    f"{self.state.output.path(self.state.shard_name(number))} was changed while this program "
                    "ran; run the same command again"
                )
            position = record.stop
            yield record

    def _indexed(self) -> Iterator[IndexedShard]:
        for record in self._records():
            if record.shard is not None:
                yield IndexedShard(**record.shard)

    def _amount(self) -> str:
        shards = "1 shard" if len(self.shards) == 1 else f"{len(self.shards)} shards"
        return f"{self.kept} images in {shards}, {self.bytes / 1e6:.1f} MB"
