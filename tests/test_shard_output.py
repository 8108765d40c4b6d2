"""Shards written elsewhere: any fsspec file system, S3 (moto's server); whole or absent, resumed, one process alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from bucket_server import serve_s3
from lalic.data_prep import lease
from lalic.data_prep.checking import check_shards
from lalic.data_prep.find import finders
from lalic.data_prep.job import run_job
from lalic.data_prep.output import LocalFolder
from lalic.data_prep.places import output_file, output_folder
from lalic.data_prep.rebuild import run_rebuild
from lalic.data_prep.remote_output import RemoteFolder
from shard_samples import SMALL, encode, kill_once, picture, result, shard_command, write_folder

from lalic.errors import LalicError
from lalic.remote import Remote


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("made")
    run_job(write_folder(base / "in"), base / "out", SMALL, workers=0, manifest=base / "out" / "m.csv.gz")
    return base


@pytest.fixture(scope="module")
def endpoint():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        with serve_s3() as address:
            yield address


@pytest.fixture
def bucket(endpoint) -> str:
    """A prefix of its own in the bucket."""
    return f"s3://photos/{uuid4().hex}/shards"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid4().hex}"


def remote_result(url: str, endpoint: str | None = None) -> dict[str, str]:
    """As `result` of a local folder, through fsspec alone."""
    options = {"endpoint_url": endpoint} if endpoint else {}
    system = fsspec.filesystem(url.partition("://")[0], skip_instance_cache=True, **options)
    files = [entry["name"] for entry in system.ls(url, detail=True) if entry["type"] == "file"]
    return {name.rpartition("/")[2]: hashlib.sha256(system.cat_file(name)).hexdigest() for name in sorted(files)}


def uploads(url: str, endpoint: str) -> list:
    system = Remote(url, endpoint).filesystem
    return system.call_s3("list_multipart_uploads", Bucket="photos", Prefix=url.split("/", 3)[3]).get("Uploads") or []


# The same files, wherever they go


def test_any_file_system_gets_the_same_bytes(made, memory, tmp_path, capsys):
    for url in (memory, f"file://{tmp_path}/a%20b"):
        run_job(made / "in", url, SMALL, workers=0, manifest=f"{url}/m.csv.gz")
    assert remote_result(memory) == result(made / "out") == result(tmp_path / "a b")
    assert not list(tmp_path.rglob("*.tmp"))
    capsys.readouterr()
    run_job(made / "in", memory, SMALL, workers=0)
    assert f"{memory}: complete before this run, 40 images in" in capsys.readouterr().out
    assert check_shards(memory, workers=0, decode=True, manifest=made / "out" / "m.csv.gz") == 0


def test_s3_gets_the_same_bytes(made, bucket, endpoint, capsys):
    run_job(made / "in", bucket, SMALL, workers=0, manifest=f"{bucket}/m.csv.gz", endpoint=endpoint)
    assert remote_result(bucket, endpoint) == result(made / "out")
    run_job(made / "in", bucket, SMALL, workers=0, endpoint=endpoint)
    assert "nothing to do" in capsys.readouterr().out
    assert check_shards(bucket, workers=2, endpoint=endpoint) == 0
    system = Remote(bucket, endpoint).filesystem
    assert not system.exists(f"{bucket}/.shard-state/lock")


def test_damage_elsewhere_is_found(made, bucket, endpoint, capsys):
    run_job(made / "in", bucket, SMALL, workers=0, endpoint=endpoint)
    system = Remote(bucket, endpoint).filesystem
    data = bytearray(system.cat_file(f"{bucket}/shard-000001.tar"))
    data[2000] ^= 1
    system.pipe_file(f"{bucket}/shard-000001.tar", bytes(data))
    system.rm_file(f"{bucket}/shard-000000.tar")
    assert check_shards(bucket, workers=0, endpoint=endpoint) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "shard-000000.tar: is missing" in lines and any("shard-000001.tar: sha256" in line for line in lines)


def test_the_rebuild_goes_elsewhere_too(made, bucket, endpoint, tmp_path, memory):
    manifest = made / "out" / "m.csv.gz"
    expected = {
        name: value for name, value in result(made / "out").items() if name in ("index.json",) or ".tar" in name
    }
    for url, address in ((bucket, endpoint), (memory, None)):
        options = {"label": "in", "workers": 1, "endpoint": address}
        with pytest.raises(LalicError, match="name a local folder for them by --staging"):
            run_rebuild(manifest, finders(str(made / "in"), 1), url, **options)
        with pytest.raises(LalicError, match="39 of 40 samples could not be had"):
            run_rebuild(manifest, [_one(made)], url, staging=tmp_path / "s", **options)
        run_rebuild(manifest, finders(str(made / "in"), 1), url, staging=tmp_path / "s", **options)
        assert remote_result(url, address) == expected
        assert not [path for path in (tmp_path / "s").iterdir() if "tar" in path.name]


def _one(made: Path):
    path = next((made / "in").rglob("*.*"))
    return lambda wanted: [(path.name, path.read_bytes())]


def test_large_files_go_in_parts(endpoint, bucket):
    folder = output_folder(bucket, endpoint)
    data = random.Random(1).randbytes(40 << 20)
    with folder.open("x.tar") as file:
        for start in range(0, len(data), 300_001):
            file.write(data[start : start + 300_001])
        assert uploads(bucket, endpoint) and folder.size("x.tar") is None
    assert folder.sha256("x.tar") == hashlib.sha256(data).hexdigest()
    assert folder.size("x.tar") == len(data) and not uploads(bucket, endpoint)


@pytest.mark.parametrize("size", [10, 20 << 20])
def test_what_raises_leaves_nothing(endpoint, bucket, memory, size):
    for url, address in ((bucket, endpoint), (memory, None)):
        folder = output_folder(url, address)
        folder.write_text("x.tar", "before")
        with pytest.raises(KeyboardInterrupt), folder.open("x.tar") as file:
            file.write(bytes(size))
            raise KeyboardInterrupt
        assert folder.read("x.tar") == b"before"
        assert list(remote_result(url, address)) == ["x.tar"]
    assert not uploads(bucket, endpoint)


# Interrupted


class Stop(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def test_stopped_between_any_two_files_it_ends_in_the_same_bytes(made, memory, monkeypatch):
    monkeypatch.setattr(lease, "_CONFIRM", 0)
    original = RemoteFolder._move
    for done in (False, True):
        for step in range(1, 100):
            url = f"{memory}/{step}-{done}"
            left = step

            def move_or_stop(self, source, target, done=done):
                nonlocal left
                left -= 1
                if left or done:
                    original(self, source, target)
                if not left:
                    raise Stop

            monkeypatch.setattr(RemoteFolder, "_move", move_or_stop)
            try:
                run_job(made / "in", url, SMALL, workers=0, manifest=f"{url}/m.csv.gz")
                break
            except Stop:
                monkeypatch.setattr(RemoteFolder, "_move", original)
                run_job(made / "in", url, SMALL, workers=0, manifest=f"{url}/m.csv.gz")
            assert remote_result(url) == result(made / "out")
        assert step > 10


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_on_s3(tmp_path, root, bucket, endpoint, kills):
    for number in range(20 * kills):
        path = tmp_path / "in" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(number, 160, 160), "PNG"))
    flags = ["--shard-size", "400000", "--min-side", "32", "--workers", "0", "--check", "headers"]
    subprocess.run(
        shard_command(root, "--input", tmp_path / "in", "--output", tmp_path / "out", *flags),
        check=True,
        capture_output=True,
    )
    command = shard_command(root, "--input", tmp_path / "in", "--output", bucket, "--endpoint", endpoint, *flags)
    system = Remote(bucket, endpoint).filesystem
    delays = random.Random(3)
    killed = there = 0
    for _ in range(3 * kills):
        # Behind the next shard: its record, or something of the one after it, is under way.
        delay = delays.uniform(0, 0.05)
        if kill_once(command, lambda there=there: shards_there(system, bucket) > there, delay, interval=0.01):
            killed += 1
            there = shards_there(system, bucket)
        else:  # A loaded machine saw the last shards too late, the job was complete: begin again.
            system.rm(bucket, recursive=True)
            there = 0
        if killed == kills:
            break
    assert killed == kills
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "is taken over, its holder is gone" in done.stderr
    assert remote_result(bucket, endpoint) == result(tmp_path / "out")


def shards_there(system, url: str) -> int:
    system.invalidate_cache()
    try:
        return sum(name.endswith(".tar") for name in system.ls(url, detail=False))
    except FileNotFoundError:
        return 0


def test_uploads_of_a_killed_run_are_given_up(made, bucket, endpoint):
    """They are invisible, but paid for. Those of other programs are not touched."""
    system = Remote(bucket, endpoint).filesystem
    key = bucket.split("/", 3)[3]
    for name in ("shard-000007.tar", "other-000001.tar"):
        system.call_s3("create_multipart_upload", Bucket="photos", Key=f"{key}/{name}")
    run_job(made / "in", bucket, SMALL, workers=0, endpoint=endpoint)
    assert [upload["Key"].rpartition("/")[2] for upload in uploads(bucket, endpoint)] == ["other-000001.tar"]


def test_a_server_that_goes_away_is_one_line_and_the_next_run_goes_on(made, bucket, endpoint, monkeypatch):
    written = 0
    original = RemoteFolder._try

    def fail_later(self, action, name):
        nonlocal written
        if name.endswith(".tar"):
            written += 1
            if written > 30:
                return original(self, lambda: _raise(ConnectionResetError("connection reset")), name)
        return original(self, action, name)

    monkeypatch.setattr(RemoteFolder, "_try", fail_later)
    with pytest.raises(LalicError, match="connection reset, 1 attempts; see whether the server and the network are up"):
        run_job(made / "in", bucket, SMALL, workers=0, endpoint=endpoint)
    monkeypatch.setattr(RemoteFolder, "_try", original)
    run_job(made / "in", bucket, SMALL, workers=0, endpoint=endpoint, manifest=f"{bucket}/m.csv.gz")
    assert remote_result(bucket, endpoint) == result(made / "out")


def _raise(error: Exception) -> None:
    raise error


# One process at a time


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lease, "EXPIRY", 1.5)


@pytest.fixture(params=["memory", "s3"])
def place(request, endpoint) -> Remote:
    if request.param == "s3":
        return Remote(f"s3://photos/{uuid4().hex}", endpoint)
    return Remote(f"memory://{uuid4().hex}")


def test_a_second_process_is_refused(place, quick_lease):
    with lease.Lease(place, "state/lock"):
        for _ in range(2):
            with pytest.raises(LalicError, match=f"another process is writing shards into it .*process {os.getpid()}"):
                lease.Lease(place, "state/lock").__enter__()
    with lease.Lease(place, "state/lock"):
        pass


def test_of_many_that_start_at_once_one_gets_it(place, quick_lease):
    won, lost = [], []
    leases = [lease.Lease(place, "lock") for _ in range(8)]

    def enter(one: lease.Lease) -> None:
        try:
            one.__enter__()
            won.append(one)
        except LalicError:
            lost.append(one)

    threads = [threading.Thread(target=enter, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    won[0].__exit__(None, None, None)


def test_the_lease_of_another_machine_that_is_gone_expires(place, quick_lease, monkeypatch):
    content = {"owner": "x", "beats": 3, "host": "elsewhere", "process": 1, "machine": "another", "began": "1"}
    place.filesystem.pipe_file(place.url("lock"), json.dumps(content).encode())
    began = time.monotonic()
    with lease.Lease(place, "lock") as held:
        assert time.monotonic() - began >= 1.5
        held.check()


def test_the_lease_of_a_process_of_this_machine_that_is_gone_is_taken_at_once(place, monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    holder = {**lease._this_process(), "process": process.pid, "began": lease._began(process.pid)}
    place.filesystem.pipe_file(place.url("lock"), json.dumps({"owner": "x", **holder}).encode())
    process.kill()
    process.wait()
    began = time.monotonic()
    with lease.Lease(place, "lock"):
        assert time.monotonic() - began < 20


def test_a_lease_that_was_taken_away_stops_the_holder(place, quick_lease):
    with lease.Lease(place, "lock") as held:
        held.check()
        place.filesystem.pipe_file(place.url("lock"), b'{"owner": "somebody else"}')
        deadline = time.monotonic() + 10
        with pytest.raises(LalicError, match="its lease lock was lost, another process may be writing"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)
    assert json.loads(place.read("lock")) == {"owner": "somebody else"}


def test_two_jobs_into_one_remote_folder(made, memory, quick_lease):
    folder = RemoteFolder(memory)
    folder.prepare(".shard-state")
    with folder.held(".shard-state/lock"), pytest.raises(LalicError, match="another process is writing"):
        run_job(made / "in", memory, SMALL, workers=0)
    run_job(made / "in", memory, SMALL, workers=0)


# A full disk, a real one


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 150 kB and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=148k", "none", disk]).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("flags", [[], ["--from-manifest"], ["--check", "headers", "--workers", "0"]], ids=str)
def test_a_disk_that_is_full(made, root, small_disk, flags):
    disk, enlarge = small_disk
    if "--from-manifest" in flags:
        flags = [*flags, made / "out" / "m.csv.gz"]
    else:
        flags = [*flags, "--shard-size", "60000", "--min-side", "32", "--manifest", disk / "out" / "m.csv.gz"]
    command = shard_command(root, "--input", made / "in", "--output", disk / "out", *flags)
    full = subprocess.run(command, capture_output=True, text=True)
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "cannot be written on (No space left on device)" in line and "run the same command again" in line
    safe = {path.name: path.read_bytes() for path in (disk / "out").glob("*.tar")}
    enlarge()
    subprocess.run(command, check=True, capture_output=True)
    now, then = result(disk / "out"), result(made / "out")
    assert {name: now[name] for name in then if ".tar" in name or name == "index.json" or name in now} == {
        name: then[name] for name in then if ".tar" in name or name == "index.json" or name in now
    }
    assert all((disk / "out" / name).read_bytes() == data for name, data in safe.items())
    assert not list((disk / "out").glob(".*.tmp")) and not list((disk / "out").glob(".*.part"))


# Bad places


@pytest.mark.parametrize(
    "where, message",
    [
        ("https://example.org/shards", "https:// cannot be written to"),
        ("nosuch://x/y", "nosuch:// cannot be read"),
        ("s3://", "names no server or bucket"),
    ],
)
def test_places_that_cannot_be(made, where, message):
    with pytest.raises(LalicError, match=message):
        run_job(made / "in", where, SMALL, workers=0)


def test_a_bucket_that_is_not_there_is_one_line(made, endpoint):
    with pytest.raises(LalicError, match="cannot be written to, there is no such place") as caught:
        run_job(made / "in", "s3://absent/x", SMALL, workers=0, endpoint=endpoint)
    assert "\n" not in str(caught.value)


def test_another_job_in_a_remote_folder_is_refused(made, memory):
    run_job(made / "in", memory, SMALL, workers=0)
    with pytest.raises(LalicError, match=r"belongs to another job .--shard-size was 60000"):
        run_job(made / "in", memory, type(SMALL)(min_side=32), workers=0)


def test_names_of_files_and_folders(tmp_path, monkeypatch):
    assert output_file("a/b.csv")[0].where == "a" and output_file("b.csv")[0].where == "."
    assert output_file("/b.csv")[0].where == "/"
    assert isinstance(output_folder(f"file://{tmp_path}"), LocalFolder)
    with pytest.raises(LalicError, match="the name of a file was expected"):
        output_file("a/")
