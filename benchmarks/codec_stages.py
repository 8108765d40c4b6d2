"""The parts of a coder's time: what the network's layers take by stage, what the entropy coder takes, what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Task = Callable[[], Any]


def stages_of(model: Any) -> dict[str, list[Any]]:
    """The network's parts by stage."""
    codec = model.latent_codec.y
    groups = codec.latent_codec.values()
    inner = [layer for g in groups for layer in (g.context_prediction, g.entropy_parameters)]
    return {
        "g_a": [model.g_a],
        "h_a": [model.h_a],
        "h_s": [model.h_s],
        "context + parameters": [*codec.channel_context.values(), *inner],
        "g_s": [model.g_s],
    }


@contextmanager
def hooked(layers: Sequence[Any], before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call `before(layer, inputs)` and `after(layer, inputs, output)` around every one of `layers`."""
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def network_alone(model: Any, task: Task) -> Task:
    """A task that calls all layers that `task` calls, in its order, with what they got."""
    import torch

    calls: list[tuple[Any, Any]] = []
    layers = [layer for stage in stages_of(model).values() for layer in stage]
    # Not copies: strides matter, and what is written into a tensor later does not.
    with hooked(layers, lambda layer, inputs: calls.append((layer, inputs[0])), lambda *_: None):
        task()

    @torch.no_grad()
    def replay() -> None:
        for layer, x in calls:
            layer(x)

    return replay


def time_stages(model: Any, task: Task, coder: Any, methods: Sequence[str], wait: Task) -> dict[str, float]:
    """Seconds of each stage of one run of `task`; entropy coding is what the `methods` of the class `coder` take."""
    seconds = dict.fromkeys((*stages_of(model), "entropy coding"), 0.0)
    started: list[float] = []

    def begin(*_: Any) -> None:
        wait()
        started.append(time.perf_counter())

    def end(name: str) -> None:
        wait()
        seconds[name] += time.perf_counter() - started.pop()

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begin()
            result = method(*arguments, **named)
            end("entropy coding")
            return result

        return call

    names = {id(layer): name for name, layers in stages_of(model).items() for layer in layers}
    layers = [layer for stage in stages_of(model).values() for layer in stage]
    originals = {m: getattr(coder, m) for m in methods}
    try:
        for m, method in originals.items():
            setattr(coder, m, clocked(method))
        with hooked(layers, begin, lambda layer, *_: end(names[id(layer)])):
            wait()
            start = time.perf_counter()
            task()
            wait()
            total = time.perf_counter() - start
    finally:
        for m, method in originals.items():
            setattr(coder, m, method)
    return {**seconds, "the rest": total - sum(seconds.values()), "total": total}
