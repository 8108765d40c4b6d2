"""A copy of a run's state in host memory, taken while the step stands still.

On CUDA the copies go to page-locked memory, all of them are queued before the first is waited for, and the memory is
kept for the next snapshot: locking pages takes longer than filling them. Elsewhere it is kept as well, because the
system would clear every page of new memory first. So the rank that writes checkpoints needs, from its first one on,
as much host memory as a checkpoint has bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_Place = tuple[Any, ...]


class HostCopy:
    """Takes snapshots. One is good until the next is taken, which fills the same memory."""

    def __init__(self) -> None:
        self._buffers: dict[_Place, Tensor] = {}
        self._used: dict[_Place, Tensor] = {}
        self._copied: dict[_Place, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The same nest of dicts, lists, tuples and plain values, with copies of its tensors on the CPU.

        Tensors that are one in `state` (under two names) are one in the copy; nothing is shared with `state`.
        """
        self._used, self._copied, self._devices = {}, {}, set()
        copy: dict[str, Any] = self._copy(state, ())
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = self._used
        self._copied = {}
        return copy

    @property
    def nbytes(self) -> int:
        """Host memory that is held, in bytes."""
        return sum(buffer.nbytes for buffer in {id(b): b for b in self._buffers.values()}.values())

    def _copy(self, value: Any, place: _Place) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, (*place, i)) for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return tuple(self._copy(item, (*place, i)) for i, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, place: _Place) -> Tensor:
        # All of `state` is alive, so an address names one memory.
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in self._copied:
            return self._copied[same]
        cuda = tensor.device.type == "cuda"
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=cuda)
        buffer.copy_(tensor, non_blocking=cuda)
        if cuda:
            self._devices.add(tensor.device)
        self._used[place] = self._copied[same] = buffer
        return buffer
