"""The `.lalic` file, format versions 2 and 3: what is in it, `pack` and `parse`. docs/bitstream.md specifies it.

A file is a header, then sections (strings, exceptions, alpha), each followed by the CRC-32 of its bytes. Version 2 is
written by weights of one rate. Version 3 is written by weights of several rates: its header also holds the quality,
and it may have typed sections behind the others.

What holds for every file that `parse` accepts: each byte is covered by one CRC, nothing is left over, and no field has
a second spelling, so that `pack` of what was read gives the same bytes again. The header's CRC is checked before any
field is believed; nothing is allocated that is not in the file.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lalic.errors import LalicError
from lalic.ladder import LADDERS, quality_of, range_name

MAGIC = b"\x8bLAL"
VERSION = 2
"""Of files of weights of one rate."""
VERSION_OF_RATES = 3
"""Of files of weights of several rates."""
BIT_DEPTH = 8
MAX_SIDE = 65535
MAX_PIXELS = 8192 * 8192
"""Larger pictures are decoded only on demand: what decoding needs of memory and time follows the header."""
MAX_THREADS = 64

FLOAT32 = "float32"
FLOAT64 = "float64"
"""Arithmetics of the entropy path, see lalic.codec.coder: files in FLOAT64 decode alike on every machine."""
RGB = "rgb"
GRAY = "gray"
"""Colours: what the picture's channels are. A gray picture is coded as three equal channels."""

_FINGERPRINT_BYTES = 8
_METRICS = tuple(LADDERS)
_FIXED = struct.Struct(f"<4sBBB{_FINGERPRINT_BYTES}s")
_CRC_BYTES = 4
_GRAY, _ALPHA, _FLOAT64 = 1, 2, 4
_MAX_HEADER = 4096
"""Bytes that no header exceeds, with 255 strings and sections of the longest lengths."""
_ALL_RATES = 7
"""In a label, instead of a quality: the model serves a range of rates."""

SCALE = 1000
"""Qualities are stored as whole multiples of 1 / SCALE."""
SKIPPABLE = 0x80
"""Bit of a section's type: a reader that does not know the type ignores the section; without the bit it refuses it."""
MAX_SECTION_BYTES = 16 << 20
"""Bytes that the typed sections of a file have at most, together."""
_KNOWN_SECTIONS: frozenset[int] = frozenset()
"""Types without SKIPPABLE that this program understands."""


class Section(NamedTuple):
    """A typed section; `type` is 1 to 255, see SKIPPABLE."""

    type: int
    data: bytes


