"""The loader over shards elsewhere: the very stream of the local shards, in bounded room, or one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from bucket_server import Bucket, Fault, forget_credentials, serve, serve_s3
from lalic.data_prep.verify import main as verify
from remote_shards import QUICK, put, reader
from test_loader import damage, made, stream  # noqa: F401 -- a fixture
from test_train import config_path, own_process_state, records, run  # noqa: F401 -- fixtures

from lalic.data import cache as cache_module
from lalic.data import prefetch
from lalic.data.loader import build_loader
from lalic.data.order import EpochOrder
from lalic.data.reader import CachedReader, LocalReader, RangeReader, Reader
from lalic.data.source import open_shards
from lalic.errors import LalicError
from lalic.remote import Patience, Remote

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # Python 3.12 warns of any fork beside threads; here the server is one.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]

ORDER = {"crop": 64, "seed": 11, "first_epoch": 2, "start_step": 0, "num_steps": 8, "window": 2, "flip": True}
HASTY = Patience(attempts=2, first_delay=0.01, most_delay=0.02, silence=2.0)


@pytest.fixture(autouse=True)
def small_requests(monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK", 20_000)


@pytest.fixture
def bucket(made):  # noqa: F811
    with serve(Bucket()) as bucket:
        put(bucket, made / "shards")
        yield bucket


@pytest.fixture(scope="module")
def truth(made):  # noqa: F811
    """The stream of the local shards."""
    return stream(made / "shards")


def loader(source: Reader, **changes):
    settings = {**ORDER, "batch_size": 12, "workers": 0, "max_bad": 0.0}
    return build_loader(source.index, reader=source, **{**settings, **changes})


def stream_of(source: Reader, ranks: int = 1, **changes) -> dict[int, str]:
    """Position -> sum of its pixels, the ranks taking turns as in training."""
    seen: dict[int, str] = {}
    loaders = [iter(loader(source, rank=rank, world_size=ranks, **changes)) for rank in range(ranks)]
    for batch in itertools.chain.from_iterable(zip(*loaders, strict=True)):
        for position, crop in zip(batch["positions"].tolist(), batch["x"], strict=True):
            seen[position] = hashlib.sha256(crop.numpy().tobytes()).hexdigest()
    return seen


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (4, 2)])
def test_the_stream_is_that_of_the_local_shards(bucket, truth, tmp_path, size, ranks, workers):
    source = reader(f"{bucket.url}/shards", tmp_path, size)
    assert stream_of(source, ranks, workers=workers) == truth
    if size:
        sizes = source.index.shard_bytes.tolist()
        for name, expected in zip(source.index.names, sizes, strict=True):
            assert bucket.sent[f"shards/{name}"] == expected, "a shard was fetched twice"
    else:
        assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_in_spite_of_a_stumbling_server(bucket, truth, tmp_path, size):
    bucket.faults = [Fault("any", chance=0.2, times=1e9)]
    source = reader(f"{bucket.url}/shards", tmp_path, size, patience=Patience(20, 0.005, 0.02, 5.0))
    assert stream_of(source, 2, workers=2) == truth


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_s3(made, truth, tmp_path, size, monkeypatch):  # noqa: F811
    forget_credentials(monkeypatch, tmp_path)
    with serve_s3() as endpoint:
        system = Remote("s3://photos", endpoint, QUICK).filesystem
        for path in made.joinpath("shards").iterdir():
            if path.is_file():
                system.pipe_file(f"photos/shards/{path.name}", path.read_bytes())
        source = reader("s3://photos/shards", tmp_path / "cache", size, endpoint)
        assert stream_of(source, 2, workers=0) == truth
        assert stream_of(source, 1, workers=2) == truth


def test_any_other_scheme(made, truth, tmp_path):  # noqa: F811
    source = open_shards(f"file://{made / 'shards'}", cache=str(tmp_path), cache_size=1 << 30)
    assert isinstance(source, CachedReader) and stream_of(source, workers=2) == truth


@pytest.mark.parametrize("start", [0, 4])
def test_a_bounded_cache(bucket, truth, tmp_path, start, monkeypatch):
    """Room for two windows of two shards, of seven shards; four epochs, or a resume in the middle of one."""
    monkeypatch.setattr(cache_module, "IDLE", 0.3)
    monkeypatch.setattr(prefetch, "_WANT", 0.05)
    monkeypatch.setattr(prefetch, "_POLL", 0.02)
    sizes = sorted(reader(f"{bucket.url}/shards", tmp_path).index.shard_bytes.tolist())
    limit = sum(sizes[-4:])
    assert limit < sum(sizes)
    source = reader(f"{bucket.url}/shards", tmp_path, limit)
    folder, most, done = tmp_path / "shards", 0, threading.Event()

    def measure() -> None:
        nonlocal most
        while not done.is_set():
            # A file that goes while another comes may be counted with it: what is too much must be so for a while.
            most = max(most, min(on_disk(folder) for _ in range(3)))
            time.sleep(0.002)

    watcher = threading.Thread(target=measure)
    watcher.start()
    try:
        seen = stream_of(source, 2, workers=2, start_step=start, num_steps=8 - start)
    finally:
        done.set()
        watcher.join()
    assert seen == {position: truth[position] for position in range(12 * start, 96)}
    assert sum(sizes[-4:]) // 2 < most <= limit


def on_disk(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_next_window_is_fetched_in_advance(bucket, tmp_path, monkeypatch):
    """While the training holds the first batch, the thread brings two windows, and no more of them."""
    source = reader(f"{bucket.url}/shards", tmp_path)
    batches = iter(loader(source, num_steps=20, start_step=5, batch_size=4))
    position = int(next(batches)["positions"][0])
    assert position == 20
    order = EpochOrder(source.index.counts(source.index.eligible(64)), 11, 2, 2)
    windows = order.windows_from(position)
    wanted = {shard for _ in range(2) for shard in next(windows).tolist()}
    wait_until(lambda: all(map(source.cache.holds, wanted)))
    time.sleep(0.3)
    assert {shard for shard in range(len(source.index.names)) if source.cache.holds(shard)} == wanted
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    batches.close()
    assert not thread.is_alive()


def test_nothing_beyond_the_end_is_fetched(bucket, tmp_path):
    source = reader(f"{bucket.url}/shards", tmp_path)
    batches = iter(loader(source, num_steps=1, batch_size=2))
    next(batches)
    time.sleep(0.5)
    assert sum(map(source.cache.holds, range(len(source.index.names)))) == 2
    batches.close()


def test_a_corrupted_file_in_the_cache_is_fetched_again(bucket, truth, tmp_path, caplog):
    source = reader(f"{bucket.url}/shards", tmp_path)
    assert isinstance(source, CachedReader)
    for shard in range(len(source.index.names)):
        source.cache.fetch(shard)
        path = source.cache._room.whole(source.cache._key(shard))
        path.write_bytes(bytes(path.stat().st_size))
    assert stream_of(source) == truth
    assert "was damaged on the disk: it is fetched again" in caplog.text
    again = reader(f"{bucket.url}/shards", tmp_path)
    assert stream_of(again, workers=2) == truth


def test_a_sample_that_is_bad_where_it_comes_from_is_replaced(bucket, made, tmp_path, caplog):  # noqa: F811
    """Bad in the shard that the index knows: the same replacement as from a folder, by cache and by ranges."""
    folder = tmp_path / "shards"
    folder.mkdir()
    put_back = Bucket()
    put(put_back, made / "shards", "x")
    for path, data in put_back.files.items():
        (folder / path.removeprefix("x/")).write_bytes(data)
    damage(folder, [5])
    document = json.loads((folder / "index.json").read_text())
    for shard in document["shards"]:
        shard["sha256"] = hashlib.sha256((folder / shard["name"]).read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(document))
    put(bucket, folder, "bad")
    local = stream(folder, max_bad=1.0)
    for size in (0, 1 << 30):
        source = reader(f"{bucket.url}/bad", tmp_path / "cache", size)
        with caplog.at_level(logging.WARNING, "lalic.data"):
            assert stream_of(source, max_bad=1.0) == local
        assert f"bad sample {source.index.describe(5)} is replaced" in caplog.text
        with pytest.raises(LalicError, match=r"could not be read, .* data_prep/verify.py http://.*/bad; the last bad"):
            stream_of(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_with_a_wrong_sum_is_named(bucket, tmp_path, workers):
    name = "shards/shard-000001.tar"
    bucket.files[name] = bytes(len(bucket.files[name]))
    source = reader(f"{bucket.url}/shards", tmp_path)
    with pytest.raises(LalicError, match=r"shard shard-000001.tar at .*/shards is damaged: its sha256") as caught:
        stream_of(source, workers=workers, num_steps=20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_a_shard_that_is_missing_or_cut_is_named(bucket, tmp_path, workers, size):
    name = "shards/shard-000001.tar"
    data = bucket.files.pop(name)
    source = reader(f"{bucket.url}/shards", tmp_path, size, patience=HASTY)
    with pytest.raises(LalicError, match=r"shard shard-000001.tar is missing at .*/shards: copy it there") as caught:
        stream_of(source, workers=workers, num_steps=20)
    assert "\n" not in str(caught.value)
    bucket.files[name] = data[: len(data) // 2]
    what = rf"is damaged: it has {len(data) // 2} bytes, index.json says {len(data)}"
    with pytest.raises(LalicError, match=rf"shard shard-000001.tar at .*/shards {what}"):
        stream_of(source, workers=workers, num_steps=20)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_a_server_that_dies_is_one_line(made, tmp_path, workers, size):  # noqa: F811
    with serve(Bucket()) as bucket:
        put(bucket, made / "shards")
        bucket.delay = 0.02
        source = reader(f"{bucket.url}/shards", tmp_path, size, patience=HASTY)
        batches = iter(loader(source, workers=workers, num_steps=200))
        next(batches)
        bucket.faults = [Fault("drop", times=1e9)]
        if size:  # without anything in the cache the server is needed
            for path in (tmp_path / "shards").glob("*.tar"):
                path.unlink()
        with pytest.raises(
            LalicError, match=r"/shards/shard-00000\d.tar: .*2 attempts; see whether the server"
        ) as caught:
            list(batches)
    assert "\n" not in str(caught.value)


def test_a_server_that_pauses_does_not_end_a_run_with_shards_in_the_cache(bucket, truth, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "_REST", 0.05)
    source = reader(f"{bucket.url}/shards", tmp_path, patience=HASTY)
    batches = iter(loader(source))
    seen = [next(batches)]
    last = list(EpochOrder(source.index.counts(source.index.eligible(64)), 11, 2, 2).windows_from(0, 37))[1][-1]
    wait_until(lambda: source.cache.holds(last))
    bucket.faults = [Fault("503", source.index.names[last], times=12)]
    source.cache._room.whole(source.cache._key(last)).unlink()
    wait_until(lambda: bucket.faults[0].times == 0)
    assert "2 attempts; see whether the server" in caplog.text and "goes on while its shards last" in caplog.text
    seen += batches
    assert len(seen) == 8


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_a_password_in_the_url_is_in_no_message(bucket, made, tmp_path, size, caplog, capsys):  # noqa: F811
    caplog.set_level(logging.DEBUG, "lalic")
    url = bucket.url.replace("://", "://alice:secret@") + "/shards"
    assert verify([url, "--quick"]) == 0
    source = reader(url, tmp_path, size, patience=HASTY)
    assert stream_of(source, workers=0, num_steps=2)
    bucket.files.pop("shards/shard-000001.tar")
    with pytest.raises(LalicError, match=r"shard-000001.tar is missing at http://127") as missing:
        stream_of(reader(url, tmp_path / "again", size, patience=HASTY), workers=0, num_steps=20)
    bucket.faults = [Fault("500", times=1e9)]
    with pytest.raises(LalicError, match="the server answers 500") as failing:
        reader(url, tmp_path / "more", size, patience=HASTY)
    said = caplog.text + "".join(capsys.readouterr()) + str(missing.value) + str(failing.value)
    assert "/shards" in said and "secret" not in said and "alice" not in said


def wait_until(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_ends_at_once_beside_a_silent_server(bucket, tmp_path, size, workers):
    program = f"""
