"""Which code computes BiWKV: chosen once per process by LALIC_BACKEND, and logged once for every kind of device.

auto   (default) the C++ kernel on CPU tensors, the CUDA kernel on CUDA tensors; where one cannot be compiled, the
       PyTorch form, with a warning that says why
cpp    as auto, but an error where CPU tensors cannot have the C++ kernel
cuda   as auto, but an error where CUDA tensors cannot have the CUDA kernel, and without a GPU
torch  the PyTorch form everywhere
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

from . import builder, cuda_builder, reference

log = logging.getLogger("lalic.kernels")

CHOICES = ("auto", "cpp", "cuda", "torch")

CUDA_TILE = 64
"""Tokens of a tile of the CUDA kernel; it says the same (`tile_tokens`)."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Backend(NamedTuple):
    """One implementation, for tensors of checked shapes on one device: k and v of any supported dtype, w and u in the
    dtype that it is computed in (`scalar_dtype`), and so are the gradients of w and u."""

    name: str

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """w, u, k, v, states -> y; may write what its backward can use into `states`, which is `new_states(k)`."""

    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
    """gy, w, u, k, v, states -> gw, gu, gk, gv"""


def scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """What BiWKV of tensors of `dtype` is computed in: float64 or float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_states(k: Tensor) -> Tensor:
    """Room for what a forward leaves for its backward: sums at the tiles' ends on CUDA, nothing elsewhere.

    Six numbers per tile and channel: 19 % of the bytes of k in bfloat16, so that a stage's t_max bounds it too. The
    shape depends on that of k (B, T, C) and on the kind of device alone, so that tracing knows it.
    """
    B, T, C = k.shape
    shape = (B, -(-T // CUDA_TILE), 2, 3, C) if k.device.type == "cuda" else (0,)
    return k.new_empty(shape, dtype=scalar_dtype(k.dtype))


def _widened(
    name: str,
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Gradients],
) -> Backend:
    """A backend from functions of float32 or float64 tensors."""

    def widened_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Tensor:
        return forward(w, u, k.to(w.dtype), v.to(w.dtype)).to(v.dtype)

    def widened_backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Gradients:
        gw, gu, gk, gv = backward(gy.to(w.dtype), w, u, k.to(w.dtype), v.to(w.dtype))
        return gw, gu, gk.to(k.dtype), gv.to(v.dtype)

    return Backend(name, widened_forward, widened_backward)


TORCH = _widened("torch", reference.forward, reference.backward)

_choosing = threading.Lock()


def chosen() -> str:
    """The value of LALIC_BACKEND; LalicError when it is none of CHOICES."""
    name = os.environ.get("LALIC_BACKEND") or "auto"
    if name not in CHOICES:
        raise LalicError(f"LALIC_BACKEND={name} is not a backend; use one of {', '.join(CHOICES)}")
    return name


def for_device(device: torch.device) -> Backend:
    """The backend for tensors on `device`. The first call may compile, and logs what was chosen.

    Raises LalicError where LALIC_BACKEND asks for what this machine does not have.
    """
    with _choosing:
        return _choose(device.type, device.index or 0 if device.type == "cuda" else 0)


@functools.cache
def _choose(device_type: str, index: int) -> Backend:
    name = chosen()
    if name == "cuda" and not torch.cuda.is_available():
        raise LalicError("LALIC_BACKEND=cuda, but this machine has no CUDA device; use auto")
    if name == "torch":
        log.info("BiWKV on %s tensors: the PyTorch form (LALIC_BACKEND=torch)", device_type)
        return TORCH
    kernel = {"cpu": "cpp", "cuda": "cuda"}.get(device_type)
    if kernel is None:
        log.warning("BiWKV on %s tensors: the PyTorch form (there is no kernel for this device)", device_type)
        return TORCH
    try:
        backend = load_cpp() if kernel == "cpp" else load_cuda(index)
    except LalicError as error:
        if name == kernel:
            raise LalicError(f"LALIC_BACKEND={name}, but the {name} kernel is not available: {error}") from error
        log.warning(
            "BiWKV on %s tensors: the PyTorch form, over ten times slower than the %s kernel, because: %s",
            device_type,
            kernel,
            error,
        )
        return TORCH
    log.info("BiWKV on %s tensors: the %s kernel", device_type, kernel)
    return backend


@functools.cache
def load_cpp() -> Backend:
    """Compile the C++ kernel if need be, and load it. Raises LalicError when that is not possible."""
    _load(builder.build_cpu())
    operators = torch.ops.lalic_cpu
    return _widened("cpp", operators.biwkv, operators.biwkv_backward)


@functools.cache
def load_cuda(index: int = 0) -> Backend:
    """Compile the CUDA kernel if need be, and load it for GPU `index`. Raises LalicError when that is not possible."""
    path = cuda_builder.build_cuda()
    _load(path)
    operators = torch.ops.lalic_cuda
    assert operators.tile_tokens() == CUDA_TILE
    if problem := operators.problem_on_device(index):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        raise LalicError(
            f"{path} does not run on GPU {index} of generation {capability} ({problem}): add it to "
            "TORCH_CUDA_ARCH_LIST and run `lalic kernels --build`"
        )
    return Backend("cuda", operators.biwkv, operators.biwkv_backward)


def _load(path: os.PathLike[str]) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LalicError(f"the compiled kernel {path} does not load ({error}); delete its folder") from error
