"""Messages to rANS strings and back: all of them in one string (float64), or each in its own (float32, CompressAI).

A string ends with eight bytes of the coder's state, of which some six are lost; eleven strings of a Kodak picture cost
one per cent at a low rate. So files that need not be CompressAI's have one.
"""

from __future__ import annotations

from compressai.ans import BufferedRansEncoder, RansDecoder

from lalic.errors import LalicError
from lalic.model.coding import Symbols, Tables


class OneString:
    """Takes the messages in the order of coding, z first, and gives one string."""

    def __init__(self) -> None:
        self._encoder = BufferedRansEncoder()

    def add(self, tables: Tables, symbols: Symbols, indexes: Symbols) -> None:
        """Append the symbols (n,) of a message, coded by the tables of `indexes` (n,)."""
        if tables.name != "ans":
            raise LalicError(f"float64 arithmetic codes with CompressAI's `ans`, not with {tables.name}")
        tables.push(self._encoder, symbols, indexes)

    def done(self) -> tuple[bytes, ...]:
        """What a file holds."""
        return (self._encoder.flush(),)


class SeparateStrings:
    """Takes the messages in the order of coding, z first, and gives strings in CompressAI's order, z last."""

    def __init__(self) -> None:
        self._strings: list[bytes] = []

    def add(self, tables: Tables, symbols: Symbols, indexes: Symbols) -> None:
        """Append the string of the symbols (n,), coded by the tables of `indexes` (n,)."""
        self._strings.append(tables.encode(symbols, indexes))

    def done(self) -> tuple[bytes, ...]:
        """What a file holds."""
        z, *y = self._strings
        return (*y, z)


class OpenedString:
    """Inverse of OneString. `counts`: symbols of all messages; LalicError for what cannot be such a string."""

    def __init__(self, strings: tuple[bytes, ...], counts: list[int]):
        if len(strings) != 1:
            raise LalicError(f"the file is damaged: it holds {len(strings)} strings, and float64 files hold one")
        self._decoder = RansDecoder()
        self._decoder.set_stream(padded(strings[0], sum(counts)))

    def next(self, tables: Tables, indexes: Symbols) -> Symbols:
        """(n,) symbols of the next message, coded by the tables of `indexes` (n,)."""
        return tables.pull(self._decoder, indexes)


class OpenedStrings:
    """Inverse of SeparateStrings. `counts`: symbols of each, z last; LalicError for what cannot be such strings."""

    def __init__(self, strings: tuple[bytes, ...], counts: list[int]):
        if len(strings) != len(counts):
            raise LalicError(f"the file holds {len(strings)} strings, but the model codes {len(counts)}: another model")
        for string, count in zip(strings, counts, strict=True):
            check_length(string, count)
        *y, z = strings
        self._remaining = iter([z, *y])

    def next(self, tables: Tables, indexes: Symbols) -> Symbols:
        """(n,) symbols of the next message, coded by the tables of `indexes` (n,)."""
        string = next(self._remaining)
        return tables.decode(padded(string, indexes.size) if tables.name == "ans" else string, indexes)


def check_length(string: bytes, symbols: int) -> None:
    """LalicError for a string longer than any of so many symbols: an escaped one takes six bytes, the end eight."""
    if len(string) > longest_string(symbols):
        raise LalicError("the file's strings are damaged: longer than any that codes so many symbols")


def longest_string(symbols: int) -> int:
    """Bytes that no string of `symbols` symbols exceeds."""
    return 8 * symbols + 8


def padded(string: bytes, symbols: int) -> bytes:
    """The string with zeros behind it: the rANS decoder knows no end and reads on where it comes too early."""
    check_length(string, symbols)
    return string + bytes(overrun(len(string), symbols))


def overrun(size: int, symbols: int) -> int:
    """Bytes that decoding `symbols` symbols from a string of `size` bytes may read behind its end.

    A symbol takes two bytes at most. An escape code tells its length in nibbles, of which each nibble 15 in the
    string announces 15 more: a hostile string of `size` bytes makes the decoder read 15 times as many.
    """
    return 15 * size + 4 * symbols + 4096
