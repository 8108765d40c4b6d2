"""What the ranks agree on between two steps, on the host: whether all can go on.

A rank whose data cannot be read, or that was asked to stop, must not leave by itself: the others would wait for it
inside the next step. So before each step every rank says how it stands. The question goes over gloo, from host to
host, and does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from lalic.training.distributed import TIMEOUT
from lalic.training.stop import SIGNALS
from lalic.training.watchdog import waiting_for_others

SIGNAL_NAMES = {number.name for number in SIGNALS}


@dataclass(frozen=True)
class Leave:
    """Why all ranks leave the run."""

    failure: str | None
    """What is wrong, in one line, or None when somebody asked them to stop."""
    reason: str
    """What asked."""


class Agreement:
    """Every rank makes one at the same place, and asks it at the same places."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta = TIMEOUT):
        self._many = accelerator.num_processes > 1
        # A group of its own: NCCL has no host tensors, and nothing of a step may be taken for an answer.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if self._many else None

    def leave(self, asked: str | None, failure: str | None = None) -> Leave | None:
        """Say what asked this rank to stop, and what has failed on it; the answer is the same on all ranks."""
        if self._many:
            flag = torch.tensor([asked is not None or failure is not None], dtype=torch.int8)
            said: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
            with waiting_for_others():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
                if not flag.item():
                    return None
                dist.all_gather_object(said, (asked, failure), group=self._group)
            return _first(said)
        return _first([(asked, failure)])


def _first(said: Sequence[tuple[str | None, str | None]]) -> Leave | None:
    """The first rank's failure, else the first one's reason to stop; a signal is a better one than the file it made."""
    many = len(said) > 1
    for rank, (_, failure) in enumerate(said):
        if failure is not None:
            return Leave(failure if rank == 0 else f"{failure} (on rank {rank})", failure)
    reasons = [(rank, asked) for rank, (asked, _) in enumerate(said) if asked is not None]
    if not reasons:
        return None
    rank, asked = min(reasons, key=lambda reason: reason[1] not in SIGNAL_NAMES)
    return Leave(None, f"{asked} on rank {rank}" if many else asked)