@dataclass(frozen=True)
class CodedImage:
    """An entropy-coded picture.

    Attributes:
        width, height: size of the picture itself.
        strings: with FLOAT64 one. With FLOAT32 one for each message, in CompressAI's order: two for each channel
            group of y, then z.
        checks: one byte for each message, in the order of coding (z first).
        checksum: CRC-32 over all tables, indexes and symbols.
        arithmetic: of the entropy path, FLOAT32 or FLOAT64.
        exceptions: the encoder's choices where two machines could choose differently; opaque here.
        colour: RGB, or GRAY for a picture of three equal channels.
        alpha: the coded alpha channel (lalic.codec.alpha), empty where the picture is opaque.
        thousandths: 1000 times the quality, 1000 to 65535; 0 for weights of one rate.
        sections: of weights of several rates, in ascending order of their types, each type once.
    """

    width: int
    height: int
    strings: tuple[bytes, ...]
    checks: bytes
    checksum: int
    arithmetic: str = FLOAT32
    exceptions: bytes = b""
    colour: str = RGB
    alpha: bytes = b""
    thousandths: int = 0
    sections: tuple[Section, ...] = ()

    @property
    def quality(self) -> float | None:
        """The quality that weights of several rates coded the picture with; None for weights of one rate."""
        return self.thousandths / SCALE if self.thousandths else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the entropy-coded picture, what papers count as the rate: strings and exceptions, no header."""
        return sum(len(s) for s in self.strings) + len(self.exceptions)


@dataclass(frozen=True)
class LalicFile:
    """What a `.lalic` file says: the coded image and which model decodes it.

    `threads` is the number of threads that the encoder computed with, and 0 in FLOAT64, where it does not matter.
    """

    image: CodedImage
    fingerprint: bytes
    label: int
    threads: int

    @property
    def version(self) -> int:
        """Of the file format."""
        return VERSION_OF_RATES if self.image.thousandths else VERSION

    @property
    def metric(self) -> str | None:
        """What the model was trained for, "mse" or "ms-ssim"; None where the file does not say."""
        return _METRICS[self.label >> 3] if self.label else None

    @property
    def model_name(self) -> str:
        """Name of the model as far as the file knows it, with its fingerprint."""
        metric, quality = _METRICS[self.label >> 3], self.label & 7
        if quality == _ALL_RATES:
            name = range_name(metric)
        elif quality:
            name = f"lalic-{metric}-q{quality}"
        else:
            name = "a model of several rates" if self.image.thousandths else "a model off the quality ladder"
        return f"{name} (fingerprint {self.fingerprint.hex()})"


def model_label(metric: str | None, lmbda: float | None) -> int:
    """Label byte of a model of one rate, trained for `metric` with multiplier `lmbda`; 0 when that is not known."""
    if metric not in _METRICS or lmbda is None:
        return 0
    quality = quality_of(metric, lmbda) or 0
    return quality | _METRICS.index(metric) << 3 if quality else 0


def label_of(loss: Mapping[str, Any], several_rates: bool) -> int:
    """Label byte of weights whose configuration says `loss`: {"metric", "lambda"}, or what is known of it."""
    metric = loss.get("metric")
    if not several_rates:
        return model_label(metric, loss.get("lambda"))
    return _ALL_RATES | _METRICS.index(metric) << 3 if metric in _METRICS else 0


def check_size(width: int, height: int, name: str) -> None:
    """LalicError for a picture whose sides the format cannot tell."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise LalicError(f"{name}: {width} x {height} pixels do not fit the format: sides up to {MAX_SIDE}; scale it")


