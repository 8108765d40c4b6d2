"""The sharding program interrupted: killed, stopped, out of space, crashed; and run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lalic.data_prep.job import Options, run_job
from lalic.data_prep.validation import Checked
from lalic.data_prep.workers import Workers
from shard_samples import (
    SMALL,
    encode,
    error_on_a_full_disk,
    kill_once,
    picture,
    result,
    shard_command,
    shards_in,
    write_folder,
)

from lalic.errors import LalicError


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A job of a few seconds: its input and its undisturbed result."""
    base = tmp_path_factory.mktemp("many")
    for number in range(120):
        path = base / "in" / f"{number % 7}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number, 160, 160), "PNG") if number % 10 else b"bad")
    subprocess.run(
        shard_command(Path(__file__).parents[1], "--input", base / "in", "--output", base / "out", *MANY),
        check=True,
        capture_output=True,
    )
    return base / "in", result(base / "out")


MANY = ["--shard-size", "100000", "--min-side", "32", "--workers", "2"]


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_in_the_same_bytes(many, tmp_path, root, kills):
    source, expected = many
    output = tmp_path / "out"
    command = shard_command(root, "--input", source, "--output", output, *MANY)
    chance = random.Random(5)
    killed = behind_shards = 0
    for _ in range(4 * kills):
        # None more is a kill while the program starts, or finds what is there, or makes its first shard.
        more_shards = chance.choice((0, 1, 2, 5))
        wanted = shards_in(output) + more_shards
        delay = chance.uniform(0, 0.03 if more_shards else 0.5)
        if kill_once(command, lambda wanted=wanted: shards_in(output) >= wanted, delay):
            killed += 1
            behind_shards += more_shards > 0
            if killed == kills:
                break
        else:  # It was complete before the kill: begin again.
            assert result(output) == expected
            shutil.rmtree(output)
    assert killed == kills and behind_shards >= kills // 3
    subprocess.run(command, check=True, capture_output=True)
    assert result(output) == expected
    assert not list(tmp_path.rglob("*.tmp"))


class Stop(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def test_stopped_between_any_two_steps_it_ends_in_the_same_bytes(photos, tmp_path, monkeypatch):
    """Stop right before and right after each file that is put in its place, and go on from there."""
    run_job(photos, tmp_path / "whole", SMALL, workers=0)
    expected = result(tmp_path / "whole")
    replace = os.replace

    def stop_at(step: int, done: bool):
        left = step

        def replace_or_stop(*names):
            nonlocal left
            left -= 1
            if left or done:
                replace(*names)
            if not left:
                raise Stop

        return replace_or_stop

    for done in (False, True):
        for step in range(1, 100):
            output = tmp_path / f"{step}-{done}"
            monkeypatch.setattr(os, "replace", stop_at(step, done))
            try:
                run_job(photos, output, SMALL, workers=0)
                break
            except Stop:
                monkeypatch.setattr(os, "replace", replace)
                run_job(photos, output, SMALL, workers=0)
            assert result(output) == expected
        # job.json, then two files per shard, the list, the index, and the note that all is done
        assert step - 1 == 1 + 2 * (len(expected) - 2) + 3


def test_finished_shards_are_not_made_again(photos, tmp_path):
    run_job(photos, tmp_path, SMALL, workers=0)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    expected = result(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    os.truncate(tmp_path / "shard-000002.tar", 1000)
    (tmp_path / "index.json").unlink()
    run_job(photos, tmp_path, SMALL, workers=0)
    assert result(tmp_path) == expected
    again = {p.name for p in tmp_path.glob("*.tar") if p.stat().st_mtime_ns != times[p.name]}
    assert again == {"shard-000001.tar", "shard-000002.tar"}


def test_a_finished_job_says_so_and_does_nothing(photos, tmp_path, capsys):
    run_job(photos, tmp_path, SMALL, workers=0)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    capsys.readouterr()
    run_job(photos, tmp_path, SMALL, workers=0)
    assert "complete before this run, 40 images in" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(shard=None),
        lambda record: record.update(stop="x"),
        lambda record: record.update(left_out=[["a.jpg", 3, ""]]),
        lambda record: record.update(left_out=None),
        lambda record: record.update(cursor=5),
        lambda record: record["shard"].update(name="shard-000002.tar"),
        lambda record: record["shard"].update(samples=[]),
        lambda record: record["shard"].update(sha256="x"),
        lambda record: record["shard"]["samples"][0].pop("width"),
    ],
    ids=["no shard", "stop", "left out", "no left out", "cursor", "name", "no samples", "sum", "no width"],
)
def test_a_record_that_was_edited_is_as_good_as_none(photos, tmp_path, change):
    run_job(photos, tmp_path, SMALL, workers=0)
    expected = result(tmp_path)
    path = tmp_path / ".shard-state" / "000001.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (tmp_path / "shard-000001.tar").chmod(0o600)
    run_job(photos, tmp_path, SMALL, workers=0)
    assert result(tmp_path) == expected and json.loads(path.read_text()) != record
    assert (tmp_path / "shard-000001.tar").stat().st_mode & 0o777 != 0o600, "the shard was not made again"


