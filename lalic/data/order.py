"""The global sample order: which sample, and which crop of it, stands at a position.

Everything here is a pure function of (seed, epoch, index in the epoch). Ranks, workers and accumulation do
not enter, so a run resumes by arithmetic and goes on with another number of GPUs over the very same batches.

The random numbers are the raw 64-bit words of NumPy's Philox bit generator. NumPy keeps a bit generator's raw
stream the same from version to version (NEP 19); it does not promise that for `Generator.permutation`,
`shuffle` or `integers`, so none of them is used.

    n: eligible samples    S: shards    p: position, 0 <= p    e: epoch = first_epoch + p // n    i = p % n
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lalic.errors import LalicError

# The second word of a Philox key: what the numbers are for, then the epoch. So no two uses share a stream.
_SHARDS, _SAMPLES, _CROPS, _LIST = 1, 2, 3, 4
_EPOCH_BITS = 48


class Crop(NamedTuple):
    """Where a crop lies in the upright image, in pixels, and whether it is mirrored left to right."""

    left: int
    top: int
    flip: bool


class EpochPlan:
    """One epoch: shards are shuffled, then samples within each window, that is, group of `window` shards.

    Only the order of the shards is held, a few numbers for each. The samples of a window are put in order when
    they are asked for, so a plan costs milliseconds and any place of the epoch is as near as its beginning.
    """

    def __init__(self, counts: np.ndarray, seed: int, epoch: int, window: int) -> None:
        """As `EpochOrder`; `epoch` must lie below 2**48."""
        if window < 1:
            raise LalicError(f"the shuffle window must be at least 1 shard, not {window}")
        counts = np.asarray(counts, np.int64)
        # Empty shards at the end take no part: they are not there for whoever knows the samples alone.
        counts = counts[: int(np.flatnonzero(counts).max(initial=-1)) + 1]
        self.seed, self.epoch, self.window = seed, epoch, window
        self.counts, self.first = counts, np.cumsum(counts) - counts
        self.shards = np.argsort(_words(seed, _SHARDS, epoch, 0, len(counts)), kind="stable")
        """(S,) shard numbers in the order of the epoch."""
        windows = -(-len(counts) // window)
        self._unused_bits = np.uint64(max(0, windows - 1).bit_length())
        ends = np.cumsum(counts[self.shards])
        self.window_end = ends[np.minimum(np.arange(1, windows + 1) * window, len(counts)) - 1]
        """(windows,) places at which the windows end."""
        self._held = -1
        self._window_order = np.empty(0, np.int64)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 numbers of the samples at places start..stop-1 of the epoch."""
        parts = []
        while start < stop:
            number = self.window_at(start)
            begin = int(self.window_end[number - 1]) if number else 0
            end = min(stop, int(self.window_end[number]))
            parts.append(self._window(number)[start - begin : end - begin])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def window_at(self, place: int) -> int:
        """Number of the window that holds this place of the epoch."""
        return int(np.searchsorted(self.window_end, place, side="right"))

    def shards_of(self, window: int) -> np.ndarray:
        """The shard numbers of a window, ascending, without those that have no sample."""
        shards = np.sort(self.shards[window * self.window : (window + 1) * self.window])
        return shards[self.counts[shards] > 0]

    def _window(self, number: int) -> np.ndarray:
        if number != self._held:
            shards = self.shards_of(number)
            ids = np.concatenate([np.arange(self.first[s], self.first[s] + self.counts[s]) for s in shards])
            words = [_words(self.seed, _SAMPLES, self.epoch, int(self.first[s]), int(self.counts[s])) for s in shards]
            # The lowest bits are left out for the sake of runs that began when one sort of the whole epoch, with the
            # window's number in these bits, did both shuffles.
            sort_key = np.concatenate(words) >> self._unused_bits
            self._window_order, self._held = ids[np.argsort(sort_key, kind="stable")], number
        return self._window_order


def random_crop(seed: int, epoch: int, index: int, width: int, height: int, crop: int, attempt: int = 0) -> Crop:
    """The crop at `index` of `epoch`, uniform over all places. `attempt` > 0: for the n-th replacement."""
    generator = np.random.Philox(key=_key(seed, _CROPS, epoch), counter=(attempt << 64) + index)
    across, down, mirror = (int(word) for word in generator.random_raw(3))
    # The high word of a product maps 64 random bits to 0..m-1 with a bias below m / 2**64.
    return Crop((across * (width - crop + 1)) >> 64, (down * (height - crop + 1)) >> 64, bool(mirror >> 63))


