"""Text that is safe within HTML, and numbers as people read them."""

from __future__ import annotations

import html
import math
import re
from typing import Any


def text(value: object) -> str:
    """`value` as HTML text or attribute: markup and control characters are shown, not obeyed."""
    plain = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    # Right-to-left marks and the like can make a name look like another one.
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain))


def slug(value: str, number: int) -> str:
    """A word for ids and classes that no name can break: letters, digits and a number of its own."""
    return f"{re.sub(r'[^a-z0-9]+', '-', value.lower()).strip('-')[:24] or 'x'}-{number}"


def number(value: Any, digits: int, sign: bool = False) -> str:
    """A number with a real minus sign; a dash for what is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−").replace(",", "\u202f")


def size(num_bytes: int | float) -> str:
    """Bytes in binary units."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
