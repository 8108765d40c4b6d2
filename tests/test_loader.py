"""The loader: one stream of crops whatever the ranks, workers and resumes; bad samples; damaged shards."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from lalic.data_prep.job import Options, run_job
from PIL import Image

from lalic.data.images import decode_rgb
from lalic.data.index import ShardIndex
from lalic.data.loader import build_loader
from lalic.data.order import EpochPlan, random_crop
from lalic.data.reader import MAX_OPEN_SHARDS, LocalReader
from lalic.data.workers import leave_signals_to_the_trainer, worker_failure
from lalic.errors import LalicError

# torch's advice about more workers than processors is beside the point of these tests.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIDES = [64, 72, 80, 96, 120]


def write_photographs(folder: Path, count: int, sides: list[int] | None = None) -> None:
    """Noise over a gradient: JPEGs and PNGs of several sizes, no two crops alike."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for number in range(count):
        short = (sides or SIDES)[number % len(sides or SIDES)]
        size = (short, short + 9 * (number % 3)) if number % 2 else (short + 9 * (number % 3), short)
        pixels = generator.integers(0, 256, (*size, 3), np.uint8)
        suffix, options = (".png", {}) if number % 4 == 0 else (".jpg", {"quality": 80})
        Image.fromarray(pixels).save(folder / f"photo{number:03d}{suffix}", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """37 images in several shards."""
    base = tmp_path_factory.mktemp("loader")
    write_photographs(base / "photos", 37)
    run_job(base / "photos", base / "shards", Options(shard_size=80_000, min_side=64, seed=3), workers=0)
    return base


@pytest.fixture
def shards(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in made.joinpath("shards").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def loader(folder: Path, **changes):
    order = {"crop": 64, "seed": 11, "first_epoch": 2, "start_step": 0, "num_steps": 8, "window": 2}
    settings = {**order, "batch_size": 12, "workers": 0, "flip": True}
    return build_loader(ShardIndex.load(folder), **{**settings, **changes})


def stream(folder: Path, ranks: int = 1, **changes) -> dict[int, str]:
    """Position -> sum of its pixels, over all ranks."""
    seen: dict[int, str] = {}
    for rank in range(ranks):
        for batch in loader(folder, rank=rank, world_size=ranks, **changes):
            assert batch["x"].dtype == torch.uint8 and batch["positions"].dtype == torch.int64
            assert set(batch) == {"x", "bad", "positions"}
            for position, crop in zip(batch["positions"].tolist(), batch["x"], strict=True):
                assert position not in seen
                seen[position] = hashlib.sha256(crop.numpy().tobytes()).hexdigest()
    return seen


def test_the_stream_is_what_the_design_says(made):
    """Against a second, plain reading: permutation, crop, Pillow's whole decode, tarfile's members."""
    index = ShardIndex.load(made / "shards")
    eligible = index.eligible(72)
    n = len(eligible)
    assert 0 < n < len(index)
    batches = list(loader(made / "shards", crop=72))
    positions = torch.cat([batch["positions"] for batch in batches]).tolist()
    assert positions == list(range(96)) and 96 > 2 * n
    pixels = torch.cat([batch["x"] for batch in batches]).permute(0, 2, 3, 1).numpy()
    for position in positions:
        epoch, place = 2 + position // n, position % n
        sample = eligible[EpochPlan(index.counts(eligible), 11, epoch, 2).samples(place, place + 1)[0]]
        (path,) = (made / "photos").glob(f"{index.key(sample)}.*")
        whole = np.asarray(Image.open(path).convert("RGB"))
        crop = random_crop(11, epoch, place, whole.shape[1], whole.shape[0], 72)
        expected = whole[crop.top : crop.top + 72, crop.left : crop.left + 72]
        np.testing.assert_array_equal(pixels[position], expected[:, ::-1] if crop.flip else expected)


@pytest.mark.parametrize(
    "ranks, accumulation, workers",
    [(1, 2, 0), (2, 1, 0), (4, 1, 0), (2, 2, 0), (4, 3, 0), (1, 1, 2), (2, 2, 3), (4, 1, 2)],
)
def test_stream_does_not_depend_on_ranks_workers_accumulation(made, ranks, accumulation, workers):
    whole = stream(made / "shards")
    assert len(whole) == 96
    assert stream(made / "shards", ranks, accumulation=accumulation, workers=workers) == whole


@pytest.mark.parametrize("ranks, accumulation, workers", [(1, 1, 0), (2, 2, 2), (4, 1, 3)])
def test_resume_in_the_middle_continues_the_stream(made, ranks, accumulation, workers):
    whole = stream(made / "shards")
    rest = stream(made / "shards", ranks, accumulation=accumulation, workers=workers, start_step=5, num_steps=3)
    assert rest == {position: whole[position] for position in range(60, 96)}


def test_micro_batches_of_one_rank_lie_where_the_design_says(made):
    batches = list(loader(made / "shards", rank=1, world_size=2, accumulation=3, num_steps=2))
    # m = 12 / (3 * 2) = 2; position s*G + (a*R + r)*m
    starts = [batch["positions"][0].item() for batch in batches]
    assert starts == [2, 6, 10, 14, 18, 22]
    assert all(batch["x"].shape == (2, 3, 64, 64) for batch in batches)


def test_length_and_no_steps(made):
    assert len(loader(made / "shards", accumulation=2, num_steps=7)) == 14
    assert list(loader(made / "shards", num_steps=0)) == []


def test_the_global_random_state_is_left_alone(made):
    """Otherwise a resumed run would draw other quantisation noise than the uninterrupted one."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for workers in (0, 2):
        for _ in loader(made / "shards", num_steps=2, workers=workers):
            pass
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_survive_the_signals_meant_for_the_trainer(made):
    batches = iter(loader(made / "shards", num_steps=60, workers=2))
    next(batches), next(batches)  # one of each worker: both have begun
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) == 2
    # From elsewhere, as a job scheduler does it; a SIGTERM from the loader's own process ends them.
    for stop in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{stop}", *map(str, workers)], check=True)
    assert sum(1 for _ in batches) == 58


def test_a_program_ends_at_once_with_a_loader_in_use(made):
    program = f"""
from lalic.data.index import ShardIndex
from lalic.data.loader import build_loader
index = ShardIndex.load({str(made / "shards")!r})
batches = iter(build_loader(index, crop=64, seed=1, first_epoch=0, start_step=0, num_steps=500, batch_size=8))
next(batches)
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert time.monotonic() - began < 30


def test_real_photographs(data_dir, tmp_path):
    run_job(data_dir / "bsds500" / "train", tmp_path, Options(shard_size=3 << 20), workers=2)
    one = stream(tmp_path, crop=256, num_steps=4)
    assert stream(tmp_path, 2, crop=256, num_steps=4, workers=2) == one
    assert len(set(one.values())) == 48


def damage(folder: Path, samples: list[int], how=lambda data: bytes(len(data))) -> ShardIndex:
    """Overwrite samples inside their tars, the sizes stay."""
    index = ShardIndex.load(folder)
    for sample in samples:
        with open(index.shard_path(index.shard[sample]), "r+b") as file:
            file.seek(index.offset[sample])
            data = file.read(index.size[sample])
            file.seek(index.offset[sample])
            file.write(how(data))
    return index


def test_a_bad_sample_is_replaced_counted_and_logged_once(shards, caplog):
    whole = stream(shards)
    index = damage(shards, [5])
    with caplog.at_level(logging.WARNING, "lalic.data"):
        batches = list(loader(shards, max_bad=1.0))
    assert sum(batch["bad"] for batch in batches) == 96 // 37 + (5 in first_samples(index, 96 % 37))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert index.key(5) in messages[0] and index.names[index.shard[5]] in messages[0]
    # Replaced the same way everywhere, and nothing else has moved.
    one = stream(shards, max_bad=1.0)
    assert stream(shards, 2, accumulation=2, workers=2, max_bad=1.0) == one
    changed = [position for position in whole if one[position] != whole[position]]
    assert len(changed) == sum(batch["bad"] for batch in batches)


def first_samples(index: ShardIndex, count: int) -> list[int]:
    """The samples at the first `count` places of the third epoch that the loader here reads."""
    eligible = index.eligible(64)
    return eligible[EpochPlan(index.counts(eligible), 11, 4, 2).samples(0, count)].tolist()


def test_the_stream_does_not_depend_on_the_decoder(shards):
    assert stream(shards, decoder="pillow") == stream(shards)
    # Neither do the verdicts: zeros in the middle, a bit, a lost piece, a lost end.
    hurt = [
        lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * (len(data) // 3) :],
        lambda data: data[:-500] + bytes([data[-500] ^ 4]) + data[-499:],
        lambda data: data[: len(data) // 2] + data[len(data) // 2 + 7 :] + bytes(7),
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    ]
    for number, how in enumerate(hurt):
        damage(shards, list(range(number, 37, 8)), how)
    one = loader(shards, decoder="auto", max_bad=1.0)
    other = loader(shards, decoder="pillow", max_bad=1.0)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["x"], b["x"]) and a["bad"] == b["bad"]
    assert one.bad == other.bad > 0


def test_crops_lie_as_the_model_takes_them(made):
    """Channels last in memory, through the workers too: then nothing is transposed on the way to the device."""
    for workers in (0, 1):
        for batch in loader(made / "shards", num_steps=2, workers=workers):
            assert batch["x"].shape == (12, 3, 64, 64)
            assert batch["x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_reach_the_device_as_they_are(made, workers):
    for batch in loader(made / "shards", num_steps=3, workers=workers, pin_memory=True):
        assert batch["x"].is_pinned() and batch["x"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch["x"].to("cuda", non_blocking=True).cpu(), batch["x"])


def test_no_bad_sample_allowed(shards):
    damage(shards, [1])
    with pytest.raises(LalicError, match=r"1 of \d+ samples could not be read, .* allowed share of 0"):
        list(loader(shards, max_bad=0.0, num_steps=4))


def test_a_whole_bad_shard_is_replaced_from_others(shards):
    index = ShardIndex.load(shards)
    bad = np.flatnonzero(index.shard == 1).tolist()
    damage(shards, bad)
    one = stream(shards, max_bad=1.0)
    assert len(one) == 96 and stream(shards, 2, workers=2, max_bad=1.0) == one


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_one_line(shards, workers):
    index = ShardIndex.load(shards)
    damage(shards, list(range(0, len(index), 2)))
    with pytest.raises(LalicError, match=r"samples could not be read, more than the allowed share of 0.01") as caught:
        list(loader(shards, workers=workers, num_steps=40))
    assert f"check the shards with python data_prep/verify.py {shards}; the last" in str(caught.value)
    assert "\n" not in str(caught.value) and ".tar" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_left_to_read_is_one_line(shards, workers):
    damage(shards, list(range(37)))
    with pytest.raises(LalicError, match="replacements cannot be decoded") as caught:
        list(loader(shards, workers=workers, max_bad=1.0))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_away_is_named(shards, workers):
    batches = loader(shards, workers=workers, num_steps=20)
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(LalicError, match=r"shard-000001.tar cannot be read any more: No such file") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_is_one_line(shards):
    batches = iter(loader(shards, workers=1, num_steps=500))
    next(batches)
    with pytest.raises((LalicError, RuntimeError)) as caught:
        for process in multiprocessing.active_children():
            process.kill()
        list(batches)
    # torch notices it in a signal handler, which may run before the loader is asked for the next batch.
    error = caught.value if isinstance(caught.value, LalicError) else worker_failure(caught.value)
    assert str(error).startswith("a data loading process died") and "\n" not in str(error)
    assert worker_failure(RuntimeError("something else")) is None


@pytest.mark.timeout(60)
def test_workers_that_are_ended_while_they_ask_hold_nobody_up(shards, monkeypatch):
    """torch's workers ask before every batch whether they are to end; these do nothing else."""

    def ask_all_the_time(worker):
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            frame = frame.f_back
        questions = iter(frame.f_locals["done_event"].is_set, None)
        threading.Thread(target=lambda: deque(questions, maxlen=0), daemon=True).start()
        leave_signals_to_the_trainer(worker)

    monkeypatch.setattr("lalic.data.loader.leave_signals_to_the_trainer", ask_all_the_time)
    for start in range(5):
        batches = iter(loader(shards, workers=2, start_step=start, num_steps=500))
        next(batches)
        batches.close()
    assert not multiprocessing.active_children()


def test_a_tar_cut_in_half_is_named_before_anything_is_read(shards):
    path = shards / "shard-000002.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(LalicError, match=r"shard-000002.tar is damaged or cut short: it has \d+ bytes"):
        loader(shards)
    path.unlink()
    with pytest.raises(LalicError, match=r"shard-000002.tar is missing: copy it again"):
        loader(shards)


def test_cut_after_the_start_is_a_bad_sample(shards):
    """Bytes that vanish under a running job cost samples, not the run, up to the allowed share."""
    batches = iter(loader(shards, max_bad=1.0))
    assert sum(next(batches)["bad"] for _ in range(4)) == 0  # a whole epoch
    index = ShardIndex.load(shards)
    os.truncate(shards / "shard-000000.tar", int(index.offset[1]) + 10)
    assert sum(batch["bad"] for batch in batches) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_first_rank_looks_at_all_shards_and_the_others_at_those_they_open(shards, workers):
    batches = loader(shards, rank=1, world_size=2, max_bad=1.0, workers=workers)
    os.truncate(shards / "shard-000001.tar", 5000)
    with pytest.raises(LalicError, match=r"shard-000001.tar is damaged or cut short: it has 5000 bytes") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    (shards / "shard-000001.tar").unlink()
    loader(shards, rank=1, world_size=2)
    with pytest.raises(LalicError, match=r"shard-000001.tar is missing: copy it again"):
        loader(shards)


def test_the_first_damaged_shard_is_named_and_the_way_to_look_at_all(shards):
    for number in (7, 2, 5):
        os.truncate(shards / f"shard-{number:06d}.tar", 1)
    with pytest.raises(LalicError, match=r"shard-000002.tar is damaged or cut short"):
        loader(shards)


def test_crop_larger_than_some_leaves_them_out_with_a_count(made, caplog):
    with caplog.at_level(logging.INFO, "lalic.data"):
        loader(made / "shards", crop=100)
    index = ShardIndex.load(made / "shards")
    small = int((np.minimum(index.width, index.height) < 100).sum())
    assert [f"{small} of 37 images are smaller than the crop of 100" in r.message for r in caplog.records] == [True]


def test_crop_larger_than_all_names_the_largest(made):
    with pytest.raises(LalicError, match=r"a crop of 512 is larger than every image .* use a crop of at most 120"):
        loader(made / "shards", crop=512)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 10, "world_size": 4}, "batch of 10 cannot be divided by 4 ranks x 1"),
        ({"batch_size": 0}, "batch of 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not below"),
        ({"start_step": -1}, "out of range"),
        ({"max_bad": 1.5}, "share of bad samples is 1.5"),
        ({"decoder": "fast"}, "decoder is 'fast', it must be auto or pillow"),
        ({"window": 0}, "window must be at least 1"),
        ({"seed": -1}, "seed must lie between"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(made, changes, message):
    with pytest.raises(LalicError, match=message):
        list(loader(made / "shards", **changes))


def test_open_files_stay_bounded(tmp_path):
    count = MAX_OPEN_SHARDS + 20
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    entries = []
    for number in range(count):
        name = f"x-{number:06d}.tar"
        (tmp_path / name).write_bytes(buffer.getvalue())
        size = buffer.tell()
        sample = {"key": str(number), "offset": 0, "size": size, "width": 8, "height": 8}
        entries.append({"name": name, "bytes": size, "sha256": "", "samples": [sample]})
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "shards": entries}))
    index = ShardIndex.load(tmp_path)
    reader = LocalReader(index)
    before = len(os.listdir("/proc/self/fd"))
    for sample in [*range(count), *range(count)]:
        assert decode_rgb(reader.read(sample), "x").shape == (8, 8, 3)
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_SHARDS
    del reader
    assert len(os.listdir("/proc/self/fd")) <= before