def pack(image: CodedImage, fingerprint: str, label: int, threads: int) -> bytes:
    """The bytes of a `.lalic` file; `fingerprint` is the model's hexadecimal one, `threads` is ignored in FLOAT64."""
    check_size(image.width, image.height, "the picture")
    exact = image.arithmetic == FLOAT64
    if not 1 <= len(image.checks) <= 255 or len(image.strings) != (1 if exact else len(image.checks)):
        raise ValueError("one to 255 check bytes, and a string for each, or one with float64")
    if image.exceptions and not exact:
        raise ValueError("exceptions belong to float64")
    if image.sections and not image.thousandths:
        raise ValueError("sections belong to weights of several rates")
    types = [section.type for section in image.sections]
    if types != sorted(set(types) - {0}) or sum(len(data) for _, data in image.sections) > MAX_SECTION_BYTES:
        raise ValueError("sections of at most 16 MiB, in ascending order of their types, each once")
    if not _is_label(label, bool(image.thousandths)):
        raise ValueError(f"no label of such weights: {label}")
    version = VERSION_OF_RATES if image.thousandths else VERSION
    flags = (image.colour == GRAY) * _GRAY | bool(image.alpha) * _ALPHA | exact * _FLOAT64 | (BIT_DEPTH - 1) << 4
    parts = [_FIXED.pack(MAGIC, version, flags, label, bytes.fromhex(fingerprint)[:_FINGERPRINT_BYTES])]
    if image.thousandths:
        parts.append(struct.pack("<H", image.thousandths))
    if not exact:
        parts.append(bytes([threads]))
    parts += [_varint(image.width), _varint(image.height), bytes([len(image.checks)])]
    for string in image.strings:
        if len(string) % 4:
            raise LalicError("only strings of CompressAI's rANS coder (`ans`) can be stored in a .lalic file")
        parts.append(_varint(len(string) // 4))
    if exact:
        parts.append(_varint(len(image.exceptions)))
    if image.alpha:
        parts.append(_varint(len(image.alpha)))
    if image.thousandths:
        parts.append(bytes([len(image.sections)]))
        parts += [bytes([section.type]) + _varint(len(section.data)) for section in image.sections]
    parts += [image.checks, struct.pack("<I", image.checksum)]
    optional = [section for section in (image.exceptions, image.alpha) if section]
    optional += [section.data for section in image.sections]
    return b"".join(_with_crc(section) for section in (b"".join(parts), b"".join(image.strings), *optional))


def parse(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> LalicFile:
    """Read a `.lalic` file's bytes; LalicError naming the file for anything but a whole and valid one."""
    header = _parse_header(data, name)
    header.check(name, max_pixels)
    _check_total(header, len(data), name)
    reader = _Reader(data, name, header.size)
    strings = reader.section(sum(header.lengths), "strings")
    starts = [sum(header.lengths[:i]) for i in range(len(header.lengths))]
    image = CodedImage(
        header.width,
        header.height,
        tuple(strings[start : start + length] for start, length in zip(starts, header.lengths, strict=True)),
        header.checks,
        header.checksum,
        FLOAT64 if header.flags & _FLOAT64 else FLOAT32,
        reader.section(header.exceptions, "exceptions") if header.exceptions else b"",
        GRAY if header.flags & _GRAY else RGB,
        reader.section(header.alpha, "alpha channel") if header.alpha else b"",
        header.thousandths,
        tuple(Section(kind, reader.section(size, f"section of type {kind}")) for kind, size in header.sections),
    )
    return LalicFile(image, header.fingerprint, header.label, header.threads)


def read(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[LalicFile, int]:
    """Read the file `path`, and its size in bytes; a file that is none, or none of this size, is not read whole."""
    if not path.is_file():
        raise LalicError(f"no such file: {path}" if not path.exists() else f"{path} is not a file")
    name = str(path)
    with open(path, "rb") as file:
        start = file.read(_MAX_HEADER)
        header = _parse_header(start, name)
        header.check(name, max_pixels)
        _check_total(header, path.stat().st_size, name)
        data = start + file.read(header.total - len(start))
    return parse(data, name, max_pixels), len(data)


@dataclass(frozen=True)
class _Header:
    """The header's fields as they stand in the file, and its own size with its CRC."""

    version: int
    flags: int
    label: int
    fingerprint: bytes
    thousandths: int
    threads: int
    width: int
    height: int
    lengths: tuple[int, ...]
    exceptions: int
    alpha: int
    sections: tuple[tuple[int, int], ...]
    """Type and bytes of each."""
    checks: bytes
    checksum: int
    size: int

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        sections = [sum(self.lengths), *(n for n in (self.exceptions, self.alpha) if n), *(n for _, n in self.sections)]
        return self.size + sum(sections) + _CRC_BYTES * len(sections)

    def check(self, name: str, max_pixels: int) -> None:
        """LalicError for values that no encoder writes, and for more than `max_pixels`."""
        if self.flags >> 4 != BIT_DEPTH - 1:
            raise LalicError(f"{name} holds {(self.flags >> 4) + 1} bits per channel, this program reads {BIT_DEPTH}")
        exact = bool(self.flags & _FLOAT64)
        several = self.version == VERSION_OF_RATES
        if (
            self.flags & 8
            or not _is_label(self.label, several)
            or several != (self.thousandths >= SCALE)  # rungs are whole numbers from 1 on
            or not (exact or 1 <= self.threads <= MAX_THREADS)
            or not self.checks
            or bool(self.flags & _ALPHA) != bool(self.alpha)
        ):
            raise _invalid(name, "its header holds values that no encoder writes")
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise _invalid(name, f"it claims a size of {self.width} x {self.height}")
        if self.width * self.height > max_pixels:
            raise LalicError(
                f"{name} claims {self.width} x {self.height} pixels, more than the limit of {max_pixels}: "
                "raise it with --max-pixels if you trust the file and have the memory"
            )
        self._check_sections(name)

    def _check_sections(self, name: str) -> None:
        types = [kind for kind, _ in self.sections]
        if 0 in types or any(a >= b for a, b in itertools.pairwise(types)):
            raise _invalid(name, "its sections are not in ascending order of their types, each once")
        unknown = [kind for kind in types if not kind & SKIPPABLE and kind not in _KNOWN_SECTIONS]
        if unknown:
            raise LalicError(
                f"{name} holds a section of type {unknown[0]}, which this program does not know and must not skip: "
                "update it"
            )
        total = sum(size for _, size in self.sections)
        if total > MAX_SECTION_BYTES:
            raise _invalid(
                name, f"its sections claim {total} bytes, more than the {MAX_SECTION_BYTES} that they may have"
            )


def _parse_header(data: bytes, name: str) -> _Header:
    """Walk over the header and check its CRC; nothing in it is used before but the lengths of its own fields."""
    if not data.startswith(MAGIC):
        raise LalicError(f"{name} is not a .lalic file" + ("" if data else ": it is empty"))
    version = data[4] if len(data) > 4 else VERSION
    if version < VERSION:
        raise LalicError(f"{name} has format version {version}, which no release wrote: compress the picture again")
    if version > VERSION_OF_RATES:
        raise LalicError(
            f"{name} has format version {version}, this program reads versions {VERSION} and {VERSION_OF_RATES}: "
            "update it (or get the file again, if this byte is damaged)"
        )
    several = version == VERSION_OF_RATES
    reader = _Reader(data, name, 0)
    _, _, flags, label, fingerprint = _FIXED.unpack(reader.take(_FIXED.size))
    thousandths = int.from_bytes(reader.take(2), "little") if several else 0
    threads = 0 if flags & _FLOAT64 else reader.byte()
    width, height = reader.varint(), reader.varint()
    messages = reader.byte()
    lengths = tuple(reader.varint() * 4 for _ in range(1 if flags & _FLOAT64 else messages))
    exceptions = reader.varint() if flags & _FLOAT64 else 0
    alpha = reader.varint() if flags & _ALPHA else 0
    sections = tuple((reader.byte(), reader.varint()) for _ in range(reader.byte() if several else 0))
    checks = reader.take(messages)
    (checksum,) = struct.unpack("<I", reader.take(4))
    reader.check_crc(0, "header")
    return _Header(
        version,
        flags,
        label,
        fingerprint,
        thousandths,
        threads,
        width,
        height,
        lengths,
        exceptions,
        alpha,
        sections,
        checks,
        checksum,
        size=reader.position,
    )


def _is_label(label: int, several_rates: bool) -> bool:
    """Whether an encoder writes this label byte."""
    quality, metric = label & 7, label >> 3
    if quality == 0:
        return label == 0
    return metric < len(_METRICS) and (quality == _ALL_RATES) == several_rates


def _check_total(header: _Header, size: int, name: str) -> None:
    if size < header.total:
        raise LalicError(f"{name} is cut off: {size} of its {header.total} bytes are there; get it again")
    if size > header.total:
        raise LalicError(f"{name} is damaged: {size - header.total} bytes follow its end; get it again")


def _invalid(name: str, reason: str) -> LalicError:
    return LalicError(f"{name} is not a valid .lalic file: {reason}")


def _with_crc(section: bytes) -> bytes:
    return section + struct.pack("<I", zlib.crc32(section))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Takes fields off `data` from `position` on; nothing is read or allocated beyond its end."""

    def __init__(self, data: bytes, name: str, position: int):
        self.data, self.name, self.position = data, name, position

    def damaged(self, where: str) -> LalicError:
        return LalicError(f"{self.name} is damaged or cut off (seen in its {where}); get it again")

    def take(self, size: int, where: str = "header") -> bytes:
        if size > len(self.data) - self.position:
            raise self.damaged(where)
        self.position += size
        return self.data[self.position - size : self.position]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        """LEB128 of at most five bytes, without superfluous ones."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise self.damaged("header")

    def section(self, size: int, where: str) -> bytes:
        """`size` bytes and the CRC behind them, which must fit."""
        start = self.position
        section = self.take(size, where)
        self.check_crc(start, where)
        return section

    def check_crc(self, start: int, where: str) -> None:
        expected = zlib.crc32(memoryview(self.data)[start : self.position])
        if int.from_bytes(self.take(_CRC_BYTES, where), "little") != expected:
            raise self.damaged(where)
