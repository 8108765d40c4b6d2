"""What runs the main parameters: one process or DDP here, DeepSpeed's ZeRO in engine_deepspeed.py.

    start_processes ─► build_engine ─► DDPEngine         launcher: NO or MULTI_GPU
                                  └──► DeepSpeedEngine   launcher: DEEPSPEED, stage 1 or 2

The launcher alone chooses. An engine owns the main parameters and their optimiser (Adam, or Muon under DDP), and
nothing else: the quantiles have an optimiser of their own in lalic.training.step. Its state on disk has one form under
all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lalic.config import TrainSection
from lalic.model import LALIC
from lalic.training.engine_settings import deepspeed_asked, deepspeed_settings
from lalic.training.muon import Muon, check_kind, find_matrices

logger = logging.getLogger("lalic.train")


class Engine(Protocol):
    """The main parameters through backward passes and steps. All ranks call the same methods in the same order."""

    name: str
    """For the log and for checkpoints: DDP, ZeRO-1 or ZeRO-2."""

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """The model to call; forward and backward pass stand inside. Ranks exchange gradients in the last one."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar; the ranks' are averaged."""

    def clip(self) -> Tensor:
        """The norm of the main parameters' gradients, the same on all ranks; where it is above `train.clip`, the
        step takes them scaled down to that. Call it once, after the last backward pass. Not finite when they are
        not."""

    def step(self, lr: float, broken: Tensor) -> None:
        """The optimiser's step, and gradients to zero. Where the scalar `broken` is 1, weights, moments and step count
        stay."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state: as torch.optim.Adam has it for whole parameters, or Muon's. All ranks call it; the
        first one gets it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, after the weights were loaded; every rank gives the whole state. LalicError when it
        is another optimiser's."""


class MainOptimizer(Protocol):
    """What steps the main parameters of DDPEngine: MainAdam or Muon."""

    parameters: list[nn.Parameter]

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps that follow."""

    def apply(self, left_out: Tensor) -> None:
        """One step; where the scalar `left_out` is 1, nothing changes."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """See Engine."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Engine."""


class MainAdam(torch.optim.Adam):
    """The published recipe's. Fused Adam alone leaves a step out without asking the host."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__(parameters, lr=0.0, fused=True)
        self.parameters: list[nn.Parameter] = self.param_groups[0]["params"]

    def set_lr(self, lr: float) -> None:
        """See MainOptimizer."""
        self.param_groups[0]["lr"] = lr

    def apply(self, left_out: Tensor) -> None:
        """See MainOptimizer."""
        # How GradScaler tells it: where it is 1, the kernel leaves weights, moments and step count alone.
        self.found_inf = left_out
        self.step()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """See MainOptimizer."""
        check_kind(state, "adam")
        super().load_state_dict(dict(state))


def build_engine(accelerator: Accelerator, model: LALIC, train: TrainSection) -> Engine:
    """The engine that the launcher asks for. Raises SharedError when DeepSpeed cannot follow the config."""
    parameters = model.main_parameters()
    if not deepspeed_asked():
        optimizer: MainOptimizer
        if train.optimizer == "muon":
            optimizer = muon = Muon(parameters, find_matrices(model, train.muon.min_side), train.muon)
            if accelerator.is_main_process:
                logger.info("%s", muon.describe())
        else:
            optimizer = MainAdam(parameters)
        return DDPEngine(accelerator, model, optimizer, train.clip)
    from lalic.training.engine_deepspeed import DeepSpeedEngine

    settings = deepspeed_settings(train, accelerator.num_processes)
    # DeepSpeed takes torch's own class alone.
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
    return DeepSpeedEngine(accelerator, model, adam, settings)


class DDPEngine:
    """One process, or several with the whole model each."""

    name = "DDP"

    def __init__(self, accelerator: Accelerator, model: LALIC, optimizer: MainOptimizer, clip: float):
        keep_out_of_ddp(model, model.quantiles())
        self.accelerator, self.optimizer = accelerator, optimizer
        self.parameters = optimizer.parameters
        self.largest = clip or float("inf")
        self.model: nn.Module = accelerator.prepare(model)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """See Engine."""
        alone = isinstance(self.model, DistributedDataParallel) and not last
        # DDP's hooks look at the setting of the forward pass.
        with self.accelerator.no_sync(self.model if alone else None):
            yield self.model

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor:
        """See Engine."""
        return nn.utils.clip_grad_norm_(self.parameters, self.largest)

    def step(self, lr: float, broken: Tensor) -> None:
        """See Engine."""
        self.optimizer.set_lr(lr)
        self.optimizer.apply(broken)
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """See Engine."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        self.optimizer.load_state_dict(state)


def keep_out_of_ddp(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make a later DistributedDataParallel leave these parameters alone: no broadcast, no reduction."""
    chosen = {id(p) for p in parameters}
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
