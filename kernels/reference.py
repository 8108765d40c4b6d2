"""BiWKV in plain PyTorch: the definition, and two linear-time forms that run wherever PyTorch does.

Shapes: B batch, T tokens, C channels, n chunks, L tokens in a chunk.  w, u: (C,);  k, v, y: (B, T, C).

            sum_{i != t} exp(k_i - (|t-i|-1) w) v_i  +  exp(k_t + u) v_t
    y_t  =  ------------------------------------------------------------
            sum_{i != t} exp(k_i - (|t-i|-1) w)      +  exp(k_t + u)

`definition` is this formula and the truth that everything else is tested against. The linear-time forms write
it with sums over the tokens left of t (A, a) and right of t (R, r), each including the decay up to t:

    y_t = (A + R + e^u E v) / D,      D = a + r + e^u E,      E = exp(k_t)

and the gradients, with gN = gy / D and gD = -gN y, through the same sums over gN and gD (GN, GD):

    gv = E (GN_left + GN_right + e^u gN)
    S  = e^u E (gN v + gD),          gu = sum S
    gk = E [v (GN_left + GN_right) + GD_left + GD_right] + S
    gw = -e^-w sum_t [A GN_right + a GD_right + R GN_left + r GD_left]

Nothing is ever subtracted: the sums on the right are accumulated from the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import fits, fixed_backward, fixed_forward

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# Work on this many numbers of k at a time, a block of channels: it bounds the workspace of long sequences.
BLOCK_NUMEL = 1 << 24
# The weight of "no token yet". Not -inf, because -inf - -inf would be NaN.
NOTHING = -1e30


def definition(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BiWKV by its formula, O(T^2) time and memory; differentiable by autograd as many times as wanted."""
    position = torch.arange(k.shape[1], device=k.device)
    distance = (position[:, None] - position[None, :]).abs()[:, :, None]
    own = distance == 0
    exponent = torch.where(own, u, -(distance - 1) * w)  # (T, T, C): token t looks at token i
    weights = torch.softmax(exponent + k[:, None], dim=2)
    return torch.einsum("btic,bic->btc", weights, v)


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BiWKV in linear time for one dtype, float32 or float64, any device; not differentiable by autograd.

    On the CPU one exponent per chunk is enough for all but extreme inputs, which take the running maximum in
    float64. Other devices always take the latter, because asking would wait for the device.
    """
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for part in _channel_blocks(k):
        block = (w[part], u[part], k[..., part], v[..., part])
        y[..., part] = fixed_forward(*block) if _is_tame(*block[:3]) else running_forward(*block)
    return y


def backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients (gw, gu, gk, gv) of `forward`; the same two forms, chosen in the same way."""
    gw, gu = torch.empty_like(w), torch.empty_like(u)
    gk, gv = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    for part in _channel_blocks(k):
        block = (w[part], u[part], k[..., part], v[..., part])
        compute = fixed_backward if _is_tame(*block[:3]) else running_backward
        gw[part], gu[part], gk[..., part], gv[..., part] = compute(gy[..., part], *block)
    return gw, gu, gk, gv


