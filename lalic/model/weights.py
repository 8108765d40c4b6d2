"""Reading and writing LALIC weights: the published layout, and every variant of it found in the wild."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lalic.errors import LalicError
from lalic.model.rates import RUNGS, check_rungs

if TYPE_CHECKING:
    from lalic.model.lalic import LALIC

WRAPPERS = ("state_dict", "model_state_dict")
"""Keys under which training checkpoints keep the state dict."""

CODING_TABLES = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
"""Buffers that `update()` derives: empty in published files, and never read from any file."""

MERGED_KERNEL = "conv5x5_reparam.weight"
CONTEXT_RATE = 8
"""Hidden width of the blocks in the published channel contexts, in channels of y."""
AGGREGATION_RATE = 2
"""Hidden width of the published parameter aggregation, in the layer's own width."""
SHARED = {"latent_codec.hyper.h_a.": "h_a.", "latent_codec.hyper.h_s.": "h_s."}
"""The hyper transforms stand twice in a state dict: long name -> short name."""

_OLD_BOTTLENECK = re.compile(r"(entropy_bottleneck\.)_(matrix|bias|factor)(\d+)$")
_NEW_NAME = {"matrix": "matrices", "bias": "biases", "factor": "factors"}


def normalise(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict in the published layout, from any variant.

    Unwraps training checkpoints, strips DataParallel's and torch.compile's prefixes, renames the entropy
    bottleneck's parameters of older CompressAI versions, empties coding tables, and gives the hyper transforms
    both their names. The input is not changed.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.").replace("_orig_mod.", "")
        name = _OLD_BOTTLENECK.sub(lambda m: f"{m[1]}{_NEW_NAME[m[2]]}.{m[3]}", name)
        if name.rsplit(".", 1)[-1] in CODING_TABLES:
            tensor = tensor.new_empty(0)
        out[name] = tensor
    for long, short in SHARED.items():
        _copy_names(out, long, short)
        _copy_names(out, short, long)
    return out


def _copy_names(state: dict[str, Tensor], source: str, target: str) -> None:
    for name in [n for n in state if n.startswith(source)]:
        state.setdefault(target + name.removeprefix(source), state[name])


def deduplicate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the long names of the hyper transforms: safetensors refuses tensors that share memory.

    `normalise` puts them back.
    """
    return {n: t for n, t in state_dict.items() if not n.startswith(tuple(SHARED))}


def infer_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `LALIC` from the shapes in a normalised state dict; KeyError or ValueError if it is none."""
    g_a, g_a_depths = _stages(state_dict, "g_a.")
    h_a, h_a_depths = _stages(state_dict, "h_a.")
    if len(g_a) != 4 or len(h_a) != 2:
        raise ValueError(f"g_a has {len(g_a)} and h_a {len(h_a)} convolutions, not 4 and 2")
    groups: list[int] = []
    prefix = "latent_codec.y.latent_codec.y{}."
    while (name := prefix.format(len(groups)) + "context_prediction.weight") in state_dict:
        groups.append(state_dict[name].shape[1])
    dims = [*(_out_channels(w) for w in g_a), *(_out_channels(w) for w in h_a)]
    widths = [
        state_dict[prefix.format(k) + f"entropy_parameters.{i}.mix.weight"].shape[0]
        for k in range(len(groups))
        for i in (0, 2)
    ]
    aggregated, hidden = state_dict[prefix.format(0) + "entropy_parameters.0.value.weight"].shape
    context = state_dict.get("latent_codec.y.channel_context.y1.1.ffn.value.weight")
    # Widths are max(2 N, ramp): the smallest is 2 N, or the floor has no effect and any smaller N is the same.
    return {
        "N": min(128, min(widths) // 2),
        "M": dims[3],
        "dims": dims,
        "depths": [*g_a_depths, *h_a_depths],
        "groups": groups,
        "context_rate": CONTEXT_RATE if context is None else context.shape[1] // context.shape[0],
        "aggregation_rate": hidden // aggregated,
        **({"rungs": check_rungs(state_dict[RUNGS].tolist())} if RUNGS in state_dict else {}),
    }


def _stages(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[list[Tensor], list[int]]:
    """Convolution weights of an analysis transform, and the number of blocks between them."""
    names = (n.removeprefix(prefix).split(".") for n in state_dict if n.startswith(prefix))
    convolutions = sorted(int(n[0]) for n in names if len(n) == 2 and n[1] == "weight")
    depths = [b - a - 1 for a, b in itertools.pairwise(convolutions)]
    return [state_dict[f"{prefix}{i}.weight"] for i in convolutions], depths


def _out_channels(weight: Tensor) -> int:
    return weight.shape[0]


@torch.no_grad()
def published_state_dict(model: LALIC) -> dict[str, Tensor]:
    """The published layout: float32 on the CPU, both names of h_a and h_s, merged kernels, empty coding tables.

    Weights of the checkerboard convolutions are zeroed where their mask hides them: optimisers let them drift.
    """
    state = normalise(model.state_dict())
    for name in [n for n in state if n.endswith(".mask")]:
        weight = name.removesuffix("mask") + "weight"
        state[weight] = torch.where(state[name] != 0, state[weight], torch.zeros_like(state[weight]))
    return {
        n: (t.detach().float() if t.is_floating_point() else t.detach()).cpu().contiguous().clone()
        for n, t in state.items()
    }


def fingerprint(model: LALIC) -> str:
    """SHA-256 (hexadecimal) of what was learned: names, shapes and bytes of the published float32 tensors.

    Derived tensors are left out, so the fingerprint does not depend on where they were computed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(deduplicate(published_state_dict(model)).items()):
        if name.endswith(MERGED_KERNEL) or not tensor.numel() or not tensor.is_floating_point():
            continue
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Tensors of a .safetensors or torch file, unpickling nothing but tensors; LalicError in one line."""
    path = Path(path)
    if not path.exists():
        raise LalicError(f"no such weights file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # On damaged bytes the readers raise whatever they stumble over: IndexError, AssertionError, struct.error ...
    except Exception as error:
        if known := _known_mistake(path):
            raise LalicError(f"{path} {known}") from error
        # What the unpickler says of a stray byte is often a bare number.
        reason = str(error).strip().split("\n")[0][:200]
        told = f": {reason}" if " " in reason else ""
        raise LalicError(f"{path} is damaged or is not a weights file that can be read safely{told}") from error


def _known_mistake(path: Path) -> str:
    """What people save under a weights file's name without wanting to; "" for anything else."""
    if not path.is_file():
        return "is not a file"
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        return "is empty: it is no weights file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not a weights file: get the file itself, behind the page's download link"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights file: run git lfs pull"
    return ""


def load_weights(path: str | Path) -> LALIC:
    """A model in evaluation mode from a .pth, .pt, .pth.tar or .safetensors file or a release bundle's folder.

    Raises LalicError in one line when there is no such file, when it is damaged, or when it is not LALIC's.
    """
    from lalic.model.lalic import LALIC  # the class needs this module

    path = Path(path)
    file = _bundle_weights(path) if path.is_dir() else path
    state = read_state_dict(file)
    if not isinstance(state, Mapping):
        raise LalicError(f"{file} holds a {type(state).__name__}, not LALIC weights")
    try:
        model = LALIC.from_state_dict(state)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise LalicError(f"{file} is not a LALIC checkpoint: {error.args[0] if error.args else error}") from error
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:300]
        raise LalicError(f"{file} is a checkpoint of another architecture: {difference}") from error
    return model.eval()


def _bundle_weights(folder: Path) -> Path:
    file = folder / "model.safetensors"
    if not file.exists():
        raise LalicError(f"{folder} is not a release bundle: it has no model.safetensors")
    return file
