"""The best file of another codec that is not larger than a given one.

H, W: sides of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lalic.anchors import FORMATS, decode, encode, format_of

SCALES: dict[str, tuple[int, int]] = {
    "JPEG": (1, 100),  # Pillow takes 0 for "not given"
    "WEBP": (0, 100),
    "AVIF": (0, 100),
    "JPEG2000": (10, 60),  # dB
    "JPEGXL": (1, 99),
}
"""Of each format the qualities that are searched, whole numbers."""
_WAYS: dict[str, tuple[dict[str, Any], ...]] = {"JPEG": ({"progressive": True}, {})}
"""To write the same picture: of large ones the progressive JPEG is a few per cent smaller, of small ones the other."""
_BEYOND = 4
"""Sizes do not rise at every single step of a scale: so many steps above the border are tried as well."""


@dataclass(frozen=True)
class Fitted:
    """A file of another codec beside one of `budget` bytes."""

    key: str
    """Of lalic.anchors.FORMATS."""
    quality: int
    data: bytes
    budget: int

    @property
    def fits(self) -> bool:
        """False where even the lowest quality takes more bytes; then this is that one."""
        return len(self.data) <= self.budget

    @property
    def label(self) -> str:
        """For people: `JPEG, quality 23`."""
        unit = " dB" if self.key == "JPEG2000" else ""
        return f"{FORMATS[self.key].label}, quality {self.quality}{unit}"

    def decoded(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8."""
        return decode(self.data)


def best_within(rgb: NDArray[np.uint8], format: str, budget: int) -> Fitted:
    """The file of the highest quality that has at most `budget` bytes, for an (H, W, 3) uint8 picture.

    JPEG has 4:2:0, optimised tables, and is progressive where that is smaller; the others are as in lalic.anchors. The
    quality is found by bisection, and a few steps above it are tried. Where the lowest quality is too large, it is
    returned nevertheless.

    Raises LalicError for a format that is unknown or not installed, and a picture that it cannot hold.
    """
    key = format_of(format)
    files: dict[int, bytes] = {}

    def file(quality: int) -> bytes:
        if quality not in files:
            ways = (encode(rgb, key, quality, **way) for way in _WAYS.get(key, ({},)))
            files[quality] = min(ways, key=len)
        return files[quality]

    low, most = SCALES[key]
    high = most + 1
    if len(file(low)) > budget:
        return Fitted(key, low, file(low), budget)
    while high - low > 1:
        middle = (low + high) // 2
        if len(file(middle)) <= budget:
            low = middle
        else:
            high = middle
    near = range(low, min(low + _BEYOND, most) + 1)
    quality = max(q for q in near if len(file(q)) <= budget)
    return Fitted(key, quality, file(quality), budget)
