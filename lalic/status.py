"""Where runs stand: `lalic status RUN [RUN ...]`. One run is told in words, several in a table.

Reads the run folders alone, whose runs may be on other machines; --json prints one object a line, for programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lalic.durations import duration
from lalic.errors import LalicError, for_terminal
from lalic.run_status import RunStatus, SavedStep, read_status

__all__ = ["RunStatus", "SavedStep", "main", "read_status", "table", "text"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `lalic status`."""
    parser = argparse.ArgumentParser(
        prog="lalic status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead")
    arguments = parser.parse_args(argv)
    found: list[RunStatus] = []
    problem: LalicError | None = None
    for run in arguments.runs:
        try:
            found.append(read_status(run))
        except LalicError as error:
            problem = problem or error
    if arguments.json:
        for status in found:
            print(json.dumps(dataclasses.asdict(status)))
    elif len(arguments.runs) == 1:
        print("".join(map(text, found)), end="")
    elif found:
        print(table(found))
    if problem:
        raise problem
    return 0


def text(status: RunStatus, now: float | None = None) -> str:
    """A run in some lines. `now`: seconds since 1970, by default those of the clock."""
    now = time.time() if now is None else now
    lines = [for_terminal(f"{status.run}: {status.state}") + (f", {_one_line(status.detail)}" if status.detail else "")]
    where = [_progress(status)]
    if status.stage is not None:
        where.append(f"stage {status.stage}" + (f" of {status.stages}" if status.stages else ""))
    if status.state in ("running", "stopped") and status.eta_seconds is not None:
        where.append(f"{'eta' if status.state == 'running' else 'to go'} {duration(status.eta_seconds)}")
    lines.append(", ".join(where))
    for name, values, rungs in (
        ("training", _values(vars(status), ("loss", "bpp", "psnr")), None if status.validation else status.rungs),
        ("validation", _measured(status.validation), (status.validation or {}).get("rungs")),
        ("best", _measured(status.best), None),
    ):
        weighed = " (mean of the rungs, each loss weighed)" if rungs else ""
        lines += [f"{name}: {values}{weighed}"] if values else []
        lines += _rungs(rungs, status.lambdas or {})
    if status.images_per_second is not None:
        memory = f", memory {status.memory_gib:.1f} GiB" if status.memory_gib is not None else ""
        wait = f", data wait {100 * status.data_wait_share:.0f} %" if status.data_wait_share is not None else ""
        lines.append(f"speed: {status.images_per_second:.1f} images/s{wait}{memory}")
    if status.checkpoints:
        lines.append("checkpoints: " + ", ".join(_saved(saved) for saved in reversed(status.checkpoints)))
    counts = (
        ("skipped step", status.skipped_steps),
        ("bad sample", status.bad_samples),
        ("rollback", status.rollbacks),
        ("restart", status.restarts),
    )
    told = [f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts if count or name != "bad sample"]
    lines.append("health: " + ", ".join(told))
    if status.world_size is not None:
        processes = f"{status.world_size} process{'es' if status.world_size != 1 else ''}"
        job = f", job {_one_line(status.job)}" if status.job else ""
        lines.append(f"on: {_one_line(status.host or '?')}, {processes}{job}")
    if status.last_event:
        lines.append(f"last event: {_event(status.last_event, now)}")
    if status.updated is not None:
        lines.append(f"last sign of life: {duration(now - status.updated)} ago")
    return lines[0] + "\n" + "".join(f"  {line}\n" for line in lines[1:])


_COLUMNS = (
    "run",
    "state",
    "step",
    "%",
    "loss",
    "bpp",
    "psnr",
    "val loss",
    "best",
    "img/s",
    "eta",
    "skip",
    "back",
    "ago",
)


def table(statuses: Sequence[RunStatus], now: float | None = None) -> str:
    """Runs as lines of a table, without a newline at its end; what is not known is a dash."""
    now = time.time() if now is None else now
    rows = [_COLUMNS, *(_row(status, now) for status in statuses)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        # Names are read from the left, numbers compared from the right.
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(status: RunStatus, now: float) -> tuple[str, ...]:
    total = status.total_steps
    return (
        for_terminal(status.run),
        status.state,
        f"{status.step}" + (f"/{total}" if total else ""),
        f"{100 * status.step / total:.1f}" if total else "-",
        _figure(status.loss, 4),
        _figure(status.bpp, 4),
        _figure(status.psnr, 2),
        _figure((status.validation or {}).get("loss"), 4),
        _figure((status.best or {}).get("loss"), 4),
        _figure(status.images_per_second, 1),
        "-" if status.eta_seconds is None or status.state == "finished" else duration(status.eta_seconds),
        str(status.skipped_steps),
        str(status.rollbacks),
        "-" if status.updated is None else duration(now - status.updated),
    )


def _progress(status: RunStatus) -> str:
    if not status.total_steps:
        return f"step {status.step}"
    return f"step {status.step} of {status.total_steps} ({100 * status.step / status.total_steps:.1f} %)"


def _values(values: Mapping[str, Any], names: Sequence[str]) -> str:
    decimals = {"psnr": 2}
    return ", ".join(f"{n} {_figure(values[n], decimals.get(n, 4))}" for n in names if values.get(n) is not None)


def _measured(values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    shown = _values(values, ("loss", "bpp", "psnr", "ms_ssim"))
    return f"{shown} at step {values['step']}" if "step" in values else shown


def _rungs(rungs: Any, lambdas: Mapping[str, float]) -> list[str]:
    """A line for every rung of a run on a range of rates; the losses are not weighed."""
    lines = []
    for rung, values in rungs.items() if isinstance(rungs, Mapping) else ():
        shown = _measured(values) if isinstance(values, Mapping) else ""
        named = f" (lambda {lambdas[rung]:g})" if rung in lambdas else ""
        lines.append(f"  q{_one_line(rung)}{named}: {shown or '-'}")
    return lines


def _saved(saved: SavedStep) -> str:
    return f"{saved.step}" + (f" (damaged: {saved.problem})" if saved.problem else "")


def _event(event: Mapping[str, Any], now: float) -> str:
    words = [_one_line(str(event["kind"])).replace("_", " ")]
    if event.get("step") is not None:
        words.append(f"at step {event['step']}")
    if isinstance(event.get("time"), int | float):
        words.append(f"{duration(now - event['time'])} ago")
    return " ".join(words)


def _figure(value: Any, decimals: int) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, int | float) else "-"


def _one_line(words: str) -> str:
    return for_terminal(" ".join(words.split()))
