"""What a JPEG file says of itself, read without decoding it: its layout, and whether it is whole.

The layout decides which decoder may have the file (lalic.data.regions). `read_layout` knows the common kinds only
and answers None to everything else, which then goes the plain way through Pillow.

Source: ITU-T T.81 (markers), JFIF 1.02, EXIF 2.32 (the orientation's tag).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np

from lalic.data.images import ImageError

START = b"\xff\xd8"
_END = b"\xff\xd9"
_START_OF_SCAN = b"\xda"

_FRAMES = (0xC0, 0xC1)  # sequential, Huffman-coded: baseline and extended
_SOS, _DRI, _APP0, _APP1, _APP14 = 0xDA, 0xDD, 0xE0, 0xE1, 0xEE
# Tables, comments and application data that say nothing about the layout.
_PASSED_OVER = frozenset({0xC4, 0xDB, 0xFE, *range(0xE2, 0xF0)} - {_APP14})

# Sampling factors (horizontal << 4 | vertical) of the first component; both others have 1x1.
_SAMPLING = frozenset({0x11, 0x21, 0x12, 0x22, 0x41})

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION, _SHORT = 0x0112, 3
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')


class Layout(NamedTuple):
    """Of a JPEG of the common kinds: sequential in one scan, Huffman-coded, 8 bits, gray or three components."""

    width: int
    height: int
    """As stored, before the orientation."""
    orientation: int
    """EXIF's 1 to 8."""
    scan: int
    """Where the data of the scan begin."""
    restarts: int
    """Restart markers in the scan."""


def read_layout(data: bytes) -> Layout | None:
    """The layout, or None when anything is uncommon or damaged before the first scan."""
    try:
        return _read_layout(data)
    except (IndexError, _UncommonError):
        return None


def check_end(data: bytes, name: str, scan: int | None = None) -> None:
    """Raise ImageError when no end-of-image marker follows the start of the first scan.

    libjpeg takes a file whose rest is zeros, as an interrupted copy may leave it, and paints that part gray.
    """
    if data.rfind(_END) < (_first_scan(data) if scan is None else scan):
        raise ImageError(name, "damaged", "no end-of-image marker: cut short, or its end overwritten")


class StrayMarkers:
    """Looks for markers that do not belong into a scan; keeps its memory from one image to the next."""

    def __init__(self) -> None:
        self._byte = self._marker = np.empty(0, bool)

    def found(self, data: bytes, layout: Layout) -> bool:
        """Whether anything but restart markers, in their order, stands between the scan's start and an end of image.

        Without such a marker no decoder can fail inside the scan, so one that stops early misses nothing. Bits that
        fell over elsewhere become wrong pixels in every decoder: the format has no checksums.
        """
        values = np.frombuffer(data, np.uint8, offset=layout.scan)
        pairs = len(values) - 1
        if pairs < 1:
            return True
        if len(self._byte) < pairs:
            self._byte, self._marker = np.empty(2 * pairs, bool), np.empty(2 * pairs, bool)
        byte, marker = self._byte[:pairs], self._marker[:pairs]
        np.equal(values[:-1], 0xFF, out=byte)
        np.not_equal(values[1:], 0, out=marker)
        np.logical_and(byte, marker, out=marker)
        if layout.restarts:
            codes = values[1:][np.flatnonzero(marker)[: layout.restarts + 1]]
            expected = np.arange(layout.restarts + 1) % 8 + 0xD0
            expected[-1] = _END[1]
            return not np.array_equal(codes, expected)
        first = int(marker.argmax())
        return not (marker[first] and values[first + 1] == _END[1])


class _UncommonError(Exception):
    """The file is left to Pillow."""


