"""The picture that `lalic curves` draws: panels above each other over one axis of steps or hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalic.drawing import COLOURS, figure, quiet_axes
from lalic.errors import LalicError, for_terminal
from lalic.run_history import KINDS, VALIDATED, Interruption, Kind, Points, RunHistory

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
_MARKERS: dict[Kind, str] = {"stopped": "s", "killed": "v", "failed": "X", "rollback": "<"}
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
    names = [for_terminal(name) for name in labels or (Path(run.run).name for run in runs)]
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
            _panel(axes, runs, name, over)
        for axes in rows:
            _moments(axes, runs, over)
        if interrupted:
            _lane(rows[-1], runs, over)
        right = max((_last(run, over) for run in runs), default=0.0)
        rows[-1].set_xlim(0, right * 1.01 or 1.0)
        rows[-1].set_xlabel("step" if over == "steps" else "hours of training")
        drawn.align_ylabels(rows)
        _legend(drawn, runs, names, interrupted)
        if title:
            drawn.suptitle(for_terminal(title), fontsize=10)


def _look(index: int) -> dict[str, Any]:
    """Colour and dashes of a run's line."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":", "-.")[index // len(COLOURS) % 4]}


def _panel(axes: Any, runs: Sequence[RunHistory], name: str, over: str) -> None:
    shown: list[float] = []
    labelled = next((run for run in runs if run.rungs), None)
    labels: list[tuple[str, float, Any]] = []
    for i, run in enumerate(runs):
        if not run.rungs or name not in VALIDATED:
            shown += _curve(axes, run, name, over, _look(i))
            continue
        if name == "loss":  # the mean of the rungs' weighed losses; means of rates and qualities tell nothing
            shown += _curve(axes, run, name, over, {**_look(i), "linewidth": 1.8})
        for j, rung in enumerate(run.rungs):
            shade = _shade(COLOURS[i % len(COLOURS)], j, len(run.rungs))
            own = _curve(axes, run, f"q{rung}/{name}", over, {**_look(i), "color": shade, "linewidth": 1.0})
            shown += own
            if run is labelled and (ends := [v for v in own if math.isfinite(v)]):
                labels.append((f"q{rung}", ends[-1], shade))
    axes.set_ylabel(PANELS[name])
    _scale(axes, [v for v in shown if math.isfinite(v)], logarithmic=name == "loss")
    _name_rungs(axes, labels, 7.5 / (72 * _HEIGHTS[name]))
    quiet_axes(axes)


def _name_rungs(axes: Any, labels: Sequence[tuple[str, float, Any]], gap: float) -> None:
    """Write (text, value, colour) at the right end of the lines, at least `gap` of the panel's height apart."""
    to_panel = axes.transData + axes.transAxes.inverted()
    wanted = sorted((float(to_panel.transform((0, value))[1]), text, colour) for text, value, colour in labels)
    places: list[float] = []
    for place, _, _ in wanted:
        places.append(max(place, places[-1] + gap) if places else place)
    back = mean([place - want for place, (want, _, _) in zip(places, wanted, strict=True)])
    for place, (_, text, colour) in zip(places, wanted, strict=True):
        axes.annotate(text, (1.004, place - back), xycoords="axes fraction", fontsize=6.5, color=colour, va="center")


def _curve(axes: Any, run: RunHistory, name: str, over: str, look: dict[str, Any]) -> list[float]:
    """Draw one quantity of a run, its training and its validation; the values that its axis must show."""
    begun = _BEGINNING * _last(run, over)
    shown: list[float] = []
    if name in run.train.values:
        x, y = thinned(_xs(run.train, over), run.train.values[name], _MOST_POINTS)
        trend = running_mean(y, len(y) // _WINDOWS)
        if trend != y:
            axes.plot(x, y, color=look["color"], linewidth=0.6, alpha=0.3)
        axes.plot(x, trend, zorder=3, **{"linewidth": 1.4, **look})
        shown += [v for at, v in zip(x, trend, strict=True) if at >= begun]
    if name in run.validation.values:
        x, y = _xs(run.validation, over), run.validation.values[name]
        axes.plot(
            x, y, color=look["color"], linewidth=0.8, alpha=0.9, zorder=4,
            marker="o", markersize=3.2 if len(y) <= 60 else 2, markerfacecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
        shown += [v for at, v in zip(x, y, strict=True) if at >= begun]
    return shown


def _shade(colour: str, index: int, count: int) -> tuple[float, float, float]:
    """Of a run's colour for its rung number `index`: the lowest is the lightest, the highest nearly black."""
    from matplotlib.colors import to_rgb

    at = index / max(1, count - 1) - 0.5  # -1/2 to 1/2
    red, green, blue = ((1 - 1.4 * at) * c if at > 0 else c - 1.1 * at * (1 - c) for c in to_rgb(colour))
    return red, green, blue


def _scale(axes: Any, values: Sequence[float], logarithmic: bool) -> None:
    """Axis limits a little beyond the values; a logarithmic axis where they span more than four times."""
    if not values:
        return
    low, high = min(values), max(values)
    if logarithmic and low > 0 and high > 4 * low:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        subs = (1, 1.5, 2, 3, 5, 7) if high < 100 * low else (1, 3)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
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
        for kind, marker in _MARKERS.items():
            x = [_x(each, over) for each in run.interruptions if each.kind == kind]
            axes.plot(
                x, [i] * len(x), linestyle="none", marker=marker, color=colour, markersize=5.5,
                markeredgecolor="white", markeredgewidth=0.4, zorder=3,
            )  # fmt: skip
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_yticks([(len(runs) - 1) / 2], ["stops"], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(drawn: Any, runs: Sequence[RunHistory], names: Sequence[str], interrupted: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.4, **_look(i)) for i in range(len(runs))]
    labels = list(names)
    if any(len(run.validation) for run in runs):
        handles.append(
            Line2D([], [], color="#444444", marker="o", markerfacecolor="white", markersize=3.5, linewidth=0.8)
        )
        labels.append("validation")
    if any(run.stages for run in runs):
        handles.append(Line2D([], [], color="#666666", linewidth=0.8, linestyle=(0, (1, 2))))
        labels.append("next stage")
    if interrupted:
        for kind, marker in _MARKERS.items():
            if any(run.count(kind) for run in runs):
                handles.append(Line2D([], [], linestyle="none", marker=marker, color="#444444", markersize=5))
                labels.append(KINDS[kind])
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)


def thinned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points: of neighbours the last x and the mean of those y that are numbers."""
    group = -(-len(x) // most) if x else 1
    if group == 1:
        return list(x), list(y)
    starts = range(0, len(x), group)
    return [x[min(s + group, len(x)) - 1] for s in starts], [mean(y[s : s + group]) for s in starts]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the numbers within width/2 places before and after each; `values` itself for a width below 2."""
    half = width // 2
    if half == 0:
        return list(values)
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    numbers = [v for v in values if math.isfinite(v)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _finite(points: Points, name: str) -> bool:
    return any(map(math.isfinite, points.values[name]))


def _xs(points: Points, over: str) -> list[float]:
    return [float(step) for step in points.steps] if over == "steps" else points.hours


def _x(interruption: Interruption, over: str) -> float:
    return float(interruption.step) if over == "steps" else interruption.hours


def _last(run: RunHistory, over: str) -> float:
    return float(run.step) if over == "steps" else run.hours
