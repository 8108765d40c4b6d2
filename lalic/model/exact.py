"""The entropy path in float64, so that every machine takes the same decisions.

    side and context networks, float64 ─┬─► scale ─► index of its table   decisions: integers, and from here on
                                        └─► mean ─► multiple of STEP      everything is exact: y_hat = symbol + mean

A decoder must find every one of the encoder's tables: with another one, what follows is garbage. In float32, rounding
moves a scale by 1e-6 from one thread count, processor or library to the next, and of the hundred thousands of a picture
some always lie closer than that to the border between two tables. Here the same weights are used as float64 numbers,
rounding moves scales and means by about 1e-14, and those within TOLERANCE of a border are listed in the file with the
encoder's choice: the *exceptions* (lalic.model.choices), normally a few bytes.

Means are decided too, so that y_hat is the same number everywhere: for the contexts of the groups that follow, and
for g_s. That shifts them by at most STEP / 2, where quantisation shifts by up to 1/2. The tables are computed in
float64 as well, those of the Gaussians for all models alike.

Weights are converted anew for every picture, layer by layer as they are used: a few per cent of the time, little
memory, and no copy that could go stale.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel
from compressai.entropy_models.entropy_models import pmf_to_quantized_cdf
from torch import Tensor, nn

from lalic.errors import LalicError
from lalic.model.choices import MEAN, SCALE, Near, Recorder, Replay
from lalic.model.coding import Parameters, Tables, kept_tables

STEP = 2.0**-10
"""Means are multiples of this."""

TOLERANCE = 2.0**-30
"""A value so close to a border is an exception; for values above 1 times the value, as float64's rounding grows with
it. Rounding is seen to be a hundred thousand times smaller in trained models, a thousand times in one with doubled
weights, and still only one mean in 500,000 lies so close to a border. See benchmarks/decode_matrix.py."""

LARGEST_MEAN = 2.0**18
"""Beyond it twice the tolerance would be half a step: all means would be exceptions. Trained models stay below 2^8."""

CHUNK = 1 << 20
"""Elements decided at once: what that needs of memory does not grow with the picture."""

_SCALES, _NARROWEST, _WIDEST = 64, 0.11, 256.0
_TAIL_MASS = 1e-9


class Exact:
    """The float64 arithmetic of one picture; `choices` records (encoder) or replays (decoder) the exceptions."""

    dtype: torch.dtype | None = torch.float64

    def __init__(self, choices: Recorder | Replay):
        self.choices = choices
        self._elements = 0
        self._borders: Tensor | None = None
        self._recent: list[tuple[nn.Module, nn.Module]] = []

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x) in float64."""
        if x.device.type == "mps":
            raise LalicError("this device has no float64: decode on the CPU, encode there or with float32 arithmetic")
        double = next((double for known, double in self._recent if known is module), None)
        if double is None:
            double = in_float64(module)
            # A group's parameter network runs before and after its spatial context: two are enough.
            self._recent = [*self._recent[-1:], (module, double)]
        return double(x)

    def tables(self, model: EntropyModel) -> Tables:
        """The tables of `model` from float64 probabilities; `update()` need not have been called."""
        if not hasattr(model, "quantiles"):
            return gaussian_tables(model.entropy_coder.name)
        return kept_tables(model, tuple(model.parameters()), bottleneck_tables)

    def decide(self, _: EntropyModel, scales: Tensor, means: Tensor) -> Parameters:
        """Indexes and means of one part, of one picture: scales and means (1, C, H, W/2).

        LalicError where no decision is possible, or where the file's exceptions do not fit.
        """
        if len(scales) != 1:
            raise ValueError(f"every picture has exceptions of its own: code {len(scales)} pictures one by one")
        flat_scales, flat_means = scales.flatten(), means.flatten()
        indexes = torch.empty(flat_scales.shape, dtype=torch.int32, device=scales.device)
        steps = torch.empty_like(indexes)
        for start in range(0, indexes.numel(), CHUNK):
            own = slice(start, start + CHUNK)
            self._decide(flat_scales[own], flat_means[own], indexes[own], steps[own])
        decided = steps.to(torch.float64).mul_(STEP).view(scales.shape)
        return Parameters(indexes.view(scales.shape), decided, steps.view(scales.shape))

    def _decide(self, scales: Tensor, means: Tensor, indexes: Tensor, steps: Tensor) -> None:
        if not (means.abs() <= LARGEST_MEAN).all() or scales.isnan().any():
            raise LalicError(
                "latents cannot be coded, their parameters are not finite or far too large: the model's training "
                "diverged, or the file's strings are damaged"
            )
        if self._borders is None:
            self._borders = torch.tensor(scale_borders(), dtype=torch.float64, device=scales.device)
        for kind, values, out, (decisions, distances, below) in (
            (SCALE, scales, indexes, _nearest_table(scales, self._borders)),
            (MEAN, means, steps, _nearest_step(means)),
        ):
            out.copy_(decisions)
            distances = distances / (TOLERANCE * values.abs().clamp_min(1))
            positions = (distances < self.choices.reach).nonzero()[:, 0]
            below = below[positions].to(torch.int32)
            near = Near(
                positions.cpu().numpy(),
                distances[positions].cpu().numpy(),
                (out[positions] - below).long().cpu().numpy(),
            )
            out[positions] = below + torch.from_numpy(self.choices.settle(self._elements, kind, near)).to(out)
        self._elements += scales.numel()


