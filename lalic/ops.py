"""BiWKV, the bidirectional recurrent attention of LALIC, as a PyTorch operator.

The operator `lalic::biwkv` and its gradient `lalic::biwkv_backward` are declared here once, whatever computes
them: autograd, autocast, `torch.compile`, gradient checkpointing and export see the same operator with the C++ kernel,
the CUDA kernel and the PyTorch form. `lalic.kernels.backend` says which of them it is. Importing this module compiles
nothing; a kernel is built at the first call on its device, or ahead of time by `lalic kernels --build`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from lalic.errors import LalicError

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NotFiniteError(LalicError, ValueError):
    """An input of BiWKV holds NaN or infinity."""


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
    then w and u may be float32 as well as the dtype of k. Under autocast, k and v of two dtypes take the wider one,
    and w and u stay in float32. Differentiable once; two runs give the same bits.

    Inputs must be finite. On the CPU, w and u are looked at; on a GPU that would wait for the device, and a NaN or an
    infinity gives NaN in the channels that it touches. LALIC_CHECK=1 looks at all inputs on any device.

    Raises:
        TypeError: not tensors, or dtypes that do not go together.
        ValueError: shapes or devices that do not go together, or no token.
        NotFiniteError: (a ValueError and a LalicError) NaN or infinity, where they are looked for.
        RuntimeError: a failed launch, or (torch.OutOfMemoryError) no memory for the result.

    Source: Wang et al., "LALIC: Linear Attention Modeling for Learned Image Compression", CVPR 2025
    (arXiv 2502.05741), after Duan et al., "Vision-RWKV", ICLR 2025 (arXiv 2403.02308). The published kernel
    deviates from the formula; this is the formula.
    """
    for name, x in (("w", w), ("u", u), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"biwkv: {name} must be a tensor, not {type(x).__name__}")
    return torch.ops.lalic.biwkv(w, u, k, v)[0]


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise for shapes, dtypes and devices that the operator does not take; reads no element."""
    if k.dim() != 3 or v.shape != k.shape:
        raise ValueError(f"biwkv: k and v must both be (B, T, C), but are {tuple(k.shape)} and {tuple(v.shape)}")
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


def _check_finite(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    everything = os.environ.get("LALIC_CHECK", "0") not in ("", "0")
    if everything:
        suspects = {"w": w, "u": u, "k": k, "v": v}
    elif w.device.type == "cpu" and not math.isfinite(w.sum().item() + u.sum().item()):  # the cheapest look
        suspects = {"w": w, "u": u}
    else:
        return
    for name, x in suspects.items():
        if not torch.isfinite(x).all():
            raise NotFiniteError(
                f"biwkv: {name} holds NaN or infinity: the weights are damaged, or their training diverged"
            )


def _forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from lalic.kernels import backend

    _check(w, u, k, v)
    _check_finite(w, u, k, v)
    states, dtype = backend.new_states(k), backend.scalar_dtype(k.dtype)
    return backend.for_device(k.device).forward(w.to(dtype), u.to(dtype), k, v, states), states


def _backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Gradients:
    from lalic.kernels import backend

    _check(w, u, k, v)
    _check_gradient(gy, v)
    dtype = backend.scalar_dtype(k.dtype)
    gw, gu, gk, gv = backend.for_device(k.device).backward(gy, w.to(dtype), u.to(dtype), k, v, states)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv


def _fake_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from lalic.kernels import backend

    _check(w, u, k, v)
    return v.new_empty(v.shape), backend.new_states(k)


def _fake_backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Gradients:
    _check(w, u, k, v)
    _check_gradient(gy, v)
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    # All else is cheaper to compute again than to keep until the backward.
    ctx.save_for_backward(*inputs, output[1])


def _gradient(ctx: Any, gy: Tensor, _states: Tensor | None) -> Gradients:
    return torch.ops.lalic.biwkv_backward(gy, *ctx.saved_tensors)


def _no_second_gradient(ctx: Any, *_: Tensor | None) -> None:
    raise RuntimeError("lalic::biwkv_backward has no autograd formula: BiWKV is differentiable once")


def _autocast_to_wider(device_type: str) -> Any:
    """Under autocast: k and v in the wider of their dtypes, and w, u in what BiWKV computes in, never in half."""

    def call(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from lalic.kernels import backend

        wider = torch.promote_types(k.dtype, v.dtype)
        dtype = backend.scalar_dtype(wider)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.lalic.biwkv(w.to(dtype), u.to(dtype), k.to(wider), v.to(wider))

    return call


# Not torch.library.custom_op, which takes more than twice the time for each call.
_library = torch.library.Library("lalic", "DEF")
_library.define("biwkv(Tensor w, Tensor u, Tensor k, Tensor v) -> (Tensor y, Tensor states)")
_library.define(
    "biwkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor states)"
    " -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv)"
)
_library.impl("biwkv", _forward, "CompositeExplicitAutograd")
_library.impl("biwkv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lalic::biwkv", _fake_forward, lib=_library)
torch.library.register_fake("lalic::biwkv_backward", _fake_backward, lib=_library)
torch.library.register_autograd("lalic::biwkv", _gradient, setup_context=_save, lib=_library)
torch.library.register_autograd("lalic::biwkv_backward", _no_second_gradient, lib=_library)
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("biwkv", _autocast_to_wider(_device_type), _key)
