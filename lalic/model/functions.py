"""Pieces of the Bi-RWKV block that keep less for the backward pass than their plain formulation.

A linear layer keeps its input. Where that input is a cheap function of something that is kept anyway, these
compute it again instead: the result of a LayerNorm, the gated attention, the squared ReLU. Forward and backward
are the operations of the plain formulation, so under autocast the rounding is that of its linear layers.

Each takes its weights in the precision of the computation (`compute_dtype`), so that no step inside depends on
autocast, whose state in the backward pass is the caller's. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lalic.model.depthwise import depthwise_conv, depthwise_gradients


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of a linear layer on x: autocast's where it is on, otherwise that of x."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def normed_depthwise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernel: Tensor) -> Tensor:
    """Depthwise convolution of LayerNorm(x) by kernel (C, 1, K, K); x (B, H, W, C) -> (B, H, W, C).

    Keeps x, which the residual stream keeps anyway, and its mean and deviation per token.
    """
    return _NormedDepthwise.apply(x, weight, bias, eps, kernel, compute_dtype(x))


def gated_linear(receptance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """linear(sigmoid(receptance) * x, weight); receptance and x (..., C), weight (D, C) -> (..., D).

    Keeps the sigmoid and x.
    """
    return _GatedLinear.apply(receptance, x, weight.to(x.dtype))


def squared_relu_mlp(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """linear(relu(linear(x, key))^2, value); x (..., C), key (F, C), value (D, F) -> (..., D).

    Keeps x and the result of the ReLU: one tensor of the hidden width, where the plain formulation keeps two.
    """
    dtype = compute_dtype(x)
    x, key, value = x.to(dtype), key.to(dtype), value.to(dtype)
    if not torch.is_grad_enabled():
        return F.linear(F.linear(x, key).relu_().square_(), value)
    return _SquaredReluMLP.apply(x, key, value)


class _NormedDepthwise(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernel: Tensor, dtype: torch.dtype
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, kernel)
        ctx.eps, ctx.dtype = eps, dtype
        return depthwise_conv(normed.to(dtype), kernel.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, kernel = ctx.saved_tensors
        normed = torch.native_layer_norm(x, weight.shape, weight, bias, ctx.eps)[0].to(ctx.dtype)
        gn, gk = depthwise_gradients(gradient, normed, kernel.to(ctx.dtype))
        gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
            gn.to(x.dtype), x, weight.shape, mean, rstd, weight, bias, [True, True, True]
        )
        return gx, gw, gb, None, gk.to(kernel.dtype), None


class _GatedLinear(Function):
    @staticmethod
    def forward(ctx: Any, receptance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        gate = torch.sigmoid(receptance)
        ctx.save_for_backward(gate, x, weight)
        return F.linear(gate * x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        gate, x, weight = ctx.saved_tensors
        gw = _weight_gradient(gradient, gate * x)
        gp = gradient @ weight
        return torch.ops.aten.sigmoid_backward(gp * x, gate), gp * gate, gw


class _SquaredReluMLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = F.linear(x, key).relu_()
        ctx.save_for_backward(x, key, value, hidden)
        return F.linear(hidden * hidden, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, key, value, hidden = ctx.saved_tensors
        g_value = _weight_gradient(gradient, hidden * hidden)
        # d relu(h)^2 = 2 relu(h), zero where the ReLU is: no mask is needed, and doubling the weight is exact.
        g_hidden = (gradient @ (2 * value)).mul_(hidden)
        return g_hidden @ key, _weight_gradient(g_hidden, x), g_value


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Of linear(x, weight): gradient (..., D), x (..., C) -> (D, C)."""
    return gradient.flatten(0, -2).t() @ x.flatten(0, -2)
