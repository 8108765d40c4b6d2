"""The alpha section of a `.lalic` file: the alpha channel without loss, H rows of W bytes.

One byte that names the filter, then a zlib stream of exactly H * W bytes: bit 0 of the filter says that each row was
replaced by its difference from the row above, bit 1 that then each column was replaced by its difference from the
column before, modulo 256; outside the picture there is 0. An opaque picture has no section.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from lalic.errors import LalicError

_FILTERS = 4
_AXES = ((), (0,), (1,), (0, 1))


def encode(alpha: NDArray[np.uint8]) -> bytes:
    """The section for alpha (H, W): of the four filters the one that gives the fewest bytes; b"" when it is opaque."""
    if (alpha == 255).all():
        return b""
    return min((bytes([f]) + zlib.compress(_filtered(alpha, f).tobytes(), 9) for f in range(_FILTERS)), key=len)


def decode(section: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """(height, width) alpha; LalicError for a section that does not hold exactly that many values."""
    if not section:
        return np.full((height, width), 255, np.uint8)
    if section[0] >= _FILTERS:
        raise LalicError("the file's alpha channel is damaged: it names no filter")
    size = width * height
    inflate = zlib.decompressobj()
    try:
        # One byte more than there may be, so that a stream that goes on is noticed and not followed.
        values = inflate.decompress(memoryview(section)[1:], size + 1)
    except zlib.error as error:
        raise LalicError("the file's alpha channel is damaged: it is no zlib stream") from error
    if len(values) != size or not inflate.eof or inflate.unused_data:
        raise LalicError(f"the file's alpha channel is damaged: it does not hold {width} x {height} values")
    alpha = np.frombuffer(values, np.uint8).reshape(height, width)
    for axis in _AXES[section[0]]:
        alpha = np.cumsum(alpha, axis=axis, dtype=np.uint8)
    if (alpha == 255).all():
        raise LalicError("the file's alpha channel is damaged: it is opaque, and an encoder writes none then")
    return alpha


def _filtered(alpha: NDArray[np.uint8], filter: int) -> NDArray[np.uint8]:
    for axis in _AXES[filter]:
        alpha = np.diff(alpha, axis=axis, prepend=np.uint8(0))
    return alpha
