"""What the ranks agree on between two steps, on the host: whether all can go on.

A rank whose data cannot be read, or that was asked to stop, must not leave by itself: the others would wait for it
inside the next step. So before each step every rank says how it stands. The question goes over gloo, from host to
host, and does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from lalic.training.distributed import TIMEOUT


@dataclass(frozen=True)
class Leave:
    """Why all ranks leave the run."""

    failure: str | None
    """What is wrong, in one line, or None when somebody asked them to stop."""
    reason: str
    """What asked."""


class Agreement:
    """Every rank makes one at the same place, and asks it at the same places."""

    def __init__(self, accelerator: Accelerator):
        self._many = accelerator.num_processes > 1
        # A group of its own: NCCL has no host tensors, and nothing of a step may be taken for an answer.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if self._many else None

    def leave(self, asked: str | None, failure: str | None = None) -> Leave | None:
        """Say what asked this rank to stop, and what has failed on it; the answer is the same on all ranks."""
        if self._many:
            flag = torch.tensor([asked is not None or failure is not None], dtype=torch.int8)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            if not flag.item():
                return None
            said: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
            dist.all_gather_object(said, (asked, failure), group=self._group)
            return _first(said)
        return _first([(asked, failure)])


def _first(said: Sequence[tuple[str | None, str | None]]) -> Leave | None:
    """The first rank's failure, else the first one's reason to stop."""
    many = len(said) > 1
    for rank, (_, failure) in enumerate(said):
        if failure is not None:
            return Leave(failure if rank == 0 else f"{failure} (on rank {rank})", failure)
    for rank, (asked, _) in enumerate(said):
        if asked is not None:
            return Leave(None, f"{asked} on rank {rank}" if many else asked)
    return None
