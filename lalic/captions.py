"""Text in pictures: one font, and lines that fit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import ImageFont


@lru_cache
def font(size: int) -> Any:
    """The font that comes with Pillow: the same letters on every machine."""
    return ImageFont.load_default(size=size)


def wrapped(caption: str, width: int, size: int) -> list[str]:
    """`caption` broken at blanks into lines of at most `width` pixels, in the font of that size.

    A longer word stands alone.
    """
    letters, lines = font(size), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and letters.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
