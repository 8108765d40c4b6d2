"""One optimiser step: the main parameters on the rate-distortion loss, the quantiles on the auxiliary one.

    micro-batches ─► model (engine) ─► loss / accumulation ─► backward ─► clip main ─► Adam main
                                                            auxiliary loss ─► backward ─► Adam quantiles

The quantiles of the entropy bottleneck stand outside DDP and DeepSpeed: the auxiliary loss does not depend on the
data, so ranks that start equal stay equal. The clip sees the main parameters alone, as in the published recipe, where
the main loss gives the quantiles exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lalic.config import LossSection, TrainSection
from lalic.model import LALIC
from lalic.training.compiling import BlockCompiler, compile_errors
from lalic.training.distributed import check_equal, seed_from
from lalic.training.ema import Average
from lalic.training.engine import build_engine
from lalic.training.loss import RungLoss, rate_distortion
from lalic.training.verdicts import Verdicts


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device."""

    values: dict[str, Tensor]
    """Scalars of this rank: those of the loss, "aux" and "gradient_norm"."""

    left_out: Tensor
    """1 when the step was not applied, because some rank's was not finite, else 0; on the device as well."""

    rungs: Tensor | None = None
    """On a range of rates: "rungs" of `RungLoss`, summed over the micro-batches of this rank."""


class TrainStep:
    """The model, its two optimisers, and the step. Calling it does one optimiser step over the global batch.

    A step that is not finite on some rank is applied on none: weights, moments and step counts stay. On CUDA nothing
    in a step waits for the device: whether it was finite is read `lag` = 1 steps later (lalic.training.verdicts).
    `verdicts.settle` waits; call it before the state is used.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: LALIC,
        train: TrainSection,
        loss: LossSection,
        seed: int,
        *,
        max_skipped: int = 10,
        lag: int | None = None,
    ):
        self.accelerator, self.train, self.seed = accelerator, train, seed
        self.loss = loss
        self.rung_loss = RungLoss(loss, accelerator.device) if loss.rungs else None
        self.bare = model.to(accelerator.device).train()
        model.set_gradient_checkpointing(train.gradient_checkpointing)
        model.set_compute_dtype(torch.bfloat16 if train.precision == "bf16" else None)
        self.average = Average(model, train.ema) if train.ema is not None else None
        self.compiler = BlockCompiler(accelerator) if train.compile else None
        if self.compiler:
            self.compiler.attach(model)
        self.main_parameters = model.main_parameters()
        self.engine = build_engine(accelerator, model, train)
        self.aux_optimizer = torch.optim.Adam(model.quantiles(), lr=train.aux_lr, fused=True)
        lag = int(accelerator.device.type == "cuda") if lag is None else lag
        self.verdicts = Verdicts(accelerator, lag, max_skipped)
        check_equal(accelerator, model.parameters())

    def __call__(self, micro_batches: Sequence[Mapping[str, Any]], *, step: int, lr: float) -> StepResult:
        """Step number `step` (from 0) on this rank's micro-batches.

        Args:
            micro_batches: `train.accumulation` items with "x", uint8 (m, 3, H, W), and on a range of rates "quality",
                int64 (m,), the samples' rungs.
        """
        with compile_errors() if self.compiler else nullcontext():
            terms = [self._backward(batch, step, i, len(micro_batches)) for i, batch in enumerate(micro_batches)]
        rungs = torch.stack([t.pop("rungs") for t in terms]).sum(dim=0) if self.rung_loss else None
        values = {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}
        values["gradient_norm"] = self.engine.clip()
        left_out = self.verdicts.give(step, values)
        self.engine.step(lr, left_out)
        # As the engine tells its own: a step that is left out is left out by both.
        self.aux_optimizer.found_inf = left_out  # type: ignore[attr-defined]
        values["aux"] = self._auxiliary_step()
        if self.average is not None:
            self.average.update(left_out)
        self.verdicts.read()
        return StepResult(values, left_out, rungs)

    @property
    def compiled_graphs(self) -> int | None:
        """Graphs that were compiled in this process; None without train.compile."""
        return self.compiler.graphs if self.compiler else None

    def _backward(self, batch: Mapping[str, Any], step: int, index: int, count: int) -> dict[str, Tensor]:
        """Gradients of one micro-batch, added up; ranks exchange them at the last one."""
        accelerator = self.accelerator
        # Bytes go over the bus; layout and type change in one pass, to what the model works in.
        x = batch["x"].to(accelerator.device, non_blocking=True)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        # Its place in the global batch seeds a micro-batch's noise: the same on any number of ranks.
        torch.manual_seed(seed_from(self.seed, step, index * accelerator.num_processes + accelerator.process_index))
        with self.engine.micro_batch(last=index == count - 1) as model:
            if self.rung_loss is None:
                terms = rate_distortion(model(x), x, self.loss.metric, self.loss.multiplier)
            else:
                quality = batch["quality"].to(accelerator.device, non_blocking=True)
                terms = self.rung_loss(model(x, quality), x, quality)
            self.engine.backward(terms["loss"] / count)
        return {name: value.detach() for name, value in terms.items()}

    def _auxiliary_step(self) -> Tensor:
        self.aux_optimizer.zero_grad()
        loss = self.bare.aux_loss()
        loss.backward()
        self.aux_optimizer.step()
        self.aux_optimizer.zero_grad()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers, loadable with `weights_only`. All ranks call it; the first one alone gets all of it."""
        return {"main": self.engine.state_dict(), "aux": self.aux_optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, for a model of the same architecture."""
        self.engine.load_state_dict(state["main"])
        self.aux_optimizer.load_state_dict(state["aux"])
        for group in self.aux_optimizer.param_groups:
            group["lr"] = self.train.aux_lr
