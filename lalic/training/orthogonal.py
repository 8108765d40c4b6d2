"""The orthogonal factor of many matrices at once, by Newton-Schulz iterations: products of matrices alone.

    U S V^T  ─►  / Frobenius norm  ─►  X <- a X + b (X X^T) X + c (X X^T)^2 X, `steps` times  ─►  U f(S) V^T

With the coefficients of K. Jordan et al. (Muon, kellerjordan.github.io/posts/muon, 2024) and five steps, f(s) lies in
[0.68, 1.2] for singular values from 0.3 % of the norm on, and grows linearly below; it is not 1, and need not be.

Matrices of one shape are one batch, and what is elementwise runs over all shapes at once, so the number of kernels
does not grow with the number of matrices. Everything is kept in storage that stays: a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c: the steepest start that stays near 1."""

EPSILON = 1e-7
"""Added to the norm: a matrix of zeros stays one."""

_ALIGNMENT = 64
"""Batches start at multiples of so many numbers, for the kernels that read 16 bytes at once."""


class Batch(NamedTuple):
    """Matrices of one shape."""

    matrices: int
    rows: int
    """Not more than the columns."""
    columns: int


def starts_of(batches: Sequence[Batch]) -> list[int]:
    """Where each batch starts in a flat tensor; the last number is the length of that tensor."""
    return [0, *accumulate(_aligned(b.matrices * b.rows * b.columns) for b in batches)]


