"""`--check headers`: the same bytes of what is kept, the same sizes, without decoding; and what it cannot see."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from lalic.data_prep.command import main
from lalic.data_prep.headers import upright_size
from lalic.data_prep.job import run_job
from lalic.data_prep.validation import Checked, File, Limits, check_image, image_extension
from lalic.data_prep.writer import SAFE_KEY, ShardWriter, member_header
from PIL import Image
from shard_samples import SMALL, encode, keys, left_out, picture, result, write_folder

from lalic.data.images import MAX_PIXELS, ImageError, decode_rgb
from lalic.errors import LalicError

HEADERS = replace(SMALL, check="headers")


def kinds() -> dict[str, bytes]:
    image = picture(1, 40, 60)
    files = {
        "jpeg": encode(image, "JPEG"),
        "progressive": encode(image, "JPEG", progressive=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "gray jpeg": encode(image.convert("L"), "JPEG"),
        "png": encode(image, "PNG"),
        "palette": encode(image.convert("P"), "PNG"),
        "16 bit": encode(Image.fromarray(np.full((40, 60), 40000, np.uint16)), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "webp": encode(image, "WEBP"),
        "lossless webp": encode(image, "WEBP", lossless=True),
        "animated webp": encode(image, "WEBP", save_all=True, append_images=[picture(2, 40, 60)]),
    }
    for orientation in range(10):
        exif = Image.Exif()
        exif[274] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            files[f"{kind} turned {orientation}"] = encode(image, kind, exif=exif)
    return files


@pytest.mark.parametrize("kind", kinds())
def test_the_size_is_that_of_the_decoded_image(kind):
    data = kinds()[kind]
    height, width, _ = decode_rgb(data, kind).shape
    assert upright_size(data, image_extension(data, kind), kind, MAX_PIXELS) == (width, height)


def test_the_same_shards_as_with_full_decoding(tmp_path):
    write_folder(tmp_path / "in")
    for number, data in enumerate(kinds().values()):
        (tmp_path / "in" / f"kind{number}.jpg").write_bytes(data)
    run_job(tmp_path / "in", tmp_path / "full", SMALL, workers=0)
    for workers in (0, 3):
        run_job(tmp_path / "in", tmp_path / str(workers), HEADERS, workers=workers)
        assert result(tmp_path / str(workers)) == result(tmp_path / "full")


def test_what_headers_tell_is_left_out_and_what_only_pixels_tell_is_not(tmp_path):
    jpeg, png, webp = (encode(picture(1, 100, 100), kind) for kind in ("JPEG", "PNG", "WEBP"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    swapped = bytearray(webp)
    swapped[len(webp) // 2 : len(webp) // 2 + 200] = bytes(200)
    files = {
        "half.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "damaged"),
        "half.png": (png[: len(png) // 2], "damaged"),
        "flipped.png": (bytes(flipped), "damaged"),
        "half.webp": (webp[: len(webp) // 2], "damaged"),
        "text.jpg": (b"<html>", "not an image"),
        "head.jpg": (b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9", None),
        "empty.png": (b"", "empty file"),
        "small.jpg": (encode(picture(3, 31, 200), "JPEG"), "too small"),
        "large.png": (encode(Image.new("RGB", (300, 300)), "PNG"), "too many pixels"),
        "good.jpg": (jpeg, ""),
    }
    (tmp_path / "in").mkdir()
    for name, (data, _) in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    run_job(tmp_path / "in", tmp_path / "out", replace(HEADERS, max_pixels=80_000), workers=2)
    found = left_out(tmp_path / "out")
    assert found.pop("head.jpg") in ("damaged", "not an image")
    assert found == {name: reason for name, (_, reason) in files.items() if reason}
    assert keys(tmp_path / "out") == ["good"]


@pytest.mark.parametrize("extension, kind", [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_any_bytes_end_in_a_reason(extension, kind):
    """Cut, flipped, overwritten: an outcome, never another exception, and a size that cannot surprise."""
    whole = encode(picture(5, 40, 60), kind)
    generator = random.Random(9)
    for _ in range(400):
        data = bytearray(whole[: generator.choice([len(whole), generator.randrange(len(whole))])])
        for _ in range(generator.randrange(4)):
            if data:
                data[generator.randrange(min(len(data), 600))] = generator.randrange(256)
        checked = check_image(File("x", data=bytes(data)), Limits(8, 1 << 20, "headers"))
        assert checked.reason or (checked.width * checked.height <= 1 << 20 and checked.extension)
        try:
            upright_size(bytes(data), extension, "x", 1 << 20)
        except ImageError as error:
            assert error.reason in ("damaged", "not an image", "too many pixels")


def test_the_check_belongs_to_the_job(tmp_path):
    write_folder(tmp_path / "in", 8)
    run_job(tmp_path / "in", tmp_path / "out", HEADERS, workers=0)
    with pytest.raises(LalicError, match="--check was headers, is now full"):
        run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    flags = ["--shard-size", "60000", "--min-side", "32", "--check", "headers"]
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *flags]) == 0


def test_a_job_from_before_the_choice_goes_on(tmp_path, capsys):
    write_folder(tmp_path / "in", 8)
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    path = tmp_path / "out" / ".shard-state" / "job.json"
    job = json.loads(path.read_text())
    del job["check"]
    path.write_text(json.dumps(job))
    run_job(tmp_path / "in", tmp_path / "out", SMALL, workers=0)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(LalicError, match="--check was full, is now headers"):
        run_job(tmp_path / "in", tmp_path / "out", HEADERS, workers=0)


# The last line of defence against names


@pytest.mark.parametrize("key", ["../x", "/x", "a/../b", "a.b", "", "__x", "x" * 96, "a b", "a\\b", "ä", "a\n", "-/.."])
def test_the_writer_refuses_unsafe_keys(key):
    assert not SAFE_KEY.fullmatch(key)
    with pytest.raises(ValueError, match="cannot stand in a shard"):
        member_header(key, "jpg", 1)
    file = io.BytesIO()
    with pytest.raises(ValueError, match="cannot stand in a shard"):
        ShardWriter(file, "x", 1 << 20).add(key, Checked(b"x", "jpg"), "x")
    assert not file.getvalue()


@pytest.mark.parametrize("extension, size", [("exe", 1), ("jpg", 0), ("jpg", 8**11)])
def test_the_writer_refuses_other_impossible_samples(extension, size):
    with pytest.raises(ValueError, match="cannot stand in a shard"):
        member_header("a", extension, size)