SAMPLE = {"key": "a", "offset": 512, "size": 10, "width": 3, "height": 4}
SHARD = {"name": "x-000000.tar", "bytes": 1024, "sha256": "0", "samples": [SAMPLE]}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "index.json is missing: run data_prep/shard.py"),
        ('{"version": 1, "shards": [', "is not JSON, probably cut short"),
        ("[]", "no list of shards"),
        ("{}", "not a valid shard index"),
        ({"version": 2, "shards": []}, "version 2, this program reads version 1"),
        ({"version": 1, "shards": [3]}, "holds something else"),
        ({"version": 1, "shards": [{**SHARD, "name": "../x.tar"}]}, "plain file name"),
        ({"version": 1, "shards": [{**SHARD, "bytes": "many"}]}, "bytes or sha256 is missing"),
        ({"version": 1, "shards": [{**SHARD, "name": "x\0.tar"}]}, "plain file name"),
        ({"version": 1, "shards": [{**SHARD, "name": "\ud800.tar"}]}, "plain file name"),
        ({"version": 1, "shards": [{**SHARD, "name": "x\x1b[2J.tar"}]}, "plain file name"),
        ({"version": 1, "shards": [{**SHARD, "sha256": "\ud800"}]}, "bytes or sha256 is missing"),
        ({"version": 1, "shards": [{**SHARD, "bytes": -1}]}, "x-000000.tar: bytes is -1"),
        ({"version": 1, "shards": [{**SHARD, "bytes": 1 << 63}]}, "x-000000.tar: bytes is 9223372036854775808"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "size": 10**4000}]}]}, r"size is 10+\.\.\.0+\)"),
        ('{"version": 1, "shards": [], "seed": ' + 5000 * "9" + "}", "not a valid shard index .*4300 digits"),
        (100_000 * "[", "is not JSON"),
        ({"version": 1, "shards": [{**SHARD, "samples": 7}]}, "not a list of samples"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "width": 0}]}]}, "'a': width is 0"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "offset": -512}]}]}, "offset is -512"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "size": 600}]}]}, "lies outside its shard x-0"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "size": True}]}]}, "size is True"),
        ({"version": 1, "shards": [{**SHARD, "samples": [{}]}]}, "sample 0 has no key"),
        ({"version": 1, "shards": [SHARD, SHARD]}, "two shards have the same name"),
        ({"version": 1, "shards": [SHARD], "more": SAMPLE}, "holds something else"),
    ],
)
def test_a_wrong_index_is_one_line_with_a_remedy(tmp_path, content, message):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(LalicError, match=message) as caught:
        ShardIndex.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_message_holds_nothing_that_a_terminal_obeys(tmp_path):
    key = "a\x1b[2J\nerror: all is well \u00fc"
    (tmp_path / "index.json").write_text(
        json.dumps({"version": 1, "shards": [{**SHARD, "samples": [{**SAMPLE, "key": key}]}]})
    )
    index = ShardIndex.load(tmp_path)
    assert index.key(0) == key
    assert index.describe(0) == "a\\x1b[2J\\nerror: all is well \u00fc in x-000000.tar"


