"""The frozen manifest: the same wherever it is made, and the same shards made from it, whatever happens."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from bucket_server import Bucket, Fault, serve, serve_s3
from lalic.data_prep import frozen
from lalic.data_prep.command import main
from lalic.data_prep.find import finders
from lalic.data_prep.frozen import Manifest
from lalic.data_prep.job import run_job
from lalic.data_prep.manifest import escape_source, unescape_source
from lalic.data_prep.rebuild import run_rebuild
from shard_samples import SMALL, encode, error_on_a_full_disk, kill_once, picture, result, shard_command, write_folder

from lalic.errors import LalicError
from lalic.remote import Remote


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`in`, the shards `out` and their manifest `m.csv.gz`."""
    base = tmp_path_factory.mktemp("made")
    run_job(write_folder(base / "in"), base / "out", SMALL, workers=0, manifest=base / "m.csv.gz")
    return base


def shards_of(folder: Path) -> dict[str, str]:
    return {name: value for name, value in result(folder).items() if name not in ("left_out.csv", "missing.csv")}


def rebuild(manifest: Path, source: Path, output: Path, **options) -> None:
    run_rebuild(manifest, finders(str(source), 2), output, label=str(source), workers=2, **options)


def rows_of(path: Path) -> tuple[dict, list[dict[str, str]]]:
    with gzip.open(path, "rt") as file:
        head = json.loads(file.readline()[1:])
        return head, list(csv.DictReader(file))


# What is in it


