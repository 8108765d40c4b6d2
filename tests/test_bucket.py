"""Images that lie elsewhere: the same shards as from a folder, whatever the servers do on the way."""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path

import pytest
from bucket_server import Bucket, Fault, forget_credentials, serve, serve_s3
from lalic.data_prep.job import Options, run_job
from lalic.data_prep.opening import open_source
from lalic.data_prep.remote_files import Access
from shard_samples import SMALL, encode, error_on_a_full_disk, keys, kill_once, left_out, picture, result, shard_command

from lalic.errors import LalicError
from lalic.remote import Patience

QUICK = Access(patience=Patience(attempts=12, first_delay=0.01, most_delay=0.05, silence=5.0), connections=8)
IDS = [f"{random.Random(number).getrandbits(64):016x}" for number in range(60)]


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """The bucket's layout. One image is damaged, one is missing from it."""
    files = {f"train/{name}.jpg": encode(picture(n, 80, 80), "JPEG") for n, name in enumerate(IDS)}
    files[f"train/{IDS[7]}.jpg"] = files[f"train/{IDS[7]}.jpg"][:2000]
    return files


@pytest.fixture
def bucket(images):
    with serve(Bucket(dict(images))) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def id_list(tmp_path_factory) -> Path:
    """In the order that a folder is listed in."""
    path = tmp_path_factory.mktemp("lists") / "ids.txt"
    path.write_text("".join(f"train/{name}\n" for name in sorted(IDS)))
    return path


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> dict[str, str]:
    """The result from the folder: several shards."""
    output = tmp_path_factory.mktemp("expected")
    run_job(folder, output, SMALL, workers=0)
    assert len(list(output.glob("*.tar"))) > 4 and left_out(output) == {f"train/{IDS[7]}.jpg": "damaged"}
    return result(output)


def shard(inputs, output, *, workers=0, options=SMALL, access=QUICK, **where):
    run_job(open_source(inputs, access, **where), output, options, workers=workers)


# The same bytes from everywhere


def test_by_ids_from_a_bucket(bucket, id_list, expected, tmp_path):
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected
    # The damaged one is believed when the same bytes came three times.
    assert bucket.count() == len(IDS) + 2
    assert not (tmp_path / "out" / ".shard-state" / "spool").exists()


def test_by_urls(bucket, expected, tmp_path):
    (tmp_path / "urls.txt").write_text("\n".join(f"{bucket.url}/train/{name}.jpg" for name in sorted(IDS)))
    # All of them lie in train/, so that is the root.
    shard(tmp_path / "urls.txt", tmp_path / "out")
    assert {key.split("/")[-1] for key in keys(tmp_path / "out")} == set(IDS) - {IDS[7]}
    (tmp_path / "more.txt").write_text(
        "\n".join([f"{bucket.url}/other/x.jpg"] + [f"{bucket.url}/train/{name}.jpg" for name in sorted(IDS)])
    )
    shard(tmp_path / "more.txt", tmp_path / "more")
    assert set(keys(tmp_path / "more")) == {f"train/{name}" for name in IDS} - {f"train/{IDS[7]}"}
    assert left_out(tmp_path / "more")["other/x.jpg"] == "missing"


def test_by_names_below_a_bucket_and_below_a_local_copy(bucket, folder, id_list, expected, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"train/{name}.jpg" for name in sorted(IDS)))
    shard(tmp_path / "names.txt", tmp_path / "names", bucket=bucket.url)
    shard(id_list, tmp_path / "local", bucket=str(folder))
    assert result(tmp_path / "names") == result(tmp_path / "local") == expected


def test_from_s3_by_ids_and_by_listing(images, id_list, expected, tmp_path, anonymous):
    with serve_s3() as endpoint:
        access = Access(endpoint=endpoint, patience=QUICK.patience)
        system = access.remote("s3://photos").filesystem
        for name, data in images.items():
            system.pipe_file(f"s3://photos/{name}", data)
        system.pipe_file("s3://photos/train/notes.txt", b"no image")
        shard(id_list, tmp_path / "ids", access=access, bucket="s3://photos")
        listed = open_source("s3://photos", access)
        assert dict(listed.ignored) == {".txt files": 1}
        run_job(listed, tmp_path / "all", SMALL, workers=0)
        shard("s3://photos/train/", tmp_path / "train", access=access)
    assert result(tmp_path / "ids") == result(tmp_path / "all") == expected
    assert set(keys(tmp_path / "train")) == set(IDS) - {IDS[7]}


