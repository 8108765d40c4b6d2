"""Muon: every matrix moves along the orthogonal factor of its momentum; Adam trains what is no matrix.

    gradients ─► one flat tensor ─► momentum, Nesterov ─► U V^T of each ─► * -lr * 0.2 sqrt(larger side) ─► weights
    the rest  ─► fused Adam at lr * rest_lr

K. Jordan et al., kellerjordan.github.io/posts/muon (2024); the scale, with which a learning rate suits Adam and Muon
alike, is that of J. Liu et al., arXiv 2502.16982. No weight decay. A step that is left out is left out on the device;
nothing in a step reads from it. All state stays in the storage that it was given at the start.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressai.layers import CheckerboardMaskedConv2d, MaskedConv2d
from torch import Tensor, nn

from lalic.config import MuonSection
from lalic.errors import LalicError
from lalic.training.orthogonal import Batch, Orthogonaliser, cut, starts_of

KIND = "muon"
"""What its state on disk says of itself; a state that says nothing is Adam's."""


@dataclass(frozen=True)
class Matrix:
    """A parameter as a matrix (out, in): (out, in * k * k) for convolutions, transposed ones too."""

    parameter: Tensor
    out_first: bool = True
    """Whether the parameter's first dimension is that of the outputs; a transposed convolution's is the second."""
    taps: slice | None = None
    """Of the kernel's k * k entries those that a mask shows; None: all."""

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, which is there."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        shown = self.shown(self.parameter)
        first, second, *kernel = shown.shape
        out, into = (first, second) if self.out_first else (second, first)
        return out, into * math.prod(kernel)

    def shown(self, whole: Tensor) -> Tensor:
        """What is seen of a tensor of the parameter's shape: a view (d0, d1, ...) without masked entries."""
        return whole if self.taps is None else whole.flatten(2)[:, :, self.taps]

    def view_of(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as a view in the shape of `shown`."""
        first, second, *kernel = self.shown(self.parameter).shape
        matrix = matrix.unflatten(1, (second if self.out_first else first, *kernel)) if kernel else matrix
        return matrix if self.out_first else matrix.transpose(0, 1)


def find_matrices(model: nn.Module, min_side: int) -> list[Matrix]:
    """The matrices of linear layers and of convolutions that mix channels, in the order of the model's parameters.

    Left out are those with a side below `min_side`, and convolutions with another mask than a checkerboard.
    """
    found: dict[int, Matrix] = {}
    for module in model.modules():
        matrix = _matrix_of(module)
        if matrix and min(matrix.shape) >= min_side:
            found[id(matrix.parameter)] = matrix
    return [found[id(p)] for p in model.parameters() if id(p) in found]


def _matrix_of(module: nn.Module) -> Matrix | None:
    if isinstance(module, nn.Linear):
        return Matrix(module.weight)
    if isinstance(module, nn.ConvTranspose2d) and module.groups == 1:
        return Matrix(module.weight, out_first=False)
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        if isinstance(module, CheckerboardMaskedConv2d):
            # Row plus column is odd: in a kernel of odd width, so is the position in the flattened kernel.
            return Matrix(module.weight, taps=slice(1, None, 2))
        return Matrix(module.weight) if not isinstance(module, MaskedConv2d) else None
    return None


@dataclass(frozen=True)
class _Slot:
    """A matrix and its views in the flat tensors, in the shape of what is shown of the parameter."""

    matrix: Matrix
    gradient: Tensor
    momentum: Tensor
    update: Tensor

    @classmethod
    def of(cls, matrix: Matrix, *flat: Tensor) -> _Slot:
        """Of matrices in the layout of a batch: (smaller side, larger side)."""
        upright = flat[0].shape == matrix.shape
        return cls(matrix, *(matrix.view_of(f if upright else f.mT) for f in flat))

    @property
    def plain(self) -> bool:
        """Whether the views lie in memory as the parameter does: one kernel then copies many."""
        return self.matrix.taps is None and self.update.is_contiguous() and self.matrix.parameter.is_contiguous()


class Muon:
    """Muon on matrices, and Adam on the other ones of some parameters.

    Args:
        parameters: what is trained; numbers in the state are positions here.
        matrices: those that Muon takes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], matrices: Sequence[Matrix], settings: MuonSection):
        self.parameters, self.settings = list(parameters), settings
        device = self.parameters[0].device
        by_shape: defaultdict[tuple[int, ...], list[Matrix]] = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(sorted(matrix.shape))].append(matrix)
        self.batches = [Batch(len(by_shape[a, b]), a, b) for a, b in sorted(by_shape)]
        flat = [torch.zeros(starts_of(self.batches)[-1], device=device) for _ in range(3)]
        self._gradient, self._momentum, self._update = flat
        views = [[view for batch in cut(f, self.batches) for view in batch] for f in flat]
        in_order = [matrix for shape in sorted(by_shape) for matrix in by_shape[shape]]
        self._slots = [_Slot.of(*each) for each in zip(in_order, *views, strict=True)]
        layouts = ([s for s in self._slots if s.plain], [s for s in self._slots if not s.plain])
        self._layouts = [slots for slots in layouts if slots]
        scales = [-settings.scale * math.sqrt(b.columns) for b in self.batches]
        self._scales = torch.tensor(scales, device=device).view(-1, 1, 1, 1)
        self._factors = torch.zeros_like(self._scales)
        dtype = products_of(settings, device)
        self.orthogonalise = Orthogonaliser(self.batches, steps=settings.newton_schulz, dtype=dtype, device=device)
        taken = {id(m.parameter) for m in matrices}
        self.rest = [p for p in self.parameters if id(p) not in taken]
        self._lr = torch.zeros((), device=device)
        self._adam = _fused_adam(self.rest)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps that follow, which read it on the device."""
        self._lr.fill_(lr)
        for group in self._adam.param_groups if self._adam else ():
            group["lr"].fill_(lr * self.settings.rest_lr)

    @torch.no_grad()
    def apply(self, left_out: Tensor) -> None:
        """One step; every parameter has a gradient. Where the scalar `left_out` is 1, weights, momentum, moments and
        step counts stay."""
        with torch.profiler.record_function("Optimizer.step#Muon.step"):
            self._move_matrices(left_out)
            if self._adam:
                self._adam.found_inf = left_out  # type: ignore[attr-defined]
                self._adam.step()

    def _move_matrices(self, left_out: Tensor) -> None:
        settings, skip = self.settings, left_out > 0
        for slots in self._layouts:
            gradients = [slot.matrix.shown(slot.matrix.gradient) for slot in slots]
            torch._foreach_copy_([slot.gradient for slot in slots], gradients)
        # A gradient that equals the momentum leaves it as it is, and what follows finite.
        torch.where(skip, self._momentum, self._gradient, out=self._gradient)
        self._momentum.lerp_(self._gradient, 1 - settings.momentum)
        nesterov = self._gradient.lerp_(self._momentum, settings.momentum)
        torch.mul(self._scales, self._lr, out=self._factors)
        factors, updates = self._factors.unbind(), cut(self._update, self.batches)
        for orthogonal, factor, update in zip(self.orthogonalise(nesterov), factors, updates, strict=True):
            torch.mul(orthogonal, factor, out=update)
        # x + -0.0 is x, whatever the sign of a zero x.
        self._update.masked_fill_(skip, -0.0)
        for slots in self._layouts:
            weights = [slot.matrix.shown(slot.matrix.parameter) for slot in slots]
            torch._foreach_add_(weights, [slot.update for slot in slots])

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """{"kind": "muon", "state": {number of the parameter: {"momentum": ...} or Adam's three tensors}}.

        A momentum has the parameter's own shape, whatever it is batched with, and zeros where a mask hides entries.
        """
        state = {id(p): dict(entry) for p, entry in (self._adam.state.items() if self._adam else ())}
        for slot in self._slots:
            whole = torch.zeros_like(slot.matrix.parameter, requires_grad=False)
            slot.matrix.shown(whole).copy_(slot.momentum)
            state[id(slot.matrix.parameter)] = {"momentum": whole}
        return {"kind": KIND, "state": {i: state[id(p)] for i, p in enumerate(self.parameters)}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises LalicError when the state is another optimiser's or another model's."""
        check_kind(state, KIND)
        mine = {id(p): entry for p, entry in (self._adam.state.items() if self._adam else ())}
        mine.update({id(s.matrix.parameter): {"momentum": s.matrix.parameter} for s in self._slots})
        entries = {id(p): state["state"].get(i, {}) for i, p in enumerate(self.parameters)}
        for key, entry in mine.items():
            given = {name: tuple(value.shape) for name, value in entries[key].items()}
            if given != {name: tuple(value.shape) for name, value in entry.items()}:
                raise LalicError("the checkpoint's optimiser took other parameters as matrices: it is of another run")
        for slot in self._slots:
            saved = entries[id(slot.matrix.parameter)]["momentum"].to(slot.momentum.device)
            slot.momentum.copy_(slot.matrix.shown(saved))
        for parameter in self.rest:
            for name, value in mine[id(parameter)].items():
                value.copy_(entries[id(parameter)][name])

    def describe(self) -> str:
        """Who trains what, in one line."""
        numbers, others = sum(math.prod(b) for b in self.batches), sum(p.numel() for p in self.rest)
        shapes = [f"{b.rows}x{b.columns}" for b in self.batches] or ["none"]
        listed = ", ".join(shapes if len(shapes) < 5 else (shapes[0], shapes[1], "...", shapes[-1]))
        return (
            f"muon trains {len(self._slots)} matrices ({numbers:,} numbers, {len(self.batches)} shapes: {listed}; "
            f"products in {str(self.orthogonalise.dtype).removeprefix('torch.')}), "
            f"adam the other {len(self.rest)} parameters ({others:,} numbers)"
        )


def check_kind(state: Mapping[str, Any], kind: str) -> None:
    """Raise LalicError when an optimiser's saved state is that of another one than `kind`."""
    saved = state.get("kind", "adam")
    if saved != kind:
        raise LalicError(
            f"the checkpoint's optimiser is {saved}, this run's is {kind}: neither can go on from the other"
        )


def products_of(settings: MuonSection, device: torch.device) -> torch.dtype:
    """What the products of matrices are computed in."""
    name = settings.products
    if name == "auto":
        # CPUs without matrix units (AMX) multiply bfloat16 at half the speed of float32.
        name = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _fused_adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Adam | None:
    """Adam whose learning rate and state are tensors from the start, so that they keep their storage."""
    if not parameters:
        return None
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True, capturable=True)
    adam.param_groups[0]["lr"] = lr = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.zeros_like(lr), **moments}
    return adam
