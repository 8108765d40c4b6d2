"""The region decoder gives Pillow's bits, or hands over to Pillow: over kinds of JPEG, orientations and damage."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from lalic.kernels.builder import BuildError
from PIL import Image

from lalic.data import regions
from lalic.data.images import ImageError, decode_rgb
from lalic.data.jpeg import Layout, StrayMarkers, read_layout
from lalic.data.regions import CropDecoder, choose_decoder, stored_box, turn_upright

needs_regions = pytest.mark.skipif(
    choose_decoder("auto")[0] != "nvimgcodec", reason=f"no region decoder: {choose_decoder('auto')[1]}"
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves and noise in all three channels."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([127 + 100 * np.sin(columns / (3 + i) + rows / (7 - i)) for i in range(3)], -1)
    noise = np.random.default_rng(seed).normal(0, 30, (height, width, 3))
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_sampling(data: bytes, factors: int, width: int, height: int) -> bytes:
    """The same data under other sampling factors and another size: another picture, but a valid file."""
    place = data.index(b"\xff\xc0")
    frame = data[place + 4 : place + 19]
    changed = (
        frame[:1] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + frame[5:7] + bytes([factors]) + frame[8:]
    )
    return data[: place + 4] + changed + data[place + 19 :]


def boxes(width: int, height: int, orientation: int = 1) -> list[tuple[int, int, int, int]]:
    """Crops at every border and corner, off and on the grids of 8 and 16, and the whole."""
    width, height = (height, width) if orientation >= 5 else (width, height)
    found = [(0, 0, width, height)]
    for side in (16, 33):
        lefts, tops = ((0, 1, 15, 16, 17, 24, length - side - 1, length - side) for length in (width, height))
        found += [(left, top, left + side, top + side) for left in lefts for top in tops]
    return [box for box in found if 0 <= min(box) and box[2] <= width and box[3] <= height]


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    """One entry for every call of the region decoder: whether it gave pixels."""
    choose_decoder("auto")  # which calls it too
    calls: list[bool] = []
    decode = regions.RegionDecoder.decode

    def counted(self, *arguments):
        pixels = decode(self, *arguments)
        calls.append(pixels is not None)
        return pixels

    monkeypatch.setattr(regions.RegionDecoder, "decode", counted)
    return calls


def agree(data: bytes, some: list[tuple[int, int, int, int]]) -> None:
    """The crops equal those of Pillow's whole image; the rules of orientation are test_images.py's."""
    decoder = CropDecoder()
    whole = decode_rgb(data, "x")
    for box in some:
        left, top, right, bottom = box
        np.testing.assert_array_equal(decoder.decode(data, "x", box), whole[top:bottom, left:right], str(box))


SIZES = [(97, 131), (64, 64), (49, 200), (255, 40)]
FAST = {
    **{f"{s} q{q}": {"subsampling": s, "quality": q} for s in ("4:4:4", "4:2:2", "4:2:0") for q in (10, 75, 100)},
    "optimised": {"subsampling": "4:2:0", "optimize": True, "quality": 90},
    "restart rows": {"subsampling": "4:2:0", "restart_marker_rows": 1},
    "restart blocks": {"subsampling": "4:2:2", "restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True, "quality": 90},
}


@pytest.fixture(params=["cut", "whole file"])
def either_way(request, monkeypatch) -> None:
    """The region decoder gets a part of the file, or the whole where there is no C++ compiler."""
    if request.param == "whole file":

        def fail(self) -> None:
            raise BuildError("no C++ compiler")

        monkeypatch.setattr(regions.JpegCutter, "__init__", fail)


@needs_regions
@pytest.mark.parametrize("options", FAST.values(), ids=FAST.keys())
def test_regions_have_the_bits_of_the_whole(options, used, either_way):
    for height, width in SIZES:
        agree(jpeg(picture(height, width), **options), boxes(width, height))
    assert len(used) > 100 and all(used)


@needs_regions
@pytest.mark.parametrize("options", [{}, {"quality": 20}, {"restart_marker_rows": 1}], ids=str)
def test_gray_regions(options, used):
    for height, width in SIZES:
        agree(jpeg(picture(height, width).convert("L"), **options), boxes(width, height))
    assert len(used) > 100 and all(used)


@needs_regions
@pytest.mark.parametrize("name, subsampling, factors", [("4:4:0", "4:2:2", 0x12), ("4:1:1", "4:2:0", 0x41)])
def test_sampling_that_pillow_does_not_write(name, subsampling, factors, used):
    # As many coded units of as many blocks: 96 x 80 in units of 16x8 are 48 x 160 in units of 8x16.
    made = jpeg(picture(80, 96), subsampling=subsampling, quality=85)
    width, height = {"4:4:0": (47, 155), "4:1:1": (190, 39)}[name]
    agree(with_sampling(made, factors, width, height), boxes(width, height))
    assert len(used) > 20 and all(used)


@needs_regions
def test_without_jfif_and_with_adobes_marker(used):
    made = jpeg(picture(97, 131))
    assert made[2:4] == b"\xff\xe0"
    bare = made[:2] + made[made.index(b"\xff\xdb") :]
    adobe = bare[:2] + b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x01" + bare[2:]
    for data in (bare, adobe):
        agree(data, boxes(131, 97))
    assert all(used) and used


@needs_regions
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["II", "MM"])
def test_orientations(orientation, order, used):
    tag = {"II": b"\x12\x01\x03\0\x01\0\0\0%c\0\0\0", "MM": b"\x01\x12\0\x03\0\0\0\x01\0%c\0\0"}[order] % orientation
    head = {"II": b"II*\0\x08\0\0\0\x01\0", "MM": b"MM\0*\0\0\0\x08\0\x01"}[order]
    data = jpeg(picture(97, 131), exif=b"Exif\0\0" + head + tag + bytes(4))
    agree(data, boxes(131, 97, orientation))
    assert used and all(used)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_box_is_the_inverse_of_turning(orientation):
    """On numbered pixels, without a decoder."""
    stored = np.arange(40 * 60).reshape(40, 60, 1)
    upright = turn_upright(stored, orientation)
    for box in boxes(60, 40, orientation):
        left, top, right, bottom = box
        found = stored_box(box, Layout(60, 40, orientation, 0, 0))
        assert found is not None
        part = stored[found[1] : found[3], found[0] : found[2]]
        np.testing.assert_array_equal(turn_upright(part, orientation), upright[top:bottom, left:right])


def exif(**tags) -> bytes:
    block = Image.Exif()
    for name, value in tags.items():
        block[{"orientation": 274, "make": 271, "width": 256}[name]] = value
    return block.tobytes()


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>'


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


@pytest.mark.parametrize(
    "segments, expected",
    [
        ([], 1),
        ([segment(0xE1, exif(make="A camera with a long name"))], 1),
        ([segment(0xE1, exif(make="A camera with a long name", orientation=6))], 6),
        ([segment(0xE1, XMP % 8)], 8),
        ([segment(0xE1, XMP % 0)], 1),
        ([segment(0xE1, exif(orientation=3)), segment(0xE1, XMP % 8)], 3),
        ([segment(0xE1, exif(make="x")), segment(0xE1, XMP % 8)], 8),
        ([segment(0xE1, b"something else")], 1),
        ([segment(0xE2, b"ICC_PROFILE\0\x01\x01 no profile")], 1),
        ([segment(0xE1, exif(orientation=9))], None),
        ([segment(0xE1, exif(orientation=3)), segment(0xE1, exif(orientation=3))], None),
        ([segment(0xE1, exif(make="A camera with a long name", orientation=6)[:30])], None),
        ([segment(0xE1, b"Exif\0\0garbage")], None),
        ([b"\xff" + segment(0xE1, exif(orientation=3))], None),
        ([segment(0xE0, b"JFIF\0\x02\x01\0\0\x01\0\x01\0\0")], None),
        ([segment(0xEE, b"Adobe\0\x64\0\0\0\0\x02")], None),
    ],
)
def test_orientation_as_pillow_finds_it(segments, expected):
    """None: left to Pillow altogether. Otherwise the layout must say what Pillow does."""
    data = jpeg(picture(48, 64))
    data = data[:2] + b"".join(segments) + data[2:]
    layout = read_layout(data)
    assert (layout.orientation if layout else None) == expected
    if layout:
        shown = decode_rgb(data, "x").shape[:2]
        assert shown == ((64, 48) if layout.orientation >= 5 else (48, 64))
        agree(data, [(5, 7, 37, 39), (0, 0, 48, 48)])


SLOW = {
    "progressive": lambda: jpeg(picture(97, 131), progressive=True),
    "cmyk": lambda: jpeg(picture(97, 131).convert("CMYK")),
    "png": lambda: encoded("PNG"),
    "webp": lambda: encoded("WEBP", quality=80),
    "bmp": lambda: encoded("BMP"),
    "bytes after the end of a scan with stray markers": lambda: jpeg(picture(97, 131)).replace(
        b"\xff\0", b"\xff\xd3", 1
    ),
}


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture(97, 131).save(buffer, kind, **options)
    return buffer.getvalue()


@needs_regions
@pytest.mark.parametrize("make", SLOW.values(), ids=SLOW.keys())
def test_everything_else_is_pillows(make, used):
    agree(make(), boxes(131, 97)[:20])
    assert not any(used)


def test_boxes_that_do_not_fit_are_pillows_error():
    data = jpeg(picture(97, 131))
    for box in [(100, 0, 132, 32), (0, 90, 32, 122), (-1, 0, 31, 32)]:
        with pytest.raises(ImageError, match="smaller than expected"):
            CropDecoder().decode(data, "x", box)
    # Smaller than the region decoder is used for.
    np.testing.assert_array_equal(CropDecoder().decode(data, "x", (3, 5, 5, 6)), decode_rgb(data, "x")[5:6, 3:5])


@needs_regions
def test_trailing_bytes_and_a_second_picture(used):
    """What stands behind the end of the image does not count: cameras append previews."""
    data = jpeg(picture(97, 131))
    for more in (b"\0", b"some text", data, b"\xff\xd9" * 9):
        agree(data + more, [(5, 7, 69, 71)])
    assert all(used) and len(used) == 4


def outcome(decoder: CropDecoder, data: bytes, box: tuple[int, int, int, int]) -> object:
    try:
        return decoder.decode(data, "photo", box).tobytes()
    except ImageError as error:
        return str(error)


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """One of the ways in which files come to harm, or worse."""
    place, length = int(generator.integers(2, len(data))), int(generator.integers(1, 60))
    some = generator.integers(0, 256, length, np.uint8).tobytes()
    changed = bytes([data[place] ^ 1 << int(generator.integers(8))])
    marker = bytes([0xFF, generator.integers(0xC0, 0x100)])
    return [
        data[:place] + changed + data[place + 1 :],
        data[:place],
        data[:place] + bytes(min(4096, len(data) - place)) + data[place + 4096 :],
        data[:place] + bytes(len(data) - place),
        data[:place] + data[place + length :],
        data[:place] + some + data[place:],
        data[:place] + some + data[place + length :],
        data[:place] + marker + data[place + 2 :],
    ][generator.integers(8)]


@needs_regions
def test_damage_means_the_same_to_both(used, either_way):
    """A verdict, or pixels, that depended on the decoder would make a run depend on it."""
    generator = np.random.default_rng(5)
    made = [
        jpeg(picture(97, 131), subsampling="4:2:0", quality=60),
        jpeg(picture(97, 131), subsampling="4:4:4", quality=90),
        jpeg(picture(200, 160), subsampling="4:2:2", restart_marker_rows=1),
        jpeg(picture(97, 131), progressive=True),
    ]
    either, plain = CropDecoder(), CropDecoder("pillow")
    refused = 0
    for i in range(1200):
        data = damaged(made[i % 4], generator)
        left, top = int(generator.integers(60)), int(generator.integers(30))
        box = (left, top, left + 64, top + 64)
        expected = outcome(plain, data, box)
        refused += isinstance(expected, str)
        assert outcome(either, data, box) == expected, i
    assert 300 < refused < 900 and sum(used) > 200


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
def test_a_jpeg_without_its_end_is_bad_wherever_the_crop_lies(decoder):
    data = jpeg(picture(200, 160), quality=90)
    half = len(data) // 2
    for cut in (data[:half], data[:half] + bytes(len(data) - half), data[:-2], data[:-1]):
        with pytest.raises(ImageError, match="damaged"):
            CropDecoder(decoder).decode(cut, "photo", (0, 0, 16, 16))
    # The end of a preview inside the header is not the image's.
    preview = segment(0xE1, b"Exif\0\0" + jpeg(picture(16, 16)))
    with pytest.raises(ImageError, match="no end-of-image marker"):
        CropDecoder(decoder).decode(data[:2] + preview + data[2:-2], "photo", (0, 0, 16, 16))


def test_stray_markers():
    data = jpeg(picture(64, 64), restart_marker_rows=1)
    layout = read_layout(data)
    assert layout is not None and layout.restarts == 3
    seen = StrayMarkers()
    assert not seen.found(data, layout)
    assert not seen.found(data + b"more", layout)
    first = re.search(rb"\xff\xd0", data[layout.scan :]).start() + layout.scan
    for wrong in (b"\xff\xd1", b"\xff\xd9", b"\xff\xc4", b"\xff\xff"):
        assert seen.found(data[:first] + wrong + data[first + 2 :], layout)
    assert seen.found(data[:first] + data[first + 2 :], layout)
    assert seen.found(data[: layout.scan], layout) and seen.found(data[: layout.scan + 1], layout)


@needs_regions
def test_processes_have_decoders_of_their_own(used):
    data, box = jpeg(picture(97, 131)), (5, 7, 69, 71)
    decoder = CropDecoder()
    expected = decoder.decode(data, "x", box).tobytes()
    assert pickle.loads(pickle.dumps(decoder)).decode(data, "x", box).tobytes() == expected
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put((decoder.decode(data, "x", box).tobytes(), os.getpid())))
    child.start()
    assert answers.get() == (expected, child.pid)
    child.join(30)
    assert child.exitcode == 0


@needs_regions
def test_nothing_is_printed_and_no_setting_stays(tmp_path):
    """The package complains about CUDA libraries that it does not find, unless it is loaded with care."""
    program = """
