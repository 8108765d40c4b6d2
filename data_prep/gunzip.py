"""Gzip read as a stream that another process can go on with in the middle.

A deflate stream can be taken up at the beginning of any of its blocks by whoever has the 32 KiB before it. zlib has
all that this takes (inflate up to a block's end, inflatePrime, inflateSetDictionary), but Python's module does not
pass it on, so libz is called here. The library indexed_gzip, made for random access, does not fit: it inflates
everything twice, keeps an index of the whole file, and takes a file that was cut for one that ended.

Without libz (Python may have its own inside) the stream is read all the same, and has no points to go on from.
"""

from __future__ import annotations

import base64
import ctypes
import io
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

Point = dict[str, Any]
"""Where a stream can be taken up, plain JSON: `input` and `bits`, the place in the file (bits of the byte before
`input` are still to be read); `output`, the place in what comes out; `crc` and `size` of the gzip member so far; and
`window`, the bytes before it in base64. An empty one is the beginning."""

_INPUT, _OUTPUT = 1 << 18, 1 << 18
_WINDOW = 1 << 15
_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR, _Z_BLOCK = 0, 1, -5, 5
_GZIP, _RAW = 31, -15


class GzipError(Exception):
    """The stream is damaged or cut short; the text says which, in a few words."""


class Gunzip(io.RawIOBase):
    """What comes out of the gzip stream in `file`, forwards.

    Args:
        file: with `read` and, when `point` is given, `seek`.
        point: where to begin; `tell` tells places in the whole output all the same.
        spacing: bytes of output between two points.
    """

    def __init__(self, file: Any, point: Point | None = None, spacing: int = 4 << 20) -> None:
        super().__init__()
        self.file, self.spacing = file, spacing
        self.points: list[Point] = [point or {}]
        """All that were passed, in order; the owner removes those that are of no use any more."""
        self._out = self._last = (point or {}).get("output", 0)
        self._rest = b""
        self._taken = 0
        self._inflate: _Inflate | None = None
        self._ended = False
        if point:
            self._inflate = _Inflate.at(point)
            file.seek(point["input"])

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._out - len(self._rest) + self._taken

    def readinto(self, buffer: Any) -> int:
        while self._taken == len(self._rest) and not self._ended:
            self._rest, self._taken = self._more(), 0
        part = self._rest[self._taken : self._taken + len(buffer)]
        buffer[: len(part)] = part
        self._taken += len(part)
        return len(part)

    def _more(self) -> bytes:
        """The next piece of output; empty when there is only more to read, or at the end."""
        if self._inflate is None:
            self._inflate = _Inflate.of_member()
        inflate = self._inflate
        if not inflate.unread and not inflate.feed(self.file.read(_INPUT)):
            if inflate.fresh and self._out:
                self._ended = True
                return b""
            raise GzipError("cut short")
        data = inflate.step()
        self._out += len(data)
        if inflate.ended:
            self._next_member(inflate)
        elif inflate.between_blocks and self._out - self._last >= self.spacing:
            self.points.append({"output": self._out, **inflate.point(self.file.tell())})
            self._last = self._out
        return data

    def _next_member(self, inflate: _Inflate) -> None:
        """Gzip files may follow one another; what is no gzip file behind the last one is padding."""
        rest = inflate.trailer(self.file.read)
        rest += self.file.read(2 - len(rest)) if len(rest) < 2 else b""
        inflate.close()
        self._ended = rest[:2] != b"\x1f\x8b"
        self._inflate = _Inflate.of_member()
        self._inflate.feed(rest)


