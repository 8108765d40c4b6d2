"""What a checkpoint records of the process: random number generators, device, code and library versions."""

from __future__ import annotations

import os
import platform
import random
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import lalic


def random_state(device: torch.device) -> dict[str, Any]:
    """The random number generators of this process, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def surroundings(accelerator: Accelerator, backend: str) -> dict[str, Any]:
    """What the bits of a run depend on beside its config and data, as meta.json records it."""
    device = accelerator.device
    return {
        "world_size": accelerator.num_processes,
        "backend": backend,
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `surroundings`, as "torch 2.6.0 -> 2.7.0"; a meta.json may stand in for the first."""
    was = {"backend": "DDP", **before, **before.get("versions", {})}  # checkpoints of old had that one alone
    flat = {**{k: v for k, v in now.items() if k != "versions"}, **now["versions"]}
    return [f"{k} {was.get(k)} -> {v}" for k, v in flat.items() if was.get(k) != v]


def job() -> dict[str, str]:
    """The job of the cluster that this process belongs to: {"job": number}, or nothing."""
    number = os.environ.get("SLURM_JOB_ID")
    return {"job": number} if number else {}


@cache
def versions() -> dict[str, str]:
    """Code and libraries of this process, as meta.json records them; asked for once, since git takes its time."""
    names = ("torch", "compressai", "accelerate", "numpy", "pytorch-msssim")
    return {
        "lalic": lalic.__version__,
        "code": code_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def code_version() -> str:
    """`git describe` of the checkout that this package runs from; its version number when it is installed."""
    root = Path(lalic.__file__).parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return lalic.__version__