def test_it_tells_the_truth(made):
    """Against the images and the index, read by the standard library alone."""
    head, rows = rows_of(made / "m.csv.gz")
    index = json.loads((made / "out" / "index.json").read_text())
    assert head["shards"] == [[s["bytes"], s["sha256"], len(s["samples"])] for s in index["shards"]]
    assert (head["samples"], head["prefix"], head["seed"], head["min_side"], head["shard_size"]) == (
        40, "shard", 0, 32, 60_000,
    )  # fmt: skip
    samples = [
        (number, place, sample)
        for number, shard in enumerate(index["shards"])
        for place, sample in enumerate(shard["samples"])
    ]
    for row, (number, place, sample) in zip(rows, samples, strict=True):
        data = (made / "in" / row["source"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest() and int(row["bytes"]) == len(data)
        assert (row["id"], row["ext"]) == (sample["key"], sample["ext"])
        numbers = [int(row[name]) for name in ("shard", "place", "offset", "width", "height")]
        assert numbers == [number, place, sample["offset"], sample["width"], sample["height"]]


def test_pandas_reads_it(made):
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(made / "m.csv.gz", comment="#", keep_default_na=False)
    assert len(table) == 40 and list(table.columns) == list(frozen.COLUMNS) and table["width"].eq(56).all()


def test_two_machines_give_the_same_bytes(made, tmp_path):
    """Another place, other numbers of workers, files made in another order, another check."""
    for path in sorted((made / "in").rglob("*.*"), reverse=True):
        target = tmp_path / "mnt" / "disk" / path.relative_to(made / "in")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, workers, check in (("one", 1, "full"), ("two", 2, "full"), ("three", 3, "headers")):
        manifest = tmp_path / f"{name}.csv.gz"
        run_job(
            tmp_path / "mnt" / "disk",
            tmp_path / name,
            replace(SMALL, check=check),
            workers=workers,
            manifest=manifest,
        )
        assert manifest.read_bytes() == (made / "m.csv.gz").read_bytes()
        assert result(tmp_path / name) == result(made / "out")


def test_of_a_job_that_is_complete_only_the_manifest_is_written(made, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in (made / "out").iterdir() if path.is_file()}
    run_job(made / "in", made / "out", SMALL, workers=0, manifest=tmp_path / "m.csv.gz")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "m.csv.gz").read_bytes() == (made / "m.csv.gz").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_plain_and_compressed_are_the_same_manifest(made, tmp_path):
    run_job(made / "in", made / "out", SMALL, workers=0, manifest=tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == gzip.decompress((made / "m.csv.gz").read_bytes())
    assert Manifest.load(tmp_path / "m.csv").sha256 == Manifest.load(made / "m.csv.gz").sha256


@pytest.mark.parametrize(
    "name", ["a b.jpg", "50%.jpg", 'x#1,"2".jpg', "l\nine.jpg", "ä/日本.jpg", os.fsdecode(b"\xff\xfe.jpg"), "a%20b"]
)
def test_odd_sources_come_back(name):
    text = escape_source(name)
    assert not set(text) & set('#,"\n') and unescape_source(text.encode()) == name


def test_odd_names_are_rebuilt(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.makedirs(folder + b"/sp ace")
    names = [b"sp ace/a.b.c.png", "grün#1,2.png".encode(), b"sp ace/\xff\xfe.png", b"a\nb.png", b"100%.png"]
    for number, name in enumerate(names):
        with open(folder + b"/" + name, "wb") as file:
            file.write(encode(picture(number), "PNG"))
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0, manifest=tmp_path / "m.csv.gz")
    manifest = Manifest.load(tmp_path / "m.csv.gz")
    assert sorted(os.fsencode(manifest.source(i)) for i in range(5)) == sorted(names)
    rebuild(tmp_path / "m.csv.gz", tmp_path / "in", tmp_path / "again")
    assert shards_of(tmp_path / "again") == shards_of(tmp_path / "out")


# The same shards from it


def test_the_very_same_shards(made, tmp_path, capsys):
    rebuild(made / "m.csv.gz", made / "in", tmp_path)
    assert shards_of(tmp_path) == shards_of(made / "out")
    assert not list(tmp_path.glob(".*.part"))
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    rebuild(made / "m.csv.gz", made / "in", tmp_path)
    assert "complete before this run, 40 images" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_images_that_were_renamed_are_found_by_their_bytes(made, tmp_path):
    (tmp_path / "in").mkdir()
    for number, path in enumerate(sorted((made / "in").rglob("*.*"))):
        shutil.copy(path, tmp_path / "in" / f"{(number * 7) % 40}{path.suffix}")
    rebuild(made / "m.csv.gz", tmp_path / "in", tmp_path / "out")
    assert shards_of(tmp_path / "out") == shards_of(made / "out")


@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_things_that_are_not_asked_for(made, tmp_path, seed):
    """What a stream of tars does: whatever comes, more than once, beside other files."""
    arrivals = [(path.name, path.read_bytes()) for path in (made / "in").rglob("*.*")]
    arrivals += [*arrivals[:10], ("extra", b"something else"), ("", b"")]
    random.Random(seed).shuffle(arrivals)
    run_rebuild(made / "m.csv.gz", [lambda wanted: iter(arrivals)], tmp_path, label="stream", workers=3)
    assert shards_of(tmp_path) == shards_of(made / "out")


def test_images_kept_twice(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abcd":
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(picture(name > "b"), "PNG"))
    options = replace(SMALL, keep_duplicates=True)
    run_job(tmp_path / "in", tmp_path / "out", options, workers=0, manifest=tmp_path / "m.csv.gz")
    (tmp_path / "in" / "a.png").unlink()
    rebuild(tmp_path / "m.csv.gz", tmp_path / "in", tmp_path / "again")
    assert shards_of(tmp_path / "again") == shards_of(tmp_path / "out")


def test_missing_and_changed_samples_are_listed_and_can_be_mended(made, tmp_path):
    source = Path(shutil.copytree(made / "in", tmp_path / "in"))
    _, rows = rows_of(made / "m.csv.gz")
    gone, changed = rows[3], rows[30]
    (source / gone["source"]).unlink()
    (source / changed["source"]).write_bytes((source / rows[5]["source"]).read_bytes())
    with pytest.raises(
        LalicError, match=r"2 of 40 samples could not be had \(1 not found, 1 with other bytes; "
    ) as caught:
        rebuild(made / "m.csv.gz", source, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    with open(tmp_path / "out" / "missing.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["id"], row["source"], row["shard"], row["reason"]) for row in table] == [
        (gone["id"], gone["source"], gone["shard"], "not found"),
        (changed["id"], changed["source"], changed["shard"], "other bytes"),
    ]
    assert not (tmp_path / "out" / "index.json").exists()
    whole = {int(row["shard"]) for row in rows} - {int(gone["shard"]), int(changed["shard"])}
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {f"shard-{n:06d}.tar" for n in whole}
    # Only what is missing is asked for now.
    asked = []

    def find(wanted):
        asked.extend(wanted)
        return [(key, next((made / "in").rglob(f"{Path(key).name}.*")).read_bytes()) for key in wanted]

    run_rebuild(made / "m.csv.gz", [find], tmp_path / "out", label="rest", workers=1)
    assert sorted(asked) == sorted([gone["id"], changed["id"]])
    assert shards_of(tmp_path / "out") == shards_of(made / "out")
    assert not (tmp_path / "out" / "missing.csv").exists()


def test_damage_in_a_part_is_noticed(made, tmp_path):
    """A power cut may lose what was written last: what does not have its sum any more is fetched again."""
    arrivals = [(path.name, path.read_bytes()) for path in (made / "in").rglob("*.*")]
    with pytest.raises(LalicError, match="not found"):
        run_rebuild(made / "m.csv.gz", [lambda wanted: arrivals[:20]], tmp_path, label="half", workers=1)
    parts = sorted(tmp_path.glob(".*.part"))
    _, rows = rows_of(made / "m.csv.gz")
    damaged = 0
    for part in parts:
        shard = int(part.name.split("-")[1].split(".")[0])
        for row in rows:
            offset = int(row["offset"])
            if int(row["shard"]) == shard and part.read_bytes()[offset : offset + 4] != bytes(4) and not damaged:
                with open(part, "rb+") as file:
                    file.seek(offset + 100)
                    file.write(b"power cut")
                damaged += 1
    assert damaged == 1
    run_rebuild(made / "m.csv.gz", [lambda wanted: arrivals], tmp_path, label="all", workers=1)
    assert shards_of(tmp_path) == shards_of(made / "out")


def test_a_folder_of_another_job_is_not_touched(made, tmp_path):
    with pytest.raises(LalicError, match=r"belongs to another job .it was made without --from-manifest"):
        rebuild(made / "m.csv.gz", made / "in", made / "out")
    rebuild(made / "m.csv.gz", made / "in", tmp_path / "out")
    with pytest.raises(LalicError, match=r"belongs to another job .it was made with --from-manifest"):
        run_job(made / "in", tmp_path / "out", SMALL, workers=0)
    run_job(made / "in", tmp_path / "b", replace(SMALL, seed=1), workers=0, manifest=tmp_path / "b.csv")
    with pytest.raises(LalicError, match="another --from-manifest"):
        rebuild(tmp_path / "b.csv", made / "in", tmp_path / "out")


def test_options_that_the_manifest_fixes_are_refused(made, tmp_path):
    command = ["--input", str(made / "in"), "--output", str(tmp_path / "out")]
    for flags in (["--limit", "5"], ["--seed", "0"], ["--check", "full"], ["--keep-duplicates"], ["--manifest", "x"]):
        with pytest.raises(LalicError, match=f"--from-manifest goes without {flags[0]}:"):
            main([*command, "--from-manifest", str(made / "m.csv.gz"), *flags])
    with pytest.raises(LalicError, match="--staging goes with --from-manifest, or with a URL"):
        main([*command, "--staging", str(tmp_path)])
    assert not (tmp_path / "out").exists()


# Bad manifests, each one line


def edited(made: Path, tmp_path: Path, change) -> Path:
    lines = gzip.decompress((made / "m.csv.gz").read_bytes()).decode().split("\n")
    lines = change(lines) or lines
    path = tmp_path / "edited.csv"
    path.write_text("\n".join(lines))
    return path


def cell(row: int, column: str, value) -> object:
    def change(lines: list[str]) -> None:
        fields = lines[2 + row].split(",")
        place = frozen.COLUMNS.index(column)
        fields[place] = value(fields[place]) if callable(value) else value
        lines[2 + row] = ",".join(fields)

    return change


def head(name: str, value) -> object:
    def change(lines: list[str]) -> None:
        document = json.loads(lines[0][1:])
        document[name] = value(document[name]) if callable(value) else value
        lines[0] = "# " + json.dumps(document)

    return change


BAD = {
    "key upwards": (cell(4, "id", "../../etc/passwd"), "line 7 has id '../../etc/passwd'"),
    "absolute key": (cell(4, "id", "/etc/passwd"), "line 7 has id '/etc/passwd'"),
    "hidden key": (cell(4, "id", "__x"), "line 7 has id '__x'"),
    "long key": (cell(4, "id", "x" * 96), "line 7 has id 'xxx"),
    "sum": (cell(0, "sha256", lambda x: x[:-1] + "g"), "line 3 has sha256"),
    "short sum": (cell(0, "sha256", lambda x: x[:-1]), "line 3 has sha256"),
    "negative": (cell(0, "width", "-5"), "line 3 has width '-5'"),
    "spaces": (cell(0, "width", " 5"), "line 3 has width ' 5'"),
    "empty": (cell(0, "bytes", ""), "line 3 has bytes ''"),
    "huge": (cell(0, "bytes", "9" * 30), "line 3 has bytes '999"),
    "absurd": (cell(0, "bytes", "9" * 17), "line 3 has an impossible size"),
    "no width": (cell(0, "width", "0"), "line 3 has an impossible width or height"),
    "size": (cell(0, "bytes", lambda x: str(int(x) + 600)), "line 4 has an offset that does not follow"),
    "last size": (cell(39, "bytes", lambda x: str(int(x) + 90_000)), "its samples need"),
    "offset": (cell(5, "offset", lambda x: str(int(x) + 512)), "line 8 has an offset that does not follow"),
    "shard": (cell(5, "shard", "2"), "line 8 is not in the shard where it should be"),
    "place": (cell(5, "place", "77"), "line 8 is not in its place"),
    "extension": (cell(5, "ext", "exe"), "line 8 has ext 'exe'"),
    "source": (cell(5, "source", 'a"b'), "line 8 has source"),
    "no source": (cell(5, "source", ""), "line 8 has source ''"),
    "fields": (cell(5, "source", "a,b"), "line 8 has 11 fields"),
    "row gone": (lambda lines: lines.pop(10) and None, "line 12 is not in its place|has 39 rows"),
    "rows swapped": (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], "is not in its place"),
    "end gone": (lambda lines: lines[:20], "cut short in its last line"),
    "end gone at a line": (lambda lines: [*lines[:20], ""], "has 18 rows, its first line says 40"),
    "more rows": (lambda lines: [*lines[:-1], *lines[2:]], "has more rows than the 40 of its first line"),
    "titles": (lambda lines: [lines[0], "a,b", *lines[2:]], "has other columns than id"),
    "no head": (lambda lines: lines[1:], "is no manifest of this program"),
    "foreign": (lambda lines: ["# {}", *lines[1:]], "is no manifest of this program"),
    "version": (head("version", 2), "has version 2, this program reads 1"),
    "prefix": (head("prefix", "../x"), "the prefix '../x'"),
    "count": (head("samples", 10**30), "samples 1000"),
    "no shards": (head("shards", []), "no valid list of shards"),
    "shard size": (head("shards", lambda s: [[s[0][0] + 10240, *s[0][1:]], *s[1:]]), "its samples need"),
    "negative shard": (head("shards", lambda s: [[-1, *s[0][1:]], *s[1:]]), "no valid list of shards"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_an_edited_manifest_is_one_line(made, tmp_path, kind):
    change, message = BAD[kind]
    path = edited(made, tmp_path, change)
    with pytest.raises(LalicError, match=message) as caught:
        rebuild(path, made / "in", tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"--from-manifest {path}: ") and "\n" not in text
    assert not (tmp_path / "out").exists()


def test_a_duplicated_key_is_named(made, tmp_path):
    first = rows_of(made / "m.csv.gz")[1][0]["id"]
    path = edited(made, tmp_path, cell(9, "id", first))
    with pytest.raises(LalicError, match=f"lines 3 and 12 have the same id '{first}'"):
        Manifest.load(path)


def test_a_sum_that_was_edited_is_noticed_at_the_end(made, tmp_path):
    path = edited(made, tmp_path, head("shards", lambda s: [[s[0][0], "0" * 64, s[0][2]], *s[1:]]))
    with pytest.raises(
        LalicError, match=r"shard-000000.tar: its samples are those of the manifest, but its sum is not"
    ):
        rebuild(path, made / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "shard-000000.tar").exists()


@pytest.mark.parametrize("kind", ["cut", "flipped", "missing", "folder", "empty", "picture", "endless"])
def test_damaged_files(made, tmp_path, kind, monkeypatch):
    data = (made / "m.csv.gz").read_bytes()
    path = tmp_path / "m.csv.gz"
    if kind == "cut":
        path.write_bytes(data[:-100])
    elif kind == "flipped":
        path.write_bytes(data[:500] + bytes([data[500] ^ 8]) + data[501:])
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "picture":
        path.write_bytes(encode(picture(0), "PNG"))
    elif kind == "endless":
        monkeypatch.setattr(frozen, "_PART", 1000)
        lines = gzip.decompress(data).split(b"\n")
        path.write_bytes(gzip.compress(b"\n".join([*lines[:2], b"x" * 10_000])))
    with pytest.raises(LalicError, match=f"--from-manifest {path}: "):
        Manifest.load(path)


def test_parts_of_the_file_do_not_matter(made, monkeypatch):
    whole = Manifest.load(made / "m.csv.gz")
    monkeypatch.setattr(frozen, "_PART", 700)
    parts = Manifest.load(made / "m.csv.gz")
    assert parts.sha256 == whole.sha256 and (parts.offset == whole.offset).all()
    assert [parts.key(i) for i in range(40)] == [whole.key(i) for i in range(40)]


# Interrupted


def test_a_full_disk_while_rebuilding(made, tmp_path, root):
    command = shard_command(
        root, "--input", made / "in", "--output", tmp_path / "out", "--from-manifest", made / "m.csv.gz"
    )
    line = error_on_a_full_disk(command, 30_000)
    assert "cannot be written on (File too large), 0 samples are safe: make room and run the same command" in line
    subprocess.run(command, check=True, capture_output=True)
    assert shards_of(tmp_path / "out") == shards_of(made / "out")


class Stop(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def test_stopped_in_the_middle_of_any_write_it_ends_in_the_same_bytes(made, tmp_path, monkeypatch):
    """Half of a sample is written, then nothing more; the next run goes on from there."""
    pwrite = os.pwrite
    for step in range(1, 41, 2):
        left = step

        def write_or_stop(handle, data, offset):
            nonlocal left
            left -= 1
            if left:
                return pwrite(handle, data, offset)
            pwrite(handle, data[: len(data) // 2], offset)
            raise Stop

        output = tmp_path / str(step)
        monkeypatch.setattr(os, "pwrite", write_or_stop)
        with pytest.raises(Stop):
            rebuild(made / "m.csv.gz", made / "in", output)
        monkeypatch.setattr(os, "pwrite", pwrite)
        asked = []

        def find(wanted, asked=asked):
            asked.extend(wanted)
            return next(finders(str(made / "in"), 1))(wanted)

        run_rebuild(made / "m.csv.gz", [find], output, label="again", workers=1)
        # All but the sample that was under way is there.
        assert len(asked) == 41 - step and shards_of(output) == shards_of(made / "out")


def blocks_in(folder: Path) -> int:
    """Disk blocks of all shards and parts."""
    if not folder.exists():
        return 0
    blocks = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # a part that has just got its name
            blocks += entry.stat().st_blocks if "shard-" in entry.name else 0
    return blocks


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_in_the_same_bytes(tmp_path, root, kills):
    for number in range(200):
        path = tmp_path / "in" / f"{number % 7}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number, 160, 160), "PNG"))
    options = replace(SMALL, shard_size=800_000)
    run_job(tmp_path / "in", tmp_path / "whole", options, workers=0, manifest=tmp_path / "m.csv.gz")
    output = tmp_path / "out"
    command = shard_command(
        root, "--input", tmp_path / "in", "--output", output, "--from-manifest", tmp_path / "m.csv.gz"
    )
    delays = random.Random(7)
    killed = written = 0
    for kill in range(kills):
        # From a source that gives one more tenth (or so) each time, so that every run has something to do.
        have = (kill + 1) * 200 // (kills + 1)
        listed = sorted((tmp_path / "in").rglob("*.png"), key=lambda path: path.name[::-1])[:have]
        (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in listed))
        partial = [str(tmp_path / "list.txt") if part == str(tmp_path / "in") else part for part in command]
        delay = delays.uniform(0, 0.01)
        killed += kill_once(partial, lambda written=written: blocks_in(output) > written, delay, interval=0.0005)
        written = blocks_in(output)
    assert killed >= kills // 2 and not (output / "index.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert shards_of(output) == shards_of(tmp_path / "whole")
    assert not list(output.rglob("*.tmp")) and not list(output.glob(".*.part"))


# From sources of every kind


def test_from_tars_a_bucket_and_s3(made, tmp_path, monkeypatch):
    """The manifest of a folder; the images in tar.gz streams, behind HTTP that stumbles, and in S3, in other orders."""
    images = sorted((made / "in").rglob("*.*"), reverse=True)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as tar:
            for path in images[number::2]:
                tar.add(path, path.relative_to(made / "in"))
    tars = [str(tmp_path / "1.tar.gz"), str(tmp_path / "0.tar.gz")]
    command = ["--from-manifest", str(made / "m.csv.gz"), "--output"]
    assert main([*command, str(tmp_path / "tars"), "--input", *tars]) == 0
    assert shards_of(tmp_path / "tars") == shards_of(made / "out")

    names = [str(path.relative_to(made / "in")) for path in images]
    (tmp_path / "names.txt").write_text("\n".join(names))
    bucket = Bucket({name: (made / "in" / name).read_bytes() for name in names}, [Fault("any", times=15, chance=0.4)])
    with serve(bucket):
        flags = ["--input", str(tmp_path / "names.txt"), "--bucket", bucket.url]
        assert main([*command, str(tmp_path / "http"), *flags]) == 0
    assert shards_of(tmp_path / "http") == shards_of(made / "out")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with serve_s3() as endpoint:
        system = Remote("s3://photos/in", endpoint).filesystem
        for name in names:
            system.pipe_file(f"s3://photos/in/{name}", (made / "in" / name).read_bytes())
        flags = ["--input", "s3://photos/in/", "--endpoint", endpoint]
        assert main([*command, str(tmp_path / "s3"), *flags]) == 0
    assert shards_of(tmp_path / "s3") == shards_of(made / "out")


def test_a_tar_that_has_half_of_it_then_the_other_one(made, tmp_path):
    images = sorted((made / "in").rglob("*.*"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in images[number::2]:
                tar.add(path, path.relative_to(made / "in"))
    command = ["--from-manifest", str(made / "m.csv.gz"), "--output", str(tmp_path / "out"), "--input"]
    with pytest.raises(LalicError, match="20 of 40 samples could not be had"):
        main([*command, str(tmp_path / "0.tar")])
    assert main([*command, str(tmp_path / "1.tar")]) == 0
    assert shards_of(tmp_path / "out") == shards_of(made / "out")
