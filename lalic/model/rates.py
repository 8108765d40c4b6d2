"""One model for several rates: a gain for every channel of y and rung of the quality ladder.

    x ─► g_a ─► y ─► * exp(g) ─► h_a, contexts, entropy coder ─► y_hat ─► * exp(i) ─► g_s ─► x_hat

The entropy model sees scaled latents only, so coding and exact decoding know nothing of rates: the larger the gain, the
finer y is quantised. Log-gains g and inverse log-gains i interpolate linearly between rungs, as ln lambda does, so a
quality is a real number. At a fixed quality the gains are part of two convolutions (`fold`), and the model has the
published layout. Gains for every channel and rate come from "Asymmetric Gained Deep Image Compression with
Continuous Rate Adaptation" (Cui et al., CVPR 2021).

Legend: B batch, R rungs, M channels of y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lalic.errors import LalicError

PREFIX = "rates."
"""Of the names of the gains in a state dict."""

RUNGS = PREFIX + "rungs"
"""The qualities of the rungs, in a state dict: a constant, and the only tensor that tells them."""

Quality = float | Tensor
"""One quality for all pictures, or (B,) qualities."""


class Rates(nn.Module):
    """Log-gains of y and of its inverse for every rung.

    Args:
        rungs: qualities, whole numbers from 1 on, each one above the one before; at least two.
        channels: M.
    """

    rungs: Tensor

    def __init__(self, rungs: Sequence[int], channels: int):
        super().__init__()
        check_rungs(rungs)
        self.gain = nn.Parameter(torch.zeros(len(rungs), channels))
        self.inverse_gain = nn.Parameter(torch.zeros(len(rungs), channels))
        self.register_buffer("rungs", torch.tensor([float(r) for r in rungs]))
        self.lowest, self.highest = int(rungs[0]), int(rungs[-1])

    @torch.no_grad()
    def initialise(self, lambdas: Sequence[float]) -> None:
        """Begin with g = ln(lambda / reference) / 2 and i = -g, the reference being the geometric middle.

        The error of rounding is spread evenly over a cell whose side is 1 / exp(g), so its square falls with lambda.
        """
        reference = math.sqrt(lambdas[0] * lambdas[-1])
        for rung, value in enumerate(lambdas):
            self.gain[rung] = math.log(value / reference) / 2
            self.inverse_gain[rung] = -math.log(value / reference) / 2

    def check(self, quality: float) -> None:
        """Raise LalicError for a quality outside the range of the model."""
        if not self.lowest <= quality <= self.highest:  # NaN too
            raise LalicError(f"quality {quality:g} is not one of the model: it has {self.lowest} to {self.highest}")

    def scale(self, y: Tensor, quality: Quality) -> Tensor:
        """y (B, M, H, W) * exp(g)."""
        return y * self._at(self.gain, quality).exp()[..., None, None]

    def unscale(self, y_hat: Tensor, quality: Quality) -> Tensor:
        """y_hat (B, M, H, W) * exp(i)."""
        return y_hat * self._at(self.inverse_gain, quality).exp()[..., None, None]

    def _at(self, table: Tensor, quality: Quality) -> Tensor:
        """(B, M), or (1, M) for one quality. A product with weights that are one-hot at a rung: unlike indexing, its
        gradient is deterministic on a GPU without a sort."""
        q = torch.as_tensor(quality, dtype=table.dtype, device=table.device).reshape(-1, 1)
        weights = (1 - (q - self.rungs.to(table.dtype)).abs()).clamp(min=0)
        # Element by element, so that neither TF32 nor autocast rounds the gains.
        return (weights[:, :, None] * table).sum(dim=1)

    @torch.no_grad()
    def fold(self, quality: float, last: nn.Conv2d, first: nn.ConvTranspose2d) -> None:
        """Multiply the gains of one quality into the last convolution of g_a and the first of g_s, in place.

        In float64, rounded once. Raises LalicError outside the range.
        """
        self.check(quality)
        gain = self._at(self.gain.double(), quality).exp()[0]
        inverse = self._at(self.inverse_gain.double(), quality).exp()[0]
        last.weight.copy_(last.weight.double() * gain[:, None, None, None])
        if last.bias is not None:
            last.bias.copy_(last.bias.double() * gain)
        first.weight.copy_(first.weight.double() * inverse[:, None, None, None])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        told, errors = state_dict.get(prefix + "rungs"), args[-1]
        if told is not None and (told.shape != self.rungs.shape or not torch.equal(told.to(self.rungs), self.rungs)):
            errors.append(f"the weights are of the rungs {told.tolist()}, not {self.rungs.tolist()}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_rungs(rungs: Sequence[float]) -> list[int]:
    """The rungs as whole numbers; ValueError when they are not at least two, one after the other, from 1 on."""
    if isinstance(rungs, str) or not all(isinstance(r, int | float) for r in rungs):
        raise ValueError(f"rungs must be whole numbers, got {rungs!r}")
    whole = [int(r) if math.isfinite(r) else 0 for r in rungs]
    follows = whole == list(range(whole[0], whole[0] + len(whole))) if whole else False
    if len(whole) < 2 or not follows or whole[0] < 1 or any(a != b for a, b in zip(whole, rungs, strict=True)):
        raise ValueError(f"rungs must be two or more whole numbers in a row, from 1 on, got {list(rungs)}")
    return whole
