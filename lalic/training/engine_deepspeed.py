"""ZeRO stages 1 and 2: every rank keeps one part of Adam's state, and in stage 2 of the gradients.

    main parameters, flat, in order ─► rank 0 | rank 1 | ... | rank R-1 (+ padding at the end)
                                       each with its part of the weights (float32), exp_avg and exp_avg_sq

DeepSpeed replaces the parameters in our Adam by this rank's part, one flat tensor, and lets Adam step on that. So the
state that DeepSpeed cuts up is in our hands: it is gathered and scattered from here, in the form of plain Adam, and a
step that may not be applied is left out by Adam itself, as under DDP (`found_inf`). deepspeed.utils has functions
for whole states too, but they know of no state before the first step, where a run that resumes needs them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.training.distributed import together
from lalic.training.muon import check_kind

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """What of one parameter lies in a rank's part."""

    parameter: int
    """Its number."""
    start: int
    """Of the piece in the flattened parameter."""
    offset: int
    """Of the piece in the part."""
    length: int


def pieces_of(numels: Sequence[int], rank: int, part: int) -> list[Piece]:
    """The pieces of parameters with `numels` elements in the part of `rank`, parts having `part` elements each."""
    first, end = rank * part, (rank + 1) * part
    starts = [0, *accumulate(numels)][:-1]
    pieces = []
    for number, (start, numel) in enumerate(zip(starts, numels, strict=True)):
        low, high = max(start, first), min(start + numel, end)
        if low < high:
            pieces.append(Piece(number, low - start, low - first, high - low))
    return pieces


