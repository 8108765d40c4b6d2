"""The file format: what is written is read again, by a second reader too, and nothing else is ever accepted."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalic.codec import CodedImage, bitstream
from lalic.codec.bitstream import Section
from lalic.errors import LalicError

FINGERPRINT = "0123456789abcdef" * 4
STRINGS = tuple(bytes([i]) * (4 * i) for i in range(1, 12))
PLAIN = CodedImage(768, 512, STRINGS, bytes(range(11)), 0xDEADBEEF)
EXACT = replace(PLAIN, arithmetic="float64", strings=(b"".join(STRINGS),))
IMAGES = {
    "float32": PLAIN,
    "float64": EXACT,
    "exceptions": replace(EXACT, exceptions=b"\1\2\3"),
    "gray": replace(PLAIN, colour="gray"),
    "alpha": replace(PLAIN, alpha=b"\0alpha"),
    "all": replace(EXACT, exceptions=b"\1\2\3", colour="gray", alpha=b"\0alpha"),
    "quality": replace(EXACT, thousandths=4300),
    "sections": replace(PLAIN, thousandths=1000, sections=(Section(128, b""), Section(255, b"any bytes"))),
}
IMAGES["all of version 3"] = replace(IMAGES["all"], thousandths=65535, sections=IMAGES["sections"].sections)
every_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


def pack(image: CodedImage, label: int | None = None, threads: int = 2) -> bytes:
    """The file; the label is that of q3, or of all rates."""
    default = 7 if image.thousandths else 3
    return bitstream.pack(image, FINGERPRINT, default if label is None else label, threads)


class PlainReader:
    """A second reader, written from docs/bitstream.md alone."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        assert self.take(4) == bytes.fromhex("8b4c414c")
        (self.version,) = self.take(1)
        assert self.version in (2, 3)
        flags, label = self.take(2)
        self.gray, alpha, self.float64 = bool(flags & 1), bool(flags & 2), bool(flags & 4)
        assert flags & 8 == 0 and flags >> 4 == 7
        self.quality, self.metric = label & 7, "ms-ssim" if label & 8 else "mse"
        self.fingerprint = self.take(8).hex()
        self.thousandths = int.from_bytes(self.take(2), "little") if self.version == 3 else 0
        self.threads = None if self.float64 else self.take(1)[0]
        self.width, self.height = self.varint(), self.varint()
        (n,) = self.take(1)
        lengths = [4 * self.varint() for _ in range(1 if self.float64 else n)]
        exceptions = self.varint() if self.float64 else 0
        alpha_bytes = self.varint() if alpha else 0
        count = self.take(1)[0] if self.version == 3 else 0
        sections = [(self.take(1)[0], self.varint()) for _ in range(count)]
        self.checks = self.take(n)
        (self.checksum,) = struct.unpack("<I", self.take(4))
        self.header_bytes = self.at + 4
        self.crc(self.data[: self.at])
        start = self.at
        self.strings = [self.take(length) for length in lengths]
        self.crc(self.data[start : self.at])
        self.exceptions, self.alpha = b"", b""
        if exceptions:
            self.exceptions = self.take(exceptions)
            self.crc(self.exceptions)
        if alpha:
            self.alpha = self.take(alpha_bytes)
            self.crc(self.alpha)
        self.sections = []
        for kind, size in sections:
            self.sections.append((kind, self.take(size)))
            self.crc(self.sections[-1][1])
        assert self.at == len(data)

    def take(self, n: int) -> bytes:
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        groups = []
        while True:
            (byte,) = self.take(1)
            groups.append(byte % 128)
            if byte < 128:
                return sum(g * 128**i for i, g in enumerate(groups))

    def crc(self, covered: bytes) -> None:
        """Bit by bit, as the polynomial says."""
        state = 0xFFFFFFFF
        for byte in covered:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0xEDB88320 if state & 1 else 0)
        assert struct.unpack("<I", self.take(4)) == (state ^ 0xFFFFFFFF,)


