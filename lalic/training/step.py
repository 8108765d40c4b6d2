"""One optimiser step: the main parameters on the rate-distortion loss, the quantiles on the auxiliary one.

    micro-batches ─► model (DDP) ─► loss / accumulation ─► backward ─► clip main ─► Adam main
                                                         auxiliary loss ─► backward ─► Adam quantiles

The quantiles of the entropy bottleneck stand outside DDP: the auxiliary loss does not depend on the data, so
ranks that start equal stay equal. The clip sees the main parameters alone, as in the published recipe, where the
main loss gives the quantiles exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lalic.config import LossSection, TrainSection
from lalic.model import LALIC
from lalic.training.distributed import SharedError, agree, check_equal, seed_from
from lalic.training.loss import rate_distortion


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device."""

    values: dict[str, Tensor]
    """Scalars of this rank: those of `rate_distortion`, "aux" and "gradient_norm"."""

    stop: bool
    """Some rank was asked to stop; true on all of them."""


class TrainStep:
    """The model, its two optimisers, and the step. Calling it does one optimiser step over the global batch."""

    def __init__(self, accelerator: Accelerator, model: LALIC, train: TrainSection, loss: LossSection, seed: int):
        self.accelerator, self.train, self.seed = accelerator, train, seed
        self.metric, self.lmbda = loss.metric, loss.multiplier
        self.bare = model.to(accelerator.device).train()
        model.set_gradient_checkpointing(train.gradient_checkpointing)
        model.set_compute_dtype(torch.bfloat16 if train.precision == "bf16" else None)
        self.main_parameters = model.main_parameters()
        keep_out_of_ddp(model, model.quantiles())
        # The stage's learning rate comes with every step.
        main = torch.optim.Adam(self.main_parameters, lr=0.0, fused=True)
        self.aux_optimizer = torch.optim.Adam(model.quantiles(), lr=train.aux_lr, fused=True)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(model, main)
        check_equal(accelerator, model.parameters())

    def __call__(
        self,
        micro_batches: Sequence[Mapping[str, Any]],
        *,
        step: int,
        lr: float,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Step number `step` (from 0) on this rank's micro-batches.

        Args:
            micro_batches: `train.accumulation` items with "x", uint8 (m, 3, H, W).
            asked_to_stop: whether this rank was; looked at after the backward pass, where the ranks agree.

        Raises SharedError, with nothing applied, when the loss or a gradient of any rank is not finite.
        """
        terms = [self._backward(batch["x"], step, i, len(micro_batches)) for i, batch in enumerate(micro_batches)]
        values = {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}
        largest = self.train.clip or float("inf")
        values["gradient_norm"] = nn.utils.clip_grad_norm_(self.main_parameters, largest)
        finite = values["loss"].isfinite() & values["gradient_norm"].isfinite()
        broken, stop = agree(self.accelerator, ~finite, asked_to_stop())
        if broken:
            self._refuse(step, values)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        values["aux"] = self._auxiliary_step()
        return StepResult(values, stop)

    def _backward(self, pixels: Tensor, step: int, index: int, count: int) -> dict[str, Tensor]:
        """Gradients of one micro-batch, added up; ranks exchange them at the last one."""
        accelerator = self.accelerator
        x = pixels.to(accelerator.device, non_blocking=True).float() / 255
        # Its place in the global batch seeds a micro-batch's noise: the same on any number of ranks.
        torch.manual_seed(seed_from(self.seed, step, index * accelerator.num_processes + accelerator.process_index))
        alone = isinstance(self.model, DistributedDataParallel) and index < count - 1
        # DDP's hooks look at the setting of the forward pass, so both stand inside.
        with accelerator.no_sync(self.model if alone else None):
            terms = rate_distortion(self.model(x), x, self.metric, self.lmbda)
            accelerator.backward(terms["loss"] / count)
        return {name: value.detach() for name, value in terms.items()}

    def _auxiliary_step(self) -> Tensor:
        self.aux_optimizer.zero_grad()
        loss = self.bare.aux_loss()
        loss.backward()
        self.aux_optimizer.step()
        self.aux_optimizer.zero_grad()
        return loss.detach()

    def _refuse(self, step: int, values: Mapping[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        raise SharedError(
            f"step {step + 1} is not finite (loss {float(values['loss']):g}, gradient norm "
            f"{float(values['gradient_norm']):g} on this rank) and was not applied: the last checkpoint is good; "
            "lower the learning rate of the stage, or use train.precision=fp32"
        )

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers, loadable with `weights_only`."""
        return {"main": self.optimizer.state_dict(), "aux": self.aux_optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, for a model of the same architecture."""
        self.optimizer.load_state_dict(state["main"])
        self.aux_optimizer.load_state_dict(state["aux"])
        for group in self.aux_optimizer.param_groups:
            group["lr"] = self.train.aux_lr


def keep_out_of_ddp(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make a later DistributedDataParallel leave these parameters alone: no broadcast, no reduction."""
    chosen = {id(p) for p in parameters}
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
