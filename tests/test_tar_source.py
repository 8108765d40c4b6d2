"""Tars as input: streamed, with odd members, damaged, elsewhere, and taken up where a killed job stopped."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from bucket_server import Bucket, Fault, forget_credentials, serve, serve_s3
from lalic.data_prep import tars
from lalic.data_prep.job import Options, run_job
from lalic.data_prep.opening import open_source
from lalic.data_prep.remote_files import Access
from shard_samples import SMALL, encode, keys, kill_once, left_out, picture, read_back, result, shard_command, shards_in

from lalic.errors import LalicError
from lalic.remote import Patience

QUICK = Access(patience=Patience(attempts=12, first_delay=0.01, most_delay=0.05, silence=5.0), connections=4)
PICTURES = {f"train_0/{n:04d}.jpg": encode(picture(n, 80, 80), "JPEG") for n in range(60)}


def make_tar(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def shard(inputs, output, *, workers=0, options=SMALL, access=QUICK):
    run_job(open_source(inputs, access), output, options, workers=workers)


@pytest.fixture(scope="module")
def two_tars(tmp_path_factory) -> tuple[list[Path], dict[str, str]]:
    """A plain and a gzipped tar, and what comes of them."""
    base = tmp_path_factory.mktemp("tars")
    names = sorted(PICTURES)
    (base / "a.tar").write_bytes(make_tar({name: PICTURES[name] for name in names[:30]}))
    (base / "b.tar.gz").write_bytes(gzip.compress(make_tar({name: PICTURES[name] for name in names[30:]})))
    paths = [base / "a.tar", base / "b.tar.gz"]
    shard(paths, base / "out")
    return paths, result(base / "out")


# The same bytes


def test_the_order_is_that_of_the_members(two_tars, tmp_path):
    paths, expected = two_tars
    shard(paths, tmp_path / "out", workers=2)
    assert result(tmp_path / "out") == expected
    assert keys(tmp_path / "out") == [name.removesuffix(".jpg") for name in sorted(PICTURES)]
    for sample in read_back(tmp_path / "out"):
        assert sample["jpg"] == PICTURES[f"{sample['__key__']}.jpg"]


def test_the_same_images_in_a_folder_give_the_same_tars(tmp_path):
    """When they come in the same order."""
    folder = tmp_path / "in"
    for name, data in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    run_job(folder, tmp_path / "folder", SMALL, workers=0)
    members = {f"{key}.jpg": PICTURES[f"{key}.jpg"] for key in keys(tmp_path / "folder")}
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    shard(tmp_path / "x.tar", tmp_path / "tar")
    assert result(tmp_path / "tar") == result(tmp_path / "folder")


@pytest.mark.parametrize("faults", [False, True], ids=["steady", "stumbling"])
def test_over_http(two_tars, tmp_path, faults, monkeypatch):
    paths, expected = two_tars
    monkeypatch.setattr(tars, "CHUNK", 10_000)
    with serve(Bucket({f"tar/{path.name}": path.read_bytes() for path in paths})) as bucket:
        if faults:
            bucket.faults = [Fault("any", chance=0.2, times=1e9)]
        shard([f"{bucket.url}/tar/{path.name}" for path in paths], tmp_path / "out")
        assert result(tmp_path / "out") == expected
        if not faults:
            # Every byte once.
            assert bucket.sent == {f"tar/{path.name}": path.stat().st_size for path in paths}


def test_over_s3(two_tars, tmp_path, monkeypatch):
    forget_credentials(monkeypatch, tmp_path)
    paths, expected = two_tars
    with serve_s3() as endpoint:
        access = Access(endpoint=endpoint, patience=QUICK.patience)
        for path in paths:
            access.remote("s3://photos").filesystem.pipe_file(f"s3://photos/tar/{path.name}", path.read_bytes())
        shard([f"s3://photos/tar/{path.name}" for path in paths], tmp_path / "out", access=access)
    assert result(tmp_path / "out") == expected


# Members of all kinds


def test_odd_members(tmp_path, caplog):
    image = {n: encode(picture(n), "PNG") for n in range(20)}
    long = "d" * 150 + "/" + "n" * 120 + ".png"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "odd.tar", "w", format=kind) as tar:
            add(tar, "./plain.png", image[0])
            add(tar, "../up.png", image[1])
            add(tar, "/absolute.png", image[2])
            add(tar, long, image[3])
            add(tar, "grün p q.png", image[4])
            add(tar, os_name := b"\xff\xfe.png".decode("utf-8", "surrogateescape"), image[5])
            add(tar, "folder", type=tarfile.DIRTYPE)
            add(tar, "folder/fifo.png", type=tarfile.FIFOTYPE)
            add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="plain.png")
            add(tar, "device.png", type=tarfile.CHRTYPE)
            add(tar, "notes.txt", b"text")
            add(tar, "README", b"text")
            add(tar, "._plain.png", b"\0\5\x16\7")
            add(tar, "no-image.jpg", b"<html>")
            add(tar, "empty.jpg", b"")
            add(tar, "plain.png", image[6])  # a name twice
            add(tar, "plain.jpg", encode(picture(7), "JPEG"))  # a key twice
            add(tar, "twin.png", image[0])
            add(tar, "plain.webp", b"RIFF")
        with caplog.at_level("INFO", "lalic.data_prep"):
            shard(tmp_path / "odd.tar", tmp_path / f"out{kind}")
        found = keys(tmp_path / f"out{kind}")
        assert found[0] == "plain" and len(found) == len(set(found)) == 8
        for key in found:
            assert not key.startswith((".", "/", "_")) and ".." not in key
        assert [sample["__key__"] for sample in read_back(tmp_path / f"out{kind}")] == found
        assert left_out(tmp_path / f"out{kind}") == {
            "odd.tar:no-image.jpg": "not an image",
            "odd.tar:empty.jpg": "empty file",
            "odd.tar:twin.png": "duplicate",
            "odd.tar:plain.webp": "not an image",
        }
        assert os_name
        messages = {m.removeprefix("passed over: ") for m in caplog.messages if m.startswith("passed over")}
        assert messages == {
            "1 folders", "2 links", "2 special files", "1 .txt files", "1 files without a suffix", "1 hidden files",
        }  # fmt: skip
    assert result(tmp_path / f"out{tarfile.PAX_FORMAT}") == result(tmp_path / f"out{tarfile.GNU_FORMAT}")


def test_a_name_thrice_in_one_tar_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(4):
            add(tar, "a.png", encode(picture(number), "PNG"))
    shard(tmp_path / "x.tar", tmp_path / "out")
    assert len(set(keys(tmp_path / "out"))) == 3
    assert left_out(tmp_path / "out") == {"x.tar:a.png": "duplicate name"}


def test_the_same_name_in_two_tars_is_two_images(tmp_path):
    for folder, first in (("a", 0), ("b", 5)):
        (tmp_path / folder).mkdir()
        members = {f"{n}.png": encode(picture(first + n), "PNG") for n in range(5)}
        (tmp_path / folder / "x.tar").write_bytes(make_tar(members))
    shard([tmp_path / "a" / "x.tar", tmp_path / "b" / "x.tar"], tmp_path / "out")
    assert len(set(keys(tmp_path / "out"))) == 10 and not left_out(tmp_path / "out")


def test_a_sparse_member_is_read_with_its_holes(tmp_path):
    data = encode(picture(1), "PNG")
    with open(tmp_path / "s.png", "wb") as file:
        file.write(data)
        file.truncate(1 << 20)
    made = subprocess.run(
        ["tar", "--sparse", "--format=gnu", "-cf", tmp_path / "x.tar", "-C", tmp_path, "s.png"], capture_output=True
    )
    if made.returncode or (tmp_path / "x.tar").stat().st_size > 1 << 19:
        pytest.skip("no GNU tar, or no holes on this file system")
    shard(tmp_path / "x.tar", tmp_path / "out")
    (sample,) = read_back(tmp_path / "out")
    assert sample["png"] == data + bytes((1 << 20) - len(data))


def test_a_member_that_is_too_large_is_left_out_unread(tmp_path):
    (tmp_path / "x.tar").write_bytes(make_tar({"big.png": bytes(17 << 20), "a.png": encode(picture(1), "PNG")}))
    options = Options(min_side=32, max_pixels=100_000)
    run_job(tmp_path / "x.tar", tmp_path / "out", options, workers=0)
    assert keys(tmp_path / "out") == ["a"] and left_out(tmp_path / "out") == {"x.tar:big.png": "file too large"}


# Damaged tars


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gz"])
@pytest.mark.parametrize("where", ["member", "header", "boundary", "empty"])
def test_a_tar_that_was_cut_is_one_line_and_resumes_when_whole(tmp_path, two_tars, packed, where):
    whole = make_tar(PICTURES)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        middle = tar.getmembers()[40]
    size = {"member": middle.offset_data + 700, "header": middle.offset + 100, "boundary": middle.offset, "empty": 0}
    name = "x.tar.gz" if packed else "x.tar"
    cut = whole[: size[where]]
    (tmp_path / name).write_bytes(gzip.compress(cut) if packed else cut)
    with pytest.raises(LalicError, match=rf"{name}: is cut short at byte {size[where]}\b") as caught:
        shard(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value) and "finished shards are safe" in str(caught.value)
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert len(done) > 2 or where == "empty"
    # What lies before the cut is enough for a limit that ends there.
    if where != "empty":
        shard(tmp_path / name, tmp_path / "limited", options=Options(limit=40, min_side=32))
        assert len(keys(tmp_path / "limited")) == 40
    (tmp_path / name).write_bytes(gzip.compress(whole) if packed else whole)
    shard(tmp_path / name, tmp_path / "out")
    shard(tmp_path / name, tmp_path / "fresh")
    assert result(tmp_path / "out") == result(tmp_path / "fresh")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done


def test_a_damaged_header_is_no_silent_end(tmp_path):
    whole = bytearray(make_tar(PICTURES))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        middle = tar.getmembers()[40]
    whole[middle.offset + 150] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(LalicError, match=r"x.tar: is damaged or no tar \(.*\) at byte"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_a_damaged_gzip_stream(tmp_path):
    packed = bytearray(gzip.compress(make_tar(PICTURES)))
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LalicError, match=r"cut.tar.gz: the gzip stream is cut short at byte \d+ of the tar inside"):
        shard(tmp_path / "cut.tar.gz", tmp_path / "cut")
    packed[-5] ^= 1
    (tmp_path / "sum.tar.gz").write_bytes(packed)
    with pytest.raises(LalicError, match=r"sum.tar.gz: the gzip stream is damaged .* use another --output"):
        shard(tmp_path / "sum.tar.gz", tmp_path / "sum")


@pytest.mark.parametrize("content", [b"no tar at all" * 100, bytes(10240), b"\x1f\x8b" + bytes(1000)])
def test_no_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(LalicError, match=r"x.tar|no usable image"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_a_header_that_asks_for_too_much_is_not_believed(tmp_path):
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 4 << 30
    (tmp_path / "x.tar").write_bytes(member.tobuf() + bytes(5000))
    with pytest.raises(LalicError, match="is damaged"):
        shard(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gap", [0, 100_000])
def test_a_second_tar_behind_the_first_is_not_lost_in_silence(tmp_path, packed, gap):
    names = list(PICTURES)
    tars = [make_tar({name: PICTURES[name] for name in part}) for part in (names[:5], names[5:])]
    tars.insert(1, bytes(gap // 512 * 512))
    data = b"".join(gzip.compress(tar) for tar in tars) if packed else b"".join(tars)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(LalicError, match=f"x.tar: another tar begins at byte {len(tars[0] + tars[1])}, behind"):
        shard(tmp_path / "x.tar", tmp_path / "out")
    # What is no tar is padding, as it was; a limit may be reached before.
    (tmp_path / "y.tar").write_bytes(tars[0] + b"padding" * 1000)
    shard(tmp_path / "y.tar", tmp_path / "padded")
    shard(tmp_path / "x.tar", tmp_path / "limited", options=replace(SMALL, limit=5))
    assert keys(tmp_path / "padded") == keys(tmp_path / "limited") and len(keys(tmp_path / "padded")) == 5


@pytest.mark.parametrize("module, name", [(bz2, "bzip2"), (lzma, "xz")])
def test_another_packer_is_named(tmp_path, module, name):
    (tmp_path / "x.tar").write_bytes(module.compress(make_tar(PICTURES)))
    with pytest.raises(LalicError, match=f"x.tar: is packed by {name}; only"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_a_pipe_is_no_tar(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(LalicError, match=r"x.tar: is a pipe or a device, not a file"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    member.pax_headers = {name.replace("_", "."): value for name, value in pax.items()}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "crafted",
    [
        header("x.jpg", 512, GNU_sparse_map="0,ten", GNU_sparse_size="900"),
        header("x.jpg", 512, GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="9") + bytes(512),
        header("name", -2, tarfile.GNUTYPE_LONGNAME),
        header("x.txt", 1 << 63),
        header("x.jpg", -512),
    ],
    ids=["sparse map", "sparse blocks", "negative header", "beyond any file", "backwards"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_that_no_tar_has_are_one_line(tmp_path, crafted, packed):
    data = make_tar(dict(list(PICTURES.items())[:3]))[: -tarfile.RECORDSIZE] + crafted + bytes(tarfile.RECORDSIZE)
    (tmp_path / "x.tar").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(LalicError, match=r"x.tar: is (damaged|cut short)"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_missing_tars(tmp_path):
    with pytest.raises(LalicError, match=r"none.tar: no such tar"):
        shard(tmp_path / "none.tar", tmp_path / "out")
    with serve(Bucket()) as bucket, pytest.raises(LalicError, match=r"none.tar: there is no such file"):
        shard(f"{bucket.url}/none.tar", tmp_path / "out")


# Taken up again


def test_resuming_reads_from_the_last_shard_on(tmp_path, monkeypatch):
    """Stopped behind each shard in turn, by a tar that ends there; plain and gzipped, over HTTP, with bytes counted."""
    monkeypatch.setattr(tars, "CHUNK", 5_000)
    monkeypatch.setattr("lalic.data_prep.gunzip.Gunzip.__init__.__defaults__", (None, 20_000))
    whole = make_tar(PICTURES)
    for name, data in (("x.tar", whole), ("x.tar.gz", gzip.compress(whole, 6))):
        with serve(Bucket({name: data})) as bucket:
            shard(f"{bucket.url}/{name}", tmp_path / name / "whole")
            expected = result(tmp_path / name / "whole")
            for shards in (1, 3, 4):
                output = tmp_path / name / str(shards)
                bucket.sent.clear()
                stop_behind(shards, f"{bucket.url}/{name}", output, monkeypatch)
                first = bucket.sent[name]
                bucket.sent.clear()
                shard(f"{bucket.url}/{name}", output)
                assert result(output) == expected
                safe = 0
                for path in sorted(output.glob("*.tar"))[:shards]:
                    with tarfile.open(path) as tar:
                        safe += sum(512 + -(-member.size // 512) * 512 for member in tar)
                # Besides what is in no finished shard: the last member, for gzip the way from the point before it.
                most = 10_000 if name == "x.tar" else 40_000
                assert bucket.sent[name] <= len(data) * (1 - safe / len(whole)) + most
                assert first > 0


def stop_behind(shards: int, source: str, output: Path, monkeypatch) -> None:
    class Stop(BaseException):
        pass

    from lalic.data_prep.state import JobState

    save = JobState.save

    def save_and_stop(self, number, record):
        save(self, number, record)
        if number + 1 == shards:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(JobState, "save", save_and_stop)
        with pytest.raises(Stop):
            shard(source, output)
    # Requests that were under way come to their end: they are not the next run's.
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(timeout=5)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_killed_at_random_points_over_http(tmp_path, root, name):
    whole = make_tar(PICTURES)
    with serve(Bucket({name: gzip.compress(whole) if name.endswith("gz") else whole})) as bucket:
        shard(f"{bucket.url}/{name}", tmp_path / "whole")
        bucket.faults = [Fault("any", chance=0.1, times=1e9)]
        output = tmp_path / "out"
        command = shard_command(
            root, "--input", f"{bucket.url}/{name}", "--output", output, "--shard-size", SMALL.shard_size,
            "--min-side", SMALL.min_side, "--workers", "1",
        )  # fmt: skip
        killed = 0
        delays = random.Random(4)
        for shards in (0, 1, 3):
            delay = delays.uniform(0, 0.01)
            killed += kill_once(command, lambda shards=shards: shards_in(output) >= shards, delay)
        assert killed
        subprocess.run(command, check=True, capture_output=True)
    assert result(output) == result(tmp_path / "whole")


def test_another_tar_of_the_same_name_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "x.tar").write_bytes(make_tar(PICTURES))
    stop_behind(2, str(tmp_path / "x.tar"), tmp_path / "out", monkeypatch)
    (tmp_path / "x.tar").write_bytes(make_tar(dict(reversed(PICTURES.items()))))
    with pytest.raises(LalicError, match=r"x.tar: .*(has changed since this job began|damaged or no tar)"):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_other_tars_are_another_job(two_tars, tmp_path):
    paths, _ = two_tars
    shard(paths, tmp_path / "out")
    with pytest.raises(LalicError, match="the number of tars was 2, is now 1; the tars have other names"):
        shard(paths[:1], tmp_path / "out")


def test_a_global_header_still_holds_after_a_resume(tmp_path, monkeypatch):
    """A PAX header for all members behind it, here with one name for all, lies before the part that is read again."""
    members = {f"{n:03d}.png": encode(picture(n, 120, 120), "PNG") for n in range(5)}
    data = make_tar(members, format=tarfile.PAX_FORMAT, pax_headers={"path": "all/of them.png"})
    (tmp_path / "x.tar").write_bytes(data)
    shard(tmp_path / "x.tar", tmp_path / "whole")
    assert len(keys(tmp_path / "whole")) == 2 and all(
        key.startswith("all/of_them-") for key in keys(tmp_path / "whole")
    )
    stop_behind(1, str(tmp_path / "x.tar"), tmp_path / "out", monkeypatch)
    shard(tmp_path / "x.tar", tmp_path / "out")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path, root):
    """Sixty thousand members, most of them no images: nothing is kept of those that are done with."""
    image = encode(picture(1, 300, 300), "JPEG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(60_000):
            if number % 300:
                add(tar, f"n/{number}.txt", b"x")
            else:
                add(tar, f"n/{number}.jpg", image + number.to_bytes(4, "big"))
    command = shard_command(root, "--input", tmp_path / "x.tar", "--output", tmp_path / "out", "--workers", 0)
    program = (
        "import runpy, sys\n"
        "from lalic.memory import peak_resident_bytes\n"
        f"sys.argv = {command[1:]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('peak', peak_resident_bytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 250_000_000
