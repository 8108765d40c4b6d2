"""What a release tells of its training: from a checkpoint's meta.json and config.yaml, and the run's log and events."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalic.durations import duration
from lalic.fetch_cache import without_suffix


def training_facts(checkpoint: Path, *, averaged: bool = False) -> dict[str, Any]:
    """What a checkpoint folder says about its training, as label -> text or number; {} for weights from elsewhere."""
    if not (checkpoint / "meta.json").exists():
        return {}
    from lalic.training.checkpoint import read_meta

    meta, config = read_meta(checkpoint), _read_yaml(checkpoint / "config.yaml")
    run = checkpoint.resolve().parent.parent
    facts: dict[str, Any] = {}
    # The name may have been given, or mended, after this checkpoint was written.
    name = _section(_read_yaml(run / "config.yaml"), "data").get("name") or _section(config, "data").get("name")
    if name:
        facts["trained on"] = " ".join(str(name).split())
    if rates := _rates(meta.get("loss")):
        facts["rates"] = rates
    facts["steps"] = meta["step"]
    train = _section(config, "train")
    if isinstance(train.get("batch_size"), int):
        facts |= {"batch size": train["batch_size"], "crops seen": meta["step"] * train["batch_size"]}
    if train.get("optimizer"):
        facts["optimiser"] = train["optimizer"]
    if start := _start(run, train.get("init_from")):
        facts["started from"] = start
    if train.get("precision"):
        facts["precision of the transforms"] = train["precision"]
    stages = [stage for stage in config.get("stages") or () if isinstance(stage, dict)]
    if stages:
        facts["stages"] = "; ".join(_stage(stage) for stage in stages)
        if isinstance(total := meta.get("total_steps"), int) and meta["step"] < total:
            facts["stages"] += f" (planned; these weights are of step {meta['step']:,} of {total:,})"
    if averaged:
        facts["decay of the averaged weights"] = str(meta["ema"]["decay"])
    if seconds := seconds_of_steps(run / "log.jsonl", meta["step"]):
        facts["time of these steps"] = f"{duration(seconds)} h"
    if machine := _machine(run, meta):
        facts["on"] = machine
    return facts


def seconds_of_steps(log: Path, until: int) -> float:
    """Seconds that the steps up to step `until` took, waiting for data included, from a run's log.jsonl; 0.0 when it
    does not say.

    A line gives the mean over the steps since the line before. Steps that were lost with a process and done again
    count once; validation and checkpoints are not in it.
    """
    seconds: dict[int, float] = {}
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["kind"] == "train" and 0 < entry["step"] <= until:
                seconds[int(entry["step"])] = float(entry["step_seconds"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    steps = [0, *sorted(seconds)]
    return sum(seconds[step] * (step - before) for before, step in itertools.pairwise(steps))


def started_from(place: str, source: Path) -> dict[str, Any]:
    """Name and step of the weights that a new run begins with, for its first event.

    Args:
        place: `train.init_from` as it is written.
        source: the checkpoint's or bundle's folder, or the weights file, that was found for it.
    """
    step, name = None, without_suffix(re.split(r"[?#]", place)[0].rstrip("/").rpartition("/")[2])
    if (source / "meta.json").is_file():
        name, step = source.resolve().parent.parent.name, _read_json(source / "meta.json").get("step")
    elif (source / "config.json").is_file():
        config = _read_json(source / "config.json")
        name, step = str(config.get("name") or name), config.get("step")
    return {"name": name, "step": step}


def _rates(loss: Any) -> str:
    """The range of rates that one model was trained for, in words; "" for a single rate."""
    if not isinstance(loss, Mapping) or not isinstance(loss.get("lambdas"), list):
        return ""
    (low, high), lambdas = loss["quality"], loss["lambdas"]
    return f"q{low} to q{high} in one training (lambda {lambdas[0]:g} to {lambdas[-1]:g})"


def _start(run: Path, init_from: Any) -> str:
    """Where a run's first weights came from, in words; "" for fresh ones."""
    if not isinstance(init_from, str):
        return ""
    from lalic.training.events import read_events

    begun = [event for event in read_events(run) if event["kind"] == "started"]
    told = begun[-1].get("init_from") if begun else None
    if not isinstance(told, Mapping):  # runs of old did not tell
        told = started_from(init_from, Path("nowhere"))
    step = told.get("step")
    return f"{told.get('name')}{f' at step {step:,}' if isinstance(step, int) else ''}"


def _machine(run: Path, meta: Mapping[str, Any]) -> str:
    """What a run was trained on, as of this checkpoint, and what it began on; "" when the checkpoint does not say."""
    from lalic.training.events import read_events

    device, processes, threads = meta.get("device"), meta.get("world_size"), meta.get("cpu_threads")
    if not device or not isinstance(processes, int):
        return ""
    words = f"{device}, {processes} {'process' if processes == 1 else 'processes'}"
    if device == "cpu" and isinstance(threads, int):
        words += f" of {threads} {'thread' if threads == 1 else 'threads'}"
    before = []
    for event in read_events(run):
        if event["kind"] == "resumed" and isinstance(step := event.get("step"), int) and step < meta["step"]:
            changed = event.get("changed")
            for change in changed if isinstance(changed, list) else ():
                if found := re.fullmatch(r"device (.+) -> .+", str(change)):
                    before.append(f"{found[1]} up to step {step:,}")
    return "; ".join([words, *before])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    """A run's config; {} when it cannot be read."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _stage(stage: dict[str, Any]) -> str:
    keys = {"epochs": "epochs", "steps": "steps", "lr": "learning rate", "crop": "crop"}
    told = {name: str(stage[key]) for key, name in keys.items() if stage.get(key) is not None}
    if stage.get("lr_end") is not None:
        told["learning rate"] += f" to {stage['lr_end']} ({stage.get('decay')})"
    if stage.get("warmup"):
        told["warm-up"] = str(stage["warmup"])
    return ", ".join(f"{name} {value}" for name, value in told.items())
