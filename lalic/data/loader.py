"""Batches of random crops in the global sample order, on any number of ranks and workers.

    MicroBatches (main process)      step, rank -> positions and sample ids, by arithmetic
    ShardCrops (worker processes)    positions  -> read, decode, crop: uint8 (m, 3, crop, crop)
    CropLoader (main process)        counts bad samples, turns a worker's failure into one LalicError
    Prefetch (a thread of it)        shards from elsewhere -> the cache, before the workers need them

With global batch G, R ranks and accumulation A, micro-batch a of rank r at step s holds the positions
s*G + (a*R + r)*m ... + m, where m = G / (A*R). Steps count from the start of the stage.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lalic.data.cache import ShardCache
from lalic.data.crops import Failure, ShardCrops
from lalic.data.index import ShardIndex
from lalic.data.order import EpochOrder
from lalic.data.prefetch import Prefetch
from lalic.data.reader import LocalReader, Reader
from lalic.data.regions import Decoder, log_decoder
from lalic.data.slots import PREFETCH, Numbered, Slots
from lalic.data.workers import OF_THE_TRAINER, Forking, leave_signals_to_the_trainer, worker_failure
from lalic.errors import LalicError

logger = logging.getLogger("lalic.data")

# The share of bad samples is taken of at least this many, so that one early bad sample does not stop a run.
_LEAST_SEEN = 1000


def build_loader(
    index: ShardIndex,
    *,
    reader: Reader | None = None,
    crop: int,
    seed: int,
    first_epoch: int,
    start_step: int,
    num_steps: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
    window: int = 16,
    flip: bool = False,
    max_bad: float = 0.01,
    decoder: Decoder = "auto",
    rungs: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> CropLoader:
    """A torch DataLoader over the micro-batches of steps start_step .. start_step + num_steps - 1 of one
    stage.

    Args:
        index: the shards.
        reader: how the samples' bytes are had (lalic.data.source); None: the shards are files in the index's folder.
            The first rank checks them before anything is read.
        crop: side of the square crops in pixels. Samples with a shorter side below it are left out of the
        stage.
        seed: of the order and of the crops.
        first_epoch: the epoch in which position 0 of the stage lies, counted from the start of the run.
        batch_size: G, samples per step over all ranks and accumulation steps.
        window: shards that are shuffled into each other.
        flip: mirror half of the crops left to right.
        max_bad: largest share of replaced samples, counted over this loader's life and at least 1000 samples.
        decoder: "auto" decodes only the needed region of a JPEG where that can be done, "pillow" decodes whole images;
        the pixels are the same.
        rungs: qualities, of which every position draws one; None draws none. The crops are the same.
        pin_memory: put the batches in page-locked memory.

    Returns:
        A loader that yields `num_steps * accumulation` dicts: "x", uint8 (m, 3, crop, crop) RGB, channels last
        in memory; "bad", how many of them replace a bad sample; "positions", int64 (m,); with `rungs` "quality",
        int64 (m,).

    Raises:
        LalicError: settings that do not fit each other, no image as large as the crop, a shard that is
            missing or cut. While iterating: too many bad samples, a shard that went away, a worker that died.
    """
    micro_batch, rest = divmod(batch_size, accumulation * world_size)
    if batch_size < 1 or rest:
        raise LalicError(
            f"the global batch of {batch_size} cannot be divided by {world_size} ranks x {accumulation} "
            f"accumulation steps: use a multiple of {world_size * accumulation}"
        )
    if not 0 <= rank < world_size:
        raise LalicError(f"rank {rank} is not below the number of ranks, {world_size}")
    if not 0 <= max_bad <= 1:
        raise LalicError(f"the allowed share of bad samples is {max_bad}, it must lie between 0 and 1")
    if decoder not in get_args(Decoder):
        raise LalicError(f"the decoder is {decoder!r}, it must be {' or '.join(get_args(Decoder))}")
    if crop < 1 or start_step < 0 or num_steps < 0 or workers < 0:
        raise LalicError(f"crop {crop}, step {start_step}, {num_steps} steps, {workers} workers: out of range")
    eligible = eligible_samples(index, crop, log=rank == 0)
    reader = reader or LocalReader(index)
    if rank == 0:
        reader.check(window)
    order = EpochOrder(index.counts(eligible), seed, window, first_epoch)
    batches = MicroBatches(
        order, eligible, micro_batch, accumulation, rank, world_size, start_step, start_step + num_steps
    )
    if rank == 0:
        log_decoder(decoder)
    made = ShardCrops(
        reader, eligible, crop=crop, seed=seed, first_epoch=first_epoch, flip=flip, decoder=decoder, rungs=rungs
    )
    return CropLoader(made, batches, reader=reader, max_bad=max_bad, workers=workers, pin_memory=pin_memory)


def eligible_samples(index: ShardIndex, crop: int, *, log: bool = False) -> np.ndarray:
    """Ids of the samples a stage with this crop uses; LalicError when there are none."""
    eligible = index.eligible(crop)
    if not len(eligible):
        largest = index.largest_side()
        remedy = f"use a crop of at most {largest}" if largest else "the shards are empty, make them again"
        raise LalicError(f"a crop of {crop} is larger than every image in {index.folder}: {remedy}")
    if log and len(eligible) < len(index):
        logger.info(
            "%d of %d images are smaller than the crop of %d and are left out of this stage",
            len(index) - len(eligible),
            len(index),
            crop,
        )
    return eligible


@dataclass
class MicroBatches(Sampler[tuple[np.ndarray, np.ndarray]]):
    """Yields (positions, sample ids), both int64 (m,), for one rank's micro-batches in order."""

    order: EpochOrder
    eligible: np.ndarray
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    start_step: int
    stop_step: int

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batch = self.micro_batch * self.accumulation * self.world_size
        for step in range(self.start_step, self.stop_step):
            for micro in range(self.accumulation):
                start = step * batch + (micro * self.world_size + self.rank) * self.micro_batch
                stop = start + self.micro_batch
                yield np.arange(start, stop), self.eligible[self.order.samples(start, stop)]

    def prefetch(self, cache: ShardCache) -> Prefetch:
        """What brings the shards of these batches, of all ranks, into `cache`; not started yet."""
        batch = self.micro_batch * self.accumulation * self.world_size
        return Prefetch(cache, self.order, self.start_step * batch, self.stop_step * batch)


