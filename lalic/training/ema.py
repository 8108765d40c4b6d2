"""An exponential moving average of the weights: smoother than the last ones, and usually a little better.

    n updates so far:  w = max(1 - decay, 9 / (10 + n)),  average += w * (weights - average)

A decay of 0.999 alone would keep the random first weights for thousands of steps, so the first updates count for more:
1 - w is the smaller of the decay and (1 + n) / (10 + n), the rule of TensorFlow's ExponentialMovingAverage when it is
given its `num_updates`. From n = 9 / (1 - decay) - 10 on, w is constant.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalic.model import LALIC
from lalic.training import checkpoint


@dataclass(frozen=True)
class SavedAverage:
    """What a checkpoint keeps of it."""

    state: Mapping[str, Any]
    """Of the averaged model, in the layout of the model's."""
    updates: int


def read_average(folder: Path) -> SavedAverage | None:
    """The averaged weights of a checkpoint folder, None when it has none."""
    meta = checkpoint.read_meta(folder)
    if not meta.get("ema"):
        return None
    return SavedAverage(checkpoint.load_tensors(folder, checkpoint.AVERAGED), meta["ema"]["updates"])


class Average:
    """The average of a model's weights, on the same device, in float32, as a model in evaluation mode.

    It starts from the present weights. All parameters are averaged, the quantiles too; buffers are constants.
    """

    def __init__(self, model: LALIC, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        """What is validated and exported."""
        self._average = list(self.model.parameters())
        self._weights = list(model.parameters())
        device = self._weights[0].device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._one = torch.ones_like(self._updates)

    @torch.no_grad()
    def update(self, left_out: Tensor) -> None:
        """After a step: take the new weights in, unless it was left out (a scalar, 1 or 0).

        Nothing waits for the device: a step that was left out counts with the weight zero.
        """
        applied = self._one - left_out
        weight = (9 / (10 + self._updates)).clamp_(min=1 - self.decay) * applied
        self._updates += applied
        difference = torch._foreach_sub(self._weights, self._average)
        torch._foreach_mul_(difference, weight.float())
        torch._foreach_add_(self._average, difference)

    @property
    def updates(self) -> int:
        """Steps that were taken in; waits for the device."""
        return int(self._updates)

    def load(self, saved: SavedAverage | None, model: LALIC) -> None:
        """Go on from a saved average; without one, begin anew with the weights of `model`."""
        self.model.load_state_dict(saved.state if saved else model.state_dict())
        self._updates.fill_(saved.updates if saved else 0)