from lalic.data import cache
from lalic.data.loader import build_loader
from lalic.data.source import open_shards
import sys, urllib.request
source = open_shards("{bucket.url}/shards", cache={str(tmp_path)!r}, cache_size={size})
batches = iter(build_loader(source.index, reader=source, crop=64, seed=1, first_epoch=0, start_step=0, num_steps=500,
                            batch_size=8, workers={workers}))
next(batches)
print("first", flush=True)
sys.stdin.readline()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "first\n"
    bucket.delay = 60.0
    began = time.monotonic()
    child.communicate("\n", timeout=60)
    assert child.returncode == 0 and time.monotonic() - began < 15


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["ranges", "cache"])
def test_workers_that_wait_for_a_silent_server_do_not_outlive_a_killed_program(bucket, tmp_path, size):
    program = f"""
from multiprocessing import active_children
from lalic.data.loader import build_loader
from lalic.data.source import open_shards
import sys
source = open_shards("{bucket.url}/shards", cache={str(tmp_path)!r}, cache_size={size})
print("open", flush=True)
sys.stdin.readline()
batches = iter(build_loader(source.index, reader=source, crop=64, seed=1, first_epoch=0, start_step=0, num_steps=500,
                            batch_size=8, workers=2))
import threading
threading.Thread(target=next, args=(batches,), daemon=True).start()
while len(active_children()) < 2:
    pass
print(*(process.pid for process in active_children()), flush=True)
sys.stdin.readline()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "open\n"
    bucket.delay = 60.0
    child.stdin.write("\n")
    child.stdin.flush()
    workers = [Path(f"/proc/{pid}") for pid in child.stdout.readline().split()]
    time.sleep(1.0)
    child.kill()
    child.communicate(timeout=60)
    wait_until(lambda: not any(process.exists() for process in workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_a_program_that_waits_for_a_silent_server(bucket, tmp_path, workers):
    # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
    program = f"""
