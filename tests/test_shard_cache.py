"""The cache of shards: whole or absent, fetched once, bounded, whoever dies or stumbles."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from bucket_server import Bucket, Fault, serve
from remote_shards import QUICK, put, write_noise

from lalic.data import cache as cache_module
from lalic.data import room
from lalic.data.cache import ShardCache
from lalic.data.index import ShardIndex
from lalic.data.room import Part
from lalic.data.source import load_remote_index
from lalic.errors import LalicError
from lalic.remote import Remote, RemoteError

SIZE = 50_000


@pytest.fixture(autouse=True)
def small_requests(monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK", 8_000)
    monkeypatch.setattr(cache_module, "AHEAD", 3)


@pytest.fixture
def index(tmp_path) -> ShardIndex:
    return write_noise(tmp_path / "noise", 6, SIZE)


@pytest.fixture
def bucket(tmp_path, index):
    with serve(Bucket()) as bucket:
        put(bucket, tmp_path / "noise")
        yield bucket


@pytest.fixture
def make(tmp_path, index, bucket):
    def make(size: int = 1 << 30, patience=QUICK, folder: str = "cache") -> ShardCache:
        return ShardCache(index, Remote(f"{bucket.url}/shards", patience=patience), tmp_path / folder, size)

    return make


def content(cache: ShardCache, shard: int) -> bytes:
    handle = cache.open(shard)
    try:
        return os.pread(handle, 1 << 20, 0)
    finally:
        os.close(handle)


def expected(shard: int) -> bytes:
    return random.Random(shard).randbytes(SIZE)


def tars(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.tar"))


def age(cache: ShardCache, shard: int, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache._room.whole(cache._key(shard)), (then, then))


def test_a_shard_is_fetched_in_ranges_once(make, bucket):
    cache = make()
    assert content(cache, 2) == expected(2)
    assert bucket.count("n-000002.tar") == 7 and all(r for verb, _, r in bucket.requests if verb == "GET")
    assert content(cache, 2) == expected(2) and content(make(), 2) == expected(2)
    assert bucket.count("n-000002.tar") == 7
    assert [path.name for path in tars(cache)] == [f"{hashlib.sha256(expected(2)).hexdigest()}-{SIZE}.tar"]


def test_a_stumbling_server(make, bucket):
    bucket.faults = [Fault("any", chance=0.2, times=1e9)]
    cache = make()
    for shard in range(6):
        assert content(cache, shard) == expected(shard)


def _fetch_all(cache: ShardCache) -> None:
    for shard in range(6):
        cache.fetch(shard)
    os._exit(0)


def test_killed_at_any_moment(make, bucket):
    """Eight processes are killed while they fetch; what they leave is taken up, and never wrong."""
    cache = make()
    bucket.delay = 0.004
    generator = random.Random(4)
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(target=_fetch_all, args=(cache,))
        child.start()
        time.sleep(generator.uniform(0.02, 0.12))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for path in tars(cache):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name.partition("-")[0]
    for shard in range(6):
        assert content(cache, shard) == expected(shard)
    assert len(tars(cache)) == 6 and not list(cache.folder.glob("*.part"))
    sent = sum(size for path, size in bucket.sent.items() if path.endswith(".tar"))
    # At most the requests under way were lost each time.
    assert 6 * SIZE <= sent <= 6 * SIZE + 8 * cache_module.AHEAD * 8_000


@pytest.mark.parametrize("beginning", [b"", b"x" * 20_000, bytes(SIZE), bytes(2 * SIZE)])
def test_a_beginning_is_not_believed(make, beginning):
    cache = make()
    (cache.folder / f"{cache._key(1)}.part").write_bytes(beginning)
    assert content(cache, 1) == expected(1)


def test_a_good_beginning_is_gone_on_with(make, bucket):
    cache = make()
    (cache.folder / f"{cache._key(1)}.part").write_bytes(expected(1)[:33_000])
    assert content(cache, 1) == expected(1) and bucket.sent["shards/n-000001.tar"] == SIZE - 33_000


def _read_one(cache: ShardCache) -> bool:
    return content(cache, 3) == expected(3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_four_processes_fetch_a_shard_once(make, bucket, method):
    bucket.delay = 0.05
    with multiprocessing.get_context(method).Pool(4) as pool:
        assert all(pool.map(_read_one, [make()] * 4, chunksize=1))
    # spawn: the request size of this test is not known there, one request is enough
    assert bucket.count("n-000003.tar") == (7 if method == "fork" else 1)
    assert bucket.sent["shards/n-000003.tar"] == SIZE


def test_without_locks_each_fetches_for_itself(make, bucket, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    bucket.delay = 0.02
    cache = make()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(_read_one, [cache] * 3, chunksize=1))
    assert content(cache, 3) == expected(3) and "no locks" in caplog.text
    assert len(tars(cache)) == 1 and not list(cache.folder.glob("*.part"))


def test_the_oldest_goes_first_and_the_bound_holds(make):
    cache = make(3 * SIZE)
    for shard in range(3):
        cache.fetch(shard)
        age(cache, shard, 100 - shard)
    cache.want([0])
    for shard in (3, 4):
        cache.fetch(shard)
        assert cache.used <= 3 * SIZE and sum(p.stat().st_size for p in tars(cache)) <= 3 * SIZE
    assert [shard for shard in range(6) if cache.holds(shard)] == [0, 3, 4]


def test_what_is_wanted_now_stays_for_what_is_wanted_later(make):
    cache = make(3 * SIZE)
    for shard in range(3):
        cache.fetch(shard, in_advance=True)
    assert not cache.fetch(3, in_advance=True) and not list(cache.folder.glob("*.part"))
    age(cache, 1, 60)
    assert cache.fetch(3, in_advance=True)
    assert [shard for shard in range(6) if cache.holds(shard)] == [0, 2, 3]


def test_a_smaller_bound_is_kept_from_the_start(make):
    cache = make()
    for shard in range(4):
        cache.fetch(shard)
        age(cache, shard, 50 - shard)
    (cache.folder / f"{cache._key(5)}.part").write_bytes(b"left by a killed process")
    age_of_part = time.time() - 1000
    os.utime(cache.folder / f"{cache._key(5)}.part", (age_of_part, age_of_part))
    small = make(2 * SIZE)
    assert [shard for shard in range(6) if small.holds(shard)] == [2, 3] and small.used == 2 * SIZE


def test_a_part_in_use_is_not_removed(make, bucket):
    """With room for one shard, the second one waits until the first is whole, and then takes its place."""
    cache, bucket.delay = make(SIZE), 0.1
    child = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(0,))
    child.start()
    while not list(cache.folder.glob("*.part")):
        time.sleep(0.005)
    assert content(cache, 1) == expected(1) and not cache.holds(0)
    child.join()
    assert child.exitcode == 0 and bucket.sent["shards/n-000000.tar"] == SIZE


def test_what_goes_as_soon_as_it_is_whole_is_not_fetched_again(make, bucket, monkeypatch):
    """As above, at the worst moment: another process takes the place before the one that fetched looks again."""
    cache, finish = make(SIZE), Part.finish

    def finish_and_lose(part: Part, final: Path) -> None:
        finish(part, final)
        final.unlink()

    monkeypatch.setattr(Part, "finish", finish_and_lose)
    assert cache.fetch(0) and not cache.holds(0)
    assert bucket.sent["shards/n-000000.tar"] == SIZE


def test_too_small_for_two_windows(make):
    make(4 * SIZE).check(2)
    make(6 * SIZE).check(50)
    with pytest.raises(LalicError, match=rf"data.cache_size is 199999 bytes, .* up to {4 * SIZE} bytes \(200.0 kB\)"):
        make(4 * SIZE - 1).check(2)


def test_a_file_of_another_size_is_fetched_again(make, caplog):
    cache = make()
    cache.fetch(0)
    os.truncate(tars(cache)[0], SIZE - 1)
    assert content(cache, 0) == expected(0) and "was damaged on the disk" in caplog.text


def test_a_file_with_other_bytes_is_noticed_when_asked(make):
    cache = make()
    cache.fetch(0)
    assert not cache.was_damaged(0)
    with open(tars(cache)[0], "r+b") as file:
        file.write(b"rot")
    again = make()
    assert again.was_damaged(0) and not again.holds(0)
    assert content(again, 0) == expected(0) and not again.was_damaged(0)


def test_damaged_where_it_comes_from(make, bucket):
    bucket.files["shards/n-000001.tar"] = expected(2)
    cache = make()
    with pytest.raises(LalicError, match=r"shard n-000001.tar at http://.*/shards is damaged: its sha256 is") as caught:
        cache.fetch(1)
    assert "\n" not in str(caught.value) and not list(cache.folder.glob("*-*"))
    assert bucket.sent["shards/n-000001.tar"] == 2 * SIZE


def test_damaged_once(make, bucket):
    """What came wrong may come right: a proxy's broken copy, say."""
    right = bucket.files["shards/n-000001.tar"]

    class Once(dict):
        def get(self, path, default=None):
            wrong = path.endswith("1.tar") and bucket.count("n-000001.tar") == 3
            return bytes(SIZE) if wrong else super().get(path, default)

    bucket.files = Once(bucket.files)
    assert content(make(), 1) == right and bucket.sent["shards/n-000001.tar"] == 2 * SIZE


