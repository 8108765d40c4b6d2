"""What an image's header says of it, without decoding a pixel: forty times faster, and blind to damaged pixels."""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from lalic.data.images import ImageError, describe_error

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_RIFF_HEAD = 8


def upright_size(data: bytes, extension: str, name: str, max_pixels: int) -> tuple[int, int]:
    """Width and height with the EXIF orientation applied, as decode_rgb of lalic/data/images.py would give them.

    Args:
        data: the whole file.
        extension: jpg, png or webp.
        name: what error messages call the image.

    Raises ImageError: no header of that kind, cut short (as far as the header tells), more than `max_pixels`.
    """
    if extension == "webp" and _RIFF_HEAD + int.from_bytes(data[4:8], "little") > len(data):
        raise ImageError(name, "damaged", "cut short")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=(_FORMATS[extension],))
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image", f"no valid {_FORMATS[extension]} header") from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, "too many pixels", describe_error(error)) from error
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(name, "damaged", describe_error(error)) from error
    if image.width * image.height > max_pixels:
        raise ImageError(name, "too many pixels", f"{image.width}x{image.height}, limit {max_pixels} pixels")
    return (image.height, image.width) if _is_turned(image) else image.size


def _is_turned(image: Image.Image) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
    # A damaged EXIF block says nothing about the pixels: the image stays as it lies.
    except Exception:
        return False
