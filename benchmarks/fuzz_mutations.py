"""What is done to `.lalic` files by the fuzzers: damage at random, and edits of fields with every CRC made right again.

A mutation is a function (rng, files, i) -> bytes that alters files[i]; the others are there to take parts from. Fields
are written by code of their own, not by lalic.codec.bitstream, which does not write what is not valid.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lalic.codec import bitstream

Rng = np.random.Generator
Mutation = Callable[[Rng, Sequence[bytes], int], bytes]


@dataclass
class Fields:
    """A file taken apart. `lengths`, `count` and the like are what the header says, right or wrong."""

    version: int
    flags: int
    label: int
    fingerprint: bytes
    threads: int
    width: int
    height: int
    strings: list[bytes]
    checks: bytes
    checksum: int
    exceptions: bytes
    alpha: bytes
    thousandths: int
    """Of version 3, as are the sections: type and data of each."""
    sections: list[tuple[int, bytes]]
    told: dict[str, int] = field(default_factory=dict)
    """What the header says and is not true: "count", "exceptions", "alpha", "sections", "length 0", "section 0"."""

    def build(self) -> bytes:
        """The file with right CRCs, in the layout of its version; what version 2 does not have is left out."""
        parts = [bitstream.MAGIC, bytes([self.version, self.flags, self.label]), self.fingerprint]
        typed = self.sections if self.version == 3 else []
        if self.version == 3:
            parts.append(struct.pack("<H", self.thousandths & 0xFFFF))
        if not self.flags & 4:
            parts.append(bytes([self.threads]))
        parts += [varint(self.width), varint(self.height)]
        parts.append(bytes([self.told.get("count", len(self.checks)) & 0xFF]))
        for i, string in enumerate(self.strings):
            parts.append(varint(self.told.get(f"length {i}", len(string) // 4)))
        if self.flags & 4:
            parts.append(varint(self.told.get("exceptions", len(self.exceptions))))
        if self.flags & 2:
            parts.append(varint(self.told.get("alpha", len(self.alpha))))
        if self.version == 3:
            parts.append(bytes([self.told.get("sections", len(typed)) & 0xFF]))
            for i, (kind, data) in enumerate(typed):
                parts.append(bytes([kind]) + varint(self.told.get(f"section {i}", len(data))))
        parts += [self.checks, struct.pack("<I", self.checksum)]
        sections = [b"".join(parts), b"".join(self.strings), *(s for s in (self.exceptions, self.alpha) if s)]
        sections += [data for _, data in typed]
        return b"".join(s + struct.pack("<I", zlib.crc32(s)) for s in sections)


def take_apart(data: bytes) -> Fields:
    """The fields of a valid file."""
    parsed = bitstream.parse(data, "seed")
    image = parsed.image
    return Fields(
        *data[4:7],
        parsed.fingerprint,
        parsed.threads,
        image.width,
        image.height,
        list(image.strings),
        image.checks,
        image.checksum,
        image.exceptions,
        image.alpha,
        image.thousandths,
        [(section.type, section.data) for section in image.sections],
    )


def varint(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def _place(rng: Rng, data: bytes) -> int:
    """A position in `data`; in half of the cases in its first 80 bytes, where the header is."""
    end = min(len(data), 80) if rng.random() < 0.5 else len(data)
    return int(rng.integers(0, max(end, 1)))


def _random(rng: Rng, most: int) -> bytes:
    """Up to `most` random bytes, or equal ones."""
    size = int(rng.integers(0, most + 1))
    return rng.bytes(size) if rng.random() < 0.6 else bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))]) * size


def damaged(rng: Rng, data: bytes) -> bytes:
    """`data` with flipped bits, or a piece overwritten, removed, put in, doubled or cut off."""
    at, out = _place(rng, data), bytearray(data)
    kind = int(rng.integers(0, 6))
    if not data or kind == 3:
        out[at:at] = _random(rng, 40)
    elif kind == 0:
        for _ in range(int(rng.integers(1, 9))):
            out[_place(rng, data)] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        new = _random(rng, 16)
        out[at : at + len(new)] = new
    elif kind == 2:
        del out[at : at + int(rng.integers(1, 40))]
    elif kind == 4:
        out[at:at] = out[at : at + int(rng.integers(1, 40))]
    else:
        del out[at:]
    return bytes(out)


def flip_bits(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """One to eight bits, anywhere."""
    out = bytearray(files[i])
    for _ in range(int(rng.integers(1, 9))):
        out[_place(rng, out)] ^= 1 << int(rng.integers(0, 8))
    return bytes(out)


def truncate(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    return files[i][: _place(rng, files[i])]


def edit_bytes(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """One to three pieces overwritten, removed, put in or doubled."""
    data = files[i]
    for _ in range(int(rng.integers(1, 4))):
        data = damaged(rng, data)
    return data


def append(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    return files[i] + _random(rng, 64)


def splice(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """The beginning of one file and the end of another."""
    other = files[int(rng.integers(0, len(files)))]
    return files[i][: _place(rng, files[i])] + other[_place(rng, other) :]


def header_fields(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """One to three fields of the header replaced."""
    f = take_apart(files[i])
    side = [1, 2, 63, 64, 65, 128, 255, 256, 8192, 8193, 65535, 65536, 0, 1 << 31, f.width, f.height, f.height + 1]
    for _ in range(int(rng.integers(1, 4))):
        name = str(
            rng.choice(["version", "flags", "label", "fingerprint", "threads", "width", "height", "told", "check"])
        )
        if name == "version" and rng.random() < 0.5:
            f.version ^= 1  # 2 and 3
        elif name in ("version", "label", "threads"):
            setattr(f, name, int(rng.integers(0, 256)))
        elif name == "flags":
            f.flags ^= 1 << int(rng.integers(0, 8))
        elif name == "fingerprint":
            f.fingerprint = rng.bytes(8)
        elif name in ("width", "height"):
            near = max(1, getattr(f, name) + int(rng.integers(-3, 4)))
            setattr(f, name, int(rng.choice([*side, near, near])))
        elif name == "told":
            of_version_3 = ["sections", "section 0"] if f.version == 3 else []
            length = f"length {rng.integers(0, len(f.strings))}"
            what = str(rng.choice(["count", "exceptions", "alpha", length, *of_version_3]))
            f.told[what] = int(rng.choice([0, 1, 3, 127, 128, 255, 1 << 20, (1 << 35) - 1]))
        else:
            f.checks = damaged(rng, f.checks) if rng.random() < 0.3 else rng.bytes(len(f.checks))
            f.checksum = f.checksum ^ 1 << int(rng.integers(0, 32)) if rng.random() < 0.5 else f.checksum
    return f.build()


def sizes(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """Another width, height, colour or alpha flag alone, the first check byte tried: latents of the same shape."""
    f = take_apart(files[i])
    kind = int(rng.integers(0, 4))
    if kind == 0:
        f.width = max(1, f.width + int(rng.choice([-1, 1, -2, 2, 64])))
    elif kind == 1:
        f.height = max(1, f.height + int(rng.choice([-1, 1, -2, 2, 64])))
    elif kind == 2:
        f.flags ^= 1
    else:
        f.width, f.height = f.height, f.width
    f.checks = bytes([int(rng.integers(0, 256))]) + f.checks[1:]
    return f.build()


def lengths_moved(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """The same bytes, cut into strings at other places."""
    f = take_apart(files[i])
    a, b = (int(k) for k in rng.integers(0, len(f.strings), 2))
    moved = int(rng.integers(0, len(f.strings[a]) // 4 + 1))
    f.told[f"length {a}"] = len(f.strings[a]) // 4 - moved
    if a != b:
        f.told[f"length {b}"] = len(f.strings[b]) // 4 + moved
    return f.build()


def strings(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """One or two strings damaged, replaced, exchanged or taken from another file; of a length that the file can say."""
    f, other = take_apart(files[i]), take_apart(files[int(rng.integers(0, len(files)))])
    for _ in range(int(rng.integers(1, 3))):
        k, m = int(rng.integers(0, len(f.strings))), int(rng.integers(0, len(other.strings)))
        kind = int(rng.integers(0, 6))
        new = f.strings[k]
        if kind == 0:
            new = damaged(rng, new)
        elif kind == 1 and new:
            out = bytearray(new)
            out[int(rng.integers(0, len(out)))] ^= 1 << int(rng.integers(0, 8))
            new = bytes(out)
        elif kind == 2:
            new = _random(rng, 200)
        elif kind == 3:
            new = other.strings[m]
        elif kind == 4:
            n = int(rng.integers(0, len(f.strings)))
            new, f.strings[n] = f.strings[n], new
        else:
            new = new + _random(rng, 64)
        f.strings[k] = new[: len(new) // 4 * 4]
    if rng.random() < 0.05:
        f.strings = f.strings[:-1] if rng.random() < 0.5 else [*f.strings, b""]
        messages = len(f.checks) + int(rng.choice([-1, 1]))
        f.checks = f.checks[:messages].ljust(messages, b"\0")
    return f.build()


def exceptions(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """The list of exceptions damaged, replaced or taken from another file."""
    f, other = take_apart(files[i]), take_apart(files[int(rng.integers(0, len(files)))])
    f.flags |= 4
    kind = int(rng.integers(0, 4))
    if kind == 0:
        f.exceptions = other.exceptions
    elif kind == 1:
        f.exceptions = _random(rng, 40)
    else:
        f.exceptions = damaged(rng, f.exceptions)
    return f.build()


def alpha(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """Another alpha channel: damaged, of other values, of another size, a bomb, or another file's."""
    f, other = take_apart(files[i]), take_apart(files[int(rng.integers(0, len(files)))])
    f.flags |= 2
    size, kind = f.width * f.height, int(rng.integers(0, 7))
    if kind == 0:
        f.alpha = damaged(rng, f.alpha)
    elif kind == 1:
        f.alpha = bytes([int(rng.integers(0, 5))]) + zlib.compress(rng.bytes(size))
    elif kind == 2:
        f.alpha = b"\0" + zlib.compress(bytes(max(0, size + int(rng.integers(-2, 3)))))
    elif kind == 3:
        f.alpha = b"\0" + zlib.compress(bytes(int(rng.integers(1, 30)) << 20), 9)
    elif kind == 4:
        f.alpha = b"\0" + zlib.compress(b"\xff" * size)
    elif kind == 5:
        f.alpha = other.alpha or b"\3"
    elif f.alpha:
        f.alpha = bytes([f.alpha[0] ^ int(rng.integers(1, 4))]) + f.alpha[1:]
    return f.build()


