"""Compact weights: what was learned, each tensor once, in float16.

The model of such a file is exactly these numbers as float32, so whoever rounds weights has other weights: another
fingerprint, and to be measured anew. What the constructor knows by itself is not stored: masks, bounds, coding
tables, and the merged kernels, which follow from what was learned. Of the checkerboard's 5x5 kernels, which a mask
covers with zeros at 13 of their 25 places, the 12 others are: (2 C, C, 12) for (2 C, C, 5, 5), row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lalic.errors import LalicError
from lalic.model.rates import RUNGS
from lalic.model.weights import MERGED_KERNEL, deduplicate, published_state_dict

if TYPE_CHECKING:
    from lalic.model.lalic import LALIC


def learned_names(model: LALIC) -> list[str]:
    """Names of the tensors that a compact file holds: the parameters, those of h_a and h_s under their short names."""
    return sorted(deduplicate(model.state_dict()).keys() - _constants(model))


def compact_state_dict(model: LALIC, name: str) -> dict[str, Tensor]:
    """The float16 tensors of a compact file; `model` must be `rounded`.

    Raises LalicError, `name` standing for the weights, when a constant is not the one that the constructor makes: a
    compact file would lose it.
    """
    state = published_state_dict(model)
    own = published_state_dict(type(model)(**model.config))
    for key in sorted(_constants(model)):
        if not key.endswith(MERGED_KERNEL) and not torch.equal(own[key], state[key]):
            raise LalicError(f"{name} has another {key} than this program: export it as float32, which keeps it")
    for weight, seen in _masked(own).items():
        state[weight] = state[weight].flatten(2)[..., seen]
    return {key: state[key].half().contiguous() for key in learned_names(model)}


def rounded(model: LALIC, name: str) -> LALIC:
    """A model of the same numbers rounded to float16, as float32, in evaluation mode.

    Raises LalicError, `name` standing for the weights, when one is too large for float16.
    """
    result = copy.deepcopy(model).eval()
    most = torch.finfo(torch.float16).max
    with torch.no_grad():
        for key, parameter in result.named_parameters():
            half = parameter.half()
            if not torch.isfinite(half).all() and torch.isfinite(parameter).all():
                worst = float(parameter.abs().max())
                raise LalicError(
                    f"{name} holds {worst:.6g} in {key}, and float16 ends at {most:.0f}: export it as float32"
                )
            parameter.copy_(half)
    return result


def is_rounded(model: LALIC) -> bool:
    """Whether float16 holds all numbers of the model exactly."""
    return all(torch.equal(p.half().float(), p.float()) for p in model.parameters())


def is_compact(state_dict: Mapping[str, object]) -> bool:
    """Whether all floating point numbers of a state dict are float16."""
    types = {t.dtype for t in state_dict.values() if isinstance(t, Tensor) and t.is_floating_point() and t.numel()}
    return types == {torch.float16}


def with_constants(state_dict: Mapping[str, Tensor], model: LALIC) -> dict[str, Tensor]:
    """A compact state dict with what it leaves out, taken from a `model` of its architecture."""
    own = model.state_dict()
    whole = {**{name: own[name] for name in _constants(model)}, **state_dict}
    for weight, seen in _masked(own).items():
        packed = whole.get(weight)
        # What has another shape is left as it is, for load_state_dict to refuse.
        if packed is not None and packed.ndim == 3 and packed.shape[2] == int(seen.sum()):
            spread = packed.new_zeros(*packed.shape[:2], seen.numel())
            spread[..., seen] = packed
            whole[weight] = spread.unflatten(2, own[weight].shape[2:])
    return whole


def _masked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of each masked kernel -> the places (25,) that its mask leaves."""
    masks = {name: mask for name, mask in state.items() if name.endswith(".mask")}
    return {name.removesuffix("mask") + "weight": mask[0, 0].flatten() != 0 for name, mask in masks.items()}


def _constants(model: LALIC) -> set[str]:
    """Names in the published layout, those of h_a and h_s under both, of what is no parameter and known without a file.

    The rungs of a model with several rates are stored: nothing else in a file tells them.
    """
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {RUNGS}
    return {name for name in model.state_dict() if name not in stored}
