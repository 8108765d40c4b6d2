"""Training curves of runs, with everything that interrupted them.

    lalic curves RUN [RUN ...] -o curves.svg [--over steps|hours] [--labels NAME ...] [--title TEXT] [--list]

One picture (.png, .svg, .pdf) for the width of a page: loss, bits per pixel and PSNR of training (lines) and of
validation (rings), steps per second, and a lane for each run with its interruptions. Printed: a table of the runs;
with --list, one of every interruption. Reads log.jsonl and events.jsonl of the run folders and changes nothing; the
runs may go on meanwhile. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lalic.drawing import COLOURS, check_suffix, figure, quiet_axes
from lalic.durations import duration
from lalic.errors import LalicError, for_terminal, run_main
from lalic.run_history import Kind, Points, RunHistory, read_history

log = logging.getLogger("lalic.curves")

PANELS = {
    "loss": "loss",
    "bpp": "bits per pixel",
    "psnr": "PSNR (dB)",
    "steps_per_second": "steps / s",
}
_HEIGHTS = {"loss": 1.9, "bpp": 1.4, "psnr": 1.4, "steps_per_second": 0.95}
"""Of the panels, in inches."""
WIDTH = 7.2
"""Of the picture in inches: a page's text."""
_MARKS: dict[Kind, tuple[str, str]] = {
    "stopped": ("s", "stopped as asked"),
    "killed": ("v", "killed"),
    "failed": ("X", "failed"),
    "rollback": ("<", "went back"),
}
_MOST_POINTS = 1000
_WINDOWS = 60
"""The strong line is a running mean over this part of a curve."""
_BEGINNING = 0.08
"""The axes need not show this first part of a run, in which the loss is a hundred times what it will be."""