def _nearest_table(scales: Tensor, borders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each scale: its table, the distance from the nearest border, and the table below that border."""
    infinity = borders.new_full((1,), math.inf)
    padded = torch.cat([-infinity, borders, infinity])
    indexes = torch.bucketize(scales, borders)
    down, up = scales - padded[indexes], padded[indexes + 1] - scales
    return indexes, torch.minimum(down, up), torch.where(down < up, indexes - 1, indexes)


def _nearest_step(means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each mean: the nearest multiple of STEP, the distance from the nearest border, the multiple below that."""
    scaled = means / STEP
    nearest = scaled.round()
    return nearest, (0.5 - (scaled - nearest).abs()) * STEP, scaled.floor()


def in_float64(module: nn.Module) -> nn.Module:
    """A copy whose floating-point weights are float64 and which shares all else; never a part in lower precision."""
    replaced: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        # Held by `replaced`, so no identity is used twice.
        replaced[id(tensor)] = tensor.detach().double() if tensor.is_floating_point() else tensor
    for parameter in module.parameters():
        replaced[id(parameter)] = nn.Parameter(replaced[id(parameter)], requires_grad=False)
    double = copy.deepcopy(module, replaced)
    for part in double.modules():
        if hasattr(part, "compute_dtype"):
            setattr(part, "compute_dtype", None)  # noqa: B010 -- nn.Module's own typing takes tensors and modules only
    return double


@functools.cache
def scale_table() -> tuple[float, ...]:
    """CompressAI's 64 standard deviations, 0.11 to 256 in equal ratios, as multiples of 2^-20: the same everywhere."""
    ratio = math.log(_WIDEST / _NARROWEST) / (_SCALES - 1)
    return tuple(round(_NARROWEST * math.exp(ratio * i) * 2**20) / 2**20 for i in range(_SCALES))


@functools.cache
def scale_borders() -> tuple[float, ...]:
    """The 63 borders between the tables: a scale takes the nearest by ratio, which halves what a wrong scale costs.

    CompressAI takes the next wider one. Square roots are rounded correctly, so these are the same everywhere too.
    """
    return tuple(math.sqrt(a * b) for a, b in itertools.pairwise(scale_table()))


@functools.cache
def gaussian_tables(coder: str) -> Tables:
    """The tables of `scale_table()` for the entropy coder of that name, made as CompressAI makes them."""
    model = EntropyModel(entropy_coder=coder)
    # The interval that leaves half the tail's mass on either side, in standard deviations.
    reach = -NormalDist().inv_cdf(_TAIL_MASS / 2)
    centres = [math.ceil(scale * reach) for scale in scale_table()]
    cdf = np.zeros((_SCALES, 2 * max(centres) + 3), dtype=np.int32)
    for row, scale, centre in zip(cdf, scale_table(), centres, strict=True):
        half = [_normal((0.5 - k) / scale) - _normal((-0.5 - k) / scale) for k in range(centre + 1)]
        mass = [*half[:0:-1], *half, 2 * _normal((-0.5 - centre) / scale)]
        quantised = pmf_to_quantized_cdf(torch.tensor(mass, dtype=torch.float64), model.entropy_coder_precision)
        row[: len(quantised)] = quantised.numpy()
    lengths = np.array([2 * centre + 3 for centre in centres], dtype=np.int32)
    return Tables(cdf, lengths, -np.array(centres, dtype=np.int32), model.entropy_coder)


def bottleneck_tables(model: EntropyModel) -> Tables:
    """The tables that CompressAI's `update()` makes, in float64, on the CPU."""
    double = in_float64(model).cpu()
    assert isinstance(double, EntropyBottleneck)
    double.update(force=True)
    return Tables.of(double)


def _normal(x: float) -> float:
    """The standard normal distribution function; erfc keeps its precision in the left tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
