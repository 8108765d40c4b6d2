"""Checkpoints: the whole state of a run in one folder that is either complete or not there.

    RUN/checkpoints/step-00001000/
        model.pt        state dict of the model
        ema.pt          with train.ema: the averaged weights, in the layout of model.pt
        optimizer.pt    both optimisers
        rng.pt          random number generators of every rank
        config.yaml     the run's config
        meta.json       step, stage, position, best so far, validation metrics, versions: for people and programs
        MANIFEST.json   size and SHA-256 of every file above, written last

A folder is written under a temporary name, synced, read back, and renamed. The sums in the manifest are those of the
bytes that were handed to the system, so reading back finds what went wrong on their way to the disk, before the
folder has its name and long before an older one is deleted for it. Which one is the latest is decided by what is
complete on the disk: a folder whose manifest does not hold is passed over for the one before. Nothing but tensors
and plain values is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lalic.errors import LalicError
from lalic.files import fsync_folder, json_text, sha256_of, write_json
from lalic.training.summed import SummedFile, read_back, save_tensors

if TYPE_CHECKING:
    from lalic.model import LALIC

logger = logging.getLogger("lalic.train")

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
META = "meta.json"
WEIGHTS, AVERAGED = "model.pt", "ema.pt"
_NAME = re.compile(r"step-(\d{8,})$")
_SAVING, _REPLACED, _DELETED = _TEMPORARY = (".saving-", ".replaced-", ".deleted-")


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return run / FOLDER / f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    *,
    tensors: Mapping[str, Any],
    texts: Mapping[str, str],
    meta: Mapping[str, Any],
    abandoned: Callable[[], bool] = lambda: False,
) -> Path:
    """Write one checkpoint: `tensors` {file: what torch.save takes}, `texts` {file: text}, and meta.json.

    When anything fails (a full disk, or bytes that do not read back: OSError), nothing is left of it and no other
    checkpoint is touched. `abandoned` is asked between pieces; when it says so, the same happens with Abandoned.
    """
    final = folder_of(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{_SAVING}{final.name}")
    remove(temporary)
    temporary.mkdir()
    sums: dict[str, dict[str, Any]] = {}
    texts = {**texts, META: json_text(meta)}
    try:
        for name, value in {**tensors, **texts}.items():
            with SummedFile(temporary / name, abandoned) as file:
                if name in texts:
                    file.write(value.encode())
                else:
                    save_tensors(value, file)
                file.flush()
                _sync(file.fileno())
            sums[name] = {"bytes": file.bytes, "sha256": file.sha256}
        write_json(temporary / MANIFEST, {"version": 1, "files": dict(sorted(sums.items()))})
        for name, entry in sums.items():
            read_back(temporary / name, entry["sha256"], abandoned)
        _move_into_place(temporary, final)
    except BaseException:
        remove(temporary)
        raise
    return final


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _move_into_place(temporary: Path, final: Path) -> None:
    fsync_folder(temporary)
    replaced = None
    if final.exists():
        # A damaged one as a rule: a complete one would have been resumed from.
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        remove(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    if replaced:
        remove(replaced)


def problem(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is complete; `contents` compares the sums too."""
    manifest = checkpoint / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if contents and sha256_of(file) != entry["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
        return None if META in files else f"{META} is missing"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"


def steps_on_disk(run: Path) -> list[int]:
    """Steps of all checkpoint folders of a run, complete or not, newest first."""
    folder = run / FOLDER
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _NAME.match(name))), reverse=True)


def find_checkpoint(run_dir: str | Path, step: int | None = None) -> Path:
    """The newest complete checkpoint of a run, or the one after `step` steps.

    Damaged ones are passed over with a warning. LalicError when there is none.
    """
    run = Path(run_dir)
    steps = steps_on_disk(run)
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise LalicError(f"{run} has no checkpoint of step {step} (there are: {there})")
        if reason := problem(folder_of(run, step)):
            raise LalicError(f"{folder_of(run, step)} is damaged: {reason}")
        return folder_of(run, step)
    for candidate in steps:
        reason = problem(folder_of(run, candidate))
        if reason is None:
            return folder_of(run, candidate)
        logger.warning("checkpoint %s is passed over: %s", folder_of(run, candidate), reason)
    if steps:
        raise LalicError(f"none of the {len(steps)} checkpoints in {run / FOLDER} is complete")
    raise LalicError(f"{run} has no checkpoint" if run.is_dir() else f"no such run folder: {run}")


