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

from lalic.codec.coder import cut, decode, encode, pad
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

Row = dict[str, Any]


@torch.inference_mode()
def measure(model: LALIC, rgb: NDArray[np.uint8], *, real: bool, estimate: bool) -> tuple[Row, NDArray[np.uint8]]:
    """All numbers of one picture, and its reconstruction (H, W, 3) uint8.

    With `real`, the picture is entropy-coded and decoded again, and the quality is that of the decoded
    picture; the model must have been `update()`d. With `estimate`, the rate comes from the likelihoods of a
    forward pass. With both, `bpp` is the real rate, and `bpp-estimated` and `bpp-gap-percent` stand beside
    it.
    """
    if not (real or estimate):
        raise ValueError("nothing to measure: real or estimate must be chosen")
    height, width = rgb.shape[:2]
    x = to_tensor(rgb).to(next(model.parameters()).device)
    row: Row = {"width": width, "height": height}
    if estimate:
        estimated, x_hat = _forward(model, x)
        row.update(estimated)
    if real:
        coded, x_hat = _code(model, x)
        row.update(coded)
        if estimate:
            row["bpp-estimated"] = estimated["bpp"]
            row["bpp-gap-percent"] = gap_percent(row["bpp"], estimated["bpp"])
    reconstruction = to_rgb8(x_hat)
    similarity = ms_ssim(rgb, reconstruction)
    row |= {
        "psnr": psnr(rgb, reconstruction),
        "psnr-unrounded": psnr_unrounded(rgb, x_hat),
        "ms-ssim": similarity,
        "ms-ssim-db": decibels(similarity),
    }
    return row, reconstruction


def gap_percent(real: float, estimated: float) -> float:
    """How many percent the real rate lies above the estimated one."""
    return (real / estimated - 1) * 100


def _forward(model: LALIC, x: Tensor) -> tuple[Row, Tensor]:
    height, width = x.shape[-2:]
    start = _clock(x.device)
    out = model(pad(x))
    seconds = _clock(x.device) - start
    bpp = estimated_bits(out["likelihoods"]) / (height * width)
    return {"bpp": bpp, "forward_time": seconds}, cut(out["x_hat"], height, width)


def _code(model: LALIC, x: Tensor) -> tuple[Row, Tensor]:
    height, width = x.shape[-2:]
    start = _clock(x.device)
    coded = encode(model, x)
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
