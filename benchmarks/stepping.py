"""What the benchmarks of a training step have in common: the models, the images, and our step on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"full": "lalic.yaml", "medium": "medium.yaml", "small": "small.yaml", "demo": "demo.yaml"}
"""Name: the config whose model section it is."""


def read_model_config(model: str, *settings: str) -> Any:
    """The RunConfig of a named model with `key=value` settings."""
    from lalic.config import read_config

    return read_config(ROOT / "configs" / MODELS[model], settings)


def make_images(batch: int, crop: int, *, pinned: bool = False) -> Any:
    """Smooth colours, the same at every call: uint8 (batch, 3, crop, crop) on the CPU."""
    import torch

    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, crop, mode="bicubic").clamp(0, 1)
    images = (smooth * 255).to(torch.uint8)
    return images.pin_memory() if pinned else images


def start(config: Any, device: str) -> Any:
    """The accelerator of a benchmark on one `device`, "cpu" or "cuda", as the training program makes it."""
    import torch

    from lalic.training.distributed import start_processes

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch finds no CUDA device")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = start_processes(config.train)
    if accelerator.device.type != device:
        raise SystemExit(f"error: asked for {device}, but accelerate chose {accelerator.device}")
    return accelerator


def new_model(config: Any) -> Any:
    """A LALIC with the weights that every variant starts from."""
    import torch

    from lalic.model import LALIC

    torch.manual_seed(0)
    return LALIC(**config.model.arguments())


def wait_for(device: str) -> None:
    """Return when the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