class _Inflate:
    """One gzip member, from its beginning or from a point. With libz, or with Python's zlib and no points."""

    def __init__(self, bits: int) -> None:
        self.fresh = True
        """Nothing was read yet."""
        self.ended = self.between_blocks = False
        self.crc = self.size = 0
        self._bits = bits
        self._input = b""
        self._python = None
        self._stream: _Stream | None = None
        if _libz() is None:
            self._python = zlib.decompressobj(bits)
            return
        self._stream = _Stream()
        self._output = ctypes.create_string_buffer(_OUTPUT)
        _call("inflateInit2_", self._stream, bits, zlib.ZLIB_VERSION.encode(), ctypes.sizeof(_Stream))
        # Kept here: at the end of the program, modules are gone before their objects.
        self._end = _libz().inflateEnd

    @classmethod
    def of_member(cls) -> _Inflate:
        return cls(_GZIP)

    @classmethod
    def at(cls, point: Point) -> _Inflate:
        """Raises GzipError where there is no libz."""
        inflate = cls(_RAW)
        if inflate._stream is None:
            raise GzipError("cannot be taken up in the middle: the library libz is not installed")
        inflate.fresh = False
        inflate.crc, inflate.size = point["crc"], point["size"]
        if point["bits"]:
            _call("inflatePrime", inflate._stream, point["bits"], point["last"] >> (8 - point["bits"]))
        window = base64.b64decode(point["window"])
        _call("inflateSetDictionary", inflate._stream, window, len(window))
        return inflate

    @property
    def unread(self) -> int:
        if self._stream is None:
            return len(self._input)
        return int(self._stream.avail_in)

    def feed(self, data: bytes) -> bool:
        """Give the next bytes of the file; False at its end."""
        if data:
            self.fresh = False
        self._input = data
        if self._stream is not None:
            self._stream.next_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
            self._stream.avail_in = len(data)
        return bool(data)

    def step(self) -> bytes:
        """Output up to the end of a block, of the input, or of a buffer."""
        if self._stream is None:
            return self._python_step()
        self._stream.next_out = ctypes.cast(self._output, ctypes.c_void_p)
        self._stream.avail_out = _OUTPUT
        status = _call("inflate", self._stream, _Z_BLOCK, allowed=(_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR))
        data = ctypes.string_at(self._output, _OUTPUT - self._stream.avail_out)
        self.ended = status == _Z_STREAM_END
        # 128: at a block's end; 64: that of the last block, where nothing can be taken up.
        self.between_blocks = self._stream.data_type & 192 == 128
        self.size += len(data)
        if self._bits == _RAW:
            self.crc = zlib.crc32(data, self.crc)
        return data

    def point(self, place: int) -> Point:
        """Where things stand, between blocks; `place`: in the file, behind all that was fed."""
        assert self._stream is not None
        window, size = ctypes.create_string_buffer(_WINDOW), ctypes.c_uint()
        _call("inflateGetDictionary", self._stream, window, ctypes.byref(size))
        bits = self._stream.data_type & 7
        crc = self.crc if self._bits == _RAW else int(self._stream.adler)
        used = len(self._input) - self.unread
        return {
            "input": place - self.unread,
            "bits": bits,
            "last": self._input[used - 1] if bits else 0,
            "crc": crc,
            "size": self.size,
            "window": base64.b64encode(window.raw[: size.value]).decode(),
        }

    def trailer(self, read: Callable[[int], bytes]) -> bytes:
        """Check the sum and size behind the data; returns what was fed beyond. zlib has done so unless it began at
        a point.
        """
        rest = self._input[len(self._input) - self.unread :]
        if self._bits == _RAW:
            rest += read(8 - len(rest)) if len(rest) < 8 else b""
            if len(rest) < 8:
                raise GzipError("cut short")
            if rest[:8] != self.crc.to_bytes(4, "little") + (self.size & 0xFFFFFFFF).to_bytes(4, "little"):
                raise GzipError("damaged: its sum does not agree")
            rest = rest[8:]
        return rest

    def close(self) -> None:
        if self._stream is not None:
            self._end(ctypes.byref(self._stream))
            self._stream = None
            self._input = b""

    def __del__(self) -> None:
        if getattr(self, "_end", None) is not None:
            self.close()

    def _python_step(self) -> bytes:
        assert self._python is not None
        try:
            data = self._python.decompress(self._input, _OUTPUT)
        except zlib.error as error:
            raise GzipError(f"damaged ({error})") from error
        self.ended = self._python.eof
        self._input = self._python.unused_data if self.ended else self._python.unconsumed_tail
        return data


class _Stream(ctypes.Structure):
    """zlib's z_stream."""

    _fields_ = [
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    ]


@cache
def _libz() -> Any:
    for name in ("libz.so.1", "libz.dylib"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _call(name: str, stream: _Stream, *arguments: object, allowed: tuple[int, ...] = (_Z_OK,)) -> int:
    status = int(getattr(_libz(), name)(ctypes.byref(stream), *arguments))
    if status not in allowed:
        message = stream.msg.decode("ascii", "replace") if stream.msg else f"zlib's error {status}"
        raise GzipError(f"damaged ({message})")
    return status
