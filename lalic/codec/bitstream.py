"""The `.lalic` file, byte by byte.

All integers are little-endian; a varint is LEB128 (seven bits per byte, least significant first, the high bit
set on all but the last byte) without superfluous bytes.

    size      field
    4         magic: 8B 4C 41 4C ("\\x8bLAL")
    1         version: 1
    1         model label: bits 0-2 quality (1-6, 0 = not on a ladder), bit 3 metric (0 = MSE, 1 = MS-SSIM),
              bits 4-7 zero. For people; the fingerprint decides.
    8         model fingerprint: the first 8 bytes of the SHA-256 of its published weights
    1         threads the encoder computed with (1-255); the decoder takes as many, since the order of
              floating-point sums depends on it
    varint    image width, 1-65535
    varint    image height, 1-65535
    1         n: number of strings
    n varints lengths of the strings in units of 4 bytes
    n         desynchronisation checks, one byte for each string, in the order of coding (z first, see
              lalic.codec.coder)
    4         checksum of all latents: the full CRC-32 of which the checks are samples
    sum       the strings, in CompressAI's order: two for each channel group of y, then z
    4         CRC-32 (zlib) of all bytes before it

The picture is 8-bit RGB. It was extended to multiples of 64 pixels at the right and at the bottom by
repeating its last column and row, and is cut back to width x height after decoding.

The CRC is checked before any other field is believed, so damage in storage or transport (every flipped byte,
every truncation) is found before anything is decoded or allocated.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from lalic.errors import LalicError
from lalic.ladder import LADDERS, quality_of

MAGIC = b"\x8bLAL"
VERSION = 1
MAX_SIDE = 65535
MAX_PIXELS = 8192 * 8192
"""Larger pictures are decoded only on demand: what decoding needs of memory and time follows the header."""

FLOAT32 = "float32"
FLOAT64 = "float64"
"""Arithmetics of the entropy path, see lalic.codec.coder: files in FLOAT64 decode alike on every machine."""

_FINGERPRINT_BYTES = 8
_METRICS = tuple(LADDERS)
_FIXED = struct.Struct(f"<4sBB{_FINGERPRINT_BYTES}sB")


@dataclass(frozen=True)
class CodedImage:
    """An entropy-coded picture.

    Attributes:
        width, height: size of the picture itself.
        strings: in CompressAI's order, two for each channel group of y, then z.
        checks: one byte for each string, in the order of coding (z first).
        checksum: of all tables, indexes and symbols, see lalic.codec.coder.
        arithmetic: of the entropy path, FLOAT32 or FLOAT64.
        exceptions: the encoder's choices where two machines could choose differently; opaque here.
        colour: "rgb", or "gray" for a picture of three equal channels.
        alpha: the coded alpha channel, empty where the picture is opaque; opaque here.
    """

    width: int
    height: int
    strings: tuple[bytes, ...]
    checks: bytes
    checksum: int
    arithmetic: str = FLOAT32
    exceptions: bytes = b""
    colour: str = "rgb"
    alpha: bytes = b""

    @property
    def num_bytes(self) -> int:
        """Bytes of the strings alone, what papers count as the rate."""
        return sum(len(s) for s in self.strings)


@dataclass(frozen=True)
class LalicFile:
    """What a `.lalic` file says: the coded image and which model decodes it."""

    image: CodedImage
    fingerprint: bytes
    label: int
    threads: int

    @property
    def model_name(self) -> str:
        """Name of the model as far as the file knows it, with its fingerprint."""
        metric, quality = _METRICS[self.label >> 3], self.label & 7
        name = f"lalic-{metric}-q{quality}" if quality else "a model off the quality ladder"
        return f"{name} (fingerprint {self.fingerprint.hex()})"


def model_label(metric: str | None, lmbda: float | None) -> int:
    """Label byte of a model trained for `metric` with multiplier `lmbda`; 0 when that is not known."""
    if metric not in _METRICS or lmbda is None:
        return 0
    quality = quality_of(metric, lmbda) or 0
    return quality | _METRICS.index(metric) << 3 if quality else 0


def pack(image: CodedImage, fingerprint: str, label: int, threads: int) -> bytes:
    """The bytes of a `.lalic` file; `fingerprint` is the model's hexadecimal one."""
    if not (1 <= image.width <= MAX_SIDE and 1 <= image.height <= MAX_SIDE):
        raise LalicError(f"a picture of {image.width} x {image.height} does not fit the format: sides up to {MAX_SIDE}")
    parts = [
        _FIXED.pack(MAGIC, VERSION, label, bytes.fromhex(fingerprint)[:_FINGERPRINT_BYTES], threads),
        _varint(image.width),
        _varint(image.height),
        bytes([len(image.strings)]),
    ]
    for string in image.strings:
        if len(string) % 4:
            raise LalicError("only strings of CompressAI's rANS coder (`ans`) can be stored in a .lalic file")
        parts.append(_varint(len(string) // 4))
    parts += [image.checks, struct.pack("<I", image.checksum), *image.strings]
    body = b"".join(parts)
    return body + struct.pack("<I", zlib.crc32(body))


def parse(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> LalicFile:
    """Read a `.lalic` file's bytes; LalicError naming the file for anything but a whole and valid one."""
    if not data.startswith(MAGIC):
        raise LalicError(f"{name} is not a .lalic file")
    if len(data) < _FIXED.size + 4:
        raise LalicError(f"{name} is damaged or cut off: {len(data)} bytes are too few for its header")
    # The version is read before the CRC, so that a later format is not reported as damage.
    if data[4] != VERSION and zlib.crc32(data[:-4]) == _crc_of(data):
        raise LalicError(f"{name} has format version {data[4]}, this program reads version {VERSION}: update it")
    if zlib.crc32(data[:-4]) != _crc_of(data):
        raise LalicError(f"{name} is damaged or cut off: its checksum does not match; get it again")
    reader = _Reader(data, end=len(data) - 4, name=name)
    _, version, label, fingerprint, threads = _FIXED.unpack(reader.take(_FIXED.size))
    width, height = reader.varint(), reader.varint()
    if version != VERSION or label >> 4 or label & 7 == 7 or threads < 1:
        raise reader.invalid("its header holds values that no encoder writes")
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise reader.invalid(f"it claims a size of {width} x {height}")
    if width * height > max_pixels:
        raise LalicError(
            f"{name} claims {width} x {height} pixels, more than the limit of {max_pixels}: "
            "raise it with --max-pixels if you trust the file and have the memory"
        )
    count = reader.take(1)[0]
    lengths = [reader.varint() * 4 for _ in range(count)]
    checks = reader.take(count)
    (checksum,) = struct.unpack("<I", reader.take(4))
    strings = tuple(reader.take(length) for length in lengths)
    if not reader.at_end:
        raise reader.invalid("it has bytes left over")
    image = CodedImage(width, height, strings, checks, checksum)
    return LalicFile(image, fingerprint, label, threads)


def _crc_of(data: bytes) -> int:
    return int.from_bytes(data[-4:], "little")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Takes fields off the front of `data[:end]`; nothing is read or allocated beyond it."""

    def __init__(self, data: bytes, end: int, name: str):
        self.data, self.end, self.name, self.position = data, end, name, 0

    @property
    def at_end(self) -> bool:
        return self.position == self.end

    def invalid(self, reason: str) -> LalicError:
        return LalicError(f"{self.name} is not a valid .lalic file: {reason}")

    def take(self, size: int) -> bytes:
        if size > self.end - self.position:
            raise self.invalid("a field reaches beyond its end")
        self.position += size
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise self.invalid("a number in its header is malformed")
