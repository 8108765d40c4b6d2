"""The sample order: a permutation per epoch, the same in every NumPy, in every process, for ever."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from lalic.data.loader import MicroBatches
from lalic.data.order import EpochOrder, EpochPlan, random_crop, replacement_word, shuffled
from lalic.errors import LalicError

MASK = (1 << 64) - 1


def philox(key: int, counter: int, count: int) -> list[int]:
    """Philox-4x64-10 in plain integers (Salmon et al., SC 2011): the truth that the stream is checked against."""
    words: list[int] = []
    while len(words) < count:
        counter += 1
        c = [(counter >> 64 * i) & MASK for i in range(4)]
        k = [key & MASK, key >> 64]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(second >> 64) ^ c[1] ^ k[0], second & MASK, (first >> 64) ^ c[3] ^ k[1], first & MASK]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        words += c
    return words[:count]


def plain_permutation(shard_of_sample: list[int], seed: int, epoch: int, window: int) -> list[int]:
    """The definition, without NumPy: shards in random order, cut in windows, samples in random order in each."""
    shards = max(shard_of_sample) + 1
    shard_words = philox(((1 << 48 | epoch) << 64) | seed, 0, shards)
    by_word = sorted(range(shards), key=lambda shard: shard_words[shard])
    group = {shard: place // window for place, shard in enumerate(by_word)}
    bits = ((shards - 1) // window).bit_length()
    words = philox(((2 << 48 | epoch) << 64) | seed, 0, len(shard_of_sample))
    return sorted(range(len(words)), key=lambda i: (group[shard_of_sample[i]], words[i] >> bits))


def epoch_permutation(shard_of_sample: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    plan = EpochPlan(np.bincount(shard_of_sample), seed, epoch, window)
    return plan.samples(0, len(shard_of_sample))


def layout(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("sizes", [(1,), (7,), (5, 0, 9, 1, 30), (13,) * 11], ids=str)
def test_equals_the_plain_definition(sizes, window):
    shards = layout(*sizes)
    for seed, epoch in [(0, 0), (MASK, 5), (12345, (1 << 48) - 1)]:
        expected = plain_permutation(shards.tolist(), seed, epoch, window)
        assert epoch_permutation(shards, seed, epoch, window).tolist() == expected


@pytest.mark.parametrize("sizes", [(1,), (5, 9, 1, 30), (100,) * 37], ids=str)
def test_every_sample_exactly_once(sizes):
    shards = layout(*sizes)
    for epoch in range(4):
        order = epoch_permutation(shards, 7, epoch, 3)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(len(shards)))


def test_epochs_and_seeds_differ():
    shards = layout(*(50,) * 20)
    orders = {epoch_permutation(shards, seed, epoch, 4).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_window_is_finished_before_the_next_begins():
    shards = layout(*(50,) * 20)
    visited = shards[epoch_permutation(shards, 1, 0, 4)].reshape(5, 200)
    groups = [set(row.tolist()) for row in visited]
    assert all(len(group) == 4 for group in groups) and len(set.union(*groups)) == 20
    # Within a window the shards are mixed, not read one after the other.
    assert all((np.diff(row) != 0).mean() > 0.5 for row in visited)


def test_the_stream_never_changes():
    """Frozen when the format was fixed: a resumed run, and a paper, rely on it."""
    order = epoch_permutation(layout(*(1000,) * 90), 2025, 3, 16)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == "254319d0ece5dec4a897239afa2933e715447aab9aeb2d58f808a3365ffebde4"
    assert shuffled(10, 1).tolist() == [7, 2, 3, 6, 8, 0, 9, 4, 5, 1]
    assert tuple(random_crop(2025, 3, 123456, 481, 321, 256)) == (100, 43, True)


def test_crops_are_uniform_and_inside():
    crops = [random_crop(1, 0, index, 10, 9, 8) for index in range(3000)]
    places = np.zeros((3, 2))
    for left, top, _ in crops:
        places[left, top] += 1  # an IndexError here is a crop outside the image
    assert places.min() > 400 and places.max() < 600
    assert 0.45 < np.mean([crop.flip for crop in crops]) < 0.55
    assert random_crop(1, 0, 5, 8, 8, 8)[:2] == (0, 0)


def test_crop_words_are_philox():
    key, counter = ((3 << 48 | 4) << 64) | 9, (2 << 64) + 77
    words = philox(key, counter, 4)
    crop = random_crop(9, 4, 77, 1000, 500, 256, attempt=2)
    assert crop == ((words[0] * 745) >> 64, (words[1] * 245) >> 64, bool(words[2] >> 63))
    assert replacement_word(9, 4, 77, 2) == words[3]


def test_positions_run_through_epochs():
    order = EpochOrder([4, 3], seed=5, window=1, first_epoch=6)
    whole = order.samples(0, 21)
    expected = np.concatenate([epoch_permutation(layout(4, 3), 5, epoch, 1) for epoch in (6, 7, 8)])
    np.testing.assert_array_equal(whole, expected)
    for start, stop in [(0, 0), (5, 9), (6, 21), (13, 14), (2, 3)]:
        np.testing.assert_array_equal(order.samples(start, stop), whole[start:stop])


@pytest.mark.parametrize("sizes", [(5, 0, 9, 1, 30, 0), (13,) * 11, (0, 0, 2)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_any_place_alone_is_as_in_the_whole(sizes, window):
    whole = plain_permutation(layout(*sizes).tolist(), 3, 2, window)
    for start in range(len(whole)):
        fresh = EpochPlan(np.array(sizes), 3, 2, window)
        assert fresh.samples(start, min(start + 7, len(whole))).tolist() == whole[start : start + 7]


def test_windows_say_which_shards_come_next():
    counts, window, seed = [5, 0, 9, 1, 30, 2], 2, 4
    shards = layout(*counts)
    order = EpochOrder(counts, seed, window, first_epoch=3)
    # By the definition: the shards of the samples that stand between two changes of window, for two epochs.
    expected = []
    for epoch in (3, 4):
        words = philox(((1 << 48 | epoch) << 64) | seed, 0, len(counts))
        by_word = sorted(range(len(counts)), key=lambda shard: words[shard])
        groups = [by_word[i : i + window] for i in range(0, len(counts), window)]
        expected += [sorted(shard for shard in group if counts[shard]) for group in groups]
    for position in range(2 * len(shards)):
        ahead = order.windows_from(position)
        first = next(
            i for i, group in enumerate(expected) if position < sum(counts[s] for g in expected[: i + 1] for s in g)
        )
        found = [next(ahead).tolist() for _ in expected[first:]]
        assert found == expected[first:]
        assert shards[order.samples(position, position + 1)[0]] in found[0]
        for stop in (position, position + 1, position + 20, 3 * len(shards)):
            places = range(position, stop)
            needed = [{int(shards[order.samples(p, p + 1)[0]])} for p in places]
            windows = [set(group.tolist()) for group in order.windows_from(position, stop)]
            assert set().union(*needed) <= set().union(*windows)
            # The last window is needed, and the one after it would not be.
            assert not needed or needed[-1] <= windows[-1]
            assert bool(windows) == bool(needed)


@pytest.mark.parametrize("seed, epoch, window", [(-1, 0, 1), (1 << 64, 0, 1), (0, -1, 1), (0, 1 << 48, 1), (0, 0, 0)])
def test_refuses_what_it_cannot_keep_apart(seed, epoch, window):
    with pytest.raises(LalicError):
        EpochPlan(np.array([3]), seed, epoch, window)


def test_a_plan_of_nine_million_samples_in_bounded_time_and_memory():
    """9,000 shards of 1,000: in its own process, whose peak is its own. Measured: 2 ms and 1 MB, the whole 1.4 s."""
    program = """
