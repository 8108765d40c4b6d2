"""Shared memory in which the workers leave their batches, the same pages again and again.

torch hands a tensor from process to process in shared memory that is made for it, with a file descriptor and a
handshake, and all its pages fresh: about as long as decoding two photographs. Here the memory is there before the
workers are, and a batch's number says where in it the batch lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from lalic.data.images import describe_error
from lalic.errors import LalicError

PREFETCH = 4
"""Batches that each worker is asked for in advance."""


class Slots:
    """Room for the batches in flight, and for the one that the main process copies out.

    Batch i + (number of slots) is asked for after batch i + 1 was: by then i has been copied.
    """

    def __init__(self, workers: int, shape: tuple[int, ...]) -> None:
        """`shape` of a batch of bytes. Raises LalicError when there is no room."""
        self.count = workers * PREFETCH + 1
        try:
            self._memory = torch.empty((self.count, *shape), dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise LalicError(
                f"no shared memory for {self.count} batches of crops ({describe_error(error)}): "
                "make /dev/shm larger or use fewer workers"
            ) from error

    def __getitem__(self, number: int) -> torch.Tensor:
        """The memory of the batch with this number."""
        return self._memory[number % self.count]


class Numbered(Sampler[Any]):
    """Puts its number before every item of another sampler."""

    def __init__(self, sampler: Sampler[Any]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.sampler)