@pytest.fixture
def anonymous(monkeypatch, tmp_path):
    forget_credentials(monkeypatch, tmp_path)


def test_odd_names_are_found_again(tmp_path):
    names = ["a b.jpg", "ä/ü.png", "p%20q.jpg", "x+y#z?.jpg"]
    files = {f"root/{name}": encode(picture(n), "PNG") for n, name in enumerate(names)}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    from urllib.parse import quote

    with serve(Bucket(files)) as bucket:
        (tmp_path / "urls.txt").write_text("\n".join(f"{bucket.url}/root/{quote(name)}" for name in sorted(names)))
        shard(tmp_path / "urls.txt", tmp_path / "urls")
        (tmp_path / "queries.txt").write_text(f"{bucket.url}/root/a%20b.jpg?size=1\n{bucket.url}/root/a%20b.jpg?size=2")
        shard(tmp_path / "queries.txt", tmp_path / "queries", options=Options(min_side=32, keep_duplicates=True))
    run_job(tmp_path / "root", tmp_path / "folder", SMALL, workers=0)
    assert result(tmp_path / "urls") == result(tmp_path / "folder")
    assert len(set(keys(tmp_path / "queries"))) == 2


# Servers that stumble


@pytest.mark.parametrize("workers, seed", [(0, 1), (2, 2)])
def test_same_bytes_whatever_goes_wrong(bucket, id_list, expected, tmp_path, workers, seed):
    """A fifth of all answers goes wrong in one of eight ways, in another order each time."""
    bucket.faults, bucket.generator = [Fault("any", chance=0.2, times=1e9)], random.Random(seed)
    shard(id_list, tmp_path / "out", bucket=bucket.url, workers=workers)
    assert result(tmp_path / "out") == expected
    assert bucket.count() > len(IDS) + 5


def test_half_a_file_that_is_called_whole_is_found(bucket, id_list, expected, tmp_path):
    """No checksum, no error of the connection: only the image itself tells."""
    bucket.etags, bucket.faults = False, [Fault("short", name, times=2) for name in IDS[10:14]]
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected


def test_a_server_that_stays_away_ends_the_job_and_the_next_run_goes_on(bucket, id_list, expected, tmp_path):
    access = Access(patience=Patience(attempts=3, first_delay=0.01, silence=2.0), connections=2)
    bucket.faults = [Fault("503", IDS[20], times=1e9)]
    with pytest.raises(LalicError, match=rf"{IDS[20]}.jpg: the server answers 503 .*3 attempts") as caught:
        shard(id_list, tmp_path / "out", bucket=bucket.url, access=access)
    assert "\n" not in str(caught.value)
    done = bucket.count()
    bucket.faults = []
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected
    # What had come is not fetched again: the three failures, and two looks at the damaged image, possibly twice.
    assert bucket.count() <= len(IDS) + 3 + 4 and done > 0


def test_beyond_the_limit_nothing_is_noticed(bucket, id_list, tmp_path):
    last = sorted(IDS)[-1]
    bucket.faults = [Fault("503", last, times=1e9)]
    access = Access(patience=Patience(attempts=1), connections=4)
    shard(id_list, tmp_path / "out", bucket=bucket.url, access=access, options=Options(limit=30, min_side=32))
    assert len(keys(tmp_path / "out")) == 30


def test_missing_and_refused_images_are_left_out(bucket, images, id_list, tmp_path):
    names = sorted(IDS)
    del bucket.files[f"train/{names[3]}.jpg"]
    bucket.faults = [Fault("403", names[5], times=1e9)]
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    found = left_out(tmp_path / "out")
    assert found[f"train/{names[3]}.jpg"] == "missing" and found[f"train/{names[5]}.jpg"] == "refused"
    assert len(keys(tmp_path / "out")) == len(IDS) - 3


@pytest.mark.parametrize("status", ["404", "403"])
def test_a_wrong_bucket_is_one_line(bucket, tmp_path, status):
    (tmp_path / "ids.txt").write_text("\n".join(f"{number:016x}" for number in range(500)))
    bucket.faults = [Fault(status, times=1e9)]
    with pytest.raises(LalicError, match=r"none of the first 100 files can be had, such as .*--bucket, --subset"):
        shard(tmp_path / "ids.txt", tmp_path / "out", bucket=bucket.url)
    assert bucket.count() < 150