import time
import numpy as np
from lalic.data.order import EpochOrder
from lalic.memory import peak_resident_bytes
def peak():
    return peak_resident_bytes() / 2**20
counts = np.full(9000, 1000)
before, began = peak(), time.process_time()
order = EpochOrder(counts, 1, 16)
some = order.samples(7_654_321, 7_654_329)
print(time.process_time() - began, peak() - before)
before, began = peak(), time.process_time()
whole = order.samples(0, 9_000_000)
print(time.process_time() - began, peak() - before)
assert np.bincount(whole, minlength=9_000_000).max() == 1 and len(whole) == 9_000_000
assert (whole[7_654_321:7_654_329] == some).all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    plan, whole = (tuple(map(float, line.split())) for line in done.stdout.splitlines())
    assert plan[0] < 3 and plan[1] < 300
    assert whole[0] < 10 and whole[1] < 300


@pytest.mark.slow
def test_every_sample_once_over_1024_ranks_of_8_workers():
    """An epoch of 9,000,000 samples, all 1,024 ranks, 8 samples each a step: what each of the 8,192 workers gets."""
    ranks, workers, micro, n = 1024, 8, 8, 9_000_000
    order = EpochOrder(np.full(9000, 1000), 5, 16)
    ids = np.arange(n, dtype=np.int32)
    steps = -(-n // (ranks * micro))
    seen = np.zeros(n, np.uint8)
    per_worker = np.zeros((ranks, workers), np.int64)
    batches = [iter(MicroBatches(order, ids, micro, 1, rank, ranks, 0, steps)) for rank in range(ranks)]
    for step in range(steps):
        for rank in range(ranks):
            positions, samples = next(batches[rank])
            within = samples[positions < n]
            seen[within] += 1
            per_worker[rank, step % workers] += len(within)  # torch deals batches out to the workers in turn
    assert seen.min() == seen.max() == 1
    assert per_worker.sum() == n and per_worker.min() >= micro * (steps // workers - 1)
    # Any step of any rank, reached by arithmetic: the last one, from a fresh order.
    last = next(iter(MicroBatches(EpochOrder(np.full(9000, 1000), 5, 16), ids, micro, 1, 77, ranks, steps - 1, steps)))
    start = (steps - 1) * ranks * micro + 77 * micro
    np.testing.assert_array_equal(last[1], order.samples(start, start + micro))
