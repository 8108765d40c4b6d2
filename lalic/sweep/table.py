"""One table of where the rungs of a ladder stand, from the files in their run folders alone.

    runs/lalic.sweep.json   for programs        runs/lalic.sweep.md   the same for people

What a sweep knows and the run folders do not, why a rung failed, is kept in the JSON file for those who ask later.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalic.errors import LalicError, for_terminal
from lalic.files import write_json, write_text
from lalic.status import RunStatus, read_status
from lalic.sweep.plan import Ladder, Rung
from lalic.training import checkpoint


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    quality: int
    multiplier: float
    state: str
    """waiting, running, stopped, failed or finished."""
    error: str | None
    """Why the rung failed."""
    status: RunStatus
    saved: float | None
    """Unix time of the newest checkpoint."""


def json_path(ladder: Ladder) -> Path:
    """Where the table is kept for programs."""
    return ladder.prefix.with_name(f"{ladder.prefix.name}.sweep.json")


def read_rows(ladder: Ladder, failures: Mapping[int, str | None] | None = None) -> list[Row]:
    """The table of the whole ladder, by quality, whichever rungs are asked for: several sweeps may train parts of it.

    `failures`: what this sweep knows of its rungs, a reason or None for one that did not fail; of the others an
    earlier sweep's reason holds for as long as the run has not moved since.
    """
    known, before = failures or {}, _earlier_failures(json_path(ladder))
    return [_row(rung, known, before) for rung in ladder.whole]


def _row(rung: Rung, known: Mapping[int, str | None], before: Mapping[int, tuple[int, str]]) -> Row:
    status = rung_status(rung.run)
    state = "waiting" if status.state == "new" else status.state
    error = known.get(rung.quality)
    if rung.quality not in known:
        step, reason = before.get(rung.quality, (-1, ""))
        error = reason if step == status.step else None
    if state in ("running", "finished"):
        error = None
    elif state == "failed":
        error = error or status.detail or "see its log"
    return Row(rung.quality, rung.config.loss.multiplier, "failed" if error else state, error, status, _saved(status))


def rung_status(run: Path) -> RunStatus:
    """Where the run of a rung stands, which may not have a folder yet."""
    try:
        return read_status(run)
    except LalicError:
        return RunStatus(run=str(run), state="new")


def _saved(status: RunStatus) -> float | None:
    if status.last_checkpoint is None:
        return None
    try:
        return (checkpoint.folder_of(Path(status.run), status.last_checkpoint) / checkpoint.MANIFEST).stat().st_mtime
    except OSError:
        return None


def _earlier_failures(path: Path) -> dict[int, tuple[int, str]]:
    """{quality: (step, reason)} of the rungs that stand as failed in the file; {} when it cannot be read."""
    try:
        rungs = json.loads(path.read_text(encoding="utf-8"))["rungs"]
        return {int(r["quality"]): (int(r["step"]), str(r["error"])) for r in rungs if r["error"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_rows(ladder: Ladder, rows: Sequence[Row]) -> None:
    """Write both files, each of them whole or not at all. Raises OSError."""
    path = json_path(ladder)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    rungs = [_as_json(row) for row in rows]
    write_json(path, {"config": str(ladder.config), "metric": ladder.metric, "time": round(now, 3), "rungs": rungs})
    write_text(path.with_suffix(".md"), markdown(ladder, rows, now))


def _as_json(row: Row) -> dict[str, Any]:
    status = {**dataclasses.asdict(row.status), "run": str(row.status.run)}
    values = {"quality": row.quality, "lambda": row.multiplier, **status, "state": row.state, "error": row.error}
    finite: dict[str, Any] = _finite({**values, "saved": row.saved})
    return finite


def _finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(ladder: Ladder, rows: Sequence[Row], now: float) -> str:
    """The rungs that are asked for, as a table for a terminal, and what has no column below it."""
    asked = {rung.quality for rung in ladder.rungs}
    rows = [row for row in rows if row.quality in asked]
    head, cells = _cells(ladder, rows, now)
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    left = {head.index("state"), head.index("checkpoint")}

    def line(values: Sequence[str]) -> str:
        aligned = (v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(head), *map(line, cells), *_notes(rows)])


def markdown(ladder: Ladder, rows: Sequence[Row], now: float) -> str:
    """The whole table in Markdown, with the time of writing."""
    head, cells = _cells(ladder, rows, now)
    table = [head, ["---"] * len(head), *cells]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table]
    title = f"{ladder.config}, {ladder.metric}, {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(now))}"
    notes = [f"- {note}" for note in _notes(rows)]
    return "\n".join([title, "", *lines, *([""] if notes else []), *notes]) + "\n"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What has no column because it stands for few: a run's bad steps, and why one failed."""
    notes = []
    for row in rows:
        counts = {"step": row.status.skipped_steps, "rollback": row.status.rollbacks}
        steps, rollbacks = (f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items())
        if any(counts.values()):
            notes.append(f"q{row.quality}: {steps} skipped, {rollbacks}")
        if row.error:
            notes.append(f"q{row.quality} failed: {for_terminal(row.error)}")
    return notes


def _cells(ladder: Ladder, rows: Sequence[Row], now: float) -> tuple[list[str], list[list[str]]]:
    """Head and cells as text. `bpp` and `PSNR` are of the training crops, those with `val` of the last validation."""
    similarity = ladder.metric == "ms-ssim"
    head = ["q", "lambda", "state", "step", "loss", "bpp", "PSNR", "val bpp", "val PSNR"]
    head += [*(["val MS-SSIM"] if similarity else []), "best", "img/s", "eta", "checkpoint"]
    cells = []
    for row in rows:
        s, val = row.status, row.status.validation or {}
        total = s.total_steps if s.total_steps is not None else "?"
        cells.append(
            [
                str(row.quality),
                f"{row.multiplier:g}",
                row.state,
                f"{s.step}/{total}" if s.step or s.total_steps else "-",
                *(_number(s.loss, 4), _number(s.bpp, 3), _number(s.psnr, 2)),
                *(_number(val.get("bpp"), 3), _number(val.get("psnr"), 2)),
                *([_number(val.get("ms_ssim"), 4)] if similarity else []),
                _best(s.best),
                _number(s.images_per_second, 1),
                _span(s.eta_seconds) if row.state == "running" else "-",
                "-" if s.last_checkpoint is None else f"{s.last_checkpoint}{_ago(row.saved, now)}",
            ]
        )
    return head, cells


def _number(value: object, digits: int) -> str:
    good = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if good else "-"


def _best(best: Mapping[str, Any] | None) -> str:
    return f"{_number(best.get('loss'), 4)} @ {best.get('step', '?')}" if best else "-"


def _ago(saved: float | None, now: float) -> str:
    return "" if saved is None else f" ({_span(now - saved)} ago)"


def _span(seconds: float | None) -> str:
    """`45 s`, `12 min`, `5 h 10 min`, `3 d 4 h`; `-` for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
