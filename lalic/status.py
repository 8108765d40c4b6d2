"""Where a run stands, from the files in its folder alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalic.errors import LalicError
from lalic.training.checkpoint import FOLDER, problem, steps_on_disk
from lalic.training.run_folder import DONE, LOCK, LOG, is_held


@dataclass(frozen=True)
class RunStatus:
    """What is known about a run; None for what its files do not tell."""

    run: str
    state: str
    """"new", "running", "stopped", "finished" or "failed"."""
    detail: str = ""
    """The state in words: what failed."""
    step: int = 0
    total_steps: int | None = None
    stage: int | None = None
    loss: float | None = None
    bpp: float | None = None
    psnr: float | None = None
    validation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    skipped_steps: int = 0
    rollbacks: int = 0
    last_checkpoint: int | None = None
    updated: float | None = None
    """Unix time of the newest record."""


def read_status(run: Path) -> RunStatus:
    """The state of a run. Files that are missing or damaged leave gaps; LalicError when there is no run folder."""
    if not any((run / name).exists() for name in (LOG, DONE, LOCK, FOLDER)):
        raise LalicError(f"{run} is no run folder")
    train, validation = _records(run / LOG)
    complete = [s for s in steps_on_disk(run) if problem(run / "checkpoints" / f"step-{s:08d}", contents=False) is None]
    meta = _meta(run, complete[0]) if complete else {}
    step = max(complete[0] if complete else 0, int(train.get("step") or 0))
    if (run / DONE).exists():
        state = "finished"
    elif is_held(run):
        state = "running"
    else:
        state = "stopped" if step else "new"
    total, speed = meta.get("total_steps"), train.get("images_per_second")
    return RunStatus(
        run=str(run),
        state=state,
        step=step,
        total_steps=total,
        stage=train.get("stage") or meta.get("stage"),
        loss=train.get("loss"),
        bpp=train.get("bpp"),
        psnr=train.get("psnr"),
        validation=validation or None,
        best=meta.get("best"),
        images_per_second=speed,
        last_checkpoint=complete[0] if complete else None,
        updated=train.get("time"),
    )


def _meta(run: Path, step: int) -> dict[str, Any]:
    try:
        meta = json.loads((run / "checkpoints" / f"step-{step:08d}" / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _records(log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest record of training and of validation."""
    newest: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and all(map(_plain, record.values())):
                newest[record["kind"]] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return newest["train"], newest["validation"]


def _plain(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