class CropLoader(DataLoader[Any]):
    """The DataLoader of `build_loader`: counts bad samples, turns workers' failures into LalicErrors."""

    def __init__(
        self,
        crops: ShardCrops,
        batches: MicroBatches,
        *,
        reader: Reader,
        max_bad: float,
        workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__(
            crops,
            sampler=Numbered(batches),
            batch_size=None,  # an item of the dataset is a micro-batch
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin_memory and not workers,  # from the slots it is done here, in place of their copy
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=Forking() if workers else None,
            worker_init_fn=leave_signals_to_the_trainer,
            # Iterating draws a seed for the workers, which nothing here uses. Drawn from the global generator,
            # it would change the training noise of a run each time that run is resumed.
            generator=torch.Generator(),
        )
        self.crops, self.batches, self.reader, self.max_bad = crops, batches, reader, max_bad
        self._pin = pin_memory
        self.seen = self.bad = 0
        self._logged: set[int] = set()

    def __iter__(self) -> Any:
        slots = None
        if self.num_workers:
            slots = Slots(self.num_workers, (self.batches.micro_batch, self.crops.crop, self.crops.crop, 3))
        self.crops.slots = slots
        # The workers are forked with the signals blocked, so none reaches them before they have arranged theirs.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TRAINER)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        prefetch = self.batches.prefetch(self.reader.cache) if self.reader.cache is not None else None
        try:
            if prefetch is not None:
                prefetch.start()  # the worker processes are forked by now
            while (batch := _next(batches)) is not None:
                if isinstance(batch, Failure):
                    raise LalicError(batch.message)
                self._count(len(batch["positions"]), batch["bad"], batch.pop("bad_samples"))
                batch["positions"] = torch.from_numpy(batch["positions"])
                if "quality" in batch:
                    quality = torch.from_numpy(batch["quality"])
                    batch["quality"] = quality.pin_memory() if self._pin else quality
                if slots is not None:
                    x = slots[batch["x"]].permute(0, 3, 1, 2)
                    batch["x"] = x.pin_memory() if self._pin else x.clone()
                if prefetch is not None:
                    prefetch.check()
                    prefetch.position = int(batch["positions"][0])
                yield batch
        finally:
            if prefetch is not None:
                prefetch.stop()
            # torch does this when the iterator is collected. An error's traceback keeps it in a cycle, though, and
            # when a cycle is collected the queues go first: the workers are not told, and torch waits for them.
            # It also waits five seconds for each that is waiting for a server; asked by us, they all leave at once.
            for worker in getattr(batches, "_workers", ()):
                worker.terminate()
            shutdown = getattr(batches, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()

    def _count(self, seen: int, bad: int, bad_samples: list[tuple[int, str]]) -> None:
        self.seen += seen
        self.bad += bad
        for sample, reason in bad_samples:
            if sample not in self._logged:
                self._logged.add(sample)
                logger.warning("bad sample %s is replaced: %s", self.reader.index.describe(sample), reason)
        if self.bad > self.max_bad * max(self.seen, _LEAST_SEEN):
            raise LalicError(
                f"{self.bad} of {self.seen} samples could not be read, more than the allowed share of "
                f"{self.max_bad}: {self.reader.advice}; the last bad sample was "
                f"{self.reader.index.describe(bad_samples[-1][0])}"
            )


def _next(batches: Iterator[Any]) -> Any:
    """The next item, None at the end; LalicError when a worker process has died."""
    try:
        return next(batches, None)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # The connection breaks when it died while its batch was being fetched, before torch has noticed.
        noticed = error if isinstance(error, RuntimeError) else RuntimeError(f"DataLoader worker: {error}")
        failure = worker_failure(noticed)
        if failure is None:
            raise
        raise failure from error


def _as_it_is(batch: Any) -> Any:
    return batch
