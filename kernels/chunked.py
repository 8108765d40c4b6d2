"""BiWKV in PyTorch with one exponent per chunk: the portable form for all but extreme inputs.

See reference.py for the formulas and the letters. Every chunk has one reference exponent, so each token costs
one exp; `fits` says whether the numbers of a dtype are wide enough for that.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# How far exponents may spread inside what one reference exponent covers: e^-45 times e^-15 and back is still
# a normal float32.
_SPREAD = {torch.float32: 45.0, torch.float64: 300.0}
_GROWTH = {torch.float32: 15.0, torch.float64: 100.0}


def fits(w: Tensor, u: Tensor, k: Tensor) -> bool:
    """Whether one exponent per chunk loses nothing for these inputs (waits for the device of k)."""
    if k.numel() == 0:
        return True
    spread, growth = _SPREAD[k.dtype], _GROWTH[k.dtype]
    low, high = torch.aminmax(k)
    slowest = min(0.0, w.min().item())
    # A negative w lets weights grow with the distance: over a whole sequence that widens the spread.
    reach = high.item() - low.item() - slowest * k.shape[1]
    return reach <= spread and u.min().item() >= -growth and u.max().item() <= 2 * growth


class _Chunks:
    """Tokens cut in n chunks of L with the position inside the chunk first: (L, B, n, C), zero-padded."""

    def __init__(self, w: Tensor, u: Tensor, k: Tensor) -> None:
        self.B, self.T, self.C = k.shape
        self.L = max(16, round(self.T**0.5))
        self.n = -(-self.T // self.L)
        self.w, self.q, self.bonus = w, torch.exp(-w), torch.exp(u)
        position = torch.arange(self.L, dtype=w.dtype, device=w.device)[:, None, None, None]
        self.power = torch.exp(-w * position)  # (L, 1, 1, C): q^j
        k = self.cut(k, float("-inf"))
        top = k.amax(0)  # (B, n, C)
        # The exponent that every chunk's sums refer to: the largest weight that reaches it from anywhere.
        reach_left, reach_right = self._reach(top, range(self.n)), self._reach(top, range(self.n)[::-1])
        self.exponent = torch.maximum(top, torch.maximum(reach_left, reach_right))
        self.E = torch.exp(k - self.exponent)

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, self.n * self.L - self.T), value=fill)
        return padded.view(self.B, self.n, self.L, self.C).movedim(2, 0).contiguous()

    def paste(self, x: Tensor) -> Tensor:
        return x.movedim(0, 2).reshape(self.B, self.n * self.L, self.C)[:, : self.T]

    def _reach(self, top: Tensor, order: range) -> Tensor:
        reach = torch.full_like(top, float("-inf"))
        for before, c in pairwise(order):
            reach[:, c] = torch.maximum(reach[:, before] - self.w * self.L, top[:, before])
        return reach

    def _arriving(self, whole: Tensor, exponent: Tensor, order: range) -> Tensor:
        """The sum over all chunks before each one in `order`, in that chunk's exponent."""
        out = torch.zeros_like(whole)
        for before, c in pairwise(order):
            change = exponent[:, before] - exponent[:, c]
            out[:, c] = whole[:, before] * torch.exp(change)
            out[:, c] += out[:, before] * torch.exp(change - self.w * self.L)
        return out

    def before(self, x: Tensor, exponent: Tensor) -> Tensor:
        """At every token, the decayed sum of x over the tokens left of it; x is in units of e^exponent."""
        out = torch.empty_like(x)
        out[0] = self._arriving((x * self.power.flip(0)).sum(0), exponent, range(self.n))
        for j in range(1, self.L):
            torch.addcmul(x[j - 1], out[j - 1], self.q, out=out[j])
        return out

    def after(self, x: Tensor, exponent: Tensor) -> Tensor:
        """At every token, the decayed sum of x over the tokens right of it."""
        out = torch.empty_like(x)
        out[-1] = self._arriving((x * self.power).sum(0), exponent, range(self.n)[::-1])
        for j in range(self.L - 1, 0, -1):
            torch.addcmul(x[j], out[j], self.q, out=out[j - 1])
        return out


def fixed_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output of BiWKV, (B, T, C), for inputs that `fits` accepts."""
    if k.numel() == 0:
        return torch.empty_like(v)
    chunks = _Chunks(w, u, k)
    E, m = chunks.E, chunks.exponent
    Ev = E * chunks.cut(v)
    num = chunks.before(Ev, m).add_(chunks.after(Ev, m)).addcmul_(Ev, chunks.bonus)
    den = chunks.before(E, m).add_(chunks.after(E, m)).addcmul_(E, chunks.bonus)
    return chunks.paste(num.div_(den))


def fixed_backward(gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (gw, gu, gk, gv) for inputs that `fits` accepts."""
    if k.numel() == 0:
        return torch.zeros_like(w), torch.zeros_like(u), torch.empty_like(v), torch.empty_like(v)
    chunks = _Chunks(w, u, k)
    E, m, bonus, v = chunks.E, chunks.exponent, chunks.bonus, chunks.cut(v)
    Ev = E * v
    A, R, a, r = chunks.before(Ev, m), chunks.after(Ev, m), chunks.before(E, m), chunks.after(E, m)
    D = (a + r).addcmul_(E, bonus)
    y = (A + R).addcmul_(Ev, bonus).div_(D)
    # Behind the last token there is padding without weight: D may be zero there.
    gN = torch.where(E > 0, chunks.cut(gy) / D, 0.0)
    gD = -gN * torch.where(E > 0, y, 0.0)
    GN_left, GN_right = chunks.before(gN, -m), chunks.after(gN, -m)
    GD_left, GD_right = chunks.before(gD, -m), chunks.after(gD, -m)

    across = (A * GN_right).addcmul_(a, GD_right).addcmul_(R, GN_left).addcmul_(r, GD_left)
    gw = -chunks.q * across.sum((0, 1, 2))
    GN, GD = GN_left.add_(GN_right), GD_left.add_(GD_right)
    S = bonus * E * (gN * v).add_(gD)
    gk = (v * GN).add_(GD).mul_(E).add_(S)
    gv = GN.addcmul_(bonus, gN).mul_(E)
    return gw, S.sum((0, 1, 2)), chunks.paste(gk), chunks.paste(gv)