def test_index_of_a_missing_folder(tmp_path):
    with pytest.raises(LalicError, match="no such folder of shards"):
        ShardIndex.load(tmp_path / "absent")


def test_index_arrays_and_fingerprint(made, shards):
    index = ShardIndex.load(made / "shards")
    document = json.loads((made / "shards" / "index.json").read_text())
    flat = [(number, s) for number, shard in enumerate(document["shards"]) for s in shard["samples"]]
    assert [index.key(i) for i in range(len(index))] == [s["key"] for _, s in flat]
    assert index.shard.tolist() == [number for number, _ in flat]
    for field in ("offset", "size", "width", "height"):
        assert getattr(index, field).tolist() == [s[field] for _, s in flat]
    assert ShardIndex.load(shards).fingerprint == index.fingerprint
    document["shards"][0]["samples"][0]["size"] += 1
    (shards / "index.json").write_text(json.dumps(document))
    assert ShardIndex.load(shards).fingerprint != index.fingerprint


def test_batches_in_hand_do_not_change(made):
    """They are copied out of the memory that the workers write to again and again."""
    kept = list(loader(made / "shards", num_steps=30, workers=2))
    for batch, again in zip(kept, loader(made / "shards", num_steps=30), strict=True):
        assert torch.equal(batch["x"], again["x"])


def test_no_room_for_shared_memory_is_one_line(made, monkeypatch):
    def fail(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(
        LalicError, match=r"^no shared memory for 9 batches .* make /dev/shm larger or use fewer workers"
    ):
        list(loader(made / "shards", workers=2))