import signal
from lalic.data.loader import build_loader
from lalic.data.source import open_shards
signal.signal(signal.SIGINT, signal.default_int_handler)
source = open_shards("{bucket.url}/shards", cache={str(tmp_path)!r})
print("open", flush=True)
input()
next(iter(build_loader(source.index, reader=source, crop=64, seed=1, first_epoch=0, start_step=0, num_steps=500,
                       batch_size=8, workers={workers})))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "open\n"
    bucket.delay = 60.0
    child.stdin.write("\n")
    child.stdin.flush()
    time.sleep(2.0)
    child.send_signal(2)
    began = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and time.monotonic() - began < 15


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache_size": 5}, r"data.cache_size: only for shards elsewhere, but data.shards=.* is a folder"),
        ({"cache": "x", "endpoint": "http://x"}, "data.endpoint and data.cache: only for"),
    ],
)
def test_settings_for_elsewhere_are_refused_for_a_folder(made, settings, message):  # noqa: F811
    with pytest.raises(LalicError, match=message):
        open_shards(str(made / "shards"), **settings)
    assert isinstance(open_shards(str(made / "shards")), LocalReader)


@pytest.mark.parametrize("url", ["http://", "s3://", "s3:///shards"])
def test_a_url_without_a_server_is_named_as_it_was_given(url, tmp_path):
    with pytest.raises(LalicError, match=f"{url}: names no server or bucket"):
        open_shards(url, cache=str(tmp_path))


