"""The sharding program: what it keeps, what it leaves out and why, and that nothing can make it differ."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from lalic.data_prep.command import main, parse_size
from lalic.data_prep.job import Options, run_job
from lalic.data_prep.keys import make_keys
from lalic.data_prep.opening import open_source
from PIL import Image
from shard_samples import SMALL, encode, keys, left_out, picture, read_back, result, shard_command, write_folder

from lalic.data.index import ShardIndex
from lalic.data.reader import LocalReader
from lalic.errors import LalicError

FLAGS = ["--shard-size", "60000", "--min-side", "32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


# What is in the shards


def test_webdataset_reads_the_original_bytes(photos, tmp_path):
    """WebDataset itself, an independent reader, sees every file once and unchanged."""
    run_job(photos, tmp_path, SMALL, workers=0)
    assert len(list(tmp_path.glob("*.tar"))) > 3
    originals = {str(p.relative_to(photos).with_suffix("")): p for p in photos.rglob("*.*")}
    seen = []
    for sample in read_back(tmp_path):
        (extension,) = [name for name in sample if not name.startswith("__")]
        assert sample[extension] == originals[sample["__key__"]].read_bytes()
        assert (
            extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[Image.open(originals[sample["__key__"]]).format]
        )
        seen.append(sample["__key__"])
    assert sorted(seen) == sorted(originals) and seen == keys(tmp_path)


def test_the_index_tells_the_truth(photos, tmp_path):
    run_job(photos, tmp_path, SMALL, workers=0)
    document = json.loads((tmp_path / "index.json").read_text())
    assert {k: document[k] for k in document if k != "shards"} == {
        "version": 1, "prefix": "shard", "seed": 0, "min_side": 32,
    }  # fmt: skip
    for shard in document["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] <= 60_000
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        with tarfile.open(tmp_path / shard["name"]) as tar:
            members = tar.getmembers()
        for member, sample in zip(members, shard["samples"], strict=True):
            assert member.name == f"{sample['key']}.{sample['ext']}"
            assert (member.offset_data, member.size) == (sample["offset"], sample["size"])
            owner = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert owner == (0, 0, 0, "", "", 0o644)
            image = Image.open(io.BytesIO(data[sample["offset"] : sample["offset"] + sample["size"]]))
            assert image.size == (sample["width"], sample["height"])
    LocalReader(ShardIndex.load(tmp_path)).check(1)


def test_width_and_height_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "in").mkdir()
    picture(1, 40, 60).save(tmp_path / "in" / "a.jpg", exif=exif)
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    index = ShardIndex.load(tmp_path / "out")
    assert (index.width[0], index.height[0]) == (40, 60)


def test_real_photographs(data_dir, tmp_path):
    run_job(data_dir / "bsds500" / "train", tmp_path, Options(shard_size=4 << 20), workers=2)
    index = ShardIndex.load(tmp_path)
    assert len(index) == 200 and set(np.minimum(index.width, index.height).tolist()) == {321}
    for sample in read_back(tmp_path):
        original = data_dir / "bsds500" / "train" / f"{sample['__key__']}.jpg"
        assert sample["jpg"] == original.read_bytes()


# Nothing makes it differ


def test_same_bytes_whatever_the_workers_and_the_place(photos, tmp_path):
    run_job(photos, tmp_path / "one", SMALL, workers=0)
    run_job(photos, tmp_path / "two", SMALL, workers=1)
    elsewhere = tmp_path / "deep" / "er" / "copy"
    elsewhere.parent.mkdir(parents=True)
    # The order in which files are made, and so perhaps listed, must not count either.
    for path in sorted(photos.rglob("*.*"), reverse=True):
        target = elsewhere / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    run_job(elsewhere, tmp_path / "three", SMALL, workers=2)
    assert result(tmp_path / "one") == result(tmp_path / "two") == result(tmp_path / "three")


def test_the_seed_decides_on_the_order(photos, tmp_path):
    run_job(photos, tmp_path / "a", SMALL, workers=0)
    run_job(photos, tmp_path / "b", Options(shard_size=60_000, min_side=32, seed=1), workers=0)
    one, other = keys(tmp_path / "a"), keys(tmp_path / "b")
    assert sorted(one) == sorted(other) and one != other and one != sorted(one)


def test_limit_takes_the_first_usable_images(photos, tmp_path):
    folder = tmp_path / "in"
    for number in range(20):
        good = number not in (2, 3, 9, 13)
        path = folder / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(number), "JPEG") if good else b"garbage")
    for workers in (0, 2):
        output = tmp_path / f"out{workers}"
        run_job(folder, output, Options(limit=10, min_side=32), workers=workers)
        usable = [n for n in range(20) if n not in (2, 3, 9, 13)]
        assert sorted(keys(output)) == [f"{n:02d}" for n in usable[:10]]
        assert set(left_out(output)) == {"02.jpg", "03.jpg", "09.jpg"}
    assert result(tmp_path / "out0") == result(tmp_path / "out2")


# What is left out


def test_every_kind_of_bad_image_is_left_out_and_listed(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    jpeg = encode(picture(1, 100, 100), "JPEG")
    png = bytearray(encode(picture(2, 100, 100), "PNG"))
    png[len(png) // 2] ^= 1
    files = {
        "good.jpg": (jpeg, None),
        "twin.jpg": (jpeg, "duplicate"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "damaged"),
        "flipped.png": (bytes(png), "damaged"),
        "text.jpg": (b"<html>not found</html>", "not an image"),
        "empty.png": (b"", "empty file"),
        "small.jpg": (encode(picture(3, 31, 200), "JPEG"), "too small"),
        "large.png": (encode(Image.new("RGB", (300, 300)), "PNG"), "too many pixels"),
        "more/gray.png": (encode(picture(4).convert("L"), "PNG"), None),
        "more/rgba.png": (encode(picture(5).convert("RGBA"), "PNG"), None),
        "more/palette.png": (encode(picture(6).convert("P"), "PNG"), None),
        "more/cmyk.jpg": (encode(picture(7).convert("CMYK"), "JPEG"), None),
        "more/deep.png": (encode(Image.fromarray(np.full((40, 40), 40000, np.uint16)), "PNG"), None),
        "more/really-a-png.jpg": (encode(picture(8), "PNG"), None),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("passed over")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    options = Options(min_side=32, max_pixels=80_000)
    run_job(folder, tmp_path / "out", options, workers=2)
    expected = {name: reason for name, (_, reason) in files.items() if reason}
    found = left_out(tmp_path / "out")
    # Which of two twins stays depends on the seed, so either name will do.
    twin = {name for name in ("good.jpg", "twin.jpg") if name in found}
    assert len(twin) == 1
    found["twin.jpg"] = found.pop(twin.pop())
    assert found == {**expected, "gone.jpg": "cannot be read"}
    kept = {name.rpartition(".")[0] for name, (_, reason) in files.items() if not reason}
    assert {key.replace("twin", "good") for key in keys(tmp_path / "out")} == kept
    report = capsys.readouterr().out
    assert "7 images in 1 shard" in report and "left out: 9 images" in report
    assert "       3  damaged, for example" in report
    run_job(folder, tmp_path / "serial", options, workers=0)
    assert result(tmp_path / "serial") == result(tmp_path / "out")


def test_keep_duplicates(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(picture(0), "PNG"))
    run_job(tmp_path / "in", tmp_path / "once", SMALL, workers=0)
    run_job(tmp_path / "in", tmp_path / "all", Options(min_side=32, keep_duplicates=True), workers=0)
    assert len(keys(tmp_path / "once")) == 1 and sorted(keys(tmp_path / "all")) == ["a", "b", "c"]


def test_duplicates_are_found_across_a_resume(tmp_path):
    """A shard that is made again knows what the shards before it hold."""
    for number in range(30):
        path = tmp_path / "in" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(number % 20), "PNG"))
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    expected = result(tmp_path / "out")
    assert len(keys(tmp_path / "out")) == 20 and len(expected) > 4
    sorted((tmp_path / "out").glob("*.tar"))[-1].unlink()
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    assert result(tmp_path / "out") == expected


# Names


def test_keys_are_unique_plain_and_stable():
    paths = ["a/b.jpg", "a/b.png", "a/c.d.jpg", "ä/x.jpg", "__meta__/x.jpg", "p q.jpg", "p_q.jpg", "a/B.jpg",
             "x" * 300 + ".jpg", "x" * 301 + ".jpg", "-.jpg", os.fsdecode(b"\xff\xfe.jpg")]  # fmt: skip
    keys = make_keys(paths)
    assert len(set(keys)) == len(paths)
    for key in keys:
        assert "." not in key and len(key) <= 95 and key.isascii() and not key.startswith(("__", "/"))
    assert keys[6] == "p_q-" + hashlib.sha256(b"p_q.jpg").hexdigest()[:8]
    assert keys[7] == "a/B" and make_keys(["a/b.jpg"]) == ["a/b"]
    assert make_keys(paths[::-1]) == keys[::-1]


def test_odd_names_end_up_readable_in_the_tar(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.makedirs(folder + b"/sp ace")
    names = [b"sp ace/a.b.c.png", "sp ace/grün.png".encode(), b"sp ace/\xff\xfe.png", b"a\nb.png"]
    for number, name in enumerate(names):
        with open(folder + b"/" + name, "wb") as file:
            file.write(encode(picture(number), "PNG"))
    with open(folder + b"/\xff.jpg", "wb") as file:
        file.write(b"bad")
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=2)
    assert [sample["__key__"] for sample in read_back(tmp_path / "out")] == keys(tmp_path / "out")
    assert len(keys(tmp_path / "out")) == 4
    assert left_out(tmp_path / "out") == {"\\udcff.jpg": "not an image"}


def test_a_list_of_paths(tmp_path, photos):
    (tmp_path / "lists").mkdir()
    chosen = sorted(photos.rglob("*.*"))[5:15]
    lines = [str(path) for path in chosen[:5]] + [os.path.relpath(path, tmp_path / "lists") for path in chosen[5:]]
    lines = ["# a comment", "", *lines, lines[0], str(photos / "absent.jpg")]
    (tmp_path / "lists" / "list.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    run_job(tmp_path / "lists" / "list.txt", tmp_path / "out", SMALL, workers=0)
    assert sorted(keys(tmp_path / "out")) == sorted(str(p.relative_to(photos).with_suffix("")) for p in chosen)
    assert left_out(tmp_path / "out") == {"absent.jpg": "cannot be read"}
    assert open_source(tmp_path / "lists" / "list.txt").ignored == {"paths listed before": 1}


# Bad input, each one line


@pytest.mark.parametrize("kind", ["missing", "empty", "image", "binary", "no-lines", "only-text-files"])
def test_input_that_is_none(tmp_path, kind):
    source = tmp_path / "in"
    expected = "no image to take"
    if kind == "missing":
        expected = "no such folder or list"
    elif kind == "empty":
        source.mkdir()
    elif kind == "image":
        source, expected = tmp_path / "in.jpg", "is one image"
        source.write_bytes(encode(picture(0), "JPEG"))
    elif kind == "binary":
        source.write_bytes(bytes(100))
        expected = "not a text file"
    elif kind == "no-lines":
        source.write_text("# nothing\n")
    else:
        source.mkdir()
        (source / "readme.txt").write_text("x")
    with pytest.raises(LalicError, match=expected):
        run_job(source, tmp_path / "out", SMALL, workers=0)
    assert not (tmp_path / "out").exists()


def test_no_usable_image_is_one_line_and_can_be_mended(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"garbage")
    (tmp_path / "in" / "b.jpg").write_bytes(encode(picture(0, 20, 20), "JPEG"))
    with pytest.raises(LalicError, match=r"no usable image among 2 \(1 not an image, 1 too small\)"):
        run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    assert len(left_out(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "index.json").exists()
    (tmp_path / "in" / "a.jpg").write_bytes(encode(picture(0), "JPEG"))
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    assert keys(tmp_path / "out") == ["a"]


def test_output_that_is_a_file_or_holds_other_shards(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LalicError, match="is not a folder"):
        run_job(photos, tmp_path / "file", SMALL, workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(LalicError, match=r"holds shard-000000.tar, but no record of how it was made"):
        run_job(photos, tmp_path / "other", SMALL, workers=0)
    assert (tmp_path / "other" / "shard-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shard-size", "lots"], "'lots' is no size"),
        (["--shard-size", "10"], "is too small"),
        (["--limit", "0"], "whole number from 1"),
        (["--workers", "-1"], "whole number from 0"),
        (["--prefix", "../x"], "letters, digits"),
    ],
)
def test_flags_that_cannot_be(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, size",
    [("536870912", 512 << 20), ("512MiB", 512 << 20), ("512M", 512 << 20), ("1.5 GB", 1_500_000_000), ("30kib", 30720)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_the_command_runs_from_a_checkout_that_is_not_installed(root, tmp_path, photos):
    """`-S` hides what is installed, the editable checkout with it; only the dependencies' folders are put back."""
    arguments = ["--input", str(photos), "--output", str(tmp_path / "out"), *FLAGS, "--workers", "0"]
    program = (
        "import runpy, sys\n"
        f"sys.path += {[p for p in sys.path if 'site-packages' in p]!r}\n"
        "try:\n    import lalic\n    sys.exit('lalic is importable, the test would show nothing')\n"
        "except ImportError:\n    pass\n"
        f"sys.argv = {['shard.py', *arguments]!r}\n"
        f"sys.path.insert(0, {str(root / 'data_prep')!r})\n"
        f"runpy.run_path({str(root / 'data_prep' / 'shard.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 images in" in done.stdout and len(keys(tmp_path / "out")) == 40


def test_the_command_reports_errors_in_one_line(root, tmp_path):
    done = subprocess.run(
        shard_command(root, "--input", tmp_path / "absent", "--output", tmp_path / "out"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: --input {tmp_path}/absent: no such folder or list of paths"]