def test_a_damaged_index_is_written_again(photos, tmp_path):
    run_job(photos, tmp_path, SMALL, workers=0)
    expected = result(tmp_path)
    os.truncate(tmp_path / "index.json", 100)
    run_job(photos, tmp_path, SMALL, workers=0)
    assert result(tmp_path) == expected


@pytest.mark.parametrize(
    "changed, difference",
    [
        (Options(shard_size=60_000, min_side=32, seed=9), "--seed was 0, is now 9"),
        (Options(shard_size=70_000, min_side=32), "--shard-size was 60000, is now 70000"),
        (Options(shard_size=60_000, min_side=32, limit=5), "--limit was None, is now 5"),
    ],
    ids=["seed", "shard-size", "limit"],
)
def test_another_job_does_not_touch_the_folder(photos, tmp_path, changed, difference):
    run_job(photos, tmp_path, SMALL, workers=0)
    before = result(tmp_path)
    with pytest.raises(LalicError, match=f"belongs to another job .*{difference}"):
        run_job(photos, tmp_path, changed, workers=0)
    assert result(tmp_path) == before


def test_other_input_does_not_touch_the_folder(photos, tmp_path):
    run_job(photos, tmp_path / "out", SMALL, workers=0)
    write_folder(tmp_path / "in", 39)
    with pytest.raises(LalicError, match="the number of images was 40, is now 39; the images have other names"):
        run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)


def test_two_processes_do_not_write_into_one_folder(photos, tmp_path, root):
    (tmp_path / ".shard-state").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\nf = open(sys.argv[1], 'a')\n"
         "fcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)",
         str(tmp_path / ".shard-state" / "lock")], stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LalicError, match="another process is writing"):
            run_job(photos, tmp_path, SMALL, workers=0)
    finally:
        holder.kill()
        holder.wait()
    run_job(photos, tmp_path, SMALL, workers=0)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(many, tmp_path, root):
    """A limit on the size of files stands in for the full disk: write() fails in the same way, for any user."""
    source, expected = many
    command = shard_command(root, "--input", source, "--output", tmp_path / "out", *MANY)
    line = error_on_a_full_disk(command, 80_000)
    assert "0 finished shards are safe: make room and run the same command again" in line
    assert not list((tmp_path / "out").glob("*.tmp")) and not list((tmp_path / "out").glob(".*.tmp"))
    subprocess.run(command, check=True, capture_output=True)
    assert result(tmp_path / "out") == expected


def crash_on_bad(path: str) -> Checked:
    if "bad" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Checked(sha256=path)


def test_a_crashing_decoder_costs_one_image():
    paths = [f"{number}{'bad' if number in (3, 4, 20) else ''}" for number in range(30)]
    workers = Workers(crash_on_bad, 2)
    try:
        results = list(workers.stream(paths))
    finally:
        workers.close()
    assert [checked.reason or checked.sha256 for checked in results] == [
        "crashes the decoder" if "bad" in path else path for path in paths
    ]


def end_at_once() -> None:
    os._exit(1)


def test_workers_that_cannot_start_are_one_line(monkeypatch):
    monkeypatch.setattr("lalic.data_prep.workers.begin_worker", end_at_once)
    workers = Workers(crash_on_bad, 1)
    try:
        with pytest.raises(LalicError, match="worker processes die at once"):
            list(workers.stream(["a", "b"]))
    finally:
        workers.close()


def test_workers_end_with_their_parent(tmp_path, root, many):
    """After a SIGKILL of the program no process of it stays behind."""
    source = many[0]
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not list a process's children")
    process = subprocess.Popen(
        shard_command(root, "--input", source, "--output", tmp_path / "out", *MANY),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[int] = []
    deadline = time.monotonic() + 30
    while len(children) < 3 and process.poll() is None and time.monotonic() < deadline:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [int(pid) for pid in listed]
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert children
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
