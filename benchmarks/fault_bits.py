"""Whether a run that was disturbed is the run that was not: checkpoints, logs and curves, bit for bit."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lalic.training import checkpoint

_STATE = ("step", "total_steps", "stage", "position", "samples", "first_epoch", "model", "loss", "ema", "best")
_STATE += ("metrics", "health", "shards", "world_size", "cpu_threads")
_OF_THE_CLOCK = ("time", "seconds", "second", "share", "memory", "busy", "wait", "waited", "gib")
"""Parts of names of what is never the same twice."""


def differences(run: Path, reference: Path, step: int) -> list[str]:
    """What of the checkpoint after `step` steps is not as in the reference: model, optimisers, average, RNG, state.

    Raises LalicError or OSError where one of the two is not there.
    """
    ours, theirs = (checkpoint.folder_of(folder, step) for folder in (run, reference))
    names = [sorted(p.name for p in folder.iterdir()) for folder in (ours, theirs)]
    if names[0] != names[1]:
        return [f"files {names[0]} instead of {names[1]}"]
    found = []
    for name in names[0]:
        # Loading a thousand tensors takes seconds; the same bytes need not be loaded.
        if name.endswith(".pt") and not filecmp.cmp(ours / name, theirs / name, shallow=False):
            pair = [checkpoint.load_tensors(folder, name) for folder in (ours, theirs)]
            if name == "rng.pt":  # it also holds what was added up since the last log line, seconds too
                pair = [_timeless(each) for each in pair]
            found += _differ(*pair, name)
    state, expected = (checkpoint.read_meta(folder) for folder in (ours, theirs))
    missed = (expected["metrics"] or {}).get("step") == step and (state["metrics"] or {}).get("step") != step
    for key in _STATE:
        # A run that is asked to stop does not wait for a validation: the resumed run makes up for it.
        if state.get(key) != expected.get(key) and not (missed and key in ("best", "metrics")):
            found.append(f"meta.json: {key} {state.get(key)} instead of {expected.get(key)}")
    return found


@contextmanager
def held(run: Path, step: int) -> Iterator[Path]:
    """A run folder with that checkpoint alone, by hard links: the run itself may delete its own meanwhile.

    FileNotFoundError when it has done so already.
    """
    folder = run / "held"
    copy = checkpoint.folder_of(folder, step)
    copy.mkdir(parents=True)
    try:
        for file in checkpoint.folder_of(run, step).iterdir():
            os.link(file, copy / file.name)
        yield folder
    finally:
        shutil.rmtree(folder)


def log_differences(run: Path, reference: Path, *, may_miss: bool = False) -> list[str]:
    """As `differences`, of the numbers of every step in log.jsonl; `may_miss`: lines that a full disk has swallowed."""
    found = []
    for kind in ("train", "validation"):
        ours, theirs = (_records(folder, kind) for folder in (run, reference))
        steps, expected = ([r["step"] for r in records] for records in (ours, theirs))
        if may_miss:
            here = set(steps)
            theirs = [r for r in theirs if r["step"] in here]
            expected = [r["step"] for r in theirs]
        if steps != expected:
            found.append(f"log.jsonl: {kind} steps {steps} instead of {expected}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            found += _differ(_timeless(a), _timeless(b), f"log.jsonl: {kind} step {a['step']}")
    return found


def board_differences(run: Path, reference: Path, *, may_miss: bool = False) -> list[str]:
    """As `log_differences`, of the loss curves that TensorBoard shows."""
    found = []
    for tag in ("train/loss", "validation/loss"):
        ours, theirs = (_curve(folder, tag) for folder in (run, reference))
        if may_miss:
            there = {step for step, _ in ours}
            theirs = [(step, value) for step, value in theirs if step in there]
        if ours != theirs:
            found.append(f"TensorBoard: {tag} has steps {[s for s, _ in ours]}, or other values")
    return found


def _curve(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Every line must be whole: a resumed run puts right what a kill has cut."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not (isinstance(k, str) and _clocked(k))}
        return {k: _timeless(v) for k, v in kept.items()}
    return [_timeless(v) for v in value] if isinstance(value, list | tuple) else value


def _clocked(name: str) -> bool:
    return any(part in _OF_THE_CLOCK for part in name.lower().split("_"))


def _differ(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in _differ(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in _differ(x, y, f"{where}.{i}")]
    return [] if type(a) is type(b) and a == b else [f"{where}: {str(a)[:80]} instead of {str(b)[:80]}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