@pytest.mark.parametrize("moment", [60, 170], ids=["in the middle", "near the end"])
def test_access_that_is_withdrawn_is_not_taken_for_missing_images(bucket, tmp_path, moment, monkeypatch):
    """The server refuses everything from some moment on: nothing may be left out for that."""
    for number in range(200):
        bucket.files[f"train/{number:016x}.jpg"] = encode(picture(number), "JPEG")
    (tmp_path / "ids.txt").write_text("\n".join(f"{number:016x}" for number in range(200)))
    monkeypatch.setattr(bucket, "fault", lambda path: "403" if len(bucket.requests) > moment else "")
    with pytest.raises(LalicError, match="could be had before and is refused now"):
        shard(tmp_path / "ids.txt", tmp_path / "out", bucket=bucket.url, options=Options(min_side=32))


def test_a_wrong_checksum_is_asked_again_and_never_sharded(bucket, id_list, expected, tmp_path, monkeypatch):
    """The server says that it is S3: then its ETag is an MD5."""
    import lalic.remote

    flipped = {}

    def flip(system, url, start, stop, most=None, read=lalic.remote.read):
        found = read(system, url, start, stop, most)
        headers = {**found.headers, "server": "AmazonS3"}
        name = url.rpartition("/")[2]
        # Once for each file a bit of the pixels changes, which no decoder would notice.
        data = found.data if flipped.setdefault(name, 0) else found.data[:-200] + b"\1" + found.data[-199:]
        flipped[name] += 1
        return found._replace(data=data, headers=headers)

    monkeypatch.setattr(lalic.remote, "read", flip)
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected and min(flipped.values()) >= 2


# Stopped and started again


@pytest.mark.parametrize("faults", [False, True], ids=["steady", "stumbling"])
def test_killed_at_random_points_nothing_safe_is_fetched_again(bucket, id_list, expected, tmp_path, root, faults):
    if faults:
        bucket.faults = [Fault("any", chance=0.1, times=1e9)]
    bucket.delay = 0.02
    output = tmp_path / "out"
    command = shard_command(
        root, "--input", id_list, "--bucket", bucket.url, "--output", output, "--shard-size", SMALL.shard_size,
        "--min-side", SMALL.min_side, "--workers", "1", "--connections", "2",
    )  # fmt: skip
    delays = random.Random(3)
    killed = 0
    for requests in (5, 20, 40):
        delay = delays.uniform(0, 0.05)
        killed += kill_once(command, lambda requests=requests: bucket.count() >= requests, delay)
        time.sleep(0.1)
        before = bucket.count()
        safe = spooled(output) | finished(output)
        asked = len(bucket.requests)
    assert killed == 3 and safe
    subprocess.run(command, check=True, capture_output=True)
    assert result(output) == expected
    again = {path for _, path, _ in bucket.requests[asked:]}
    damaged = f"train/{IDS[7]}.jpg"
    assert not (again - {damaged}) & safe
    if not faults:
        # Each kill loses what its two connections were at; the damaged one is looked at thrice by each run.
        assert before <= bucket.count() <= len(IDS) + 3 * 2 + 4 * 2


def spooled(output: Path) -> set[str]:
    """Names of the images in the spool, by their place in the order."""
    import hashlib

    from lalic.data_prep.files import candidate_order

    order, names = candidate_order(len(IDS), None, 0), [f"train/{name}.jpg" for name in sorted(IDS)]
    found = set()
    for path in (output / ".shard-state" / "spool").glob("[0-9]*-*"):
        place, size, digest = path.name.split("-")
        data = path.read_bytes()
        if len(data) == int(size) and hashlib.sha256(data).hexdigest() == digest:
            found.add(names[order[int(place)]])
    return found


def finished(output: Path) -> set[str]:
    import json

    found = set()
    for path in (output / ".shard-state").glob("[0-9]*.json"):
        record = json.loads(path.read_text())
        found |= {sample["source"] for sample in record["shard"]["samples"]}
    return found


def test_a_damaged_spool_is_fetched_again(bucket, id_list, expected, tmp_path):
    access = Access(patience=Patience(attempts=1), connections=1)
    order = sorted(IDS)
    bucket.faults = [Fault("500", order[30], times=1)]
    with pytest.raises(LalicError):
        shard(id_list, tmp_path / "out", bucket=bucket.url, access=access)
    files = sorted((tmp_path / "out" / ".shard-state" / "spool").iterdir())
    files[0].write_bytes(bytes(files[0].stat().st_size))
    files[1].write_bytes(b"half")
    (files[0].parent / "foreign").write_bytes(b"x")
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected


def test_a_spooled_file_that_vanishes_is_fetched_again(bucket, id_list, expected, tmp_path, monkeypatch):
    from lalic.data_prep.spool import Spool

    put = Spool.put
    vanished = []

    def lose_some(self, place, data):
        path = put(self, place, data)
        if place % 9 == 0 and place not in vanished:
            vanished.append(place)
            Path(path).unlink()
        return path

    monkeypatch.setattr(Spool, "put", lose_some)
    shard(id_list, tmp_path / "out", bucket=bucket.url)
    assert result(tmp_path / "out") == expected and len(vanished) > 3


def test_the_spool_holds_no_more_than_a_shard_and_what_is_under_way(bucket, id_list, tmp_path, monkeypatch):
    from lalic.data_prep.spool import Spool

    put, most = Spool.put, []

    def count(self, place, data):
        most.append(len(list(self.folder.iterdir())))
        return put(self, place, data)

    monkeypatch.setattr(Spool, "put", count)
    shard(id_list, tmp_path / "out", bucket=bucket.url, access=Access(patience=QUICK.patience, connections=2))
    in_a_shard = max(len(path.read_bytes()) for path in (tmp_path / "out").glob("*.tar")) // 4500
    assert 5 < max(most) <= in_a_shard + 2 * 2 + 2


def test_a_full_disk_while_fetching_is_one_line_and_resumes(bucket, id_list, expected, tmp_path, root):
    command = shard_command(
        root, "--input", id_list, "--bucket", bucket.url, "--output", tmp_path / "out", "--shard-size",
        SMALL.shard_size, "--min-side", SMALL.min_side, "--workers", "0",
    )  # fmt: skip
    line = error_on_a_full_disk(command, 3_000)
    assert "make room and run the same command again" in line
    subprocess.run(command, check=True, capture_output=True)
    assert result(tmp_path / "out") == expected


# Limits and what is said


def test_the_rate_limit_is_kept(bucket, id_list, images, tmp_path):
    size = sum(map(len, images.values()))
    began = time.monotonic()
    access = Access(patience=QUICK.patience, connections=8, bytes_per_second=size / 2)
    shard(id_list, tmp_path / "out", bucket=bucket.url, access=access)
    assert 1.7 < time.monotonic() - began < 6


def test_progress_tells_rate_and_retries(bucket, id_list, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lalic.data_prep.report._LOG_EVERY", 0.05)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    bucket.faults, bucket.delay = [Fault("500", times=7)], 0.03
    with caplog.at_level("INFO", "lalic.data_prep"):
        shard(id_list, tmp_path / "out", bucket=bucket.url, access=Access(patience=QUICK.patience, connections=2))
    lines = [message for message in caplog.messages if "images/s" in message]
    assert lines and re.search(r"\d+ images/s, \d+\.\d MB/s fetched, 7 retries, \S+ left", lines[-1])


@pytest.mark.parametrize(
    "what, message",
    [
        ("http", "a web server cannot be listed; give a list"),
        ("bucket", "--bucket goes with a list of ids or names"),
        ("subset", "--subset goes with a list of ids"),
        ("two", "only tars can be several"),
        ("mixed", "is a tar, .* is none"),
        ("zip", "only .tar, .tar.gz and .tgz"),
        ("nowhere", "is neither a URL nor a folder"),
    ],
)
def test_inputs_that_cannot_be(bucket, folder, id_list, tmp_path, what, message):
    (tmp_path / "x.tar").write_bytes(b"")
    (tmp_path / "x.zip").write_bytes(b"")
    inputs, where = {
        "http": ([f"{bucket.url}/train/"], {}),
        "bucket": ([str(folder)], {"bucket": bucket.url}),
        "subset": ([str(folder)], {"subset": "train"}),
        "two": ([str(folder), str(id_list)], {}),
        "mixed": ([str(tmp_path / "x.tar"), str(id_list)], {}),
        "zip": ([str(tmp_path / "x.zip")], {}),
        "nowhere": ([str(id_list)], {"bucket": str(tmp_path / "none")}),
    }[what]
    with pytest.raises(LalicError, match=message):
        open_source(inputs, QUICK, **where)