import os
from lalic.data.regions import CropDecoder, choose_decoder
before = dict(os.environ)
assert choose_decoder("auto")[0] == "nvimgcodec"
assert dict(os.environ) == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def forgotten():
    """What was found out about this machine is forgotten, before and after."""
    caches = (choose_decoder, regions._load_nvimgcodec)
    for cache in caches:
        cache.cache_clear()
    regions._logged.clear()
    yield
    for cache in caches:
        cache.cache_clear()
    regions._logged.clear()


def test_without_the_package_pillow_decodes_and_the_log_says_why(monkeypatch, caplog, forgotten):
    monkeypatch.setattr(regions.importlib.util, "find_spec", lambda name: None)
    data = jpeg(picture(97, 131))
    with caplog.at_level(logging.INFO, "lalic.data"):
        regions.log_decoder("auto")
        regions.log_decoder("auto")
    assert [r.message for r in caplog.records] == [
        "images are decoded by pillow: nvidia-nvimgcodec, which decodes JPEG several times faster, cannot be used: "
        "it is not installed (pip install nvidia-nvimgcodec-cu13)"
    ]
    agree(data, [(5, 7, 69, 71)])


@needs_regions
def test_a_pillow_with_other_bits_is_found_out(monkeypatch, caplog, forgotten):
    monkeypatch.setattr(regions, "decode_rgb", lambda data, name: decode_rgb(data, name) ^ 1)
    with caplog.at_level(logging.INFO, "lalic.data"):
        regions.log_decoder("auto")
    assert "by pillow: nvidia-nvimgcodec decodes to other bits than this Pillow" in caplog.text


