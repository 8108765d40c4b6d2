"""Coded units cut out of a JPEG: Pillow decodes them as the whole, and no damaged file leads outside its memory."""

from __future__ import annotations

import io
import struct
import subprocess

import numpy as np
import pytest
from checkout_root import ROOT
from lalic.kernels import builder
from PIL import Image
from test_region import boxes, damaged, jpeg, picture, with_sampling

from lalic.data.images import decode_rgb
from lalic.data.jpeg_cut import JpegCutter

KINDS = {
    "4:4:4": lambda: jpeg(picture(97, 131), subsampling="4:4:4", quality=95),
    "4:2:2": lambda: jpeg(picture(97, 131), subsampling="4:2:2", quality=75),
    "4:2:0": lambda: jpeg(picture(97, 131), subsampling="4:2:0", quality=75),
    "coarse": lambda: jpeg(picture(97, 131), subsampling="4:2:0", quality=5),
    "finest": lambda: jpeg(picture(97, 131), subsampling="4:2:0", quality=100),
    "own tables": lambda: jpeg(picture(97, 131), quality=40, optimize=True),
    "gray": lambda: jpeg(picture(97, 131).convert("L")),
    "RGB": lambda: jpeg(picture(97, 131), keep_rgb=True),
    "4:1:1": lambda: with_sampling(jpeg(picture(120, 96), subsampling="4:2:0"), 0x41, 190, 60),
}


@pytest.fixture(scope="module")
def cutter() -> JpegCutter:
    try:
        return JpegCutter()
    except builder.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_the_part_decodes_as_the_whole(make, cutter):
    data = make()
    whole = decode_rgb(data, "x")
    height, width = whole.shape[:2]
    for left, top, right, bottom in boxes(width, height):
        found = cutter(data, (left, top, right, bottom))
        assert found is not None
        part, (x, y, right_there, bottom_there) = found
        decoded = np.asarray(Image.open(io.BytesIO(part.tobytes())).convert("RGB"))
        # No more than the units of 8x8 to 32x16 pixels around the box.
        assert max(decoded.shape[0] - (bottom - top), decoded.shape[1] - (right - left)) < 2 * 32
        np.testing.assert_array_equal(decoded[y:bottom_there, x:right_there], whole[top:bottom, left:right])


def test_flat_pictures_and_extremes(cutter):
    """Blocks of one code, and the longest codes and values that there are."""
    generator = np.random.default_rng(0)
    checker = np.kron(generator.integers(0, 2, (24, 32)), np.ones((4, 4))) * 255
    noise = generator.integers(0, 2, (96, 128)) * 255
    for values in (np.zeros((96, 128)), np.full((96, 128), 255), checker, noise):
        for options in ({"quality": 100}, {"quality": 1}, {"quality": 100, "optimize": True}):
            data = jpeg(Image.fromarray(values.astype(np.uint8)).convert("RGB"), **options)
            found = cutter(data, (40, 24, 72, 56))
            assert found is not None
            part, (x, y, right, bottom) = found
            decoded = np.asarray(Image.open(io.BytesIO(part.tobytes())).convert("RGB"))
            np.testing.assert_array_equal(decoded[y:bottom, x:right], decode_rgb(data, "x")[24:56, 40:72])


def test_more_tables_than_are_kept(cutter):
    for seed in range(40):
        data = jpeg(picture(64, 64, seed), quality=30 + seed, optimize=True)
        found = cutter(data, (16, 16, 48, 48))
        assert found is not None
        decoded = np.asarray(Image.open(io.BytesIO(found[0].tobytes())).convert("RGB"))
        x, y, right, bottom = found[1]
        np.testing.assert_array_equal(decoded[y:bottom, x:right], decode_rgb(data, "x")[16:48, 16:48])


def test_tables_in_use_are_kept_beside_new_ones(cutter):
    """Files that have the common tables and one of their own each, as encoders write that adapt some of them."""
    common = jpeg(picture(64, 64))
    place = common.index(b"\xff\xda")
    whole = decode_rgb(common, "x")[16:48, 16:48]
    for number in range(1, 60):
        for kind in (0x03, 0x13):  # the fourth DC table, the fourth AC table
            counts = bytes([0, 0, 0, 0, 0, 0, 0, 2, *bytes(8)])
            symbols = bytes([number % 12, number // 12]) if kind == 0x03 else bytes([number, number + 1])
            own = b"\xff\xc4" + struct.pack(">HB", 21, kind) + counts + symbols
            data = common[:place] + own + common[place:]
            found = cutter(data, (16, 16, 48, 48))
            assert found is not None
            part, (x, y, right, bottom) = found
            decoded = np.asarray(Image.open(io.BytesIO(part.tobytes())).convert("RGB"))
            np.testing.assert_array_equal(decoded[y:bottom, x:right], whole)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(picture(97, 131), progressive=True),
        jpeg(picture(97, 131), restart_marker_rows=1),
        jpeg(picture(97, 131).convert("CMYK")),
        jpeg(picture(97, 131))[:-2],
        jpeg(picture(97, 131))[:900],
        b"\xff\xd8",
        b"",
    ],
    ids=["progressive", "restarts", "cmyk", "no end", "cut short", "two bytes", "empty"],
)
def test_what_it_leaves_to_others(data, cutter):
    assert cutter(data, (16, 16, 48, 48)) is None


@pytest.mark.parametrize("box", [(-1, 0, 31, 32), (0, 0, 132, 32), (0, 66, 32, 98), (32, 0, 32, 32), (40, 0, 32, 32)])
def test_boxes_outside(box, cutter):
    assert cutter(jpeg(picture(97, 131)), box) is None


def test_damaged_files_under_the_sanitizers(tmp_path):
    try:
        compiler = builder.compiler()
    except builder.BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "run"
    sources = [str(ROOT / "kernels" / "jpeg_cut.cpp"), str(ROOT / "tests" / "jpeg_cut" / "run.cpp")]
    sanitize = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run([*compiler.split(), *sanitize, *sources, "-o", str(program)], capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    generator = np.random.default_rng(3)
    made = [make() for make in KINDS.values()]
    with open(tmp_path / "cases", "wb") as file:
        for i in range(6000):
            data = damaged(made[i % len(made)], generator)
            if i % 2:  # in the header, where a byte says more
                place = int(generator.integers(2, 700))
                data = data[:place] + generator.integers(0, 256, 1, np.uint8).tobytes() + data[place + 1 :]
            left, top = int(generator.integers(60)), int(generator.integers(30))
            file.write(struct.pack("<5i", len(data), left, top, left + 24, top + 24) + data)
    done = subprocess.run([str(program), str(tmp_path / "cases")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    cases, cut = map(int, done.stdout.split())
    assert cases == 6000 and 200 < cut < 5000
