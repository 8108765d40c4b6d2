"""A model of several rates for the tests of codec and evaluation: random, and finer at higher qualities."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from lalic.files import sha256_of, write_json
from lalic.ladder import MSE, range_name
from lalic.model import LALIC, fingerprint, published_state_dict
from lalic.model.weights import deduplicate
from lalic.release_files import CONFIG, FORMAT, SAFETENSORS, SUMS

SIZES = {"N": 16, "dims": (16, 16, 16, 32, 16, 16), "depths": (0, 1, 1, 1), "groups": (16, 16)}


def rates_model(seed: int = 0, rungs: tuple[int, ...] = tuple(MSE)) -> LALIC:
    """A model of the `rungs` whose gains differ from channel to channel, with latents that are spread out."""
    torch.manual_seed(seed)
    model = LALIC(**SIZES, rungs=rungs).eval()
    assert model.rates is not None
    model.rates.initialise([MSE[rung] for rung in rungs])
    with torch.no_grad():
        model.rates.gain.add_(0.1 * torch.randn_like(model.rates.gain))
        model.rates.inverse_gain.add_(0.1 * torch.randn_like(model.rates.inverse_gain))
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    model.update()
    return model


def save_rates(model: LALIC, path: Path) -> Path:
    """Write the model as a .safetensors file."""
    save_file(deduplicate(published_state_dict(model)), path)
    return path


def write_rates_bundle(model: LALIC, folder: Path) -> Path:
    """The bundle `lalic-mse-vbr` of a model, with the files that loading needs."""
    bundle = folder / range_name("mse")
    bundle.mkdir(parents=True)
    save_rates(model, bundle / SAFETENSORS)
    rungs = model.config["rungs"]
    loss = {"metric": "mse", "quality": [rungs[0], rungs[-1]], "lambdas": [MSE[rung] for rung in rungs]}
    config = {"format": FORMAT, "name": bundle.name, "model": model.config, "loss": loss, "quality": None}
    write_json(bundle / CONFIG, config | {"fingerprint": fingerprint(model), "precision": "float32"})
    sums = {name: sha256_of(bundle / name) for name in (CONFIG, SAFETENSORS)}
    (bundle / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return bundle
