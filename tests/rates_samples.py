"""A small random model of the qualities 1 to 6, and a run's folder with a checkpoint of it as training writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lalic.ladder import LADDERS
from lalic.model import LALIC
from lalic.training.checkpoint import save

SIZES: dict[str, Any] = {"N": 16, "dims": (16, 16, 16, 32, 16, 16), "depths": (0, 1, 1, 1), "groups": (16, 16)}
RUNGS = (1, 2, 3, 4, 5, 6)
CONFIG = """\
data: {name: twelve photographs}
train: {batch_size: 4, precision: fp32, optimizer: muon}
stages:
- {steps: 2000, lr: 0.001, crop: 128, warmup: 50, decay: cosine, lr_end: 0}
"""


def rates_model(seed: int = 0, rungs: tuple[int, ...] = RUNGS, metric: str = "mse") -> LALIC:
    """A random model whose gains differ from channel to channel, in evaluation mode."""
    torch.manual_seed(seed)
    model = LALIC(**SIZES, rungs=rungs).eval()
    assert model.rates is not None
    model.rates.initialise([LADDERS[metric][rung] for rung in rungs])
    with torch.no_grad():
        model.rates.gain.add_(0.1 * torch.randn(model.rates.gain.shape))
        model.rates.inverse_gain.add_(0.1 * torch.randn(model.rates.inverse_gain.shape))
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    return model


def loss_of(rungs: tuple[int, ...] = RUNGS, metric: str = "mse") -> dict[str, Any]:
    """What the checkpoint of a range says of its loss."""
    return {"metric": metric, "quality": [rungs[0], rungs[-1]], "lambdas": [LADDERS[metric][rung] for rung in rungs]}


def metrics_of(step: int, rungs: tuple[int, ...] = RUNGS) -> dict[str, Any]:
    """Validation metrics, those of rung r with 20 + r + step / 1000 dB."""
    own = {str(r): {"loss": 1.0 + r, "bpp": r / 4, "psnr": 20 + r + step / 1000, "ms_ssim": 0.9} for r in rungs}
    return {"step": step, "loss": 2.5, "bpp": 0.875, "psnr": 23.5, "images": 12, "weights": "raw", "rungs": own}


def write_rates_run(
    run: Path, model: LALIC, steps: tuple[int, ...] = (500, 1000), *, best: int = 500, metric: str = "mse"
) -> Path:
    """A run's folder with a checkpoint of the same weights after each of the `steps`."""
    rungs = tuple(model.config["rungs"])
    for step in steps:
        meta = {
            "step": step,
            "model": model.config,
            "loss": loss_of(rungs, metric),
            "best": {"step": best, "loss": 2.5},
            "metrics": metrics_of(step, rungs),
        }
        save(run, step, tensors={"model.pt": model.state_dict()}, texts={"config.yaml": CONFIG}, meta=meta)
    return run
