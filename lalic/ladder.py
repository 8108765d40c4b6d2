"""The quality ladder: which Lagrangian multiplier stands behind q1 ... q6, and the names that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MSE = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483}
"""Published LALIC ladder, for `lambda * 255^2 * MSE + bpp` (the first six values of CompressAI's)."""

MS_SSIM = {1: 2.40, 2: 4.58, 3: 8.73, 4: 16.64, 5: 31.73, 6: 60.50}
"""CompressAI's ladder, for `lambda * (1 - MS-SSIM) + bpp`."""

LADDERS = {"mse": MSE, "ms-ssim": MS_SSIM}


def lambda_of(metric: str, quality: int) -> float:
    """Multiplier of a quality label; KeyError for a metric or label that is not on the ladder."""
    return LADDERS[metric][quality]


def lambda_at(metric: str, quality: float) -> float:
    """Multiplier of a real quality: ln lambda is linear between the rungs. KeyError off the ladder."""
    low, rest = int(quality), quality - int(quality)
    below = LADDERS[metric][low]
    return below if rest == 0 else below ** (1 - rest) * LADDERS[metric][low + 1] ** rest


def quality_of(metric: str, lmbda: float) -> int | None:
    """Quality label of a multiplier, or None off the ladder."""
    for quality, value in LADDERS[metric].items():
        if math.isclose(value, lmbda, rel_tol=1e-6):
            return quality
    return None


def release_name(metric: str, lmbda: float) -> str:
    """Name of the release bundle, e.g. `lalic-mse-q3`; off the ladder `lalic-mse-lambda0.01`."""
    quality = quality_of(metric, lmbda)
    return f"lalic-{metric}-" + (f"q{quality}" if quality else f"lambda{lmbda:g}")


def range_name(metric: str) -> str:
    """Name of the release bundle of a model that serves every rate: `lalic-mse-vbr` (variable bit rate)."""
    return f"lalic-{metric}-vbr"


def loss_name(loss: Mapping[str, Any]) -> str:
    """Name of the release bundle of weights with a loss: {"metric", "lambda"}, or {"metric", "quality", "lambdas"} of a
    range of qualities. KeyError when it says neither.
    """
    if "lambdas" in loss:
        return range_name(loss["metric"])
    return release_name(loss["metric"], float(loss["lambda"]))
