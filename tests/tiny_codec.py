"""What the tests of the codec share: a model of a few thousand weights, pictures of noise, and both arithmetics."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lalic.codec import bitstream
from lalic.model import LALIC

Picture = NDArray[np.uint8]

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
ARITHMETICS = (bitstream.FLOAT32, bitstream.FLOAT64)


def tiny_model(seed: int = 0) -> LALIC:
    """A random model whose latents are spread out, so that every string carries symbols other than zero."""
    torch.manual_seed(seed)
    model = LALIC(**TINY).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    model.update()
    return model


def picture(height: int, width: int, seed: int = 0) -> Picture:
    """(height, width, 3) noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