class TestRoundTrip:
    @every_image
    def test_a_second_reader_finds_the_same(self, image: CodedImage) -> None:
        read = PlainReader(pack(image))
        assert (read.width, read.height, read.gray) == (768, 512, image.colour == "gray")
        assert tuple(read.strings) == image.strings and read.checks == image.checks and read.checksum == 0xDEADBEEF
        assert (read.exceptions, read.alpha) == (image.exceptions, image.alpha)
        assert (read.quality, read.metric, read.fingerprint) == (7 if image.thousandths else 3, "mse", FINGERPRINT[:16])
        assert (read.version, read.thousandths) == (3 if image.thousandths else 2, image.thousandths)
        assert tuple(read.sections) == image.sections
        assert read.float64 == (image.arithmetic == "float64")
        assert read.threads == (None if read.float64 else 2)

    @every_image
    def test_every_byte_is_said_by_hand(self, image: CodedImage) -> None:
        flags = 0x70 | (image.colour == "gray") | bool(image.alpha) << 1 | (image.arithmetic == "float64") << 2
        q, listed = image.thousandths, image.sections
        header = b"\x8bLAL" + (b"\3" if q else b"\2") + bytes([flags, 7 if q else 3]) + bytes.fromhex(FINGERPRINT[:16])
        header += bytes([q % 256, q // 256]) if q else b""
        header += b"" if flags & 4 else b"\2"
        header += b"\x80\x06" + b"\x80\x04" + b"\x0b" + (b"\x42" if flags & 4 else bytes(range(1, 12)))
        header += (bytes([len(image.exceptions)]) if flags & 4 else b"") + (b"\6" if flags & 2 else b"")
        header += (bytes([len(listed)]) if q else b"") + b"".join(bytes([kind, len(data)]) for kind, data in listed)
        header += bytes(range(11)) + b"\xef\xbe\xad\xde"
        sections = [header, b"".join(STRINGS), *(s for s in (image.exceptions, image.alpha) if s)]
        sections += [data for _, data in listed]
        assert pack(image) == b"".join(s + struct.pack("<I", zlib.crc32(s)) for s in sections)

    @given(
        width=st.integers(1, 65535),
        height=st.integers(1, 1024),
        words=st.lists(st.integers(0, 300), min_size=1, max_size=40),
        messages=st.integers(1, 255),
        checksum=st.integers(0, 2**32 - 1),
        label=st.sampled_from([0, *range(1, 7), *range(9, 15)]),
        threads=st.integers(1, 64),
        arithmetic=st.sampled_from(["float32", "float64"]),
        exceptions=st.binary(max_size=300),
        colour=st.sampled_from(["rgb", "gray"]),
        alpha=st.binary(max_size=300),
        thousandths=st.one_of(st.just(0), st.integers(1000, 65535)),
        sections=st.dictionaries(st.integers(128, 255), st.binary(max_size=300), max_size=5),
    )
    def test_pack_and_parse(
        self,
        width: int,
        height: int,
        words: list[int],
        messages: int,
        checksum: int,
        label: int,
        threads: int,
        arithmetic: str,
        exceptions: bytes,
        colour: str,
        alpha: bytes,
        thousandths: int,
        sections: dict[int, bytes],
    ) -> None:
        exact = arithmetic == "float64"
        strings = tuple(bytes([i % 256]) * (4 * n) for i, n in enumerate(words[:1] if exact else words))
        listed = exceptions if exact else b""
        checks = bytes(range(messages if exact else len(words)))
        typed = tuple(Section(*item) for item in sorted(sections.items())) if thousandths else ()
        label = label & 8 | 7 if thousandths and label else label
        more = (arithmetic, listed, colour, alpha, thousandths, typed)
        image = CodedImage(width, height, strings, checks, checksum, *more)
        data = bitstream.pack(image, "ab" * 32, label, threads)
        parsed = bitstream.parse(data, "x")
        assert parsed == bitstream.LalicFile(image, b"\xab" * 8, label, 0 if exact else threads)
        assert bitstream.pack(parsed.image, parsed.fingerprint.hex(), parsed.label, parsed.threads) == data

    @pytest.mark.parametrize("side", [1, 127, 128, 16383, 16384, 65535])
    def test_sides_at_the_varints_borders(self, side: int) -> None:
        image = replace(PLAIN, width=side, height=1)
        assert bitstream.parse(pack(image), "x").image == image
        assert PlainReader(pack(image)).width == side

    def test_the_header_of_a_photograph(self) -> None:
        """Eleven messages in some ten kilobytes, as a Kodak picture has them."""
        image = replace(EXACT, strings=(bytes(36000),))
        assert PlainReader(pack(image)).header_bytes == 42
        assert len(pack(image)) - image.num_bytes == 46
        assert PlainReader(pack(replace(image, thousandths=4300))).header_bytes == 45
        strings = tuple(bytes(4 * (130 + 137 * i)) for i in range(11))
        assert PlainReader(pack(replace(PLAIN, strings=strings))).header_bytes == 62

    def test_rate_counts_what_decodes_the_picture(self) -> None:
        assert IMAGES["all"].num_bytes == sum(map(len, STRINGS)) + 3

    @every_image
    def test_read_from_disk(self, image: CodedImage, tmp_path: Path) -> None:
        path = tmp_path / "a.lalic"
        path.write_bytes(pack(image))
        parsed, size = bitstream.read(path)
        assert parsed.image == image and size == len(pack(image))


class TestDamage:
    @every_image
    def test_every_flipped_bit(self, image: CodedImage) -> None:
        data = pack(image)
        for position in range(len(data)):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                with pytest.raises(LalicError):
                    bitstream.parse(bytes(damaged), "damaged")

    @every_image
    def test_every_truncation(self, image: CodedImage, tmp_path: Path) -> None:
        data, path = pack(image), tmp_path / "cut.lalic"
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(LalicError, match=r"not a \.lalic file|cut off"):
                bitstream.read(path)
            with pytest.raises(LalicError, match=r"not a \.lalic file|cut off"):
                bitstream.parse(data[:length], "cut")

    @pytest.mark.parametrize("extra", [b"\0", b"\n", bytes(4), b"more"], ids=repr)
    @every_image
    def test_bytes_left_over(self, image: CodedImage, extra: bytes, tmp_path: Path) -> None:
        (tmp_path / "long.lalic").write_bytes(pack(image) + extra)
        with pytest.raises(LalicError, match=f"damaged: {len(extra)} bytes follow"):
            bitstream.read(tmp_path / "long.lalic")

    @pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"<!DOCTYPE html>", b"\x8bLA"])
    def test_other_files(self, data: bytes) -> None:
        with pytest.raises(LalicError, match=r"not a \.lalic file"):
            bitstream.parse(data, "other")

    @pytest.mark.parametrize(("version", "message"), [(1, "no release wrote"), (0, "no release"), (9, "update it")])
    def test_other_versions_are_named(self, version: int, message: str) -> None:
        data = bytearray(pack(PLAIN))
        data[4] = version
        with pytest.raises(LalicError, match=f"format version {version}.*{message}"):
            bitstream.parse(bytes(data), "later")

    @given(data=st.binary(max_size=300))
    def test_random_bytes_behind_the_magic(self, data: bytes) -> None:
        with pytest.raises(LalicError):
            bitstream.parse(bitstream.MAGIC + data, "random")

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        """Ten terabytes of holes behind a good header."""
        path = tmp_path / "huge.lalic"
        path.write_bytes(pack(PLAIN))
        with open(path, "r+b") as file:
            file.truncate(10 << 40)
        with pytest.raises(LalicError, match="bytes follow its end"):
            bitstream.read(path)


