"""Decode photographs to 8-bit RGB by one set of rules, for training, evaluation and the codec alike.

The rules, so that two people get the same pixels from one file:

- Formats: JPEG (also multi-picture MPO), PNG, WebP, and BMP and PNM for lossless test sets. Of an animation,
  the first frame.
- The EXIF orientation is applied: the array is upright, and width and height are those of the upright image.
- Gray is repeated in the three channels; palettes are looked up.
- Transparency (RGBA, gray with alpha, a transparent palette entry or colour) is laid over white.
- CMYK and YCCK are converted by Pillow's arithmetic, without a colour profile.
- 16 bits become 8 by keeping the high byte, so the whole range is scaled and nothing is clipped.
- ICC profiles are ignored, as in all published training and evaluation codes of this field.
- Floating-point images are refused.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lalic.errors import LalicError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_TITLES = {"WEBP": "WebP", "PPM": "PNM"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pnm"})

# Pillow itself refuses to open more (twice its MAX_IMAGE_PIXELS), so a larger limit could not be kept.
MAX_PIXELS = 178_956_970

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[int, int, int, int]


class ImageError(LalicError):
    """One image that cannot be used. `reason` is one of a few fixed phrases, `detail` is free."""

    def __init__(self, name: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        return type(self), (self.name, self.reason, self.detail)


def decode_rgb(data: bytes, name: str, *, box: Box | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a whole image, or the part `box` = (left, top, right, bottom) of the upright image.

    Args:
        data: the file's bytes.
        name: what error messages call the image.
        max_pixels: larger images are refused before anything is decoded (decompression bombs).

    Returns:
        (H, W, 3) uint8 array, writable.

    Raises:
        ImageError: no image, damaged, too large, or a box outside it.
    """
    image = load(data, name, max_pixels)
    try:
        image = upright(image)
        if box is not None:
            left, top, right, bottom = box
            if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
                raise ImageError(name, "smaller than expected", f"{image.width}x{image.height}, box {box}")
            image = image.crop(box)
        return np.array(to_rgb(image, name))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(name, "damaged", describe_error(error)) from error


def read_rgb(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the image file `path`: (H, W, 3) uint8. Raises ImageError, or LalicError for a missing file."""
    return decode_rgb(read_bytes(path), str(path), max_pixels=max_pixels)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of the file `path`; LalicError for one that is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LalicError(f"{path}: cannot be read ({error.strerror or error})") from error


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below `folder` (by its suffix), sorted by its path within the folder.

    Names that begin with a dot are left out. Raises LalicError for a missing folder or one without images.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file, a folder of images was expected" if root.exists() else "no such folder of images"
        raise LalicError(f"{folder}: {what}")
    found = sorted((name for name in walk_files(root) if suffix_of(name) in SUFFIXES), key=os.fsencode)
    if not found:
        raise LalicError(f"{folder}: no image in it (looked for {', '.join(sorted(SUFFIXES))})")
    return [root / name for name in found]


def suffix_of(name: str) -> str:
    """The suffix of a path in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def walk_files(root: Path) -> Iterator[str]:
    """Yield, unsorted, the paths of all files below `root`, relative to it and with '/'.

    Links to folders are followed, each real folder once; names that begin with a dot are left out. A folder
    that cannot be listed is an error, since images would go missing in silence.
    """
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise LalicError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that of two links to one folder the same one is followed everywhere.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}".replace(os.sep, "/")


def load(
    data: bytes,
    name: str,
    max_pixels: int,
    formats: Sequence[str] = FORMATS,
    check: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """Open and decode fully; nothing is decoded of an image above `max_pixels`, or that `check` raises ImageError for.

    `formats` are Pillow's names; ImageError for anything else.
    """
    if not data:
        raise ImageError(name, "empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of its limit; ours is explicit, and damaged EXIF is not worth a warning.
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=tuple(formats))
            if image.width * image.height > max_pixels:
                detail = f"{image.width}x{image.height}, limit {max_pixels} pixels"
                raise ImageError(name, "too many pixels", detail)
            if check is not None:
                check(image)
            image.load()
            return image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        *known, last = (_TITLES.get(name, name) for name in formats)
        raise ImageError(name, "not an image", f"neither {', '.join(known)} nor {last}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, "too many pixels", describe_error(error)) from error
    # Pillow's plugins raise nearly anything on crafted bytes (struct.error, SyntaxError, IndexError, ...).
    except Exception as error:
        raise ImageError(name, "damaged", describe_error(error)) from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation asks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        method = _UPRIGHT.get(orientation)
    # A damaged EXIF block says nothing about the pixels: the image stays as it lies.
    except Exception:
        return image
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image in mode RGB by the rules above; ImageError for a floating-point one."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError(name, "unsupported pixel format", "floating point")
    if image.mode.startswith("I"):
        # 16-bit gray ("I;16", or "I" holding 0..65535). The high byte, as Pillow does for 16-bit RGB.
        wide = np.asarray(image).astype(np.int64, copy=False).clip(0, 0xFFFF)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def describe_error(error: BaseException) -> str:
    """One line that is the same in every run: Pillow's messages may hold the address of an object."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", " ".join(str(error).split()))
    return text[:200] or type(error).__name__
