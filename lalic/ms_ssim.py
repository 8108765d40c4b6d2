"""MS-SSIM of two pictures in float64 and in bounded memory, strip by strip.

The definition is that of Wang, Simoncelli and Bovik (2003) as pytorch-msssim computes it, the implementation behind
most published numbers: an 11-tap Gaussian window (sigma 1.5) without padding, five scales halved by 2x2 means (an odd
side gets a row or column of zeros on both sides first), RGB channel by channel. What differs is that the window is not
rounded to float32, which is worth about 1e-7, and that nothing of the picture's size is kept but one channel of each
picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
TAPS = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""For pictures in [0, 1]."""
MIN_SIDE = (TAPS - 1) * 2 ** (len(WEIGHTS) - 1) + 1
STRIP = 1 << 15
"""About as many pixels are in work at once: their sums fit a processor's cache, which halves the time."""


def ms_ssim_rgb8(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """MS-SSIM of two (H, W, 3) uint8 pictures, sides of at least MIN_SIDE: mean over the channels."""
    values = [_channel(a[..., c], b[..., c]) for c in range(a.shape[-1])]
    return sum(values) / len(values)


def _channel(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    x, y = (torch.tensor(p, dtype=torch.float64).div_(255) for p in (a, b))
    value = 1.0
    for i, weight in enumerate(WEIGHTS):
        if i:
            x, y = _halved(x), _halved(y)
        luminance_too, contrast = _means(x, y)
        last = i == len(WEIGHTS) - 1
        value *= max(luminance_too if last else contrast, 0.0) ** weight
    return value


def _halved(x: Tensor) -> Tensor:
    height, width = x.shape
    return F.avg_pool2d(x[None, None], 2, padding=(height % 2, width % 2))[0, 0]


def _means(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Means over the picture of the SSIM, and of its contrast and structure factor alone."""
    height, width = x.shape
    rows = max(1, STRIP // width)
    ssim = contrast = 0.0
    for top in range(0, height - TAPS + 1, rows):
        part = slice(top, min(top + rows, height - TAPS + 1) + TAPS - 1)
        s, c = _sums(x[part], y[part])
        ssim, contrast = ssim + s, contrast + c
    count = (height - TAPS + 1) * (width - TAPS + 1)
    return ssim / count, contrast / count


def _sums(x: Tensor, y: Tensor) -> tuple[float, float]:
    mean_x, mean_y, xx, yy, xy = _blurred(torch.stack((x, y, x * x, y * y, x * y)))
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    contrast = (2 * (xy - product) + C2) / (xx + yy - squares + C2)
    ssim = (2 * product + C1) / (squares + C1) * contrast
    return float(ssim.sum()), float(contrast.sum())


def _blurred(maps: Tensor) -> Tensor:
    """(5, h, w) -> (5, h - 10, w - 10): the window along rows, then along columns."""
    for dim in (1, 2):
        length = maps.shape[dim] - TAPS + 1
        out = maps.narrow(dim, TAPS // 2, length) * _WINDOW[TAPS // 2]
        for i in range(TAPS // 2):
            pair = maps.narrow(dim, i, length) + maps.narrow(dim, TAPS - 1 - i, length)
            out.add_(pair, alpha=_WINDOW[i])
        maps = out
    return maps


def _window() -> list[float]:
    taps = [np.exp(-((i - TAPS // 2) ** 2) / (2 * SIGMA**2)) for i in range(TAPS)]
    return [float(t / sum(taps)) for t in taps]


_WINDOW = _window()
