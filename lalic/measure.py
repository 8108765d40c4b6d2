"""One picture through one model: rate, quality, time.

x: (1, 3, H, W) float32 in [0, 1] on the model's device; rgb: (H, W, 3) uint8. Times are wall-clock seconds
of the computation alone, with the picture already on the device and nothing read or written; on CUDA the
device is synchronised before the clock is read.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalic.codec.bitstream import FLOAT64
from lalic.codec.coder import cut, decode, encode, pad
from lalic.memory import PeakMemory
from lalic.metrics import (
    bits_per_pixel,
    decibels,
    estimated_bits,
    ms_ssim,
    psnr,
    psnr_unrounded,
    to_rgb8,
    to_tensor,
)
from lalic.model import LALIC
from lalic.model.lalic import STRIDE

Row = dict[str, Any]


class Session:
    """Measures pictures with one model, and knows which of them found it warm.

    Args:
        real: entropy-code and decode each picture; the quality is that of the decoded picture.
        estimate: take the rate from the likelihoods of a forward pass. With both, `bpp` is the real rate, and
            `bpp-estimated` and `bpp-gap-percent` stand beside it.
        warm_up: run each size once, unmeasured, before its first picture.
        arithmetic: of the entropy coding, FLOAT64 or FLOAT32 (lalic.codec.coder); for FLOAT32 the model must have
            been `update()`d.
        quality: of a model of several rates.
    """

    def __init__(
        self,
        model: LALIC,
        *,
        real: bool,
        estimate: bool,
        warm_up: bool = False,
        arithmetic: str = FLOAT64,
        quality: float | None = None,
    ):
        if not (real or estimate):
            raise ValueError("nothing to measure: real or estimate must be chosen")
        self.model, self.real, self.estimate, self.warm_up = model, real, estimate, warm_up
        self._sizes: set[tuple[int, int]] = set()
        self._first = True
        self.arithmetic, self.quality = arithmetic, quality

    @torch.inference_mode()
    def measure(self, rgb: NDArray[np.uint8]) -> tuple[Row, NDArray[np.uint8]]:
        """All numbers of one picture, and its reconstruction (H, W, 3) uint8.

        `timing` says what its times may be used for: "first" of the session, the first of a "new-size", or "warm".
        """
        height, width = rgb.shape[:2]
        x = to_tensor(rgb).to(next(self.model.parameters()).device)
        # The model sees the padded picture: libraries prepare themselves for that size.
        size = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
        if size not in self._sizes and self.warm_up:
            self._compute(x)
            self._sizes.add(size)
        timing = "first" if self._first else "warm" if size in self._sizes else "new-size"
        memory = PeakMemory(x.device)
        row, x_hat = self._compute(x)
        peak = memory.bytes()  # before the quality is measured, which takes memory too
        self._first = False
        self._sizes.add(size)
        reconstruction = to_rgb8(x_hat)
        similarity = ms_ssim(rgb, reconstruction)
        quality = {
            "psnr": psnr(rgb, reconstruction),
            "psnr-unrounded": psnr_unrounded(rgb, x_hat),
            "ms-ssim": similarity,
            "ms-ssim-db": decibels(similarity),
        }
        return {"width": width, "height": height, **row, **quality, "peak-memory-bytes": peak, "timing": timing}, (
            reconstruction
        )

    def _compute(self, x: Tensor) -> tuple[Row, Tensor]:
        row: Row = {}
        if self.estimate:
            row, x_hat = _forward(self.model, x, self.quality)
        if self.real:
            estimated = row.get("bpp")
            coded, x_hat = _code(self.model, x, self.arithmetic, self.quality)
            row |= coded
            if estimated is not None:
                row |= {"bpp-estimated": estimated, "bpp-gap-percent": gap_percent(row["bpp"], estimated)}
        return row, x_hat


def measure(
    model: LALIC, rgb: NDArray[np.uint8], *, real: bool, estimate: bool, quality: float | None = None
) -> tuple[Row, NDArray[np.uint8]]:
    """All numbers of one picture, and its reconstruction (H, W, 3) uint8; see Session."""
    return Session(model, real=real, estimate=estimate, quality=quality).measure(rgb)


def gap_percent(real: float, estimated: float) -> float:
    """How many percent the real rate lies above the estimated one."""
    return (real / estimated - 1) * 100


def _forward(model: LALIC, x: Tensor, quality: float | None) -> tuple[Row, Tensor]:
    height, width = x.shape[-2:]
    start = _clock(x.device)
    out = model(pad(x), quality)
    seconds = _clock(x.device) - start
    bpp = estimated_bits(out["likelihoods"]) / (height * width)
    return {"bpp": bpp, "forward_time": seconds}, cut(out["x_hat"], height, width)


def _code(model: LALIC, x: Tensor, arithmetic: str, quality: float | None) -> tuple[Row, Tensor]:
    height, width = x.shape[-2:]
    start = _clock(x.device)
    coded = encode(model, x, arithmetic, quality=quality)
    middle = _clock(x.device)
    x_hat = decode(model, coded)
    end = _clock(x.device)
    row = {
        "bpp": bits_per_pixel(coded.num_bytes, height, width),
        "bytes": coded.num_bytes,
        "enc_time": middle - start,
        "dec_time": end - middle,
    }
    return row, x_hat


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
