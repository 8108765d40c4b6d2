"""Pictures to strings and back, so that a decoder that went astray is noticed at once.

B = 1, H, W: sides of the picture; padded to multiples of 64. Symbols are the integers that the entropy coder
sees, indexes say which table (which scale) codes each of them.

A learned codec's decoder must compute exactly the encoder's tables: a different rounding of one scale by
another processor, thread count or library version, and everything after it is garbage. There are two arithmetics:

FLOAT64   the entropy path in float64 with listed exceptions (lalic.model.exact), all messages in one string: every
          machine decodes the same latents. What `lalic compress` writes.
FLOAT32   the network as it is, and CompressAI's strings, one for each message: decoded by the same kind of machine
          with the same libraries and thread count, or refused.

In both, a decoder that went astray is noticed at once: both sides run one SHA-256 over what determines the decoding.
The encoder stores the first byte of its digest as it stands *before* each message's symbols, and the first four at the
end; the decoder compares each byte before it decodes the message, and the four before it paints. A CRC would notice
another machine as well, but it is linear: who edits a header could repair it without running the model. What is hashed
(integers as little-endian int32, elements in the order of channels, rows, columns):

    once         the text "ARITHMETIC COLOUR WIDTHxHEIGHT E A\n" in ASCII, E and A being the bytes of the exceptions
                 and of the alpha channel as coded; with weights of several rates " Q" before the line feed, the
                 quality in thousandths, and " TYPE:BYTES" for each section; the exceptions; the alpha channel; the
                 sections
    each message, the tables' digest (CRC-32 of the tables: rows padded to the longest, lengths, offsets), 4 bytes;
    z first      the index of each element's table; in FLOAT64, but for z, each mean as a multiple of STEP;
                 here stands the check byte; the symbols

FLOAT32 leaves the means out: they shift what is painted by float noise, but not what is decoded.

Weights of several rates (lalic.model.rates) code at a quality, which is rounded to thousandths before anything is
computed with it: the file holds exactly what the encoder used.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lalic.codec.bitstream import FLOAT32, FLOAT64, SCALE, CodedImage, Section
from lalic.codec.strings import OneString, OpenedString, OpenedStrings, SeparateStrings
from lalic.errors import LalicError
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC
from lalic.model.choices import Recorder, Replay
from lalic.model.coding import Parameters, Symbols, Tables, flat
from lalic.model.exact import Exact
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


def encode_image(
    model: LALIC,
    rgb: NDArray[np.uint8],
    arithmetic: str = FLOAT64,
    *,
    quality: float | None = None,
    colour: str = "rgb",
    alpha: bytes = b"",
    sections: tuple[Section, ...] = (),
) -> CodedImage:
    """`encode` for an (H, W, 3) uint8 picture, on the model's device."""
    x = to_tensor(rgb).to(_device(model))
    return encode(model, x, arithmetic, quality=quality, colour=colour, alpha=alpha, sections=sections)


def decode_image(model: LALIC, image: CodedImage) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 picture; LalicError when this machine does not reproduce what the encoder computed."""
    return to_rgb8(decode(model, image))


def encode(
    model: LALIC,
    x: Tensor,
    arithmetic: str = FLOAT64,
    *,
    quality: float | None = None,
    colour: str = "rgb",
    alpha: bytes = b"",
    sections: tuple[Section, ...] = (),
) -> CodedImage:
    """Entropy-code x (1, 3, H, W) in [0, 1], any H and W from 1 up.

    `arithmetic` is FLOAT64, or FLOAT32 with a model that was `update()`d. `quality` belongs to models of several rates
    and is rounded to thousandths. `colour`, `alpha` and `sections` are what CodedImage says; the strings' checks cover
    them. Raises LalicError for a quality that the model does not have.
    """
    height, width = x.shape[-2:]
    recorder = Recorder()
    exact = Exact(recorder) if _known(arithmetic) == FLOAT64 else None
    thousandths = thousandths_for(model, quality)
    empty = CodedImage(width, height, (), b"", 0, arithmetic, b"", colour, alpha, thousandths, sections)
    messages, _, _ = model.messages(pad(x), exact, empty.quality)
    empty = replace(empty, exceptions=recorder.listed())
    running, checks, strings = _Running(empty), bytearray(), OneString() if exact else SeparateStrings()
    for message in messages:
        ((indexes, symbols),) = message.rows()
        checks.append(running.before(message.tables, indexes, message.parameters))
        strings.add(message.tables, symbols, indexes)
        running.after(symbols)
    return replace(empty, strings=strings.done(), checks=bytes(checks), checksum=running.checksum)


def decode(model: LALIC, image: CodedImage) -> Tensor:
    """x_hat (1, 3, H, W) in [0, 1]; LalicError for strings that do not fit the model or its arithmetic."""
    return cut(model.paint(decode_latents(model, image), image.quality), image.height, image.width)


def decode_latents(model: LALIC, image: CodedImage) -> Tensor:
    """y_hat (1, M, 4 rows, 4 columns), checked; with FLOAT64 in float64 and the same numbers on every machine."""
    _check_quality(model, image)
    counts = symbol_counts(model, image.height, image.width)
    if len(image.checks) != len(counts):
        raise LalicError(
            f"the file holds {len(image.checks)} messages, but the model codes {len(counts)}: another model"
        )
    if _known(image.arithmetic) == FLOAT32 and image.exceptions:
        raise LalicError("the file is damaged: it lists exceptions, which its arithmetic does not know")
    choices = Replay(image.exceptions, sum(counts[:-1]))
    exact = Exact(choices) if image.arithmetic == FLOAT64 else None
    reader = _Reader(image, counts)
    y_hat = model.latents(1, latent_shapes(model, image.height, image.width)["hyper"], reader.read, exact)
    choices.finish()
    if reader.running.checksum != image.checksum:
        raise _astray(image, "the latents")
    return y_hat


def thousandths_for(model: LALIC, quality: float | None) -> int:
    """What a file holds for the quality: its thousandths, rounded; 0 for a model of one rate.

    Raises LalicError for a quality that the model does not have, and where it has several and none is given.
    """
    if model.rates is None:
        if quality is not None:
            raise LalicError(f"the model has one rate and takes no quality, but {quality:g} was given")
        return 0
    if quality is None:
        raise LalicError(
            f"the model has several rates: give a quality from {model.rates.lowest} to {model.rates.highest}"
        )
    model.rates.check(quality)
    return round(quality * SCALE)


def _check_quality(model: LALIC, image: CodedImage) -> None:
    """LalicError for a quality that the model does not have."""
    if model.rates is None and image.quality is not None:
        raise LalicError(
            f"the file was written with weights of several rates (quality {image.quality:g}), not with these"
        )
    if model.rates is not None and image.quality is None:
        raise LalicError("the file was written with weights of one rate, and these have several")
    if model.rates is not None and image.quality is not None:
        model.rates.check(image.quality)


def _known(arithmetic: str) -> str:
    if arithmetic not in (FLOAT32, FLOAT64):
        raise LalicError(f"no such arithmetic: {arithmetic!r}; there are {FLOAT64} and {FLOAT32}")
    return arithmetic


def latent_shapes(model: LALIC, height: int, width: int) -> dict[str, Any]:
    """The `shape` that CompressAI's decompress wants, for a picture of height x width pixels."""
    rows, columns = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    groups = model.config["groups"]
    return {"y": [(c, rows * 4, columns * 4) for c in groups], "hyper": (rows, columns)}