def test_another_size_or_nothing_where_it_comes_from(make, bucket):
    bucket.files["shards/n-000001.tar"] = expected(1)[:-5]
    with pytest.raises(LalicError, match=r"n-000001.tar at .* is damaged: it has 49995 bytes, index.json says 50000"):
        make().fetch(1)
    del bucket.files["shards/n-000001.tar"]
    cache = make()
    with pytest.raises(LalicError, match=r"shard n-000001.tar is missing at http://"):
        cache.fetch(1)
    assert "shards/n-000001.tar" not in bucket.sent and not list(cache.folder.glob("*-*"))


def test_a_server_that_dies_leaves_a_beginning(make, bucket):
    cache = make(patience=QUICK)
    bucket.faults = [Fault("drop", "n-000000.tar", times=0)]

    def pulse() -> None:
        bucket.faults[0].times = 1e9

    with pytest.raises(RemoteError, match="8 attempts"):
        cache.fetch(0, pulse=pulse)
    (part,) = cache.folder.glob("*.part")
    assert 0 < part.stat().st_size < SIZE
    bucket.faults.clear()
    assert content(cache, 0) == expected(0)


class _Disk:
    """os.pwrite on a disk of a few bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.write = folder, size, os.pwrite

    def pwrite(self, handle: int, data: bytes, start: int) -> int:
        if sum(path.stat().st_size for path in self.folder.iterdir()) + len(data) > self.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(handle, data, start)


def test_a_full_disk_makes_room_or_is_one_line(make, monkeypatch):
    cache = make()
    disk = _Disk(cache.folder, int(2.5 * SIZE))
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    for shard in range(4):
        assert content(cache, shard) == expected(shard)
        age(cache, shard, 50 - shard)
    assert [shard for shard in range(6) if cache.holds(shard)] == [2, 3]
    disk.size = SIZE // 2
    with pytest.raises(LalicError, match=r"cache: No space left on device: free some, or give a smaller") as caught:
        cache.fetch(5)
    assert "\n" not in str(caught.value) and not list(cache.folder.glob("*-*"))


def test_a_folder_that_cannot_be(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LalicError, match=r"file/cache: Not a directory: see that data.cache is a folder"):
        make(folder="file/cache")


def test_a_sum_is_needed(tmp_path, index, bucket):
    document = json.loads((tmp_path / "noise" / "index.json").read_text())
    document["shards"][2]["sha256"] = "../../x"
    (tmp_path / "noise" / "index.json").write_text(json.dumps(document))
    with pytest.raises(LalicError, match=r"n-000002.tar at .* has no valid sha256"):
        ShardCache(ShardIndex.load(tmp_path / "noise"), Remote(bucket.url), tmp_path / "cache", 1)


def test_other_urls_of_the_same_shards_share(make, bucket, index, tmp_path):
    cache = make()
    cache.fetch(0)
    other = ShardCache(index, Remote(f"{bucket.url}/elsewhere", patience=QUICK), tmp_path / "cache", 1 << 30)
    assert content(other, 0) == expected(0) and bucket.count("elsewhere", "HEAD") == 0


def test_a_lock_that_was_released_by_a_rename_is_not_taken(tmp_path):
    """Another process finishes between the opening of its part and the lock on it."""
    place = room.Room(tmp_path, 1000)
    key = "0" * 64 + "-10"
    part = place.claim(key)
    handle = os.open(part.path, os.O_RDWR)
    part.finish(place.whole(key))
    part.close()
    assert room._lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and not room._is(handle, part.path)
    assert place.claim(key) is None and not part.path.exists()
    os.close(handle)


def test_index_is_fetched_once_until_it_changes(tmp_path, bucket, index, caplog):
    remote = Remote(f"{bucket.url}/shards", patience=QUICK)
    for _ in range(2):
        found = load_remote_index(remote, tmp_path / "cache")
        assert found.fingerprint == index.fingerprint and found.folder == remote.root
        assert bucket.count("index.json") == 1
    document = json.loads(bucket.files["shards/index.json"])
    document["shards"].pop()
    bucket.files["shards/index.json"] = json.dumps(document).encode()
    assert load_remote_index(remote, tmp_path / "cache").fingerprint != index.fingerprint
    bucket.etags = False
    for requests in (3, 4):
        load_remote_index(remote, tmp_path / "cache")
        assert bucket.count("index.json") == requests


def test_index_that_is_none(tmp_path, bucket):
    remote = Remote(f"{bucket.url}/shards", patience=QUICK)
    good = bucket.files["shards/index.json"]
    bucket.files["shards/index.json"] = good[: len(good) // 2]
    with pytest.raises(LalicError, match=r"http://.*/shards/index.json, kept as .* is not JSON") as caught:
        load_remote_index(remote, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    bucket.files["shards/index.json"] = good.replace(b'"n-000001.tar"', b'"../n-00001.tar"')
    with pytest.raises(LalicError, match="plain file name"):
        load_remote_index(remote, tmp_path / "cache")
    bucket.files["shards/index.json"] = good
    assert len(load_remote_index(remote, tmp_path / "cache")) == 6
    with pytest.raises(LalicError, match=r"/nothing: there is no index.json, so it is no folder of shards"):
        load_remote_index(Remote(f"{bucket.url}/nothing", patience=QUICK), tmp_path / "cache")


def test_index_from_a_stumbling_server(tmp_path, bucket, index, caplog):
    bucket.faults = [Fault("any", chance=0.2, times=1e9)]
    with caplog.at_level(logging.INFO, "lalic.data"):
        for number in range(6):
            remote = Remote(f"{bucket.url}/shards", patience=QUICK)
            assert load_remote_index(remote, tmp_path / f"cache{number}").fingerprint == index.fingerprint