def test_settings_of_another_kind_of_server_and_a_small_cache(bucket, tmp_path):
    url = f"{bucket.url}/shards/"
    with pytest.raises(LalicError, match="goes with s3:// only"):
        open_shards(url, endpoint="http://127.0.0.1:1", cache=str(tmp_path))
    assert isinstance(open_shards(url, cache=str(tmp_path), cache_size=0), RangeReader)
    source = open_shards(url, cache=str(tmp_path), cache_size=100_000)
    with pytest.raises(LalicError, match=r"data.cache_size is 100000 bytes, .* have up to \d+ bytes .*: give at least"):
        loader(source)


def test_training_from_a_url_and_back(config_path, tmp_path):  # noqa: F811
    """Local, from a URL through the cache, and moved to ranges at a resume: the same weights."""
    local, remote = tmp_path / "local", tmp_path / "remote"
    quick = ["checkpoint.every=2", "validate.every=1000", "data.val=null", "data.val_crop=null"]
    run(config_path, local, *quick)
    with serve(Bucket()) as bucket:
        put(bucket, config_path.parent / "shards")
        moved = [*quick, f"data.shards={bucket.url}/shards", f"data.cache={tmp_path / 'cache'}"]
        reset_state()
        # Four steps of a shorter plan, gone on with from the same URL without a cache.
        run(config_path, remote, *moved, "stages=[{steps: 4, lr: 1e-3, crop: 64}]", "data.cache_size=1GiB")
        assert list((tmp_path / "cache" / "shards").glob("*.tar"))
        reset_state()
        run(config_path, remote, *moved, "data.cache_size=0", "data.workers=1")
    a, b = (
        torch.load(folder / "checkpoints" / "step-00000007" / "model.pt", weights_only=True)
        for folder in (local, remote)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["step"] for r in records(remote)] == list(range(1, 8))