def symbol_counts(model: LALIC, height: int, width: int) -> list[int]:
    """Number of symbols in each message, in CompressAI's order: those of y, then z."""
    shapes = latent_shapes(model, height, width)
    halves = [c * h * w // 2 for c, h, w in shapes["y"] for _ in range(2)]
    rows, columns = shapes["hyper"]
    return [*halves, model.config["dims"][5] * rows * columns]


class _Running:
    """The digest that encoder and decoder both run."""

    def __init__(self, image: CodedImage):
        words = [image.arithmetic, image.colour, f"{image.width}x{image.height}"]
        words += [str(len(image.exceptions)), str(len(image.alpha))]
        if image.thousandths:
            words += [str(image.thousandths), *(f"{kind}:{len(data)}" for kind, data in image.sections)]
        self._digest = hashlib.sha256(f"{' '.join(words)}\n".encode("ascii"))
        for part in (image.exceptions, image.alpha, *(data for _, data in image.sections)):
            self._digest.update(part)

    @property
    def checksum(self) -> int:
        """The digest's first four bytes as it stands."""
        return int.from_bytes(self._digest.digest()[:4], "little")

    def before(self, tables: Tables, indexes: Symbols, parameters: Parameters) -> int:
        """Take in what decodes the next message; its check byte."""
        self._digest.update(tables.digest)
        self._digest.update(indexes.astype("<i4").tobytes())
        if parameters.steps is not None:
            self._digest.update(flat(parameters.steps).astype("<i4").tobytes())
        return self._digest.digest()[0]

    def after(self, symbols: Symbols) -> None:
        """Take in the symbols of the message."""
        self._digest.update(symbols.astype("<i4").tobytes())


class _Reader:
    """Decodes the messages of one picture, in the order of coding, each only after its check byte fits."""

    def __init__(self, image: CodedImage, counts: list[int]):
        one = image.arithmetic == FLOAT64
        self.image = image
        self.strings = OpenedString(image.strings, counts) if one else OpenedStrings(image.strings, counts)
        self.running = _Running(image)
        self.done = 0

    def read(self, tables: Tables, parameters: Parameters) -> Symbols:
        """(1, n) symbols of the next message."""
        (indexes,) = flat(parameters.indexes)
        check = self.running.before(tables, indexes, parameters)
        checks = self.image.checks
        if check != checks[self.done]:
            raise _astray(self.image, f"message {self.done + 1} of {len(checks)}")
        self.done += 1
        symbols = self.strings.next(tables, indexes)
        self.running.after(symbols)
        return symbols[None]


def _astray(image: CodedImage, where: str) -> LalicError:
    if image.arithmetic == FLOAT64:
        advice = (
            "float64 files decode alike on every machine, so the file was altered or written with other weights or "
            "another version of lalic; if neither is the case, please report it"
        )
    else:
        advice = (
            "decode it with the same versions of lalic and torch, the same LALIC_BACKEND and number of threads, on the "
            "same kind of device; files of float64 arithmetic do not need that"
        )
    return LalicError(
        f"this machine computes other probabilities than the one that wrote the file (seen at {where}): {advice}"
    )


def _device(model: LALIC) -> torch.device:
    return next(model.parameters()).device