def random_crops(seed: int, epoch: int, index: int, widths: list[int], heights: list[int], crop: int) -> list[Crop]:
    """`random_crop` at index, index + 1, ... for images of these sizes, out of one generator."""
    words = _words(seed, _CROPS, epoch, 4 * index, 4 * len(widths)).reshape(-1, 4).tolist()
    return [
        Crop((across * (width - crop + 1)) >> 64, (down * (height - crop + 1)) >> 64, bool(mirror >> 63))
        for (across, down, mirror, _), width, height in zip(words, widths, heights, strict=True)
    ]


def random_rungs(seed: int, epoch: int, index: int, count: int, rungs: int) -> np.ndarray:
    """(count,) int64 numbers 0..rungs-1, uniform, for index, index + 1, ... of `epoch`.

    From the word that crops leave over, whatever replaces a bad sample: so a position has one rung, and the crops of a
    run do not depend on whether it draws rungs.
    """
    words = _words(seed, _CROPS, epoch, 4 * index, 4 * count)[3::4].tolist()
    return np.array([(word * rungs) >> 64 for word in words], np.int64)


def replacement_word(seed: int, epoch: int, index: int, attempt: int) -> int:
    """64 random bits that choose the `attempt`-th (from 1) replacement of a bad sample."""
    generator = np.random.Philox(key=_key(seed, _CROPS, epoch), counter=(attempt << 64) + index)
    return int(generator.random_raw(4)[3])


def shuffled(n: int, seed: int) -> np.ndarray:
    """(n,) int64, a seeded permutation of 0..n-1 that is no epoch's: the order of the samples in the
    shards.
    """
    return np.argsort(_words(seed, _LIST, 0, 0, n), kind="stable")


class EpochOrder:
    """The endless sequence of positions over a fixed set of samples: epoch after epoch, each with its own plan."""

    def __init__(self, counts: np.ndarray, seed: int, window: int, first_epoch: int = 0) -> None:
        """
        Args:
            counts: (S,) samples in each shard. Samples are numbered 0..n-1 through the shards in order.
            seed: not negative, below 2**64.
            window: shards that are mixed with each other. A reader has at most the shards of one window in hand,
                and needs no shard twice in an epoch.
            first_epoch: the epoch of position 0.
        """
        self.counts = np.asarray(counts, np.int64)
        self.length = int(self.counts.sum())
        """n, samples in an epoch."""
        self.seed, self.window, self.first_epoch = seed, window, first_epoch
        self._plan = EpochPlan(self.counts, seed, first_epoch, window)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 sample numbers, for positions start..stop-1."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.length)
            end = min(stop, (epoch + 1) * self.length)
            parts.append(self._epoch(epoch).samples(place, place + end - start))
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def windows_from(self, position: int, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the shard numbers of the window at `position`, of the next window, and so on, of those that begin
        before position `stop`, or without end.
        """
        epoch, place = divmod(position, self.length)
        while True:
            # A plan of its own: whoever looks ahead must not throw the reader's out.
            plan = EpochPlan(self.counts, self.seed, self.first_epoch + epoch, self.window)
            for number in range(plan.window_at(place), len(plan.window_end)):
                if stop is not None and position >= stop:
                    return
                yield plan.shards_of(number)
                position = epoch * self.length + int(plan.window_end[number])
            epoch, place = epoch + 1, 0

    def _epoch(self, epoch: int) -> EpochPlan:
        epoch += self.first_epoch
        if epoch != self._plan.epoch:
            self._plan = EpochPlan(self.counts, self.seed, epoch, self.window)
        return self._plan


def _key(seed: int, purpose: int, epoch: int) -> int:
    if not 0 <= seed < 1 << 64:
        raise LalicError(f"the seed must lie between 0 and 2**64 - 1, not {seed}")
    if not 0 <= epoch < 1 << _EPOCH_BITS:
        raise LalicError(f"the epoch must lie between 0 and 2**48 - 1, not {epoch}")
    return (((purpose << _EPOCH_BITS) | epoch) << 64) | seed


def _words(seed: int, purpose: int, epoch: int, start: int, count: int) -> np.ndarray:
    """(count,) uint64 raw words of the stream (seed, purpose, epoch), from word `start` on."""
    # Philox makes four words at each step of its counter, so any place of the stream is reached at once.
    generator = np.random.Philox(key=_key(seed, purpose, epoch), counter=start // 4)
    return generator.random_raw(start % 4 + count)[start % 4 :]
