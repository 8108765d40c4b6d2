"""Release bundles: a folder that holds one model in a form that people can keep, check and use.

    release/lalic-mse-q3/
        lalic-mse-q3.pth     plain state dict in the published layout; absent in a compact bundle and with several rates
        model.safetensors    the same tensors, the hyper transforms under their short names only; in a compact bundle
                             what was learned, in float16
        config.json          architecture, metric, lambda, quality label, step, averaged or raw, precision, fingerprint,
                             the training, licence, versions, what the reference picture gives
        metrics.json         validation metrics of the checkpoint, {} when there are none
        evaluation.json      what `lalic eval` measured; absent where nothing was given to `lalic export --eval`
        reference.lalic      a generated picture, coded; `lalic verify` decodes it (lalic.reference_picture)
        README.md            model card
        SHA256SUMS           checksums of all the files above, for `sha256sum -c`

A model for several rates is one bundle, release/lalic-mse-vbr; lalic.release_rates folds bundles of one rate out of it.
The model of a compact bundle is exactly its float16 numbers (lalic.model.compact): fingerprint, reference picture and
evaluation are of these. Nothing in a bundle is ever unpickled as code.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lalic.card import Licence
from lalic.errors import LalicError
from lalic.fetch import address_of, resolve
from lalic.fetch_cache import forget, without_suffix
from lalic.files import fsync_folder
from lalic.ladder import lambda_of, loss_name
from lalic.model import LALIC, fingerprint, load_weights
from lalic.model.compact import is_rounded, rounded
from lalic.model.lalic import check_architecture
from lalic.release_builtin import damaged, is_builtin
from lalic.release_contents import fill_bundle
from lalic.release_files import (
    CONFIG,
    EVALUATION,
    FLOAT16,
    FLOAT32,
    METRICS,
    SAFETENSORS,
    SUMS,
    read_extra,
    verify_bundle,
)
from lalic.release_rates import range_loss
from lalic.versions import versions

__all__ = [
    "Kind",
    "Weights",
    "in_precision",
    "open_checkpoint",
    "open_weights",
    "stem_of",
    "verify_bundle",
    "versions",
    "write_bundle",
]

Kind = Literal["ema", "raw"]


@dataclass
class Weights:
    """A model in evaluation mode and what is known about where it comes from."""

    model: LALIC
    name: str
    source: str
    step: int | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    """{"metric", "lambda"}, of several rates {"metric", "quality": [lowest, highest], "lambdas"}; empty when the file
    does not say."""
    metrics: dict[str, Any] = field(default_factory=dict)
    kind: Kind | None = None
    """Averaged weights or those of the last step; None when the file does not say."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of a bundle: what its configuration says of the training, as label -> text or number."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Of a bundle: its evaluation.json, see lalic.card_evaluation."""
    precision: str = FLOAT32
    """Of a bundle: FLOAT32 or FLOAT16, that of its model.safetensors. The model itself is float32 always."""
    licence: Licence | None = None
    """Of a bundle: that of its card, where its configuration tells it."""
    folded: dict[str, Any] = field(default_factory=dict)
    """Of one rate that was folded out of several: {"name", "quality", "fingerprint"} of the weights of all rates."""

    @cached_property
    def fingerprint(self) -> str:
        """`lalic.model.fingerprint` of the model, computed once: it takes seconds for the published size."""
        return fingerprint(self.model)


def in_precision(weights: Weights, precision: str) -> Weights:
    """The weights as a bundle of a precision holds them: FLOAT16 rounds them, which makes them other weights.

    Evaluations of other numbers are left out. Raises LalicError for numbers that float16 does not reach.
    """
    if precision == FLOAT16 and not is_rounded(weights.model):
        weights = replace(weights, model=rounded(weights.model, weights.source), evaluations=[])
    return replace(weights, precision=precision)


def open_weights(place: str | Path, kind: Kind | None = None) -> Weights:
    """Open weights of any kind: a file, a verified release bundle, a checkpoint folder, a training run; by path, by
    the name of a release or by URL (see lalic.fetch).

    Of a training run, the newest complete checkpoint is taken; of a checkpoint, the averaged weights where it has
    any, or those of a `kind`. Raises LalicError in one line.
    """
    address = address_of(place)
    path = resolve(place)
    try:
        return _open_path(path, kind)
    except LalicError as error:
        if kind is None and is_builtin(path):
            raise damaged(path, error) from error
        if address is None:
            raise
        if path.is_file():
            forget(path)  # whatever it is, it is not kept for weights
        raise LalicError(f"{address.shown}: {error}") from error


def _open_path(path: Path, kind: Kind | None) -> Weights:
    if kind is not None and not ((path / "meta.json").exists() or (path / "checkpoints").is_dir()):
        raise LalicError(f"{path} is no training run and no checkpoint folder: it holds one kind of weights only")
    if not path.is_dir():
        model = load_weights(path)
        return Weights(model, stem_of(path), str(path), loss=_loss_from_name(stem_of(path), model))
    if (path / CONFIG).exists() and (path / SAFETENSORS).exists() and not (path / "meta.json").exists():
        return _open_bundle(path)
    if (path / "meta.json").exists() or (path / "checkpoints").is_dir():
        return open_checkpoint(path, kind=kind)
    raise LalicError(f"{path} is neither a release bundle nor a training run nor a checkpoint folder")


def open_checkpoint(path: Path, step: int | None = None, kind: Kind | None = None) -> Weights:
    """Open a training run (its newest complete checkpoint, or that of `step`) or one checkpoint's folder."""
    from lalic.training.checkpoint import find_checkpoint, has_average, load_model, problem, read_meta

    if (path / "meta.json").exists():
        folder = path
        if reason := problem(folder):
            raise LalicError(f"{folder} is damaged: {reason}; take another checkpoint of the run")
    else:
        folder = find_checkpoint(path, step)
    meta = read_meta(folder)
    name = f"{folder.parent.parent.resolve().name}-{folder.name}"
    kind = kind or ("ema" if has_average(folder) else "raw")
    model = load_model(folder, kind).eval()
    loss, metrics = dict(meta.get("loss") or {}), dict(meta.get("metrics") or {})
    if metrics.get("weights", kind) != kind:
        metrics = {}  # measured on the other weights
    return Weights(model, name, str(folder), meta.get("step"), loss, metrics, kind)


