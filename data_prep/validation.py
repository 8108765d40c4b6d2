"""Is this an image that can be trained on? Runs in worker processes."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import IO, NamedTuple

from PIL import Image

from lalic.data.images import ImageError, decode_rgb, describe_error
from lalic.data.jpeg import check_end
from lalic.errors import LalicError

from .headers import upright_size

CHECKS = ("full", "headers")
"""full: all of the image is decoded. headers: kind, size and orientation, a JPEG's end, a PNG's sums."""

_PNG = b"\x89PNG\r\n\x1a\n"


_NOT_THE_FILES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN}
)
"""Errors that say nothing of the file that was to be read."""


@dataclass(frozen=True)
class Limits:
    """What an image must keep to."""

    min_side: int
    max_pixels: int
    check: str = "full"


class File(NamedTuple):
    """What is to be checked: the file at `path`, or `data` itself."""

    name: str
    path: str = ""
    data: bytes | None = None


@dataclass(frozen=True)
class Checked:
    """The outcome for one file: either `reason` says why it is left out, or all other fields are set."""

    data: bytes = b""
    extension: str = ""
    sha256: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


def check_image(file: File, limits: Limits) -> Checked:
    """Read the file and decode all of it. Width and height are those of the upright image.

    Where the bytes were given, they are not given back: whoever has them need not get them from another process.
    Raises LalicError only when the machine, not the image, is at fault.
    """
    name = file.path or file.name
    try:
        data = _read(file.path, limits) if file.data is None else file.data
        extension = image_extension(data, name)
        if extension == "jpg":
            check_end(data, name)
        if extension == "png":
            _check_png_sums(data, name)
        if limits.check == "headers":
            width, height = upright_size(data, extension, name, limits.max_pixels)
        else:
            height, width, _ = decode_rgb(data, name, max_pixels=limits.max_pixels).shape
        if min(width, height) < limits.min_side:
            detail = f"{width}x{height}, shorter side below {limits.min_side}"
            raise ImageError(name, "too small", detail)
    except ImageError as error:
        return Checked(reason=error.reason, detail=error.detail)
    except MemoryError as error:
        # Leaving the image out would make the result depend on the machine.
        raise LalicError(
            f"{name}: not enough memory to decode it; use fewer --workers or a lower --max-pixels"
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Checked(data if file.data is None else b"", extension, sha256, width, height)


def most_bytes(limits: Limits) -> int:
    """No image within the limit needs more: 16 bits in four channels, uncompressed, and 16 MiB of metadata."""
    return 8 * limits.max_pixels + (16 << 20)


def too_large(size: int, most: int) -> Checked:
    """The outcome for a file that is not worth reading."""
    return Checked(reason="file too large", detail=f"{size} bytes, at most {most} for --max-pixels")


def image_extension(data: bytes, name: str) -> str:
    """`jpg`, `png` or `webp`, by the content: a suffix may be wrong, and readers of shards choose by it."""
    if not data:
        raise ImageError(name, "empty file")
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(_PNG):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ImageError(name, "not an image", "neither JPEG, PNG nor WebP")


def open_regular(path: str) -> IO[bytes]:
    """Open a file for reading; OSError for what is none, such as a pipe, which would be waited for without end."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a pipe, a device or a folder, not a file")
    return descriptor


def _read(path: str, limits: Limits) -> bytes:
    most = most_bytes(limits)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                large = too_large(size, most)
                raise ImageError(path, large.reason, large.detail)
            return file.read()
    except OSError as error:
        if error.errno in _NOT_THE_FILES:
            # Leaving the image out would make the result depend on the machine.
            raise LalicError(
                f"{path}: cannot be read ({error.strerror}); the fault is this machine's or its network drive's, not "
                "the image's: mend it and run the same command again"
            ) from error
        raise ImageError(path, "cannot be read", error.strerror or str(error)) from error


def _check_png_sums(data: bytes, name: str) -> None:
    """Check the sum of every chunk of a PNG; Pillow's decoder passes over them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(BytesIO(data), formats=("PNG",)).verify()
    except Image.DecompressionBombError as error:
        raise ImageError(name, "too many pixels", describe_error(error)) from error
    except Exception as error:
        raise ImageError(name, "damaged", describe_error(error)) from error
