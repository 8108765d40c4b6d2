"""Decoding rules: every kind of image to 8-bit RGB, every kind of damage to one clear error."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lalic.data.images import ImageError, decode_rgb, list_images, read_rgb
from lalic.errors import LalicError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def png16(values: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG written by hand, so that the test does not lean on the library that reads it."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


RGB = noise(5, 7)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {})])
def test_lossless_formats_give_the_pixels(kind, options):
    decoded = decode_rgb(encode(Image.fromarray(RGB), kind, **options), "x")
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, RGB)


def test_gray_and_bilevel_are_repeated():
    gray = RGB[..., 0]
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(gray)), "x"), np.repeat(gray[..., None], 3, 2))
    black = Image.fromarray(gray > 127)
    assert black.mode == "1"
    np.testing.assert_array_equal(decode_rgb(encode(black), "x")[..., 1], np.where(gray > 127, 255, 0))


def test_palette_is_looked_up():
    indices = np.arange(35, dtype=np.uint8).reshape(5, 7) % 4
    palette = np.array([[9, 8, 7], [1, 200, 3], [250, 0, 128], [255, 255, 255]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(decode_rgb(encode(image), "x"), palette[indices])


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return rgb * share + 255 * (1 - share)


def test_alpha_is_laid_over_white():
    alpha = noise(5, 7, 1, seed=1)[..., 0]
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    # An 8-bit composite may round either way.
    assert np.abs(decode_rgb(encode(rgba), "x") - over_white(RGB.astype(float), alpha)).max() <= 1
    gray = Image.fromarray(np.dstack([RGB[..., 0], alpha]))
    assert gray.mode == "LA"
    expected = over_white(np.repeat(RGB[..., :1], 3, 2).astype(float), alpha)
    assert np.abs(decode_rgb(encode(gray), "x") - expected).max() <= 1


def test_transparent_palette_entry_and_colour_are_white():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette(bytes([10, 20, 30, 40, 50, 60]))
    decoded = decode_rgb(encode(image, transparency=0), "x")
    np.testing.assert_array_equal(decoded[0], [[255, 255, 255], [40, 50, 60]])
    two = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    decoded = decode_rgb(encode(two, transparency=(4, 5, 6)), "x")
    np.testing.assert_array_equal(decoded[0], [[1, 2, 3], [255, 255, 255]])


@pytest.mark.parametrize("channels, color_type", [(1, 0), (3, 2)], ids=["gray", "rgb"])
def test_16_bit_png_is_scaled_not_clipped(channels, color_type):
    values = np.random.default_rng(2).integers(0, 1 << 16, (6, 4, channels)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    decoded = decode_rgb(png16(values, color_type), "x")
    np.testing.assert_array_equal(decoded, np.broadcast_to(values >> 8, (6, 4, 3)))


def test_16_bit_rgba_png():
    values = np.random.default_rng(3).integers(0, 1 << 16, (6, 4, 4)).astype(np.uint16)
    values[..., 3] = 65535
    np.testing.assert_array_equal(decode_rgb(png16(values, 6), "x"), values[..., :3] >> 8)


def test_cmyk_jpeg():
    flat = np.zeros((16, 16, 4), np.uint8)
    flat[..., 0] = 255  # full cyan
    decoded = decode_rgb(encode(Image.fromarray(flat, "CMYK"), "JPEG", quality=95), "x")
    assert decoded.shape == (16, 16, 3)
    assert np.abs(decoded.astype(int) - [0, 255, 255]).max() <= 6


@pytest.mark.parametrize("inks", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 90, 0), (30, 60, 90, 120), (0, 0, 0, 255)])
def test_cmyk_without_a_profile(inks):
    flat = np.broadcast_to(np.array(inks, np.uint8), (16, 16, 4))
    data = encode(Image.fromarray(np.ascontiguousarray(flat), "CMYK"), "JPEG", quality=100)
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    assert np.abs(decode_rgb(data, "x") - expected).max() <= 2


def test_an_icc_profile_changes_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind, options in (("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"lossless": True})):
        plain = encode(Image.fromarray(RGB), kind, **options)
        tagged = encode(Image.fromarray(RGB), kind, icc_profile=profile, **options)
        assert Image.open(io.BytesIO(tagged)).info["icc_profile"] == profile
        np.testing.assert_array_equal(decode_rgb(tagged, "x"), decode_rgb(plain, "x"))


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_rgb(data, "x"), np.asarray(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored = noise(16, 24, seed=4)
    # EXIF 2.32, tag 274: where row 0 and column 0 of the stored image lie in the upright one.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(Image.fromarray(stored), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_rgb(data, "x"), upright)
    np.testing.assert_array_equal(decode_rgb(data, "x", box=(3, 2, 11, 13)), upright[2:13, 3:11])


def test_damaged_exif_does_not_cost_the_image():
    plain = encode(Image.fromarray(RGB), "JPEG")
    damaged = encode(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    np.testing.assert_array_equal(decode_rgb(damaged, "x"), decode_rgb(plain, "x"))


def test_box_equals_the_cut_of_the_whole():
    data = encode(Image.fromarray(noise(40, 50)), "JPEG", quality=90)
    np.testing.assert_array_equal(decode_rgb(data, "x", box=(5, 6, 37, 38)), decode_rgb(data, "x")[6:38, 5:37])
    with pytest.raises(ImageError, match="smaller than expected"):
        decode_rgb(data, "x", box=(30, 0, 51, 20))


JPEG = encode(Image.fromarray(noise(64, 64)), "JPEG")
PNG = encode(Image.fromarray(noise(64, 64)))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"this is no image", "not an image"),
        (b"GIF89a" + bytes(50), "not an image"),
        (JPEG[: len(JPEG) // 2], "damaged"),
        (JPEG[:200], "(damaged|not an image)"),
        (PNG[: len(PNG) // 2], "damaged"),
        (PNG[:100] + bytes(50) + PNG[150:], "damaged"),
        (encode(Image.fromarray(noise(64, 64)), "WEBP")[:-200], "(damaged|not an image)"),
    ],
    ids=["empty", "text", "gif", "half-jpeg", "jpeg-head", "half-png", "png-hole", "cut-webp"],
)
def test_damage_is_one_named_error(data, reason):
    with pytest.raises(ImageError, match=f"^photo.jpg: {reason}") as caught:
        decode_rgb(data, "photo.jpg")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_bombs_are_refused_before_they_are_decoded():
    huge = png16(np.zeros((1, 1, 1), np.uint16), 0)
    header = struct.pack(">IIBBBBB", 60000, 60000, 16, 0, 0, 0, 0)
    huge = huge[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + huge[33:]
    with pytest.raises(ImageError, match="too many pixels"):
        decode_rgb(huge, "bomb.png")
    with pytest.raises(ImageError, match=r"too many pixels .*limit 4095"):
        decode_rgb(PNG, "x", max_pixels=4095)
    assert decode_rgb(PNG, "x", max_pixels=4096).shape == (64, 64, 3)


def test_real_photographs_as_pillow_decodes_them(data_dir):
    for path in list_images(data_dir / "kodak")[:3] + list_images(data_dir / "bsds500" / "train")[:5]:
        np.testing.assert_array_equal(read_rgb(path), np.asarray(Image.open(path).convert("RGB")))


def test_list_images_is_sorted_recursive_and_skips_the_rest(tmp_path):
    for name in ["b.JPG", "a/z.png", "a/.hidden.png", ".trash/x.png", "a/notes.txt", "c.webp", "a.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert names == ["a.png", "a/z.png", "b.JPG", "c.webp"]


def test_list_images_names_what_is_wrong(tmp_path):
    with pytest.raises(LalicError, match="no such folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(LalicError, match="no image in it"):
        list_images(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LalicError, match="is a file"):
        list_images(tmp_path / "file")
    with pytest.raises(LalicError, match="cannot be read"):
        read_rgb(tmp_path / "absent.png")
