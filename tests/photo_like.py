"""Synthetic pictures that are a little like photographs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def photo_like(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3): smooth structure with a little noise, so that every metric has something to measure."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (7 + 3 * c)) + np.cos(columns / (5 + 2 * c)) for c in range(3)]
    picture = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))
    return picture.clip(0, 255).astype(np.uint8)
