"""Every kind of damage to a folder of shards is found and named; whole shards give no line."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from bucket_server import Bucket, Fault, serve
from lalic.data_prep.checking import check_shards
from lalic.data_prep.job import run_job
from lalic.data_prep.verify import main
from shard_samples import SMALL, encode, picture, write_folder

from lalic.errors import LalicError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("made")
    run_job(write_folder(base / "in"), base / "out", SMALL, workers=0, manifest=base / "m.csv.gz")
    return base


@pytest.fixture
def shards(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "shards"))


def problems(capsys, shards: Path, **options) -> list[str]:
    capsys.readouterr()
    count = check_shards(shards, workers=0, **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count + 1
    assert lines[-1].startswith(f"{shards}: {count or 'no'} problem")
    return lines[:-1]


def index_of(shards: Path) -> dict:
    return json.loads((shards / "index.json").read_text())


def sample_of(shards: Path, shard: int = 1, place: int = 1) -> dict:
    return index_of(shards)["shards"][shard]["samples"][place]


def edit_index(shards: Path, change) -> None:
    document = index_of(shards)
    change(document)
    (shards / "index.json").write_text(json.dumps(document))


def flip(path: Path, place: int) -> None:
    with open(path, "rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("options", [{}, {"quick": True}, {"decode": True}])
def test_whole_shards_have_no_problem(made, shards, capsys, options):
    assert problems(capsys, shards, **options) == []
    assert problems(capsys, shards, manifest=made / "m.csv.gz", **options) == []


def test_all_problems_are_found_on_many_processes_and_the_status_says_so(shards, capsys):
    (shards / "shard-000000.tar").unlink()
    flip(shards / "shard-000002.tar", 600)
    assert main([str(shards), "--workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shard-000000.tar: is missing"
    assert "shard-000002.tar: sha256 is another than in the index: bytes were changed" in lines


def test_a_missing_an_empty_and_a_truncated_shard(shards, capsys):
    (shards / "shard-000000.tar").unlink()
    (shards / "shard-000001.tar").write_bytes(b"")
    size = (shards / "shard-000002.tar").stat().st_size
    sample = sample_of(shards, 2, 2)
    os.truncate(shards / "shard-000002.tar", sample["offset"] + 10)
    for quick in (True, False):
        lines = problems(capsys, shards, quick=quick)
        assert "shard-000000.tar: is missing" in lines
        assert "shard-000001.tar: is empty" in lines
        assert any(f"{sample['offset'] + 10} bytes, " in line and f"says {size}" in line for line in lines)
    assert any(f"shard-000002.tar: {sample['key']}: is cut off" in line for line in lines)


def test_a_bit_in_a_header(shards, capsys):
    sample = sample_of(shards)
    flip(shards / "shard-000001.tar", sample["offset"] - 512 + 3)
    lines = problems(capsys, shards)
    assert lines == [
        f"shard-000001.tar: {sample['key']}: the tar header before offset {sample['offset']} is damaged (bad checksum)",
        "shard-000001.tar: sha256 is another than in the index: bytes were changed",
    ]


def test_a_bit_in_an_image(made, shards, capsys):
    sample = sample_of(shards)
    flip(shards / "shard-000001.tar", sample["offset"] + sample["size"] // 2)
    only_sum = ["shard-000001.tar: sha256 is another than in the index: bytes were changed"]
    assert problems(capsys, shards) == only_sum
    named = f"shard-000001.tar: {sample['key']}: sha256 is another than in the manifest"
    assert problems(capsys, shards, manifest=made / "m.csv.gz") == [named, *only_sum]


def test_decode_finds_pixels_that_headers_do_not_tell(tmp_path, capsys):
    """As the sharding program with --check headers would take it: the sums are right, the pixels are not."""
    data = encode(picture(1, 64, 64), "PNG")
    start = data.index(b"IDAT")
    chunk = b"IDAT" + bytes(100)
    data = data[: start - 4] + struct.pack(">I", 100) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[-12:]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    run_job(tmp_path / "in", tmp_path / "out", replace(SMALL, check="headers"), workers=0)
    assert problems(capsys, tmp_path / "out") == []
    (line,) = problems(capsys, tmp_path / "out", decode=True)
    assert line.startswith("shard-000000.tar: a: damaged")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("key", "another/key", "its tar header has the name '{key}.{ext}'"),
        ("ext", "gif", "the index has none of the known extensions, its tar header '{ext}'"),
        ("size", -1, "its tar header has {size} bytes, the index"),
        ("width", 7, "is 56x48, the index says 7x48"),
        ("height", 8, "is 56x48, the index says 56x8"),
    ],
)
def test_an_index_that_does_not_match(shards, capsys, field, value, message):
    sample = sample_of(shards)

    def change(document):
        entry = document["shards"][1]["samples"][1]
        entry[field] = entry[field] + value if field == "size" else value

    edit_index(shards, change)
    lines = problems(capsys, shards)
    assert any(message.format(**sample) in line and line.startswith("shard-000001.tar: ") for line in lines), lines
    assert not any("sha256" in line for line in lines)


def test_an_offset_that_is_off_is_named_and_its_neighbours_are_not(shards, capsys):
    sample = sample_of(shards)

    def change(document):
        document["shards"][1]["samples"][1]["offset"] -= 512

    edit_index(shards, change)
    lines = problems(capsys, shards)
    assert all(f"{sample['key']}:" in line or "which is not in the index" in line for line in lines) and lines


def test_shards_that_were_exchanged(shards, capsys):
    one, other = shards / "shard-000000.tar", shards / "shard-000001.tar"
    one.rename(shards / "x")
    other.rename(one)
    (shards / "x").rename(other)
    lines = problems(capsys, shards)
    assert {line.partition(":")[0] for line in lines} == {"shard-000000.tar", "shard-000001.tar"}


def test_what_is_in_the_tar_but_not_in_the_index(shards, capsys):
    removed = []
    edit_index(shards, lambda document: removed.append(document["shards"][1]["samples"].pop(1)))
    (line,) = problems(capsys, shards)
    assert line.startswith(f"shard-000001.tar: holds '{removed[0]['key']}.{removed[0]['ext']}' at ")
    assert line.endswith("which is not in the index")


def test_a_sample_appended_by_another_program(shards, capsys):
    with tarfile.open(shards / "shard-000001.tar", "a") as tar:
        member = tarfile.TarInfo("extra.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"more"))
    lines = problems(capsys, shards)
    assert any("holds 'extra.jpg' at" in line for line in lines) and any("sha256" in line for line in lines)


def test_a_tar_without_its_end(shards, capsys):
    last = sample_of(shards, 1, -1)
    end = -(-(last["offset"] + last["size"]) // 512) * 512
    os.truncate(shards / "shard-000001.tar", end)
    assert any("has no end" in line for line in problems(capsys, shards))


def test_a_duplicated_key(shards, capsys):
    key = sample_of(shards, 0, 0)["key"]

    def change(document):
        document["shards"][1]["samples"][1]["key"] = key

    edit_index(shards, change)
    lines = problems(capsys, shards)
    assert f"shard-000001.tar: key {key} is also in shard-000000.tar" in lines


def test_extra_shards_and_leavings(shards, capsys):
    shutil.copy(shards / "shard-000000.tar", shards / "shard-000099.tar")
    (shards / ".shard-000003.tar.123.tmp").touch()
    (shards / "notes.txt").touch()
    for quick in (True, False):
        assert problems(capsys, shards, quick=quick) == [
            ".shard-000003.tar.123.tmp: left over by a run that did not end",
            "shard-000099.tar: is not in index.json",
        ]


def test_behind_a_web_server(shards, capsys):
    flip(shards / "shard-000002.tar", 600)
    with serve(Bucket({f"s/{path.name}": path.read_bytes() for path in shards.iterdir() if path.is_file()})) as bucket:
        bucket.files["s/shard-000001.tar"] = b""
        del bucket.files["s/shard-000000.tar"]
        bucket.faults = [Fault("500", times=2)]
        for workers in ("0", "2"):
            assert main([f"{bucket.url}/s", "--workers", workers]) == 1
            lines = capsys.readouterr().out.splitlines()
            assert {"shard-000000.tar: is missing", "shard-000001.tar: is empty"} <= {*lines}
            assert "shard-000002.tar: sha256 is another than in the index: bytes were changed" in lines
        with pytest.raises(LalicError, match=r"/t/index.json is missing"):
            main([f"{bucket.url}/t"])


def test_another_manifest(made, shards, tmp_path, capsys):
    run_job(write_folder(tmp_path / "in", 38), tmp_path / "other", SMALL, workers=0, manifest=tmp_path / "m.csv.gz")
    lines = problems(capsys, shards, manifest=tmp_path / "m.csv.gz")
    assert "index.json: has 40 samples, the manifest 38" in lines


def test_a_manifest_that_is_not_there_is_told_by_its_own_flag(shards, tmp_path):
    with pytest.raises(LalicError, match=r"^--manifest .*none.csv: no such file"):
        check_shards(shards, workers=0, manifest=tmp_path / "none.csv")
    with pytest.raises(LalicError, match=r"^--manifest s3://x/m.csv: is a URL: fetch the file first"):
        check_shards(shards, workers=0, manifest="s3://x/m.csv")


def test_no_index_is_one_line(shards, root):
    (shards / "index.json").write_text('{"version": 1')
    done = subprocess.run(
        [sys.executable, str(root / "data_prep" / "verify.py"), str(shards)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] and "is not JSON" in done.stderr
    (shards / "index.json").unlink()
    with pytest.raises(LalicError, match="is missing"):
        check_shards(shards, workers=0)


def test_every_single_bit_counts(made, tmp_path, capsys):
    """Whatever byte of a shard is changed, it does not pass."""
    name = "shard-000002.tar"
    size = (made / "out" / name).stat().st_size
    for place in [*range(0, 512, 37), *range(512, size, 7919), size - 1]:
        shards = tmp_path / str(place)
        shards.mkdir()
        for file in (made / "out").iterdir():
            if file.is_file() and file.name != name:
                os.link(file, shards / file.name)
        shutil.copy(made / "out" / name, shards / name)
        flip(shards / name, place)
        assert any(line.startswith(name) for line in problems(capsys, shards))
