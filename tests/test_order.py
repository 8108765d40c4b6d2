"""The sample order: a permutation per epoch, the same in every NumPy, in every process, for ever."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from lalic.data.order import EpochOrder, epoch_permutation, random_crop, replacement_word, shuffled
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
    order = EpochOrder(layout(4, 3), seed=5, window=1, first_epoch=6)
    whole = order.samples(0, 21)
    expected = np.concatenate([epoch_permutation(layout(4, 3), 5, epoch, 1) for epoch in (6, 7, 8)])
    np.testing.assert_array_equal(whole, expected)
    for start, stop in [(0, 0), (5, 9), (6, 21), (13, 14), (2, 3)]:
        np.testing.assert_array_equal(order.samples(start, stop), whole[start:stop])


@pytest.mark.parametrize("seed, epoch, window", [(-1, 0, 1), (1 << 64, 0, 1), (0, -1, 1), (0, 1 << 48, 1), (0, 0, 0)])
def test_refuses_what_it_cannot_keep_apart(seed, epoch, window):
    with pytest.raises(LalicError):
        epoch_permutation(layout(3), seed, epoch, window)


def test_nine_million_samples_in_bounded_time_and_memory():
    """9,000 shards of 1,000: in its own process, whose peak is its own. Measured: about 1.4 s and 180 MB."""
    program = """
import resource, time
import numpy as np
from lalic.data.order import epoch_permutation
shards = np.repeat(np.arange(9000, dtype=np.int32), 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
order = epoch_permutation(shards, 1, 0, 16)
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
assert np.bincount(order, minlength=9_000_000).max() == 1 and len(order) == 9_000_000
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 3 and megabytes < 300