@needs_regions
def test_without_a_compiler_the_log_says_what_is_lost(monkeypatch, caplog, forgotten, either_way):
    with caplog.at_level(logging.INFO, "lalic.data"):
        regions.log_decoder("auto")
    assert "by nvimgcodec: regions of JPEG, with Pillow's bits" in caplog.text
    assert ("which is slower, since no C++ compiler" in caplog.text) == (regions.open_region_decoder()._cutter is None)


def test_a_set_decoder_is_taken(caplog, forgotten, used):
    data = jpeg(picture(97, 131))
    with caplog.at_level(logging.INFO, "lalic.data"):
        regions.log_decoder("pillow")
    assert "images are decoded by pillow: data.decoder is pillow" in caplog.text
    assert CropDecoder("pillow").decode(data, "x", (0, 0, 32, 32)).shape == (32, 32, 3) and not used


@needs_regions
def test_real_photographs(data_dir, used):
    generator = np.random.default_rng(0)
    for path in sorted((data_dir / "bsds500" / "val").glob("*.jpg"))[:12]:
        data = path.read_bytes()
        width, height = Image.open(path).size
        corners = zip(generator.integers(0, width - 255, 4), generator.integers(0, height - 255, 4), strict=True)
        agree(data, [(int(x), int(y), int(x) + 256, int(y) + 256) for x, y in corners])
    assert len(used) == 48 and all(used)