def read_meta(checkpoint: str | Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint folder: step, stage, position, model, loss, best, metrics, versions ..."""
    path = Path(checkpoint) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LalicError(f"{checkpoint} is no checkpoint: {META} is missing or damaged") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise LalicError(f"{path} is damaged: it holds no step")
    return meta


def best_on_disk(run: Path) -> int | None:
    """Step of the complete checkpoint with the lowest validation loss of its own, None when none was validated.

    It is the best step of the run unless that could not be written. Completeness is judged by sizes.
    """
    losses: dict[int, float] = {}
    for step in steps_on_disk(run):
        if problem(folder_of(run, step), contents=False) is None:
            metrics = read_meta(folder_of(run, step)).get("metrics") or {}
            if metrics.get("step") == step and math.isfinite(metrics.get("loss", math.nan)):
                losses[step] = metrics["loss"]
    return min(losses, key=lambda step: (losses[step], step), default=None)


def load_tensors(checkpoint: str | Path, name: str) -> Any:
    """One of a checkpoint's .pt files, on the CPU; LalicError when it is not readable safely."""
    import torch

    path = Path(checkpoint) / name
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise LalicError(f"{path} is missing or damaged: {str(error).splitlines()[0][:200]}") from error


def has_average(checkpoint: str | Path) -> bool:
    """Whether a folder is a checkpoint with averaged weights."""
    return (Path(checkpoint) / AVERAGED).is_file()


def load_model(checkpoint: str | Path, weights: Literal["ema", "raw"] | None = None) -> LALIC:
    """The model of a checkpoint folder, float32, on the CPU, in evaluation mode.

    `weights`: the averaged ones or those that were trained; None: averaged ones where there are any.
    """
    from lalic.model import LALIC

    if weights == "ema" and not has_average(checkpoint):
        raise LalicError(f"{checkpoint} has no averaged weights: it was trained without train.ema")
    averaged = weights == "ema" or (weights is None and has_average(checkpoint))
    meta = read_meta(checkpoint)
    try:
        model = LALIC(**meta["model"])
        model.load_state_dict(load_tensors(checkpoint, AVERAGED if averaged else WEIGHTS))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LalicError(f"{checkpoint} holds no LALIC model: {' '.join(str(error).split())[:200]}") from error
    return model.eval()


def prune(
    run: Path, written: int, *, keep: int, keep_every: int | None = None, protected: Collection[int] = ()
) -> None:
    """Delete old checkpoints, after that of step `written` is in place and was read back.

    What stays: the `keep` newest complete ones up to `written`, complete ones whose step is a multiple of
    `keep_every`, and those of `protected` steps. Nothing newer than the oldest of the `keep` is touched. A newer one
    than `written` was not resumed from, because it is damaged: it does not count. Completeness is judged by sizes
    here; reading all contents each time would take longer than writing, and the newest has just been read.
    """
    complete = [s for s in steps_on_disk(run) if s <= written and problem(folder_of(run, s), contents=False) is None]
    if len(complete) < keep:
        return
    for_ever = {s for s in complete if keep_every is not None and s % keep_every == 0}
    for step in steps_on_disk(run):
        if step < complete[keep - 1] and step not in for_ever and step not in protected:
            doomed = folder_of(run, step).with_name(f"{_DELETED}step-{step:08d}")
            remove(doomed)
            # Renamed first: half a checkpoint never stands under a checkpoint's name.
            os.rename(folder_of(run, step), doomed)
            remove(doomed)


def remove_leftovers(run: Path) -> None:
    """Delete what an interrupted save or prune left behind; one that was just being replaced gets its name back."""
    folder = run / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if path.name.startswith(_REPLACED) and not final.exists():
            os.rename(path, final)
        elif path.name.startswith(_TEMPORARY):
            remove(path)


def remove(folder: Path) -> None:
    """Delete a folder and all in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
