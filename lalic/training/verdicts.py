"""What all ranks decide about a step: whether it may be applied, and whether somebody was asked to stop.

    step s    ── broken?, stop? ─► maximum over the ranks ─► optimisers (on the device: a broken step is no step)
                                                     └─────► host memory, behind an event
    step s+1  ── reads what step s left there

The host thus learns of a broken step when the next one is queued already. Nothing is lost by that: once a step was
broken the flag stays up, so that no later step is applied either, and before anything leaves the run (a log line, a
validation, a checkpoint, its end) `settle` reads what is still unread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from lalic.training.distributed import SharedError, any_rank


@dataclass(frozen=True)
class _Verdict:
    """The flags of one step on their way to the host."""

    step: int
    flags: Tensor
    """(2,) in host memory: broken, stop."""
    arrived: torch.cuda.Event | None
    values: Mapping[str, Tensor]
    """"loss" and "gradient_norm" of this rank, for the message."""


class Verdicts:
    """The verdicts of a run's steps, read `lag` steps after they were given (0: at once)."""

    def __init__(self, accelerator: Accelerator, lag: int):
        self.accelerator, self.lag = accelerator, lag
        self.stop = False
        """Some rank was asked to stop, as far as was read; the same on all ranks."""
        self._broken = torch.zeros((), device=accelerator.device)
        self._unread: deque[_Verdict] = deque()

    def give(self, step: int, values: Mapping[str, Tensor], asked_to_stop: bool) -> Tensor:
        """Judge step `step` by its "loss" and "gradient_norm"; every rank calls it.

        Returns a scalar on the device for the optimisers' `found_inf`: 1 when this step or an earlier one is not
        finite on some rank, else 0.
        """
        broken = ~(values["loss"].isfinite() & values["gradient_norm"].isfinite())
        # A kernel with a number inside: a tensor made from a Python value would be copied, and waited for.
        stop = torch.full_like(self._broken, float(asked_to_stop))
        flags = any_rank(self.accelerator, torch.stack((torch.maximum(self._broken, broken.float()), stop)))
        self._broken = flags[0]
        self._unread.append(self._send(step, flags, values))
        return self._broken

    def read(self) -> None:
        """Read the verdicts that are `lag` steps old. Raises SharedError when a step was broken."""
        self._read(self.lag)

    def settle(self) -> bool:
        """Read all verdicts, waiting for the device; returns `stop`. Raises SharedError as `read` does."""
        self._read(0)
        return self.stop

    def _send(self, step: int, flags: Tensor, values: Mapping[str, Tensor]) -> _Verdict:
        if flags.device.type != "cuda":
            return _Verdict(step, flags, None, values)
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Verdict(step, host, arrived, values)

    def _read(self, unread: int) -> None:
        while len(self._unread) > unread:
            verdict = self._unread.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            broken, stop = verdict.flags.numpy().astype(bool)
            self.stop = self.stop or bool(stop)
            if broken:
                raise SharedError(
                    f"step {verdict.step + 1} is not finite (loss {float(verdict.values['loss']):g}, gradient norm "
                    f"{float(verdict.values['gradient_norm']):g} on this rank) and was not applied: the last "
                    "checkpoint is good; lower the learning rate of the stage, or use train.precision=fp32"
                )
