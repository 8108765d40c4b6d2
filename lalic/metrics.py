"""Picture quality and rate, defined once: PSNR, MS-SSIM, bits per pixel.

H, W: image height and width. Pictures are (H, W, 3) uint8 arrays, the RGB that people get; the unrounded PSNR
takes the decoder's float output as well. Everything is computed on the CPU in float64, so a number does not
depend on the device that decoded the picture, and strip by strip, so that large pictures take little memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalic.ms_ssim import MIN_SIDE, ms_ssim_rgb8

MS_SSIM_MIN_SIDE = MIN_SIDE
"""161: five scales of an 11-tap window need sides above (11 - 1) * 2^4 = 160 pixels."""


def to_rgb8(x_hat: Tensor) -> NDArray[np.uint8]:
    """Decoder output (1, 3, H, W) or (3, H, W) -> (H, W, 3) uint8, clamped to [0, 1] and rounded."""
    x = x_hat.detach().reshape(x_hat.shape[-3:])
    out = np.empty((*x.shape[1:], 3), dtype=np.uint8)
    for part in _strips(out.shape):
        rounded = x[:, part].float().clamp(0, 1).mul(255).round().to(torch.uint8)
        out[part] = rounded.permute(1, 2, 0).cpu().numpy()
    return out


def to_tensor(rgb: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.tensor(rgb).permute(2, 0, 1)[None].float().div(255).contiguous()


def psnr(original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float:
    """PSNR in dB of two 8-bit RGB pictures over all three channels; `math.inf` when they are identical."""
    _check_same_shape(original.shape, reconstruction.shape)
    squares = 0  # exact: integers
    for part in _strips(original.shape):
        difference = original[part].astype(np.int64) - reconstruction[part]
        squares += int(np.vdot(difference, difference))
    return _psnr_from_mse(squares / original.size, peak=255.0)


def psnr_unrounded(original: NDArray[np.uint8], x_hat: Tensor) -> float:
    """PSNR in dB of the decoder's output (1, 3, H, W), clamped to [0, 1] but not rounded to 8 bits.

    This is what most papers' evaluation scripts print; it is a little higher than `psnr` at high rates.
    """
    x = x_hat.detach().reshape(x_hat.shape[-3:]).permute(1, 2, 0)
    _check_same_shape(original.shape, tuple(x.shape))
    squares = []
    for part in _strips(original.shape):
        difference = original[part] / 255.0 - x[part].double().clamp(0, 1).cpu().numpy()
        squares.append(float(np.vdot(difference, difference)))
    return _psnr_from_mse(math.fsum(squares) / original.size, peak=1.0)


def ms_ssim(original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float | None:
    """MS-SSIM of two 8-bit RGB pictures; None where a side has 160 pixels or less (too short for it)."""
    _check_same_shape(original.shape, reconstruction.shape)
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    return ms_ssim_rgb8(original, reconstruction)


def decibels(similarity: float | None) -> float | None:
    """MS-SSIM as `-10 log10(1 - MS-SSIM)`; `math.inf` for 1, None for None."""
    if similarity is None:
        return None
    # Rounding can leave identical pictures a hair above 1.
    return math.inf if similarity >= 1 else -10 * math.log10(1 - similarity)


def bits_per_pixel(num_bytes: int, height: int, width: int) -> float:
    """Rate of `num_bytes` for a picture of height x width pixels (its own size, before any padding)."""
    return num_bytes * 8 / (height * width)


def estimated_bits(likelihoods: Mapping[str, Tensor]) -> float:
    """Ideal code length in bits: -sum log2 of all likelihoods, summed in float64."""
    return sum(float(-torch.log2(p.detach().double()).sum()) for p in likelihoods.values())


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are numbers; None and infinities are left out, and nothing left gives None."""
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return math.fsum(kept) / len(kept) if kept else None


def json_ready(value: Any, digits: int = 8) -> Any:
    """`value` with floats rounded, and with None for infinities and NaN, which JSON does not know."""
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: json_ready(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v, digits) for v in value]
    return value


def _psnr_from_mse(mse: float, peak: float) -> float:
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def _strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a picture, some at a time: float64 copies of all of a large one would take many times its memory."""
    rows = max(1, (1 << 20) // max(1, shape[1]))
    yield from (slice(top, top + rows) for top in range(0, shape[0], rows))


def _check_same_shape(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    if a != b:
        raise ValueError(f"pictures of different sizes cannot be compared: {a} and {b}")
