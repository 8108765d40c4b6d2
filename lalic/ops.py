"""BiWKV, the bidirectional recurrent attention of LALIC, as a PyTorch operator.

The operator `lalic::biwkv` and its gradient `lalic::biwkv_backward` are declared here once, whatever computes
them: autograd, `torch.compile`, gradient checkpointing and export see the same operator with the C++ kernel and
with the PyTorch form. `lalic.kernels.backend` says which of the two it is. Importing this module compiles
nothing; the C++ kernel is built at the first call on CPU tensors, or ahead of time by `lalic kernels --build`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def biwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix the tokens of every channel with weights that decay with the distance, in both directions.

            sum_{i != t} exp(k_i - (|t-i|-1) w) v_i  +  exp(k_t + u) v_t
    y_t  =  ------------------------------------------------------------
            sum_{i != t} exp(k_i - (|t-i|-1) w)      +  exp(k_t + u)

    Args:
        w: decay per token, (C,), already divided by T; any sign.
        u: bonus of the token itself, (C,), already divided by T; any sign.
        k: keys, (B, T, C), T >= 1, any strides.
        v: values, like k.

    Returns:
        y: (B, T, C), contiguous, in the dtype of v.

    float32 and float64 are computed as such; bfloat16 and float16 (k and v alike) are computed in float32, and
    then w and u may be float32 as well as the dtype of k, as under autocast. Inputs must be finite: a NaN or an
    infinity anywhere is not looked for and gives NaN in the channels it touches. Differentiable once.

    Raises:
        TypeError: not tensors, or dtypes that do not go together.
        ValueError: shapes or devices that do not go together, or no token.

    Source: Wang et al., "LALIC: Linear Attention Modeling for Learned Image Compression", CVPR 2025
    (arXiv 2502.05741), after Duan et al., "Vision-RWKV", ICLR 2025 (arXiv 2403.02308). The published kernel
    deviates from the formula; this is the formula.
    """
    for name, x in (("w", w), ("u", u), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"biwkv: {name} must be a tensor, not {type(x).__name__}")
    return _biwkv(w, u, k, v)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise for shapes, dtypes and devices that the operator does not take; reads no element."""
    if k.dim() != 3 or v.shape != k.shape:
        raise ValueError(
            f"biwkv: k and v must both be (B, T, C), but are {tuple(k.shape)} and {tuple(v.shape)}"
        )
    B, T, C = k.shape
    if T == 0 or C == 0:
        raise ValueError(f"biwkv: at least one token and one channel are needed, but k is {tuple(k.shape)}")
    for name, x in (("w", w), ("u", u)):
        if x.dim() != 1 or x.shape[0] != C:
            raise ValueError(
                f"biwkv: {name} must be (C,) = ({C},) for k of shape {tuple(k.shape)}, but is {tuple(x.shape)}"
            )
        if x.device != k.device:
            raise ValueError(f"biwkv: {name} is on {x.device} but k is on {k.device}; move one of them")
        if x.dtype != k.dtype and not (x.dtype == torch.float32 and k.dtype.itemsize == 2):
            raise TypeError(f"biwkv: {name} is {x.dtype} but k is {k.dtype}; make them the same dtype")
    if k.dtype not in _DTYPES:
        raise TypeError(f"biwkv: k must be float32, float64, bfloat16 or float16, not {k.dtype}")
    if v.dtype != k.dtype:
        raise TypeError(f"biwkv: k is {k.dtype} but v is {v.dtype}; make them the same dtype")
    if v.device != k.device:
        raise ValueError(f"biwkv: v is on {v.device} but k is on {k.device}; move one of them")


def _check_gradient(gy: Tensor, v: Tensor) -> None:
    if gy.shape != v.shape or gy.dtype != v.dtype or gy.device != v.device:
        raise ValueError(
            f"biwkv_backward: gy must be like v ({tuple(v.shape)}, {v.dtype}, {v.device}), "
            f"but is {tuple(gy.shape)}, {gy.dtype}, {gy.device}"
        )


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("lalic::biwkv", mutates_args=(), schema="(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor")
def _biwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from lalic.kernels import backend

    _check(w, u, k, v)
    dtype = _accumulation_dtype(k.dtype)
    # The caller's autocast must not reach into the float32 state.
    with torch.autocast(k.device.type, enabled=False):
        compute = backend.for_device(k.device)
        return compute.forward(w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype)).to(v.dtype)


@torch.library.custom_op(
    "lalic::biwkv_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _biwkv_backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    from lalic.kernels import backend

    _check(w, u, k, v)
    _check_gradient(gy, v)
    dtype = _accumulation_dtype(k.dtype)
    with torch.autocast(k.device.type, enabled=False):
        compute = backend.for_device(k.device)
        gradients = compute.backward(gy.to(dtype), w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype))
    gw, gu, gk, gv = (g.to(x.dtype) for g, x in zip(gradients, (w, u, k, v), strict=True))
    return gw, gu, gk, gv


@_biwkv.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check(w, u, k, v)
    return v.new_empty(v.shape)


@_biwkv_backward.register_fake
def _(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    _check(w, u, k, v)
    _check_gradient(gy, v)
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    # The inputs alone: everything else is cheaper to compute again than to keep until the backward.
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gy: Tensor) -> Gradients:
    return _biwkv_backward(gy, *ctx.saved_tensors)


_biwkv.register_autograd(_gradient, setup_context=_save)