def plot_runs(
    runs: Sequence[RunHistory],
    path: str | Path,
    *,
    over: str = "steps",
    labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw the curves of runs to `path` (.png, .svg or .pdf).

    Args:
        over: "steps" or "hours" (of the runs' lives, without the time between) to the right.
        labels: names of the runs; by default those of their folders.

    Raises LalicError for another suffix, and where no run has logged anything.
    """
    names = list(labels) or labels_of(runs)
    panels = [name for name in PANELS if any(_finite(run.train, name) for run in runs)]
    if not panels:
        raise LalicError("nothing to draw: no run has logged a step yet")
    interrupted = any(run.interruptions for run in runs)
    heights = [_HEIGHTS[name] for name in panels] + ([0.25 + 0.16 * len(runs)] if interrupted else [])
    # What is beside the panels: title, legend, the labels below.
    height = sum(heights) + 0.08 * len(heights) + 0.65 + 0.18 * ((len(runs) - 1) // 4) + (0.25 if title else 0.0)
    with figure(Path(path), WIDTH, height) as drawn:
        rows = drawn.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, name in zip(rows, panels, strict=False):
            _panel(axes, runs, names, name, over)
        for axes in rows:
            _moments(axes, runs, over)
        if interrupted:
            _lane(rows[-1], runs, over)
        right = max((_last(run, over) for run in runs), default=0.0)
        rows[-1].set_xlim(0, right * 1.01 or 1.0)
        rows[-1].set_xlabel("step" if over == "steps" else "hours of training")
        drawn.align_ylabels(rows)
        _legend(drawn, rows, interrupted, runs)
        if title:
            drawn.suptitle(title, fontsize=10)


def labels_of(runs: Sequence[RunHistory]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [Path(run.run).absolute().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _panel(axes: Any, runs: Sequence[RunHistory], names: Sequence[str], name: str, over: str) -> None:
    shown: list[float] = []
    for i, (run, label) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        dashes = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        x, y = thinned(_xs(run.train, over), run.train.values[name], _MOST_POINTS)
        trend = running_mean(y, len(y) // _WINDOWS)
        if trend != y:
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(x, trend, color=colour, linestyle=dashes, linewidth=1.4, label=label, zorder=3)
        begun = _BEGINNING * _last(run, over)
        shown += [v for at, v in zip(x, trend, strict=True) if at >= begun]
        if name in run.validation.values:
            x, y = _xs(run.validation, over), run.validation.values[name]
            few = len(y) <= 60
            axes.plot(
                x, y, color=colour, linewidth=0.8, alpha=0.9, zorder=4,
                marker="o", markersize=3.2 if few else 2, markerfacecolor="white", markeredgewidth=0.8,
            )  # fmt: skip
            shown += [v for at, v in zip(x, y, strict=True) if at >= begun]
    axes.set_ylabel(PANELS[name])
    _scale(axes, [v for v in shown if math.isfinite(v)], logarithmic=name == "loss")
    quiet_axes(axes)


def _scale(axes: Any, values: Sequence[float], logarithmic: bool) -> None:
    """Axis limits a little beyond the values; a logarithmic axis where they span more than four times."""
    if not values:
        return
    low, high = min(values), max(values)
    if logarithmic and low > 0 and high > 4 * low:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        room = (high / low) ** 0.06
        axes.set_ylim(low / room, high * room)
        return
    room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _moments(axes: Any, runs: Sequence[RunHistory], over: str) -> None:
    """Light lines through a panel: where stages begin, and of a single run where it was interrupted."""
    beginnings = {(step if over == "steps" else hours) for run in runs for step, hours, _ in run.stages}
    for x in sorted(beginnings) if len(beginnings) <= 12 else []:
        axes.axvline(x, color="#666666", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if len(runs) == 1:
        for each in runs[0].interruptions:
            axes.axvline(_x(each, over), color="#999999", linewidth=0.5, alpha=0.6, zorder=1)


def _lane(axes: Any, runs: Sequence[RunHistory], over: str) -> None:
    """One line for each run with a mark for each interruption."""
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([0, _last(run, over)], [i, i], color=colour, linewidth=0.8, alpha=0.5)
        for kind, (marker, _) in _MARKS.items():
            x = [_x(each, over) for each in run.interruptions if each.kind == kind]
            axes.plot(
                x, [i] * len(x), linestyle="none", marker=marker, color=colour, markersize=5.5,
                markeredgecolor="white", markeredgewidth=0.4, zorder=3,
            )  # fmt: skip
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_yticks([(len(runs) - 1) / 2], ["stops"], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(drawn: Any, rows: Sequence[Any], interrupted: bool, runs: Sequence[RunHistory]) -> None:
    from matplotlib.lines import Line2D

    handles, labels = rows[0].get_legend_handles_labels()
    if any(len(run.validation) for run in runs):
        handles.append(
            Line2D([], [], color="#444444", marker="o", markerfacecolor="white", markersize=3.5, linewidth=0.8)
        )
        labels.append("validation")
    if any(run.stages for run in runs):
        handles.append(Line2D([], [], color="#666666", linewidth=0.8, linestyle=(0, (1, 2))))
        labels.append("next stage")
    if interrupted:
        for kind, (marker, text) in _MARKS.items():
            if any(run.count(kind) for run in runs):
                handles.append(Line2D([], [], linestyle="none", marker=marker, color="#444444", markersize=5))
                labels.append(text)
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)


def thinned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points: of neighbours the last x and the mean of those y that are numbers."""
    group = -(-len(x) // most) if x else 1
    if group == 1:
        return list(x), list(y)
    starts = range(0, len(x), group)
    return [x[min(s + group, len(x)) - 1] for s in starts], [_mean(y[s : s + group]) for s in starts]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the numbers within width/2 places before and after each; `values` itself for a width below 2."""
    half = width // 2
    if half == 0:
        return list(values)
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    numbers = [v for v in values if math.isfinite(v)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _finite(points: Points, name: str) -> bool:
    return any(map(math.isfinite, points.values[name]))


def _xs(points: Points, over: str) -> list[float]:
    return [float(step) for step in points.steps] if over == "steps" else points.hours


def _x(interruption: Any, over: str) -> float:
    return float(interruption.step) if over == "steps" else interruption.hours


def _last(run: RunHistory, over: str) -> float:
    return float(run.step) if over == "steps" else run.hours


def summary(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """A Markdown table of the runs, without a newline at its end."""
    titles = ("run", "steps", "hours", "steps/s", "starts", *get_args(Kind), "train loss", "validation loss, bpp, PSNR")
    rows = [titles, ("---", *["---:"] * (len(titles) - 2), "---")]
    for run, name in zip(runs, names, strict=True):
        speeds = [v for v in run.train.values["steps_per_second"] if math.isfinite(v)]
        losses = [v for v in run.train.values["loss"] if math.isfinite(v)]
        last = {key: values[-1] for key, values in run.validation.values.items() if values}
        found = ", ".join(f"{last[key]:.{2 if key == 'psnr' else 4}f}" for key in last)
        rows.append(
            (
                for_terminal(name),
                str(run.step),
                f"{run.hours:.2f}",
                f"{statistics.median(speeds):.3g}" if speeds else "-",
                str(run.starts),
                *(str(run.count(kind)) for kind in get_args(Kind)),
                f"{losses[-1]:.4f}" if losses else "-",
                f"{found} at step {run.validation.steps[-1]}" if found else "-",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def interruptions(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """A Markdown table of every interruption, in the order of the runs and of time."""
    rows: list[tuple[str, ...]] = [("run", "UTC", "step", "what", "went on at", "after", "detail"), ("---",) * 7]
    for run, name in zip(runs, names, strict=True):
        for each in sorted(run.interruptions, key=lambda one: one.hours):
            when = "-" if each.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each.time))
            detail = for_terminal(each.detail).replace("|", "\\|")
            if len(detail) > 100:
                detail = detail[:97] + "..."
            onward = "-" if each.resumed_step is None else str(each.resumed_step)
            away = "-" if each.away is None else duration(each.away)
            rows.append((for_terminal(name), when, str(each.step), _MARKS[each.kind][1], onward, away, detail))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `lalic curves`."""
    parser = argparse.ArgumentParser(
        prog="lalic curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--over", choices=("steps", "hours"), default="steps", help="to the right (%(default)s)")
    parser.add_argument("--labels", nargs="+", help="names of the runs (default: their folders')")
    parser.add_argument("--title", default="", help="title of the picture")
    parser.add_argument("--list", action="store_true", help="print every interruption as well")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every glyph that goes into a PDF
    check_suffix(args.output)
    if args.labels and len(args.labels) != len(args.runs):
        raise LalicError(f"{len(args.runs)} runs but {len(args.labels)} labels: give one for each")
    runs = [read_history(run) for run in args.runs]
    names = args.labels or labels_of(runs)
    for run in runs:
        if not len(run.train):
            log.warning("%s has logged no step yet: it is not in the picture", for_terminal(run.run))
    begun = [(run, name) for run, name in zip(runs, names, strict=True) if len(run.train)]
    if not begun:
        raise LalicError("nothing to draw: no run has logged a step yet")
    runs, names = [run for run, _ in begun], [name for _, name in begun]
    plot_runs(runs, args.output, over=args.over, labels=names, title=args.title)
    print(summary(runs, names))
    if args.list and any(run.interruptions for run in runs):
        print("\n" + interruptions(runs, names))
    print(f"\n{args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
