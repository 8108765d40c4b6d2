"""What lies around the images and the shards: files that are none, folders that vanish, places that others use."""

from __future__ import annotations

import csv
import errno
import os
import subprocess
from pathlib import Path

import pytest
from bucket_server import Bucket, serve, serve_s3
from lalic.data_prep import validation
from lalic.data_prep.checking import check_shards
from lalic.data_prep.command import main
from lalic.data_prep.find import finders
from lalic.data_prep.job import Options, run_job
from lalic.data_prep.opening import open_source
from lalic.data_prep.rebuild import run_rebuild
from lalic.data_prep.remote_files import Access, RemoteFiles
from lalic.data_prep.report import LeftOut
from lalic.data_prep.spool import Spool
from shard_samples import SMALL, encode, keys, left_out, picture, result, shard_command, write_folder

from lalic.errors import LalicError
from lalic.remote import Patience, Remote

QUICK = Access(patience=Patience(attempts=3, first_delay=0.01, most_delay=0.02))


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_folder(tmp_path / "in", 12)


# Files that are none


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_pipes_and_devices_are_left_out_and_not_waited_for(photos, tmp_path, workers):
    run_job(photos, tmp_path / "expected", SMALL, workers=0)
    os.mkfifo(photos / "pipe.jpg")
    (photos / "device.png").symlink_to("/dev/null")
    run_job(photos, tmp_path / "out", SMALL, workers=workers)
    assert left_out(tmp_path / "out") == {"pipe.jpg": "cannot be read", "device.png": "cannot be read"}
    assert sorted(keys(tmp_path / "out")) == sorted(keys(tmp_path / "expected"))


@pytest.mark.timeout(60)
def test_a_rebuild_does_not_wait_for_a_pipe(photos, tmp_path):
    run_job(photos, tmp_path / "out", SMALL, workers=0, manifest=tmp_path / "m.csv")
    lost = next(photos.rglob("*.png"))
    lost.unlink()
    os.mkfifo(lost)
    with pytest.raises(LalicError, match=r"1 of 12 samples could not be had \(1 not found"):
        run_rebuild(tmp_path / "m.csv", finders(str(photos), 1), tmp_path / "again", label="in", workers=1)


# What goes away while it is read


def job_while(source, output: Path, monkeypatch, after: int, event) -> None:
    """A job in which `event()` happens before the file number `after` is read."""
    read, seen = validation.open_regular, []

    def open_later(path):
        seen.append(path)
        if len(seen) == after:
            event()
        return read(path)

    monkeypatch.setattr(validation, "open_regular", open_later)
    try:
        run_job(source, output, SMALL, workers=0)
    finally:
        monkeypatch.setattr(validation, "open_regular", read)


@pytest.mark.parametrize("what", ["input", "subfolder", "mount"])
def test_a_folder_that_goes_away_ends_the_job_and_loses_nothing(photos, tmp_path, monkeypatch, what):
    run_job(photos, tmp_path / "expected", SMALL, workers=0)
    gone = photos / "set1" if what == "subfolder" else photos

    def go_away():
        gone.rename(tmp_path / "elsewhere")
        if what == "mount":
            photos.mkdir()

    with pytest.raises(LalicError, match=r"is gone or another one since this run began"):
        job_while(photos, tmp_path / "out", monkeypatch, 4, go_away)
    assert not (tmp_path / "out" / "index.json").exists()
    if what == "mount":
        photos.rmdir()
    (tmp_path / "elsewhere").rename(gone)
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    assert result(tmp_path / "out") == result(tmp_path / "expected")


def test_one_file_that_goes_away_is_left_out(photos, tmp_path, monkeypatch):
    lost = next(photos.rglob("*.png"))
    job_while(photos, tmp_path / "out", monkeypatch, 1, lost.unlink)
    assert set(left_out(tmp_path / "out").values()) == {"cannot be read"} and len(keys(tmp_path / "out")) == 11


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ENOTCONN])
def test_an_error_of_the_machine_is_not_taken_for_one_of_the_image(photos, tmp_path, monkeypatch, number):
    def refuse():
        raise OSError(number, os.strerror(number))

    with pytest.raises(LalicError, match="the fault is this machine's"):
        job_while(photos, tmp_path / "out", monkeypatch, 5, refuse)
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    assert len(keys(tmp_path / "out")) == 12 and not left_out(tmp_path / "out")