def _read_layout(data: bytes) -> Layout:
    if data[:2] != START:
        raise _UncommonError
    place, frame, interval = 2, b"", 0
    orientation = _Orientation()
    while True:
        if data[place] != 0xFF:
            raise _UncommonError
        marker = data[place + 1]
        end = place + 2 + (data[place + 2] << 8 | data[place + 3])
        body = place + 4
        if end < body or end > len(data):
            raise _UncommonError
        if marker == _SOS:
            break
        if marker in _FRAMES:
            if frame:
                raise _UncommonError
            frame = data[body:end]
        elif marker == _APP1:
            orientation.take(data[body:end])
        elif marker == _DRI:
            interval = data[body] << 8 | data[body + 1]
        elif marker == _APP0:
            # libjpeg wants version 1 and says so on the standard error output.
            if data[body : body + 5] == b"JFIF\0" and data[body + 5] != 1:
                raise _UncommonError
        elif marker == _APP14:
            # Adobe's transform: 0 for RGB, 1 for YCbCr.
            if data[body : body + 5] == b"Adobe" and data[body + 11] > 1:
                raise _UncommonError
        elif marker not in _PASSED_OVER:
            raise _UncommonError
        place = end
    width, height, components, across, down = _frame(frame)
    # All components in one scan, and of their coefficients all 64 with all bits.
    if end - body != 4 + 2 * components or data[body] != components or data[end - 3 : end] != b"\0\x3f\0":
        raise _UncommonError
    units = -(-width // across) * -(-height // down)
    return Layout(width, height, orientation.value(), end, (units - 1) // interval if interval else 0)


def _frame(frame: bytes) -> tuple[int, int, int, int, int]:
    """Width, height, components, and width and height of a coded unit, of a frame header."""
    precision, components = frame[0], frame[5]
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if precision != 8 or not height or not width or len(frame) != 6 + 3 * components:
        raise _UncommonError
    factors = frame[7]
    if components == 1 and factors == 0x11:
        return width, height, 1, 8, 8
    if components == 3 and factors in _SAMPLING and frame[10] == 0x11 and frame[13] == 0x11:
        return width, height, 3, 8 * (factors >> 4), 8 * (factors & 15)
    raise _UncommonError


class _Orientation:
    """Collects EXIF's orientation over the APP1 segments, the way Pillow reads it; what is unclear is left to it."""

    def __init__(self) -> None:
        self._exif: int | None = None
        self._xmp = b""

    def take(self, segment: bytes) -> None:
        if segment.startswith(_EXIF):
            # Pillow strings several together.
            if self._exif is not None:
                raise _UncommonError
            self._exif = _tag_value(segment[len(_EXIF) :])
        elif segment.startswith(_XMP):
            self._xmp = segment

    def value(self) -> int:
        """1 to 8."""
        if self._exif:
            return self._exif
        packet = _XMP_ORIENTATION.search(self._xmp) if self._xmp else None
        return int(packet[2]) if packet and packet[2] in b"12345678" else 1


def _tag_value(tiff: bytes) -> int:
    """The orientation in the first directory of an EXIF block, 0 when it has none."""
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        (table,) = struct.unpack_from(order + "L", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, table)
        entries = [struct.unpack_from(order + "HHLL", tiff, table + 2 + 12 * i) for i in range(count)]
    except (KeyError, struct.error):
        raise _UncommonError from None
    found = beyond = 0
    for place, (tag, kind, length, offset) in enumerate(entries):
        size = length * _TYPE_BYTES.get(kind, 0)
        if size > 4:
            # A value that lies outside ends the directory for some readers.
            beyond += size
            if offset + size > len(tiff) or beyond > len(tiff):
                raise _UncommonError
        if tag == _ORIENTATION:
            (value,) = struct.unpack_from(order + "H", tiff, table + 2 + 12 * place + 8)
            if found or kind != _SHORT or length != 1 or not 1 <= value <= 8:
                raise _UncommonError
            found = value
    return found


def _first_scan(data: bytes) -> int:
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != _START_OF_SCAN:
        fill = data[place + 1 : place + 2] == b"\xff"
        place += 1 if fill else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return place