def _open_bundle(folder: Path) -> Weights:
    config = verify_bundle(folder, only=(CONFIG, SAFETENSORS))
    model = _as_told(load_weights(folder), config.get("model"), folder)
    name, loss = str(config.get("name", folder.name)), dict(config.get("loss") or {})
    weights = Weights(model, name, str(folder), config.get("step"), loss, kind=config.get("weights"))
    weights.training = dict(config.get("training") or {})
    weights.precision = FLOAT16 if config.get("precision") == FLOAT16 else FLOAT32
    weights.licence = Licence.told(config.get("license"))
    weights.folded = dict(config.get("folded") or {})
    weights.metrics = read_extra(folder, METRICS, {})
    weights.evaluations = read_extra(folder, EVALUATION, [])
    if weights.fingerprint != config["fingerprint"]:
        raise LalicError(f"{folder}: the weights are not those that its {CONFIG} names; get the bundle again")
    return weights


def _as_told(model: LALIC, told: Any, folder: Path) -> LALIC:
    """The model with the `N` of its configuration, which the tensors' shapes do not tell where it has no effect."""
    try:
        told = check_architecture(**told)
    except (TypeError, ValueError) as error:
        raise LalicError(
            f"{folder}: {CONFIG} tells an architecture that this version does not know ({error}); "
            "get the bundle again, or install a newer version"
        ) from error
    if any(told.get(key) != model.config.get(key) for key in told.keys() | model.config.keys() if key != "N"):
        raise LalicError(f"{folder}: the weights have another architecture than {CONFIG} tells; get the bundle again")
    if told == model.config:
        return model
    try:
        named = LALIC(**told)
        named.load_state_dict(model.state_dict())
    except (TypeError, ValueError, RuntimeError) as error:
        raise LalicError(f"{folder}: the weights do not have the widths that {CONFIG} tells with N") from error
    return named.eval()


def write_bundle(
    weights: Weights,
    output: Path,
    *,
    force: bool = False,
    recipe: Mapping[str, Any] | None = None,
    licence: Licence | None = None,
) -> Path:
    """Write `output/NAME/` whole or not at all; NAME follows from the loss (lalic.ladder).

    An existing bundle of the same content is left as it is; another one is replaced only with `force`.
    `recipe` is what the model card tells about the training; `licence` is that of the weights, by default what they
    had. Weights of precision FLOAT16 must be rounded (`in_precision`). Raises LalicError for weights that are not
    finite, or that cannot decode what they code.
    """
    licence = licence or weights.licence or Licence()
    name = loss_name(weights.loss)
    target = output / name
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill_bundle(temporary, name, weights, recipe or weights.training, licence)
        _move_into_place(temporary, target, force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _move_into_place(temporary: Path, target: Path, force: bool) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif _same_bundle(temporary, target):
        return
    elif not force:
        raise LalicError(f"{target} exists and holds something else: add --force to replace it")
    else:
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    fsync_folder(target.parent)


def _same_bundle(new: Path, existing: Path) -> bool:
    try:
        verify_bundle(existing)
        return (existing / SUMS).read_text() == (new / SUMS).read_text()
    except (LalicError, OSError):
        return False


def stem_of(path: Path) -> str:
    """`ckpt/lalic-mse-q3.pth.tar` -> `lalic-mse-q3`."""
    return without_suffix(path.name)


def _loss_from_name(name: str, model: LALIC) -> dict[str, Any]:
    """The loss that a file's name tells, where it is a release name that fits the model; else nothing."""
    rungs = model.config.get("rungs")
    match = re.search(r"lalic-(mse|ms-ssim)-(?:q([1-6])|vbr)$", name)
    if match is None or (match[2] is None) == (rungs is None):
        return {}
    return range_loss(match[1], rungs) if rungs else {"metric": match[1], "lambda": lambda_of(match[1], int(match[2]))}