class DeepSpeedEngine:
    """The main parameters under ZeRO; see Engine."""

    def __init__(
        self, accelerator: Accelerator, model: LALIC, optimizer: torch.optim.Adam, settings: Mapping[str, Any]
    ):
        """Raises SharedError when DeepSpeed cuts the parameters otherwise than this class knows."""
        self.name = f"ZeRO-{settings['zero_optimization']['stage']}"
        self.parameters: list[nn.Parameter] = list(optimizer.param_groups[0]["params"])
        self._adam = optimizer
        self._zero = _initialize(accelerator, model, optimizer, settings)
        self.model: nn.Module = self._zero
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self._numels = [p.numel() for p in self.parameters]
        together(accelerator, self._check_layout)
        self._hidden = self._hidden_weights(model)

    @property
    def part(self) -> Tensor:
        """This rank's part of the weights, (elements,)."""
        return self._adam.param_groups[0]["params"][0]

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """See Engine."""
        self._zero.set_gradient_accumulation_boundary(last)
        yield self.model

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self._zero.backward(loss)

    def clip(self) -> Tensor:
        """See Engine; the scaling itself is DeepSpeed's, in its step."""
        norm = self._zero.optimizer.scaled_global_norm()
        # DeepSpeed marks a norm that is not finite by a negative one.
        return torch.where(norm < 0, torch.full_like(norm, float("nan")), norm).to(torch.float32)

    def step(self, lr: float, broken: Tensor) -> None:
        """See Engine."""
        # The forward pass zeroes the weights that a mask hides in the parameters alone: without this they drift.
        self.part.data.index_fill_(0, self._hidden, 0.0)
        self._adam.found_inf = broken  # type: ignore[attr-defined]
        self._adam.param_groups[0]["lr"] = lr
        self._zero.step()

    def state_dict(self) -> dict[str, Any]:
        """See Engine. Rank by rank and moment by moment through one buffer of a part's size, to host memory."""
        group = {k: v for k, v in self._adam.param_groups[0].items() if k != "params"}
        first = self.rank == 0
        moments = {name: [torch.empty(p.shape) for p in self.parameters] if first else [] for name in MOMENTS}
        for name in MOMENTS:
            mine = self._state()[name]
            for owner in range(self.ranks):
                part = mine if owner == self.rank else torch.empty_like(mine)
                if self.ranks > 1:
                    dist.broadcast(part, src=owner)
                for piece in pieces_of(self._numels, owner, part.numel()) if first else ():
                    whole = moments[name][piece.parameter].view(-1)
                    whole[piece.start :][: piece.length].copy_(part[piece.offset :][: piece.length])
        step = self._state()["step"]
        state = {
            number: {"step": step.detach().clone(), **{name: moments[name][number] for name in MOMENTS}}
            for number in range(len(self.parameters) if first else 0)
        }
        return {"state": state, "param_groups": [{**group, "params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        check_kind(state, "adam")
        self._fill(self.part.data, self.parameters)
        per_parameter = [state["state"][number] for number in range(len(self.parameters))]
        steps = {float(s["step"]) for s in per_parameter}
        if len(steps) > 1:
            raise LalicError(
                "the checkpoint's parameters have taken different numbers of steps: resume it without DeepSpeed"
            )
        ours = self._state()
        ours["step"].fill_(steps.pop())
        for name in MOMENTS:
            self._fill(ours[name], [s[name] for s in per_parameter])

    def _state(self) -> dict[str, Tensor]:
        """Adam's state of this rank's part; as under plain Adam, it is all zero before the first step."""
        if not self._adam.state[self.part]:
            self._adam.state[self.part] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.part.device),
                **{name: torch.zeros_like(self.part, requires_grad=False) for name in MOMENTS},
            }
        return self._adam.state[self.part]

    def _fill(self, part: Tensor, values: Sequence[Tensor]) -> None:
        """Copy this rank's pieces of whole parameters into its part."""
        for piece in pieces_of(self._numels, self.rank, part.numel()):
            source = values[piece.parameter].detach().reshape(-1)
            part[piece.offset :][: piece.length].copy_(source[piece.start :][: piece.length])

    def _check_layout(self) -> None:
        """All of the above rests on the order of the parameters in the parts: compare them with the weights."""
        groups = self._adam.param_groups
        fits = len(groups) == 1 and len(groups[0]["params"]) == 1 and self.part.dtype == torch.float32
        fits = fits and self.part.ndim == 1 and self.part.numel() * self.ranks >= sum(self._numels)
        if fits:
            expected = torch.zeros_like(self.part.data)
            self._fill(expected, self.parameters)
            fits = torch.equal(expected, self.part.data)
        if not fits:
            import deepspeed

            raise LalicError(
                f"DeepSpeed {deepspeed.__version__} cuts the parameters otherwise than it is known here: use another "
                "version, or DDP (launch/accelerate/multi_gpu.yaml), and report this"
            )

    def _hidden_weights(self, model: LALIC) -> Tensor:
        """Where in this rank's part the weights are that the checkerboard convolutions' masks hide, (n,) int64."""
        masks = {id(m.weight): m.mask for m in model.modules() if isinstance(m, MaskedConv2d)}
        hidden = []
        for piece in pieces_of(self._numels, self.rank, self.part.numel()):
            mask = masks.get(id(self.parameters[piece.parameter]))
            if mask is not None:
                shown = mask.reshape(-1)[piece.start :][: piece.length]
                hidden.append((shown == 0).nonzero().view(-1) + piece.offset)
        return torch.cat(hidden) if hidden else torch.empty(0, dtype=torch.int64, device=self.part.device)


def _initialize(
    accelerator: Accelerator, model: LALIC, optimizer: torch.optim.Adam, settings: Mapping[str, Any]
) -> Any:
    """DeepSpeed's engine over the processes that are there already."""
    if accelerator.device.type == "cpu":
        # Read when deepspeed is first imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # Newer torch renames what it calls in every step.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated")
    # Its information is for its developers.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The operators that DeepSpeed may compile: none. On a CPU it would build an all-reduce of its own when it starts,
    # and a process killed in the middle of that leaves a lock for which all later ones wait for ever.
    deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings))
    return engine