# --staging


def remote_images(server: Bucket, numbers: range) -> RemoteFiles:
    names = [f"{number:02d}.jpg" for number in numbers]
    server.files |= {name: encode(picture(number), "JPEG") for name, number in zip(names, numbers, strict=True)}
    return RemoteFiles("list", server.url, names, QUICK, most=1 << 20)


def test_two_jobs_with_one_staging_folder_do_not_take_each_others_images(tmp_path, monkeypatch):
    """The second job's place 0 is not what the first one kept for its own place 0."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with serve_s3() as endpoint, serve(Bucket()) as server:
        options, where = Options(min_side=32), {"workers": 0, "endpoint": endpoint, "scratch": tmp_path / "staging"}
        with monkeypatch.context() as patch:
            patch.setattr("lalic.data_prep.job.Sharding._build", stop)
            with pytest.raises(KeyboardInterrupt):
                source = remote_images(server, range(8))
                run_job(source, "s3://photos/one", options, **where)
        kept = [path for path in (tmp_path / "staging").rglob("*") if path.is_file()]
        assert len(kept) == 8
        run_job(remote_images(server, range(10, 18)), "s3://photos/two", options, **where)
        run_job(remote_images(server, range(10, 18)), tmp_path / "local", options, workers=0)
        tar = Remote("s3://photos/two", endpoint).read("shard-000000.tar")
        assert tar == (tmp_path / "local" / "shard-000000.tar").read_bytes()
        assert all(path.exists() for path in kept)
        asked = server.count(method="GET")
        run_job(remote_images(server, range(8)), "s3://photos/one", options, **where)
        assert server.count(method="GET") == asked and not list((tmp_path / "staging").iterdir())


def stop(sharding, number, start, cursor, progress):
    """In place of Sharding._build: fetch everything, then be interrupted."""
    sharding.feed.seek(start, cursor)
    while sharding.feed.peek() is not None:
        sharding.feed.advance()
    raise KeyboardInterrupt


def test_a_full_staging_disk_is_called_by_its_name(tmp_path, monkeypatch):
    def refuse(spool, place, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "put", refuse)
    with serve(Bucket()) as server, pytest.raises(LalicError, match=f"--staging {tmp_path}/staging: cannot be written"):
        source = remote_images(server, range(3))
        run_job(source, "memory://full", SMALL, workers=0, scratch=tmp_path / "staging")


def test_a_staging_that_is_a_file_is_called_by_its_name(photos, tmp_path):
    run_job(photos, tmp_path / "out", SMALL, workers=0, manifest=tmp_path / "m.csv")
    options = {"label": "in", "workers": 1, "staging": tmp_path / "m.csv"}
    with pytest.raises(LalicError, match=r"--staging .*m.csv: is not a folder"):
        run_rebuild(tmp_path / "m.csv", finders(str(photos), 1), "memory://again", **options)


def test_the_spool_removes_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "spool" / "folder").mkdir(parents=True)
    (tmp_path / "spool" / "precious.txt").write_text("x")
    (tmp_path / "spool" / ".3-140").write_text("half written")
    spool = Spool(tmp_path / "spool")
    spool.put(0, b"image")
    spool.remove()
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == ["folder", "precious.txt"]


def test_tars_of_somebody_else_in_the_output_stay(photos, tmp_path):
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    others = [tmp_path / "out" / name for name in ("shard-backup-000099.tar", "shard-12.tar")]
    for path in others:
        path.write_bytes(b"precious")
    (tmp_path / "out" / "shard-000099.tar").write_bytes(b"of an earlier run")
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    assert all(path.read_bytes() == b"precious" for path in others)
    assert not (tmp_path / "out" / "shard-000099.tar").exists()


# Where the manifest goes is looked at before the work and not after it


@pytest.mark.parametrize(
    "name, message",
    [
        ("absent/m.csv", "there is no folder"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("out/index.json", "index.json is a file of the shards themselves"),
        ("out/../out/left_out.csv", "left_out.csv is a file of the shards"),
        ("out/shard-000001.tar", "is a file of the shards"),
        ("folder/", "the name of a file was expected"),
        ("", "the name of a file was expected"),
    ],
)
def test_a_manifest_that_cannot_be_written_is_told_at_once(photos, tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    where = f"{tmp_path}/{name}" if name else ""
    with pytest.raises(LalicError, match=f"--manifest.*{message}"):
        run_job(photos, tmp_path / "out", SMALL, workers=0, manifest=where)
    assert not (tmp_path / "out").exists()


def test_a_manifest_for_the_web_is_told_at_once(photos, tmp_path):
    with pytest.raises(LalicError, match=r"--manifest http://127.0.0.1:1: http:// cannot be written to"):
        run_job(photos, tmp_path / "out", SMALL, workers=0, manifest="http://127.0.0.1:1/m.csv")


# Options


@pytest.mark.parametrize(
    "flags", [["--shard-size", "9" * 400], ["--shard-size", "9999999TB"], ["--rate-limit", "9" * 400]]
)
def test_numbers_beyond_all_measure_are_one_line(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2 and "too large" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [["--endpoint", "http://127.0.0.1:9"], ["--rate-limit", "1MB"], ["--request-limit", "5"], ["--no-checksums"]],
)
def test_an_option_that_would_do_nothing_is_refused(photos, tmp_path, flags):
    with pytest.raises(LalicError, match=f"{flags[0]}.* goes with"):
        main(["--input", str(photos), "--output", str(tmp_path / "out"), "--workers", "0", *flags])
    assert not (tmp_path / "out").exists()


def test_options_of_the_network_are_taken_where_there_is_one(tmp_path):
    with serve(Bucket({f"{n}.jpg": encode(picture(n, 300, 300), "JPEG") for n in range(3)})) as server:
        (tmp_path / "list.txt").write_text("".join(f"{server.url}/{n}.jpg\n" for n in range(3)))
        flags = ["--rate-limit", "9MB", "--request-limit", "500", "--no-checksums", "--workers", "0"]
        assert main(["--input", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out"), *flags]) == 0
    assert len(keys(tmp_path / "out")) == 3


def test_an_output_without_a_name_is_not_the_present_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LalicError, match="--output: is empty"):
        main(["--input", str(photos), "--output", "", "--workers", "0"])
    with pytest.raises(LalicError, match="SHARDS: is empty"):
        check_shards("", workers=0)
    assert sorted(os.listdir(tmp_path)) == ["in"]


# What is printed


def test_names_that_the_terminal_cannot_write(photos, tmp_path, root):
    """The job was done, and its last line ended in a traceback."""
    output = os.fsencode(tmp_path) + b"/out\xff"
    command = [os.fsencode(part) for part in shard_command(root, "--input", photos, "--min-side", 32, "--workers", 0)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, b"--output", output], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"out\\udcff: 12 images in 1 shard" in done.stdout


def test_names_with_control_characters_stay_in_one_line(tmp_path):
    table = LeftOut()
    table.add("a\nb\x1b[2J\r.jpg", "damaged", "cut short")
    assert table.lines() == ["         1  damaged, for example a\\nb\\x1b[2J\\r.jpg: cut short"]


def test_a_carriage_return_in_a_name_ends_no_row(photos, tmp_path):
    (photos / "a\rb.jpg").write_bytes(b"garbage")
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    with open(tmp_path / "out" / "left_out.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["a\rb.jpg", "not an image", "neither JPEG, PNG nor WebP"]]


# Lists at a URL


def test_a_list_that_comes_in_chunks_without_a_size(tmp_path):
    with serve(Bucket()) as server:
        server.files["list.txt"] = b"".join(b"%s/%02d.jpg\n" % (server.url.encode(), number) for number in range(5))
        server.chunked = "list.txt"
        source = open_source(f"{server.url}/list.txt", QUICK)
    assert source.count == 5


def test_an_empty_list_at_a_url_is_called_so(tmp_path):
    with serve(Bucket(files={"list.txt": b""})) as server, pytest.raises(LalicError, match="to take, no path in it"):
        open_source(f"{server.url}/list.txt", QUICK)