def cut(flat: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    """The batches in a flat tensor, as views (matrices, rows, columns)."""
    starts = starts_of(batches)[:-1]
    return [flat.narrow(0, s, b.matrices * b.rows * b.columns).view(b) for s, b in zip(starts, batches, strict=True)]


class Orthogonaliser:
    """U V^T, nearly, of all matrices U S V^T of some shapes.

    Args:
        batches: the shapes.
        steps: Newton-Schulz steps.
        dtype: of the products. In float32, where it takes fewer operations, the iteration runs on X X^T: see _Gram.
    """

    def __init__(self, batches: Sequence[Batch], *, steps: int, dtype: torch.dtype, device: torch.device):
        self.batches, self.dtype = tuple(batches), dtype
        counts = [b.matrices for b in batches]
        self._all_norms = torch.zeros(sum(counts), dtype=torch.float32, device=device)
        self._norms = list(self._all_norms.split(counts))
        by_gram = [dtype == torch.float32 and _Gram.pays(b, steps) for b in batches]
        like = torch.empty(0, dtype=dtype, device=device)
        self._direct = _Direct([b for b, gram in zip(batches, by_gram, strict=True) if not gram], steps, like)
        self._gram = _Gram([b for b, gram in zip(batches, by_gram, strict=True) if gram], steps, like)
        ways = {way: iter(zip(way.inputs, way.results, strict=True)) for way in (self._gram, self._direct)}
        in_order = [next(ways[self._gram if gram else self._direct]) for gram in by_gram]
        self._inputs = [source for source, _ in in_order]
        self._results = [result for _, result in in_order]

    def __call__(self, matrices: Tensor) -> list[Tensor]:
        """Flat float32 matrices, as `cut` cuts them, to batches of orthogonal factors in the products' dtype.

        The next call fills the same storage anew. What is not finite gives NaN, in its own matrix alone.
        """
        views = cut(matrices, self.batches)
        for view, norm in zip(views, self._norms, strict=True):
            torch.linalg.vector_norm(view, dim=(1, 2), out=norm)
        self._all_norms.add_(EPSILON)
        for view, norm, x in zip(views, self._norms, self._inputs, strict=True):
            torch.div(view, norm[:, None, None], out=x)
        self._direct.run()
        self._gram.run()
        return self._results

    def flops(self) -> int:
        """Floating-point operations of the products of one call."""
        return self._direct.flops() + self._gram.flops()


class _Direct:
    """The iteration itself, from one buffer to the other and back.

    a X is added to the product: in bfloat16, b A + c A^2 would be lost beside the a of a I + b A + c A^2.
    """

    def __init__(self, batches: Sequence[Batch], steps: int, like: Tensor):
        self.batches, self.steps = batches, steps
        self._flats = [like.new_zeros(starts_of(batches)[-1]) for _ in range(2)]
        self._views = [cut(flat, batches) for flat in self._flats]
        self.inputs, self.results = self._views[0], self._views[steps % 2]
        self._a, self._square = _Squares(batches, like), _Squares(batches, like)

    def run(self) -> None:
        a, b, c = COEFFICIENTS
        for step in range(self.steps):
            here, there = step % 2, (step + 1) % 2
            for x, gram, square in zip(self._views[here], self._a.views, self._square.views, strict=True):
                torch.bmm(x, x.mT, out=gram)
                torch.bmm(gram, gram, out=square)
            self._square.flat.mul_(c).add_(self._a.flat, alpha=b)
            torch.mul(self._flats[here], a, out=self._flats[there])
            for x, p, y in zip(self._views[here], self._square.views, self._views[there], strict=True):
                y.baddbmm_(p, x)

    def flops(self) -> int:
        return sum(self.flops_of(batch, self.steps) for batch in self.batches)

    @staticmethod
    def flops_of(batch: Batch, steps: int) -> int:
        n, a, b = batch
        return n * steps * (4 * a * a * b + 2 * a**3)


class _Gram:
    """The same on A = X X^T: with P = a I + b A + c A^2, a step is A <- P A P, Q <- P Q; the result is Q X.

    All of these are polynomials in A, symmetric, and commute, so it is the same in exact arithmetic. Squaring halves
    the digits of small singular values: float32 has enough of them, bfloat16 has not.
    """

    def __init__(self, batches: Sequence[Batch], steps: int, like: Tensor):
        self.batches, self.steps = batches, steps
        self.inputs, self.results = (cut(like.new_zeros(starts_of(batches)[-1]), batches) for _ in range(2))
        self._a, self._p, self._q, self._spare, self._identity = (_Squares(batches, like) for _ in range(5))
        for view in self._identity.views:
            view.diagonal(dim1=1, dim2=2).fill_(COEFFICIENTS[0])

    def run(self) -> None:
        a, p, q, spare = self._a, self._p, self._q, self._spare
        _, b, c = COEFFICIENTS
        for x, gram in zip(self.inputs, a.views, strict=True):
            torch.bmm(x, x.mT, out=gram)
        for step in range(self.steps):
            _multiply(a, a, spare)
            torch.add(self._identity.flat, a.flat, alpha=b, out=p.flat)
            p.flat.add_(spare.flat, alpha=c)
            if step < self.steps - 1:
                _multiply(p, a, spare)
                _multiply(spare, p, a)
            if step == 0:
                p, q = q, p
            else:
                _multiply(p, q, spare)
                q, spare = spare, q
        for x, whole, y in zip(self.inputs, q.views, self.results, strict=True):
            torch.bmm(whole, x, out=y)

    def flops(self) -> int:
        return sum(self.flops_of(batch, self.steps) for batch in self.batches)

    @staticmethod
    def flops_of(batch: Batch, steps: int) -> int:
        n, a, b = batch
        products = steps + 2 * (steps - 1) + (steps - 1)
        return n * (4 * a * a * b + 2 * products * a**3)

    @classmethod
    def pays(cls, batch: Batch, steps: int) -> bool:
        """Whether this way takes fewer operations."""
        return cls.flops_of(batch, steps) < _Direct.flops_of(batch, steps)


class _Squares:
    """Batches of (rows, rows) in one flat tensor."""

    def __init__(self, batches: Sequence[Batch], like: Tensor):
        squares = [Batch(b.matrices, b.rows, b.rows) for b in batches]
        self.flat = like.new_zeros(starts_of(squares)[-1])
        self.views = cut(self.flat, squares)


def _multiply(a: _Squares, b: _Squares, out: _Squares) -> None:
    for left, right, target in zip(a.views, b.views, out.views, strict=True):
        torch.bmm(left, right, out=target)


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT
