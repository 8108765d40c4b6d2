"""What a run reads before its first step: shards, images to validate on, the schedule, the weights it begins with."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalic.config import LossSection, RunConfig
from lalic.data.images import list_images
from lalic.data.loader import eligible_samples
from lalic.data.reader import Reader
from lalic.data.source import open_shards
from lalic.errors import LalicError
from lalic.fetch import resolve
from lalic.ladder import quality_of
from lalic.model import LALIC, load_weights
from lalic.model.rates import PREFIX
from lalic.release_training import started_from
from lalic.remote import without_password
from lalic.training import checkpoint
from lalic.training.distributed import seed_from
from lalic.training.ema import read_average
from lalic.training.schedule import Schedule, plan
from lalic.training.typed_yaml import as_mapping

logger = logging.getLogger("lalic.train")


@dataclass(frozen=True)
class Inputs:
    """What a run reads before its first step."""

    reader: Reader
    images: list[Path]
    """To validate on."""
    schedule: Schedule
    model: LALIC
    saved: dict[str, Any] | None
    """Of the checkpoint to resume from: "meta", "optimizer", "average" (None: it has none) and "rng"."""
    origin: dict[str, Any]
    """Of a new run with `train.init_from`: {"init_from": {"name", "step"}}, for events.jsonl."""


def read_inputs(config: RunConfig, resume_from: Path | None) -> Inputs:
    """Everything from the disk, on one rank. Raises LalicError for what is missing or does not fit."""
    data = config.data
    reader = open_shards(data.shards, endpoint=data.endpoint, cache=data.cache, cache_size=data.cache_size)
    index = reader.index
    images = list_images(data.val) if data.val else []

    def samples(crop: int) -> int:
        return len(eligible_samples(index, crop))

    schedule = plan(config.stages, config.train.batch_size, samples)
    seed = seed_from(config.run.seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if resume_from is None:
        return Inputs(reader, images, schedule, new_model(config), None, _origin(config))
    saved = {
        "meta": checkpoint.read_meta(resume_from),
        "optimizer": checkpoint.load_tensors(resume_from, "optimizer.pt"),
        "average": read_average(resume_from),
        "rng": checkpoint.load_tensors(resume_from, "rng.pt"),
    }
    if saved["meta"]["shards"] != index.fingerprint:
        raise LalicError(
            f"{without_password(data.shards)} does not hold the samples that this run was started on: point "
            "data.shards at them, or use another run.dir"
        )
    return Inputs(reader, images, schedule, checkpoint.load_model(resume_from, "raw"), saved, {})


def new_model(config: RunConfig) -> LALIC:
    """The model of a new run: fresh weights, or those of `train.init_from`."""
    model = LALIC(**config.model.arguments(), rungs=config.loss.rungs)
    if model.rates is not None:
        model.rates.initialise(config.loss.lambdas)
    if config.train.init_from is None:
        return model
    source = _source(config.train.init_from)
    found = checkpoint.load_model(source) if (source / checkpoint.META).exists() else load_weights(source)
    fresh_gains = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}
    try:
        model.load_state_dict({**fresh_gains, **_fitting(found, config.loss, source)})
    except RuntimeError as error:
        sizes = {name: value for name, value in found.config.items() if name != "rungs"}
        differing = [f"{k} {v} there, {model.config[k]} here" for k, v in sizes.items() if v != model.config[k]]
        raise LalicError(
            f"train.init_from: {source} is of another architecture than the config's model section "
            f"({'; '.join(differing)})"
        ) from error
    logger.info("weights from %s%s", source, ", averaged" if checkpoint.has_average(source) else "")
    return model


def _fitting(found: LALIC, loss: LossSection, source: Path) -> dict[str, Tensor]:
    """The state of a model that was found, for a run with this loss: of its rates those that the run has.

    A model of one rate has no gains to give. Raises LalicError for rates that it lacks.
    """
    if found.rates is None:
        return found.state_dict()
    has: list[int] = found.config["rungs"]
    single = quality_of(loss.metric, loss.multiplier) if loss.rungs is None else None
    if not set(loss.rungs or (single,)) <= set(has):
        asked = f"loss.quality={as_mapping(loss.quality)}" if loss.quality else f"loss.lambda={loss.lmbda:g}"
        raise LalicError(f"train.init_from: {source} has the rates {has[0]} to {has[-1]}, and {asked} needs others")
    if loss.rungs is None:
        return found.at(float(single or 0)).state_dict()
    rows = slice(has.index(loss.rungs[0]), has.index(loss.rungs[-1]) + 1)
    return {name: t[rows] if name.startswith(PREFIX) else t for name, t in found.state_dict().items()}


def _source(init_from: str) -> Path:
    """The weights file, bundle or checkpoint folder that `train.init_from` means."""
    source = resolve(init_from)
    return checkpoint.find_checkpoint(source) if (source / checkpoint.FOLDER).is_dir() else source


def _origin(config: RunConfig) -> dict[str, Any]:
    init_from = config.train.init_from
    return {} if init_from is None else {"init_from": started_from(init_from, _source(init_from))}
