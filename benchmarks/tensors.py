"""What a computation does with whole tensors: operations, copies, bytes kept for the backward pass, peak."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WholeTensorOperations(TorchDispatchMode):
    """Counts, by name, the operations whose result has at least `numel` elements; views are not operations.

    What an operator of ours does inside (`lalic::...`) is one operation.
    """

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        given = {_memory(x) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        whole = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel() >= self.numel]
        in_place = name.endswith("_")
        if any(in_place or _memory(x) not in given for x in whole):
            self.counts[name] += 1
        return result


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def saved_bytes(forward: Callable[[], Any], without: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each piece of memory once, but for `without`."""
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[_memory(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = forward()
    del result
    for x in without:
        kept.pop(_memory(x), None)
    return sum(kept.values())


def copies(task: Callable[[], Any], numel: int) -> Counter[str]:
    """Copies of at least `numel` elements on the CPU during `task`, those inside other operators included.

    The name tells the operation (to another layout or dtype), the count how often.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        task()
    found: Counter[str] = Counter()
    for event in profiler.events():
        shape = event.input_shapes[0] if event.input_shapes else []
        if event.name in ("aten::copy_", "aten::clone", "aten::_to_copy") and math.prod(shape) >= numel:
            found[event.name] += 1
    return found


def peak_bytes(task: Callable[[], Any], device: torch.device) -> int:
    """The most memory that tensors took at once during `task`, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
