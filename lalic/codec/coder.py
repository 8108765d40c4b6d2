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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from numpy.typing import NDArray
from torch import Tensor

from lalic.codec.bitstream import CodedImage
from lalic.errors import LalicError
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC
from lalic.model.lalic import STRIDE

MAX_SYMBOL = 1 << 24
"""Larger integers are not exact in float32, and the rANS coder's escape codes overflow soon after."""


def pad(x: Tensor) -> Tensor:
    """Extend (B, 3, H, W) to multiples of 64 at the right and the bottom, repeating the last column and row.

    Repeated pixels cost fewer bits than black ones, which would put an edge into the picture.
    """
    height, width = x.shape[-2:]
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
    with _checked(model, _Encoding()) as state:
        out = model.compress(pad(x))
    strings = tuple(s for (s,) in out["strings"])
    return CodedImage(width, height, strings, bytes(state.checks), state.crc)


def decode(model: LALIC, image: CodedImage) -> Tensor:
    """x_hat (1, 3, H, W) in [0, 1]; LalicError for strings that do not fit the model or its arithmetic."""
    counts = symbol_counts(model, image.height, image.width)
    if len(image.strings) != len(counts):
        raise LalicError(
            f"the file holds {len(image.strings)} strings, but the model codes {len(counts)}: another model"
        )
    with _checked(model, _Decoding(image.checks)) as state:
        # The rANS decoder reads on where a string ends too early: let it find zeros, not foreign memory. A
        # symbol takes two bytes at most, but for rare escape codes.
        strings = [[s + bytes(4 * n + 4096)] if state.pads else [s] for s, n in zip(image.strings, counts, strict=True)]
        x_hat = model.decompress(strings, latent_shapes(model, image.height, image.width))["x_hat"]
    if state.crc != image.checksum:
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


class _Running:
    """The CRC that encoder and decoder both run over tables, indexes and symbols."""

    def __init__(self) -> None:
        self.crc = 0
        self.pads = True

    def begin(self, tables: bytes, indexes: Sequence[int]) -> int:
        """Take in what decodes the next string; its check byte."""
        self.crc = zlib.crc32(np.asarray(indexes, dtype="<i4").tobytes(), zlib.crc32(tables, self.crc))
        return self.crc & 0xFF

    def end(self, symbols: Sequence[int], problem: str) -> None:
        """Take in the symbols of the string."""
        values = np.asarray(symbols, dtype="<i4")
        if values.size and (values.min() < -MAX_SYMBOL or values.max() > MAX_SYMBOL):
            raise LalicError(problem)
        self.crc = zlib.crc32(values.tobytes(), self.crc)


class _Encoding(_Running):
    def __init__(self) -> None:
        super().__init__()
        self.checks = bytearray()
        self.last: tuple[bytes, list[int]] = (b"", [])


class _Decoding(_Running):
    def __init__(self, checks: bytes) -> None:
        super().__init__()
        self.checks = list(checks)
        self.done = 0


class _CheckedCoder:
    """Stands in for one entropy model's coder and reports to the run's `_Encoding` or `_Decoding`."""

    def __init__(self, coder: Any, tables: bytes, state: Any):
        self.name, self._coder, self._tables, self._state = coder.name, coder, tables, state

    def encode_with_indexes(
        self, symbols: list[int], indexes: list[int], cdfs: Any, lengths: Any, offsets: Any
    ) -> bytes:
        state = self._state
        state.checks.append(state.begin(self._tables, indexes))
        state.end(symbols, "the model's latents cannot be coded: they are not finite, its training diverged")
        string = self._coder.encode_with_indexes(symbols, indexes, cdfs, lengths, offsets)
        state.last = (string, symbols)
        return string

    def decode_with_indexes(
        self, string: bytes, indexes: list[int], cdfs: Any, lengths: Any, offsets: Any
    ) -> list[int]:
        state = self._state
        if isinstance(state, _Encoding):
            # CompressAI's codecs decode each string right after encoding it, to learn the rounded latents.
            if string != state.last[0]:
                raise RuntimeError("a string was decoded during encoding that was not the last one encoded")
            return state.last[1]
        check = state.begin(self._tables, indexes)
        if state.done >= len(state.checks) or check != state.checks[state.done]:
            raise _astray(f"string {state.done + 1} of {len(state.checks)}")
        state.done += 1
        symbols = self._coder.decode_with_indexes(string, indexes, cdfs, lengths, offsets)
        state.end(symbols, "the file's strings are damaged: they decode to impossible values")
        return symbols


@contextmanager
def _checked(model: LALIC, state: Any) -> Iterator[Any]:
    """Put `_CheckedCoder`s into all entropy models of `model` for the duration of one picture."""
    models = [m for m in model.modules() if isinstance(m, EntropyModel)]
    originals = [m.entropy_coder for m in models]
    state.pads = all(c.name == "ans" for c in originals)
    try:
        for m, coder in zip(models, originals, strict=True):
            m.entropy_coder = _CheckedCoder(coder, _tables_of(m), state)
        yield state
    finally:
        for m, coder in zip(models, originals, strict=True):
            m.entropy_coder = coder


def _tables_of(model: EntropyModel) -> bytes:
    """Digest of the tables that `update()` built, so that tables built differently are noticed, too."""
    crc = 0
    for table in (model.quantized_cdf, model.cdf_length, model.offset):
        crc = zlib.crc32(table.detach().cpu().to(torch.int32).contiguous().numpy().tobytes(), crc)
    return crc.to_bytes(4, "little")


def _astray(where: str) -> LalicError:
    return LalicError(
        f"this machine computes other probabilities than the one that wrote the file (seen at {where}): "
        "decode it with the same versions of lalic and torch, the same LALIC_BACKEND, on the same kind of "
        "device"
    )


def _device(model: LALIC) -> torch.device:
    return next(model.parameters()).device
