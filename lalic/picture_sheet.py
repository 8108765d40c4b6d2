"""Versions of one photograph beside each other on a sheet for a document: whole, and a part of them enlarged.

    caption            caption            caption
    whole, reduced     whole, reduced     whole, reduced      with the part marked
    part, enlarged     part, enlarged     part, enlarged      pixel by pixel, not smoothed

H, W: sides of the photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lalic.captions import font, wrapped

Picture = NDArray[np.uint8]
CELL = 640
"""Pixels across a version's column."""
_GAP = 16
_FONT = 26
_LINE = 34


@dataclass(frozen=True)
class Box:
    """A part of a photograph, in its pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, picture: Picture) -> Picture:
        """(height, width, 3)."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Version:
    """One column: an (H, W, 3) uint8 picture and what is said above it."""

    picture: Picture
    lines: tuple[str, ...]


def part_size(height: int, width: int, zoom: int) -> tuple[int, int]:
    """Height and width of the part that fills a column `zoom` times enlarged, or the photograph's own if smaller."""
    return min(height, CELL * 3 // 4 // zoom), min(width, CELL // zoom)


def where_they_differ(a: Picture, b: Picture, height: int, width: int) -> Box:
    """The part of that size in which two (H, W, 3) pictures differ most: largest sum of squared differences.

    Of equal ones the uppermost, then the leftmost.
    """
    squares = np.zeros((a.shape[0] + 1, a.shape[1] + 1), np.int64)
    difference = a.astype(np.int32) - b
    squares[1:, 1:] = (difference * difference).sum(axis=2).cumsum(axis=0).cumsum(axis=1)
    sums = squares[height:, width:] - squares[:-height, width:] - squares[height:, :-width] + squares[:-height, :-width]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return Box(int(left), int(top), width, height)


def draw_sheet(versions: Sequence[Version], part: Box, note: str = "") -> Image.Image:
    """The sheet: up to three versions in a row, four in two rows; `note` stands below them."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(versions), 3)
    text = max(sum(len(wrapped(line, CELL, _FONT)) for line in version.lines) for version in versions) * _LINE + 6
    cells = [_cell(version, part, text) for version in versions]
    across, down = cells[0].size
    rows = -(-len(cells) // columns)
    width = columns * across + (columns - 1) * _GAP
    remark = wrapped(note, width, _FONT) if note else []
    sheet = Image.new("RGB", (width, rows * down + (rows - 1) * 2 * _GAP + len(remark) * _LINE), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * (across + _GAP), i // columns * (down + 2 * _GAP)))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(remark):
        top = sheet.height - (len(remark) - i) * _LINE
        draw.text((0, top), line, fill="#444444", font=font(_FONT))
    return sheet


def _cell(version: Version, part: Box, text: int) -> Image.Image:
    whole, scale = _fitted(version.picture)
    detail, _ = _fitted(part.of(version.picture))
    draw = ImageDraw.Draw(whole)
    # Dark around light: to be seen on any photograph.
    edges = [round(v * scale) for v in (part.left, part.top, part.left + part.width, part.top + part.height)]
    box = (edges[0], edges[1], min(edges[2], whole.width) - 1, min(edges[3], whole.height) - 1)
    if box[2] - box[0] > 8 and box[3] - box[1] > 8:
        draw.rectangle(box, outline="black", width=4)
        draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), outline="white", width=2)
    cell = Image.new("RGB", (CELL, text + whole.height + _GAP // 2 + detail.height + _GAP // 2), "white")
    letters = ImageDraw.Draw(cell)
    row = 0
    for i, line in enumerate(version.lines):
        for piece in wrapped(line, CELL, _FONT):
            letters.text((0, row * _LINE), piece, fill="black" if i == 0 else "#333333", font=font(_FONT))
            row += 1
    cell.paste(whole, ((CELL - whole.width) // 2, text))
    cell.paste(detail, ((CELL - detail.width) // 2, text + whole.height + _GAP // 2))
    return cell


def _fitted(picture: Picture) -> tuple[Image.Image, float]:
    """The picture as large as a column takes it, and how many times enlarged: whole numbers without smoothing."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    times = min(CELL // width, CELL * 3 // 4 // height)
    if times >= 1:
        return image.resize((width * times, height * times), Image.Resampling.NEAREST), float(times)
    scale = min(CELL / width, CELL * 3 / 4 / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.LANCZOS), scale