def quality(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """Another quality alone, the first check byte tried; sometimes version 2 becomes version 3, or the reverse."""
    f = take_apart(files[i])
    if f.version == 2 or rng.random() < 0.1:
        f.version ^= 1
        f.label = 7 if f.version == 3 else 3
    near = f.thousandths + int(rng.choice([-1000, -100, -1, 1, 100, 1000]))
    f.thousandths = int(rng.choice([near, near, rng.integers(1000, 6001), 0, 999, 1000, 6000, 6001, 65535])) & 0xFFFF
    f.checks = bytes([int(rng.integers(0, 256))]) + f.checks[1:]
    return f.build()


def typed_sections(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """Sections of version 3 put in, removed, altered, doubled, exchanged, or told to be longer than they are."""
    f = take_apart(files[i])
    f.version, f.label = 3, 7
    f.thousandths = f.thousandths or int(rng.integers(1000, 6001))
    for _ in range(int(rng.integers(1, 3))):
        kind = int(rng.integers(0, 6))
        if kind == 0 or not f.sections:
            new = (int(rng.choice([0, 1, 127, 128, 199, 201, 255])), _random(rng, 40))
            f.sections = sorted([*f.sections, new]) if rng.random() < 0.7 else [*f.sections, new]
            continue
        k = int(rng.integers(0, len(f.sections)))
        if kind == 1:
            del f.sections[k]
        elif kind == 2:
            f.sections[k] = (f.sections[k][0], damaged(rng, f.sections[k][1]))
        elif kind == 3:
            f.sections.insert(k, f.sections[k])
        elif kind == 4:
            f.sections[k] = (int(rng.integers(0, 256)), f.sections[k][1])
        else:
            f.told[f"section {k}"] = int(rng.choice([0, 1, 127, 1 << 20, (1 << 24) + 1, (1 << 35) - 1]))
    f.checks = bytes([int(rng.integers(0, 256))]) + f.checks[1:]
    return f.build()


def sections_of_another(rng: Rng, files: Sequence[bytes], i: int) -> bytes:
    """The header's fields of one file, the sections of another, each with some probability."""
    f, other = take_apart(files[i]), take_apart(files[int(rng.integers(0, len(files)))])
    for name in (one.name for one in dataclasses.fields(Fields)):
        if name != "told" and rng.random() < 0.3:
            setattr(f, name, getattr(other, name))
    return f.build()


MUTATIONS: dict[str, Mutation] = {
    m.__name__: m
    for m in (
        flip_bits,
        truncate,
        edit_bytes,
        append,
        splice,
        header_fields,
        sizes,
        lengths_moved,
        strings,
        exceptions,
        alpha,
        quality,
        typed_sections,
        sections_of_another,
    )
}
WEIGHTS = [2, 1, 2, 1, 1, 4, 2, 2, 6, 3, 3, 3, 3, 3]
"""How often each is drawn: rather where a CRC does not end it at once."""


def mutate(rng: Rng, files: Sequence[bytes]) -> tuple[str, int, bytes]:
    """Name of a mutation, index of the file it was done to, and what came out."""
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    while True:
        name = str(rng.choice(list(MUTATIONS), p=shares))
        i = int(rng.integers(0, len(files)))
        data = MUTATIONS[name](rng, files, i)
        if data not in files:
            return name, i, data