@pytest.mark.parametrize("end", ["stop", "missing"])
def test_a_run_that_waits_for_data_or_cannot_have_them_keeps_its_steps(config_path, tmp_path, end):  # noqa: F811
    """Asked to stop beside a silent server, or without its shards: a checkpoint of the last step, and the same end."""
    quick = ["checkpoint.every=100", "validate.every=1000", "data.val=null", "data.val_crop=null", "log.every=1"]
    run(config_path, tmp_path / "reference", *quick)
    with serve(Bucket()) as bucket:
        put(bucket, config_path.parent / "shards")
        held, bucket.delay = dict(bucket.files), 0.1
        remote = [f"data.shards={bucket.url}/shards", f"data.cache={tmp_path}", "data.cache_size=0"]
        order = [*quick, *remote, "data.workers=0"]
        command = [sys.executable, "-m", "lalic.train", "--config", str(config_path), *order]
        command.append(f"run.dir={tmp_path / 'run'}")
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while "step 1/7" not in child.stderr.readline():
            assert child.poll() is None
        if end == "stop":
            bucket.delay = 60.0
            time.sleep(3.0)  # the step that has its data is done by then
            child.send_signal(15)
        else:
            for name in held:
                if name.endswith(".tar"):
                    del bucket.files[name]
        began = time.monotonic()
        said = child.communicate(timeout=50)[1]
        assert child.returncode == (0 if end == "stop" else 2), said
        assert ("stopped at step 1: SIGTERM" if end == "stop" else "is missing at") in said
        assert time.monotonic() - began < 30
        (kept,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        assert 1 <= int(kept.name.removeprefix("step-")) < 7
        bucket.delay = 0.0
        bucket.files.update(held)
        reset_state()
        run(config_path, tmp_path / "run", *order)
    a, b = (
        torch.load(tmp_path / folder / "checkpoints" / "step-00000007" / "model.pt", weights_only=True)
        for folder in ("reference", "run")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def reset_state() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_config_says_what_a_size_is(config_path):  # noqa: F811
    from lalic.config import config_text, read_config

    config = read_config(config_path, ["data.cache_size=1.5GiB", "data.shards=s3://a/b"])
    assert config.data.cache_size == 3 << 29 and "cache_size: 1610612736\n" in config_text(config)
    assert read_config(config_path, ["data.cache_size=0"]).data.cache_size == 0
    with pytest.raises(LalicError, match=r"data.cache_size must be a size such as 512MiB or 200GiB or null, not 'big'"):
        read_config(config_path, ["data.cache_size=big"])
