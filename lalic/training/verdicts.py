"""What all ranks find about a step: whether it was finite, and whether too many in a row were not.

    step s    ── broken? ─► maximum over the ranks ─► optimisers (on the device: a broken step is no step)
                                           └────────► host memory, behind an event
    step s+1  ── reads what step s left there

A broken step leaves weights, moments and step counts alone, and the next step goes on with the next data. After
`limit` of them in a row the run is halted: no later step is applied either, until `restart`. The host learns of all
this when the next step is queued already, which changes nothing: the device has counted by itself, so the run is
halted at the very same step whenever the host looks. Before anything leaves the run (a log line, a validation, a
checkpoint, its end) `settle` reads what is still unread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from lalic.training.distributed import any_rank


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not finite on some rank and was applied on none."""

    step: int
    """Counted from 0."""
    loss: float
    """Of this rank."""
    gradient_norm: float

    def __str__(self) -> str:
        return f"step {self.step + 1} (loss {self.loss:g}, gradient norm {self.gradient_norm:g} on this rank)"


@dataclass(frozen=True)
class _Verdict:
    """The flags of one step on their way to the host."""

    step: int
    flags: Tensor
    """(2,) in host memory: broken, halted."""
    arrived: torch.cuda.Event | None
    values: Mapping[str, Tensor]
    """"loss" and "gradient_norm" of this rank, for the message."""


class Verdicts:
    """The verdicts of a run's steps, read `lag` steps after they were given (0: at once).

    `limit`: so many broken steps in a row halt the run.
    """

    def __init__(self, accelerator: Accelerator, lag: int, limit: int):
        self.accelerator, self.lag, self.limit = accelerator, lag, limit
        self.unseen: list[SkippedStep] = []
        """Skipped steps that nobody has taken note of yet; the reader empties it."""
        self.restart()

    def restart(self, in_row: int = 0) -> None:
        """Begin anew, after `in_row` skipped steps: at the start, after a resume, and where a run was halted."""
        self.in_row = in_row
        self.halted_at: int | None = None
        """The steps that were done or skipped when the run was halted; None while it goes on."""
        device = self.accelerator.device
        self._in_row = torch.full((), float(in_row), device=device)
        self._halted = torch.zeros((), device=device)
        self._unread: deque[_Verdict] = deque()

    def give(self, step: int, values: Mapping[str, Tensor]) -> Tensor:
        """Judge step `step` by its "loss" and "gradient_norm"; every rank calls it.

        Returns a scalar on the device for the optimisers' `found_inf`: 1 when this step is not finite on some rank,
        or the run was halted before it, else 0.
        """
        broken = ~(values["loss"].isfinite() & values["gradient_norm"].isfinite())
        broken = any_rank(self.accelerator, broken.float())
        left_out = torch.maximum(broken, self._halted)
        self._in_row = (self._in_row + 1) * broken
        self._halted = torch.maximum(self._halted, (self._in_row >= self.limit).float())
        self._unread.append(self._send(step, torch.stack((broken, self._halted)), values))
        return left_out

    def read(self) -> None:
        """Read the verdicts that are `lag` steps old."""
        self._read(self.lag)

    def settle(self) -> None:
        """Read all verdicts, waiting for the device."""
        self._read(0)

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
            if self.halted_at is not None:
                continue  # queued behind the step that halted the run, and not applied
            broken, halted = verdict.flags.numpy().astype(bool)
            self.in_row = self.in_row + 1 if broken else 0
            if broken:
                values = (float(verdict.values[name]) for name in ("loss", "gradient_norm"))
                self.unseen.append(SkippedStep(verdict.step, *values))
            if halted:
                self.halted_at = verdict.step + 1
