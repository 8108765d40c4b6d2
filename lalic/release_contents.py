"""The files of a new release bundle (see lalic.release)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lalic.card import Licence, model_card
from lalic.codec.bitstream import label_of
from lalic.errors import LalicError
from lalic.files import fsync_folder, sha256_of, write_json, write_text
from lalic.metrics import json_ready
from lalic.model import published_state_dict
from lalic.model.compact import compact_state_dict
from lalic.model.weights import deduplicate
from lalic.reference_picture import code_reference
from lalic.release_files import CARD, CONFIG, EVALUATION, FLOAT16, FORMAT, METRICS, REFERENCE, SAFETENSORS, SUMS
from lalic.release_rates import quality_label
from lalic.versions import versions

if TYPE_CHECKING:
    from lalic.release import Weights


def fill_bundle(folder: Path, name: str, weights: Weights, recipe: Mapping[str, Any], licence: Licence) -> None:
    """Write the files of the bundle `name` into an empty folder, and wait until they are on the disk."""
    _write_weights(folder, name, weights)
    config = _config(name, weights, recipe, licence)
    label = label_of(config["loss"], weights.model.rates is not None)
    try:
        told = code_reference(weights.model, weights.fingerprint, label, folder / REFERENCE)
    except LalicError as error:
        raise LalicError(f"{weights.source} cannot code the reference picture: {error}") from error
    write_json(folder / CONFIG, config | {"reference": json_ready(told)})
    metrics = json_ready(weights.metrics)
    write_json(folder / METRICS, metrics)
    if weights.evaluations:
        write_json(folder / EVALUATION, json_ready(weights.evaluations))
    sums = {f.name: sha256_of(f) for f in sorted(folder.iterdir())}
    card = model_card(config, metrics, recipe, weights.model, sums, weights.evaluations, licence)
    write_text(folder / CARD, card)
    sums[CARD] = sha256_of(folder / CARD)
    write_text(folder / SUMS, "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(folder)


def _write_weights(folder: Path, name: str, weights: Weights) -> None:
    state = published_state_dict(weights.model)
    check_finite(state, weights.source)
    if weights.precision == FLOAT16:
        once = compact_state_dict(weights.model, weights.source)
    else:
        once = deduplicate(state)
        if weights.model.rates is None:  # the published code has no gains
            with _told_in_one_line(folder):
                torch.save(state, folder / f"{name}.pth")
    with _told_in_one_line(folder):
        # One metadata entry only: their order in the file is random, and equal weights shall give equal files.
        save_file(once, folder / SAFETENSORS, metadata={"format": "pt"})
    # save_file makes it readable for the owner alone.
    (folder / CONFIG).touch()
    shutil.copymode(folder / CONFIG, folder / SAFETENSORS)


@contextmanager
def _told_in_one_line(folder: Path) -> Iterator[None]:
    """Both libraries raise errors of their own where the system has no more room."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free >> 20
        raise LalicError(
            f"{folder.parent}: the weights cannot be written; {free} MiB are free on this disk: make room or choose "
            "another --output"
        ) from error


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """LalicError naming the first tensor that holds NaN or infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LalicError(f"{name} holds numbers that are not finite, in {key}: take another checkpoint")


def _config(name: str, weights: Weights, recipe: Mapping[str, Any], licence: Licence) -> dict[str, Any]:
    loss = weights.loss
    several = {"quality": loss["quality"], "lambdas": loss["lambdas"]} if "lambdas" in loss else None
    return {
        "format": FORMAT,
        "name": name,
        "model": weights.model.config,
        "loss": {"metric": loss["metric"], **(several or {"lambda": float(loss["lambda"])})},
        "quality": quality_label(loss, weights.model.config.get("rungs")),
        "step": weights.step,
        "weights": weights.kind,
        "precision": weights.precision,
        "fingerprint": weights.fingerprint,
        **({"folded": weights.folded} if weights.folded else {}),
        "training": dict(recipe),
        "license": licence._asdict(),
        "versions": versions("lalic", "torch", "compressai"),
    }