def _channel_blocks(k: Tensor) -> Iterator[slice]:
    tokens, channels = max(1, k.shape[0] * k.shape[1]), k.shape[2]
    width = max(1, BLOCK_NUMEL // tokens)
    return (slice(start, start + width) for start in range(0, channels, width))


def _is_tame(w: Tensor, u: Tensor, k: Tensor) -> bool:
    return k.device.type == "cpu" and fits(w, u, k)


class _Sums(NamedTuple):
    """Decayed sums over the tokens before (or after) every token; the true values are num, den times e^m."""

    num: Tensor
    den: Tensor
    m: Tensor

    def flip(self) -> _Sums:
        return _Sums(*(x.flip(1) for x in self))


def _join(first: _Sums, second: _Sums) -> _Sums:
    m = torch.maximum(first.m, second.m)
    scale, other = torch.exp(first.m - m), torch.exp(second.m - m)
    return _Sums(first.num * scale + second.num * other, first.den * scale + second.den * other, m)


def _sums_before(num: Tensor, den: Tensor, exponent: Tensor, w: Tensor) -> _Sums:
    """At every token t: sum over i < t of exp(exponent_i - (t-i-1) w) (num_i, den_i), for any exponents.

    Inside a chunk the exponents are kept in the coordinate exponent_i + j w (j counts from the chunk's start),
    in which nothing decays, relative to their running maximum; float64 makes that exact enough for every w.
    """
    B, T, C = exponent.shape
    L = max(16, round(T**0.5))
    n = -(-T // L)

    def cut(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, n * L - T), value=fill).view(B, n, L, C).movedim(2, 0)

    decay = w * torch.arange(L, dtype=w.dtype, device=w.device)[:, None, None, None]  # (L, 1, 1, C)
    level = (cut(exponent, NOTHING) + decay).clamp(min=NOTHING)
    top = level.cummax(0).values
    new = torch.exp(level - top)
    num, den = cut(num, 0.0) * new, cut(den, 0.0) * new
    for j in range(1, L):
        keep = torch.exp(top[j - 1] - top[j])
        num[j] += num[j - 1] * keep
        den[j] += den[j - 1] * keep

    whole = _Sums(num[-1], den[-1], top[-1] - decay[-1])
    zeros = torch.zeros_like(whole.m)
    arriving = _Sums(zeros, zeros.clone(), torch.full_like(zeros, NOTHING))
    for c in range(1, n):
        before = _Sums(arriving.num[:, c - 1], arriving.den[:, c - 1], arriving.m[:, c - 1] - w * L)
        joined = _join(before, _Sums(whole.num[:, c - 1], whole.den[:, c - 1], whole.m[:, c - 1]))
        arriving.num[:, c], arriving.den[:, c], arriving.m[:, c] = joined

    def shift(x: Tensor, fill: float) -> Tensor:  # what stood at token j is what comes before token j + 1
        return torch.cat([torch.full_like(x[:1], fill), x[:-1]])

    local = _Sums(shift(num, 0.0), shift(den, 0.0), shift(top - decay, NOTHING))
    total = _join(local, _Sums(arriving.num, arriving.den, arriving.m - decay))
    return _Sums(*(x.movedim(0, 2).reshape(B, n * L, C)[:, :T] for x in total))


def _sums_after(num: Tensor, den: Tensor, exponent: Tensor, w: Tensor) -> _Sums:
    return _sums_before(num.flip(1), den.flip(1), exponent.flip(1), w).flip()


def _quotient(u: Tensor, k: Tensor, v: Tensor, left: _Sums, right: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """(y, D, m): the output and its denominator, which is D times e^m."""
    own = _Sums(v, torch.ones_like(v), k + u)
    total = _join(_join(left, right), own)
    return total.num / total.den, total.den, total.m


def running_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`forward` for any finite input: float64, relative to the running maximum of the exponents."""
    dtype = v.dtype
    w, u, k, v = (x.double() for x in (w, u, k, v))
    ones = torch.ones_like(v)
    y, _, _ = _quotient(u, k, v, _sums_before(v, ones, k, w), _sums_after(v, ones, k, w))
    return y.to(dtype)


def running_backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """`backward` for any finite input."""
    dtype = v.dtype
    gy, w, u, k, v = (x.double() for x in (gy, w, u, k, v))
    ones = torch.ones_like(v)
    left, right = _sums_before(v, ones, k, w), _sums_after(v, ones, k, w)
    y, D, m = _quotient(u, k, v, left, right)
    gN = gy / D  # times e^-m
    gD = -gN * y
    g_left, g_right = _sums_before(gN, gD, -m, w), _sums_after(gN, gD, -m, w)

    from_left, from_right, own = torch.exp(k + g_left.m), torch.exp(k + g_right.m), torch.exp(k + u - m)
    GN = from_left * g_left.num + from_right * g_right.num
    GD = from_left * g_left.den + from_right * g_right.den
    S = own * (gN * v + gD)
    across = torch.exp(left.m + g_right.m - w) * (left.num * g_right.num + left.den * g_right.den)
    across += torch.exp(right.m + g_left.m - w) * (right.num * g_left.num + right.den * g_left.den)
    gw, gu = -across.sum((0, 1)), S.sum((0, 1))
    return gw.to(dtype), gu.to(dtype), (v * GN + GD + S).to(dtype), (GN + own * gN).to(dtype)
