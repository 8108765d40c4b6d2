"""Pictures to strings and back, so that a decoder that went astray is noticed at once.

B = 1, H, W: sides of the picture; padded to multiples of 64. Symbols are the integers that the entropy coder
sees, indexes say which table (which scale) codes each of them.

A learned codec's decoder must compute exactly the encoder's tables: a different rounding of one scale by
another processor, thread count or library version, and everything after it is garbage. So both sides run
one CRC-32 over what determines the decoding: for each string, in the order of coding, the coding tables and
the indexes, then the symbols. The encoder stores the CRC's low byte as it stands *before* each string's
symbols, and the whole CRC at the end. The decoder compares each byte before it decodes the string, and all
32 bits before it paints. Means are left out on purpose: they shift what is painted by float noise, but not
what is decoded.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lalic.codec.bitstream import CodedImage
from lalic.errors import LalicError
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC
from lalic.model.coding import Symbols, Tables
from lalic.model.lalic import STRIDE


def pad(x: Tensor) -> Tensor:
    """Extend (B, 3, H, W) to multiples of 64 at the right and the bottom, repeating the last column and row.

    Repeated pixels cost fewer bits than black ones, which would put an edge into the picture.
    """
    height, width = x.shape[-2:]
    if height % STRIDE == width % STRIDE == 0:
        return x
    return F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def cut(x: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad`."""
    return x[..., :height, :width]


def encode_image(model: LALIC, rgb: NDArray[np.uint8]) -> CodedImage:
    """Entropy-code an (H, W, 3) uint8 picture with a model that was `update()`d, on the model's device."""
    return encode(model, to_tensor(rgb).to(_device(model)))


def decode_image(model: LALIC, image: CodedImage) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 picture; LalicError when this machine does not reproduce what the encoder computed."""
    return to_rgb8(decode(model, image))


def encode(model: LALIC, x: Tensor) -> CodedImage:
    """Entropy-code x (1, 3, H, W) in [0, 1], any H and W from 1 up."""
    height, width = x.shape[-2:]
    messages, _, _ = model.messages(pad(x))
    running, checks, strings = _Running(), bytearray(), []
    for message in messages:
        ((indexes, symbols),) = message.rows()
        checks.append(running.before(message.tables, indexes))
        strings.append(message.tables.encode(symbols, indexes))
        running.after(symbols)
    z, *y = strings
    return CodedImage(width, height, (*y, z), bytes(checks), running.crc)


def decode(model: LALIC, image: CodedImage) -> Tensor:
    """x_hat (1, 3, H, W) in [0, 1]; LalicError for strings that do not fit the model or its arithmetic."""
    counts = symbol_counts(model, image.height, image.width)
    if len(image.strings) != len(counts):
        raise LalicError(
            f"the file holds {len(image.strings)} strings, but the model codes {len(counts)}: another model"
        )
    if any(len(s) > longest_string(n) for s, n in zip(image.strings, counts, strict=True)):
        raise LalicError("the file's strings are damaged: longer than any that codes so many symbols")
    reader = _Reader(image)
    x_hat = model.reconstruct(1, latent_shapes(model, image.height, image.width)["hyper"], reader.read)
    if reader.running.crc != image.checksum:
        raise _astray("the latents")
    return cut(x_hat, image.height, image.width)


def latent_shapes(model: LALIC, height: int, width: int) -> dict[str, Any]:
    """The `shape` that CompressAI's decompress wants, for a picture of height x width pixels."""
    rows, columns = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    groups = model.config["groups"]
    return {"y": [(c, rows * 4, columns * 4) for c in groups], "hyper": (rows, columns)}


def symbol_counts(model: LALIC, height: int, width: int) -> list[int]:
    """Number of symbols in each string, in CompressAI's order."""
    shapes = latent_shapes(model, height, width)
    halves = [c * h * w // 2 for c, h, w in shapes["y"] for _ in range(2)]
    rows, columns = shapes["hyper"]
    return [*halves, model.config["dims"][5] * rows * columns]


def longest_string(symbols: int) -> int:
    """Bytes that no string of `symbols` symbols exceeds: an escaped one takes six, and the coder ends with eight."""
    return 8 * symbols + 8


class _Running:
    """The CRC that encoder and decoder both run over tables, indexes and symbols."""

    def __init__(self) -> None:
        self.crc = 0

    def before(self, tables: Tables, indexes: Symbols) -> int:
        """Take in what decodes the next string; its check byte."""
        self.crc = zlib.crc32(indexes.astype("<i4").tobytes(), zlib.crc32(tables.digest, self.crc))
        return self.crc & 0xFF

    def after(self, symbols: Symbols) -> None:
        """Take in the symbols of the string."""
        self.crc = zlib.crc32(symbols.astype("<i4").tobytes(), self.crc)


class _Reader:
    """Decodes the strings of one picture, in the order of coding, each only after its check byte fits."""

    def __init__(self, image: CodedImage):
        *y, z = image.strings
        self.strings, self.checks = [z, *y], image.checks
        self.running = _Running()
        self.done = 0

    def read(self, tables: Tables, indexes: Symbols) -> Symbols:
        """(1, n) symbols of the next string."""
        check = self.running.before(tables, indexes[0])
        if self.done >= len(self.checks) or check != self.checks[self.done]:
            raise _astray(f"string {self.done + 1} of {len(self.checks)}")
        string = self.strings[self.done]
        if tables.name == "ans":
            string += bytes(overrun(len(string), indexes.size))
        self.done += 1
        symbols = tables.decode(string, indexes[0])
        self.running.after(symbols)
        return symbols[None]


def overrun(size: int, symbols: int) -> int:
    """Bytes of zeros to put behind a string: the rANS decoder knows no end and reads on where it comes too early.

    A symbol takes two bytes at most. An escape code tells its length in nibbles, of which each nibble 15 in the
    string announces 15 more: a hostile string of `size` bytes makes the decoder read 15 times as many.
    """
    return 15 * size + 4 * symbols + 4096


def _astray(where: str) -> LalicError:
    return LalicError(
        f"this machine computes other probabilities than the one that wrote the file (seen at {where}): "
        "decode it with the same versions of lalic and torch, the same LALIC_BACKEND, on the same kind of "
        "device"
    )


def _device(model: LALIC) -> torch.device:
    return next(model.parameters()).device