def with_crcs(header: bytes, *sections: bytes) -> bytes:
    return b"".join(s + struct.pack("<I", zlib.crc32(s)) for s in (header, *sections))


def header(**fields: bytes) -> bytes:
    """A header of one empty string and no sections; `fields` replace its parts."""
    parts = {
        "start": b"\x8bLAL\2",
        "flags": b"\x70",
        "label": b"\3",
        "fingerprint": bytes(8),
        "q": b"",
        "threads": b"\1",
        "width": b"\1",
        "height": b"\1",
        "count": b"\1",
        "lengths": b"\0",
        "exceptions": b"",
        "alpha": b"",
        "sections": b"",
        "checks": b"\0",
        "checksum": bytes(4),
    }
    assert fields.keys() <= parts.keys()
    return b"".join({**parts, **fields}.values())


class TestHostile:
    """Right CRCs around what no encoder writes."""

    def test_the_plain_one_is_accepted(self) -> None:
        assert bitstream.parse(with_crcs(header(), b""), "x").image.strings == (b"",)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"flags": b"\x78"}, "no encoder writes"),
            ({"flags": b"\xf0"}, "16 bits per channel"),
            ({"flags": b"\x00"}, "1 bits per channel"),
            ({"label": b"\x13"}, "no encoder writes"),
            ({"label": b"\7"}, "no encoder writes"),
            ({"label": b"\x08"}, "no encoder writes"),
            ({"threads": b"\0"}, "no encoder writes"),
            ({"threads": b"\x41"}, "no encoder writes"),
            ({"width": b"\0"}, "size of 0 x 1"),
            ({"height": b"\x80\x80\4"}, "size of 1 x 65536"),
            ({"width": b"\x81\0"}, "damaged"),
            ({"width": b"\x80\x80\x80\x80\x80\1"}, "damaged"),
            ({"count": b"\0", "lengths": b"", "checks": b""}, "no encoder writes"),
            ({"lengths": b"\1"}, "cut off"),
            ({"lengths": b"\xff\xff\xff\xff\x7f"}, "cut off: 37 of its"),
            ({"flags": b"\x74", "threads": b"", "exceptions": b"\5"}, "cut off"),
            ({"flags": b"\x72", "alpha": b"\0"}, "no encoder writes"),
            ({"flags": b"\x72", "alpha": b"\5"}, "cut off"),
            ({"width": b"\x81\x80\1", "height": b"\x80\x80\1"}, "--max-pixels"),
        ],
        ids=str,
    )
    def test_values(self, fields: dict[str, bytes], message: str, tmp_path: Path) -> None:
        data = with_crcs(header(**fields), b"")
        (tmp_path / "a.lalic").write_bytes(data)
        with pytest.raises(LalicError, match=message):
            bitstream.read(tmp_path / "a.lalic", max_pixels=1 << 28)
        with pytest.raises(LalicError, match=message):
            bitstream.parse(data, "x", max_pixels=1 << 28)

    V3: ClassVar[dict[str, bytes]] = {"start": b"\x8bLAL\3", "label": b"\7", "q": b"\xe8\3", "sections": b"\0"}

    def test_the_plain_one_of_version_3_is_accepted(self) -> None:
        image = bitstream.parse(with_crcs(header(**self.V3), b""), "x").image
        assert (image.quality, image.sections) == (1.0, ())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"q": b"\0\0"}, "no encoder writes"),
            ({"q": b"\xe7\3"}, "no encoder writes"),
            ({"label": b"\3"}, "no encoder writes"),
            ({"label": b"\x08"}, "no encoder writes"),
            ({"label": b"\x17"}, "no encoder writes"),
            ({"sections": b"\1\0\0"}, "not in ascending order of their types, each once"),
            ({"sections": b"\2\x80\0\x80\0"}, "not in ascending order of their types, each once"),
            ({"sections": b"\2\x81\0\x80\0"}, "not in ascending order of their types, each once"),
            ({"sections": b"\1\5\0"}, "section of type 5, which this program does not know and must not skip"),
            ({"sections": b"\2\5\0\x80\0"}, "section of type 5"),
            ({"sections": b"\1\x80\1"}, "cut off"),
            ({"sections": b"\1\x80\x80\0"}, "damaged"),
            (
                {"sections": b"\1\x80\xff\xff\xff\xff\x7f"},
                "its sections claim 34359738367 bytes, more than the 16777216",
            ),
            ({"sections": b"\2\x80\xff\xff\xff\7\x81\2"}, "its sections claim 16777217 bytes"),
            ({"sections": b"\2\x80\0"}, "damaged"),
            ({"sections": b"\xff\x80\0"}, "damaged"),
        ],
        ids=str,
    )
    def test_values_of_version_3(self, fields: dict[str, bytes], message: str, tmp_path: Path) -> None:
        data = with_crcs(header(**self.V3 | fields), b"")
        (tmp_path / "a.lalic").write_bytes(data)
        for call in (lambda: bitstream.read(tmp_path / "a.lalic"), lambda: bitstream.parse(data, "x")):
            with pytest.raises(LalicError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)

    def test_a_section_that_this_program_knows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a type that a later version gives a meaning."""
        monkeypatch.setattr(bitstream, "_KNOWN_SECTIONS", frozenset({5}))
        image = replace(PLAIN, thousandths=2500, sections=(Section(5, b"critical"), Section(200, b"not")))
        assert bitstream.parse(pack(image), "x").image == image

    @given(data=st.data())
    @settings(max_examples=300)
    def test_the_parser_accepts_what_it_would_write(self, data: st.DataObject) -> None:
        packed = pack(data.draw(st.sampled_from(list(IMAGES.values()))))
        size = PlainReader(packed).header_bytes - 4
        head, rest = bytearray(packed[:size]), packed[size + 4 :]
        for _ in range(data.draw(st.integers(1, 4))):
            head[data.draw(st.integers(5, size - 1))] = data.draw(st.integers(0, 255))
        hostile = bytes(head) + struct.pack("<I", zlib.crc32(bytes(head))) + rest
        try:
            parsed = bitstream.parse(hostile, "hostile")
        except LalicError:
            return
        assert 1 <= parsed.image.width * parsed.image.height <= bitstream.MAX_PIXELS
        assert bitstream.pack(parsed.image, parsed.fingerprint.hex(), parsed.label, parsed.threads) == hostile

    @pytest.mark.parametrize("size", [(65535, 65535), (8193, 8192)], ids=str)
    def test_size_is_bounded_before_anything_is_allocated(self, size: tuple[int, int]) -> None:
        data = pack(replace(PLAIN, width=size[0], height=size[1]))
        with pytest.raises(LalicError, match="--max-pixels"):
            bitstream.parse(data, "bomb")
        assert bitstream.parse(data, "bomb", max_pixels=65535**2).image.width == size[0]


class TestPacking:
    @pytest.mark.parametrize(
        ("metric", "lmbda", "name"),
        [("mse", 0.0483, "lalic-mse-q6"), ("ms-ssim", 2.4, "lalic-ms-ssim-q1"), ("mse", 0.01, "off the quality")],
    )
    def test_model_name(self, metric: str, lmbda: float, name: str) -> None:
        text = bitstream.parse(pack(PLAIN, bitstream.model_label(metric, lmbda)), "x").model_name
        assert name in text
        assert "0123456789abcdef" in text

    @pytest.mark.parametrize("size", [(65536, 1), (1, 65536), (0, 1)], ids=str)
    def test_size_beyond_the_format(self, size: tuple[int, int]) -> None:
        with pytest.raises(LalicError, match="65535"):
            pack(replace(PLAIN, width=size[0], height=size[1]))

    def test_strings_of_another_coder(self) -> None:
        with pytest.raises(LalicError, match="rANS"):
            pack(replace(PLAIN, strings=(b"abc",), checks=b"\0"))

    @pytest.mark.parametrize(
        ("loss", "several", "name"),
        [
            ({"metric": "mse", "quality": [1, 6]}, True, "lalic-mse-vbr"),
            ({"metric": "ms-ssim", "quality": [1, 6]}, True, "lalic-ms-ssim-vbr"),
            ({"metric": "mse", "lambda": 0.0067}, True, "lalic-mse-vbr"),  # a file under the name of another
            ({}, True, "a model of several rates"),
            ({"metric": "mse", "lambda": 0.0067}, False, "lalic-mse-q3"),
            ({"metric": "mse", "quality": [1, 6]}, False, "a model off the quality ladder"),
            ({}, False, "a model off the quality ladder"),
        ],
    )
    def test_label(self, loss: dict[str, object], several: bool, name: str) -> None:
        image = IMAGES["quality"] if several else PLAIN
        parsed = bitstream.parse(pack(image, bitstream.label_of(loss, several)), "x")
        assert parsed.model_name == f"{name} (fingerprint {FINGERPRINT[:16]})"
        assert parsed.metric == (loss.get("metric") if name.startswith("lalic") else None)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"strings": (), "checks": b""},
            {"checks": b"\0"},
            {"exceptions": b"\1"},
            {"sections": (Section(128, b""),)},
            {"thousandths": 1000, "sections": (Section(129, b""), Section(128, b""))},
            {"thousandths": 1000, "sections": (Section(128, b""), Section(128, b""))},
            {"thousandths": 1000, "sections": (Section(0, b""),)},
            {"thousandths": 1000, "sections": (Section(128, bytes(1 << 24)), Section(129, b"1"))},
        ],
        ids=lambda wrong: ", ".join(wrong),
    )
    def test_what_no_reader_would_take(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"check bytes|exceptions|sections"):
            pack(replace(PLAIN, **wrong))

    @pytest.mark.parametrize(("image", "label"), [(PLAIN, 7), (IMAGES["quality"], 3), (IMAGES["quality"], 8)])
    def test_a_label_of_the_other_version(self, image: CodedImage, label: int) -> None:
        with pytest.raises(ValueError, match="no label"):
            pack(image, label)

    def test_float64_has_one_string(self) -> None:
        with pytest.raises(ValueError, match="or one with float64"):
            pack(replace(EXACT, strings=STRINGS))
