"""A model of several rates for the tests of codec and evaluation: random, and finer at higher qualities."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from lalic.ladder import MSE
from lalic.model import LALIC, published_state_dict
from lalic.model.weights import deduplicate

SIZES = {"N": 16, "dims": (16, 16, 16, 32, 16, 16), "depths": (0, 1, 1, 1), "groups": (16, 16)}


def rates_model(seed: int = 0, rungs: tuple[int, ...] = tuple(MSE)) -> LALIC:
    """A model of the `rungs` whose gains differ from channel to channel, with latents that are spread out."""
    torch.manual_seed(seed)
    model = LALIC(**SIZES, rungs=rungs).eval()
    assert model.rates is not None
    model.rates.initialise([MSE[rung] for rung in rungs])
    with torch.no_grad():
        model.rates.gain.add_(0.1 * torch.randn_like(model.rates.gain))
        model.rates.inverse_gain.add_(0.1 * torch.randn_like(model.rates.inverse_gain))
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    model.update()
    return model


def save_rates(model: LALIC, path: Path) -> Path:
    """Write the model as a .safetensors file."""
    save_file(deduplicate(published_state_dict(model)), path)
    return path
