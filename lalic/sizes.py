"""Sizes in bytes as people write them: 536870912, 512MiB or 512M (binary), 500MB (decimal)."""

from __future__ import annotations

import re

from lalic.errors import LalicError

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?B?)", re.IGNORECASE)


class Size(int):
    """A number of bytes; as the type of a setting, it may be given as text with a unit."""


def parse_size(text: str) -> Size:
    """Bytes of `536870912`, `512MiB` or `512M` (binary), `500MB` (decimal). LalicError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise LalicError(f"{text!r} is no size; examples: 536870912, 512MiB, 1GB")
    number, unit, suffix = (part.upper() for part in match.groups())
    try:
        return Size(float(number) * (1000 if suffix == "B" else 1024) ** _UNITS[unit])
    except OverflowError:
        raise LalicError(f"{text[:40]}... is too large for a size") from None


def size_text(size: int) -> str:
    """`17.2 GB`, for messages."""
    for unit, least in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size} bytes"
