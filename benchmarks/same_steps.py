"""Two training steps made comparable: the same noise in both, float64 all through ours, and how far they lie apart.

CompressAI draws the uniform noise of its likelihoods in the order in which a tensor lies in memory. Ours are
channels-last and the published ones are not, so even with one seed the same number would meet another latent. `Noise`
therefore takes the place of the drawing in both codes, by the latent's logical place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from compressai.entropy_models.entropy_models import EntropyModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VALUES = ("loss", "bpp", "mse", "aux", "gradient_norm")


@dataclass
class Steps:
    """What some steps left behind."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in VALUES})
    """One number for every step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Of the model after the last step, float64."""


class Noise:
    """Uniform noise in [-1/2, 1/2) that depends on the seed, the forward pass and the order of the drawings in it."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.drawn: list[tuple[int, ...]] = []
        """The shapes that the last forward pass asked for."""
        self._passes = 0

    def draw(self, like: Tensor) -> Tensor:
        """Noise of the shape and dtype of `like`: float32 numbers, also for float64."""
        self.drawn.append(tuple(like.shape))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._passes) * 1009 + len(self.drawn))
        return (torch.rand(like.shape, generator=generator) - 0.5).to(like)

    @contextmanager
    def given_to(self, model: nn.Module) -> Iterator[None]:
        """All entropy models take their noise from here, from the first pass on; a call of `model` is a pass."""
        quantize = EntropyModel.quantize

        def with_noise(entropy_model: Any, inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
            return inputs + self.draw(inputs) if mode == "noise" else quantize(entropy_model, inputs, mode, means)

        def next_pass(*_: Any) -> None:
            self._passes += 1
            self.drawn = []

        self._passes = 0
        hook = model.register_forward_pre_hook(next_pass)
        EntropyModel.quantize = with_noise
        try:
            yield
        finally:
            EntropyModel.quantize = quantize
            hook.remove()


class InFloat64(TorchFunctionMode):
    """Our training program in float64: it makes float32 of images, and of what enters the loss; not under this."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.to and not args[0].is_floating_point():
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


def our_steps(
    state: Mapping[str, Tensor],
    sizes: Mapping[str, Any],
    batches: Sequence[Tensor],
    rates: Sequence[float],
    noise: Noise,
    *,
    lmbda: float,
    dtype: torch.dtype = torch.float32,
    **train: Any,
) -> Steps:
    """The steps of lalic.train, on the CPU.

    Args:
        state: weights to start from, in the published layout.
        sizes: arguments of LALIC.
        batches: of each step, uint8 (B, 3, H, W).
        rates: learning rate of each step.
        dtype: float32 as the program has it, or float64.
        train: settings of the config's section `train`.
    """
    from lalic.config import LossSection, TrainSection
    from lalic.model import LALIC
    from lalic.training.distributed import start_processes
    from lalic.training.step import TrainStep

    os.environ["ACCELERATE_USE_CPU"] = "true"
    section = TrainSection(batch_size=len(batches[0]), cpu_threads=1, **train)
    model = LALIC(**sizes)
    model.load_state_dict(state)
    stepper = TrainStep(start_processes(section), model.to(dtype), section, LossSection(lmbda=lmbda), seed=0)
    steps = Steps()
    with noise.given_to(stepper.bare), InFloat64() if dtype == torch.float64 else nullcontext():
        for number, (pixels, lr) in enumerate(zip(batches, rates, strict=True)):
            found = stepper([{"x": pixels}], step=number, lr=lr).values
            for name in VALUES:
                steps.values[name].append(float(found[name]))
    steps.weights = learned(stepper.bare)
    return steps


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What a model has learned, float64: its parameters by name, without the derived merged kernels."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {n: p.detach().double().clone() for n, p in parameters if not n.endswith("conv5x5_reparam.weight")}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Euclidean, over all parameters; both must have the same ones."""
    if a.keys() != b.keys():
        raise ValueError(f"not the same parameters: {sorted(a.keys() ^ b.keys())[:3]}")
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def apart(ours: Steps, theirs: Steps, start: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far two runs from the same start lie apart.

    Of every value the largest relative difference over the steps. Of the weights the distance between the two ends
    over the length of the way there, of the main parameters and of the quantiles, and the largest difference of one.
    """
    found: dict[str, Any] = {
        name: max(abs(a - b) / abs(b) for a, b in zip(ours.values[name], theirs.values[name], strict=True))
        for name in VALUES
    }
    for part, quantiles in (("weights", False), ("quantiles", True)):
        x, y, origin = (
            {n: t for n, t in of.items() if n.endswith(".quantiles") is quantiles}
            for of in (ours.weights, theirs.weights, start)
        )
        found[part] = distance(x, y) / distance(y, origin)
        found[f"{part}_largest"] = max(float((x[n] - y[n]).abs().max()) for n in y)
    return found
