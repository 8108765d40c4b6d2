"""Which code computes BiWKV: chosen once per process by LALIC_BACKEND, and logged once.

    auto   (default) the C++ kernel on CPU tensors; the PyTorch form where it cannot be compiled
    cpp    the C++ kernel, or an error that says why not
    torch  the PyTorch form

CUDA tensors take the PyTorch form on their device: this version has no CUDA kernel.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lalic.errors import LalicError

from . import builder, reference

log = logging.getLogger("lalic.kernels")

CHOICES = ("auto", "cpp", "torch")
NO_CUDA = "not built yet in this version; CUDA tensors take the portable PyTorch form"

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Backend(NamedTuple):
    """One implementation; its tensors are all float32 or all float64, of checked shapes, on one device."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # w, u, k, v -> y
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]  # gy, w, u, k, v -> gw, gu, gk, gv


TORCH = Backend("torch", reference.forward, reference.backward)

_choosing = threading.Lock()


def chosen() -> str:
    """The value of LALIC_BACKEND; LalicError when it is none of CHOICES."""
    name = os.environ.get("LALIC_BACKEND") or "auto"
    if name not in CHOICES:
        raise LalicError(f"LALIC_BACKEND={name} is not a backend; use one of {', '.join(CHOICES)}")
    return name


def for_device(device: torch.device) -> Backend:
    """The backend for tensors on `device`. The first call may compile, and logs what was chosen."""
    with _choosing:
        return _for_cpu() if device.type == "cpu" else _for_other(device.type)


@functools.cache
def _for_cpu() -> Backend:
    name = chosen()
    if name == "torch":
        log.info("BiWKV on CPU tensors: the PyTorch form (LALIC_BACKEND=torch)")
        return TORCH
    try:
        backend = load_cpp()
    except LalicError as error:
        if name == "cpp":
            raise LalicError(f"LALIC_BACKEND=cpp, but the C++ kernel is not available: {error}") from error
        log.warning(
            "BiWKV on CPU tensors: the PyTorch form, over ten times slower than the C++ kernel, because: %s", error
        )
        return TORCH
    log.info("BiWKV on CPU tensors: the C++ kernel")
    return backend


@functools.cache
def _for_other(device_type: str) -> Backend:
    reason = NO_CUDA if device_type == "cuda" else "there is no kernel for this device"
    log.warning("BiWKV on %s tensors: the PyTorch form (%s)", device_type, reason)
    return TORCH


@functools.cache
def load_cpp() -> Backend:
    """Compile the C++ kernel if need be, and load it. Raises LalicError when that is not possible."""
    path = builder.build_cpu()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LalicError(f"the compiled kernel {path} does not load ({error}); delete its folder") from error
    operators = torch.ops.lalic_cpu
    return Backend("cpp", operators.biwkv, operators.biwkv_backward)
