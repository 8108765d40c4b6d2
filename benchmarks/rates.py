"""One model for several rates beside single-rate models: BD-rate and loss on held-out photographs, by steps spent.

    python benchmarks/rates.py bsds500 --work runs/rates [--output FILE.json] [--picture FILE.png]

One model over a range of rungs (q3 to q6) and one for each of its rungs, all by Muon with the same seed, learning rate
and order, constant rate after a short warm-up, averaged weights (short_runs.py). Two questions, of the same runs:

    shared   one model with all the steps against single ones that share them, a quarter each
    apart    one model against single ones that had as many steps *each*, so four times its steps together

BD-rate is that of PSNR over the estimated rate, of means over the photographs; negative means that the one model needs
fewer bits. Short runs may share no quality, so two more figures are told: the PSNR at equal rate (BD-PSNR), and where
even the lowest rung of the one model is better than the highest single one, the bits that this lowest needs beside
that highest, which bounds what is saved. Where no quality is shared at the end, the last point of the one model that
shares one is compared: it has had fewer steps.

Runs are trained in the order in which they answer the questions, and the figures are written after each stretch. Ends
with 1 when the one model is not `--limit` percent better with shared steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout
from benchmarks.short_runs import Recipe, Setup, add_arguments, setup_of, train  # noqa: E402
from lalic.bdrate import bd_rate  # noqa: E402
from lalic.errors import LalicError, run_main  # noqa: E402
from lalic.files import write_json  # noqa: E402

Points = list[dict[str, Any]]
Ladder = dict[str, dict[str, float]]
"""{rung: {"loss", "bpp", "psnr"}}, lowest first."""

MIN_RUNGS = 4
"""What BD-rate needs."""


def ladder_at(runs: Mapping[str, Points], steps: int) -> Ladder | None:
    """All rungs at `steps` of every run; None while one of them has no point there."""
    found: Ladder = {}
    for points in runs.values():
        point = next((p for p in points if p["step"] == steps), None)
        if point is None:
            return None
        found.update(point["heldout"])
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def difference(one: Ladder, singles: Ladder) -> dict[str, Any]:
    """Of the one model from the single ones: BD-rate in percent (or why there is none), PSNR at equal rate in dB, the
    bound in percent where one is above the other, and relative losses."""
    rates, qualities = ([[row[key] for row in side.values()] for side in (singles, one)] for key in ("bpp", "psnr"))
    row: dict[str, Any] = {"bd_rate": None, "bd_psnr": None, "bound": None}
    row["loss"] = {q: one[q]["loss"] / singles[q]["loss"] - 1 for q in singles}
    try:
        row["bd_rate"] = bd_rate(rates[0], qualities[0], rates[1], qualities[1])
    except LalicError as error:
        row["reason"] = str(error)
        if min(qualities[1]) >= max(qualities[0]):
            row["bound"] = 100 * (min(rates[1]) / max(rates[0]) - 1)
    row["bd_psnr"] = bd_psnr(rates[0], qualities[0], rates[1], qualities[1])
    return row


def bd_psnr(
    rate_anchor: Sequence[float], psnr_anchor: Sequence[float], rate_test: Sequence[float], psnr_test: Sequence[float]
) -> float | None:
    """Mean difference of PSNR over the logarithms of the rates that both curves have; None where they share none."""
    import numpy as np
    from scipy.interpolate import PchipInterpolator

    logs = np.log(rate_anchor), np.log(rate_test)
    low, high = max(r.min() for r in logs), min(r.max() for r in logs)
    if low >= high or any((np.diff(r) <= 0).any() for r in logs):
        return None
    areas = [
        float(PchipInterpolator(r, q).integrate(low, high)) for r, q in zip(logs, (psnr_anchor, psnr_test), strict=True)
    ]
    return float((areas[1] - areas[0]) / (high - low))


def saved(row: Mapping[str, Any]) -> str:
    """BD-rate in words, or what is known in its place."""
    if row["bd_rate"] is not None:
        return f"{row['bd_rate']:+.1f} %"
    if row["bound"] is not None:
        text = f"no shared quality; beyond {row['bound']:+.1f} %"
        if e := row.get("earlier"):
            text += f"; with {e['steps']:,} steps {e['bd_rate']:+.1f} % ({e['low']:.2f} to {e['high']:.2f} dB)"
        return text
    return f"none ({row['reason']})"


def compare(one: Points, singles: Mapping[str, Points], milestones: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """The rows of both questions, as far as the runs are and have points there."""
    found: dict[str, list[dict[str, Any]]] = {"shared": [], "apart": []}
    for steps in milestones:
        mine = ladder_at({"one": one}, steps)
        for question, each in (("shared", steps // len(singles)), ("apart", steps)):
            theirs = ladder_at(singles, each)
            if mine is not None and theirs is not None:
                row = {
                    "steps": steps,
                    "steps_of_each": each,
                    **difference(mine, theirs),
                    "one": mine,
                    "singles": theirs,
                }
                if question == "shared" and row["bd_rate"] is None:
                    row["earlier"] = earlier(one, theirs, steps)
                found[question].append(row)
    return found


def earlier(one: Points, singles: Ladder, steps: int) -> dict[str, Any] | None:
    """The last point of the one model before `steps` whose BD-rate against the single ones can be computed: its step,
    the BD-rate, and the range of PSNR that it is taken over."""
    for point in reversed(one):
        mine = point["heldout"]
        if point["step"] < steps and (rate := difference(mine, singles)["bd_rate"]) is not None:
            psnr = [[row["psnr"] for row in side.values()] for side in (mine, singles)]
            return {"steps": point["step"], "bd_rate": rate, "low": max(map(min, psnr)), "high": min(map(max, psnr))}
    return None


def stretches(rungs: Sequence[int], steps: int) -> list[tuple[int | None, int]]:
    """(rung, or None for the one model; steps to train it to), the most telling ones first."""
    quarter, half = steps // len(rungs), steps // 2
    order: list[tuple[int | None, int]] = [(rung, quarter) for rung in rungs]
    order.append((None, steps))
    return order + [(rung, until) for until in (half, steps) for rung in rungs]


def train_all(setup: Setup, arguments: argparse.Namespace, note: Any) -> None:
    """Train every stretch; `note(one, singles)` is called with the points after each."""
    low, high = arguments.quality
    rungs = range(low, high + 1)
    one: Points = []
    singles: dict[str, Points] = {str(rung): [] for rung in rungs}
    for rung, until in stretches(rungs, arguments.steps):
        if until > (arguments.single_steps if rung else arguments.steps):
            continue
        quality = (low, high) if rung is None else rung
        points = train(setup, Recipe("muon", arguments.lr, quality, arguments.seed), until)
        if rung is None:
            one = points
        else:
            singles[str(rung)] = points
        note(one, singles)


def draw(path: Path, one: Points, singles: Mapping[str, Points], compared: Mapping[str, Any]) -> None:
    """PSNR over rate: the one model and the single ones at the milestones; and each rung's loss over steps."""
    from lalic.drawing import COLOURS, figure, quiet_axes

    with figure(path, 7.2, 3.2) as drawn:
        left, right = drawn.subplots(1, 2)
        curves: dict[str, tuple[Ladder, str]] = {}
        for row in (*compared["shared"], *compared["apart"]):
            curves[f"one model, {row['steps']:,} steps"] = row["one"], "-o"
            curves[f"{len(singles)} single, {row['steps_of_each']:,} steps each"] = row["singles"], "--s"
        for i, (label, (ladder, line)) in enumerate(sorted(curves.items(), key=lambda c: (c[1][1], len(c[0]), c[0]))):
            xs, ys = ([r[key] for r in ladder.values()] for key in ("bpp", "psnr"))
            left.plot(xs, ys, line, label=label, color=COLOURS[i % len(COLOURS)], linewidth=1, markersize=3)
        left.set_xlabel("estimated bpp")
        left.set_ylabel("PSNR, dB")
        left.legend(frameon=False, fontsize=6)
        for i, (rung, points) in enumerate(singles.items()):
            for run, line in ((one, "-"), (points, "--")):
                xs, ys = [p["step"] for p in run], [p["heldout"][rung]["loss"] for p in run]
                right.plot(xs, ys, line, color=COLOURS[i], linewidth=1, label=f"q{rung}" if line == "-" else None)
        right.set_xlabel("steps (full: one model, dashed: single)")
        right.set_ylabel("loss on held-out photographs")
        right.set_yscale("log")
        right.set_ylim(top=20)
        for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
            axis("{x:g}")
        right.legend(frameon=False)
        for axes in (left, right):
            quiet_axes(axes)


def report(compared: Mapping[str, Any]) -> str:
    """The rows in lines."""
    lines = []
    for question, rows in compared.items():
        for row in rows:
            rate = f"BD-rate {saved(row)}"
            rate += "" if row["bd_psnr"] is None else f"; {row['bd_psnr']:+.2f} dB at equal rate"
            losses = ", ".join(f"q{rung} {value:+.1%}" for rung, value in row["loss"].items())
            steps = f"one model, {row['steps']} steps; single ones, {row['steps_of_each']} each"
            lines.append(f"{question}: {steps}: {rate}; loss {losses}")
    return "\n".join(lines) or "no row yet"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, print and write the figures; 1 when the limit is missed."""
    arguments = _parser().parse_args(argv)
    low, high = arguments.quality
    if high - low + 1 < MIN_RUNGS:
        raise LalicError(f"--quality {low} {high}: BD-rate needs a range of at least {MIN_RUNGS} rungs")
    unit = 2 * (high - low + 1) * arguments.every
    if arguments.steps < unit or arguments.steps % unit:
        raise LalicError(
            f"--steps {arguments.steps}: must be a multiple of {unit}, so that points lie where it is asked"
        )
    setup = setup_of(arguments)
    words = sys.argv[1:] if argv is None else argv
    milestones = [arguments.steps // 4, arguments.steps // 2, arguments.steps]
    compared: dict[str, Any] = {}

    def note(one: Points, singles: Mapping[str, Points]) -> None:
        compared.update(compare(one, singles, milestones))
        result = {
            "command": " ".join(["python benchmarks/rates.py", *words]),
            "environment": describe(setup.threads),
            "settings": {**setup.facts(), "lr": arguments.lr, "seed": arguments.seed, "quality": [low, high]},
            "limit": arguments.limit,
            **compared,
            "runs": {"one": one, "singles": dict(singles)},
        }
        if arguments.output:
            write_json(arguments.output, result)
        if arguments.picture and compared["shared"]:
            draw(arguments.picture, one, singles, compared)

    train_all(setup, arguments, note)
    print(report(compared))
    last: dict[str, Any] = next((row for row in compared["shared"] if row["steps"] == arguments.steps), {})
    rates = [last.get("bd_rate"), last.get("bound"), (last.get("earlier") or {}).get("bd_rate")]
    if not any(rate is not None and rate <= arguments.limit for rate in rates):
        print(f"error: with shared steps the one model is not {-arguments.limit:g} % better", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/rates.py", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--quality", type=int, nargs=2, default=[3, 6], metavar=("LOWEST", "HIGHEST"))
    parser.add_argument("--lr", type=float, default=6e-3, help="of Muon, for all runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000, help="of the one model (%(default)s)")
    parser.add_argument("--single-steps", type=int, default=3000, help="of a single model, at most (%(default)s)")
    parser.add_argument("--limit", type=float, default=-15.0, help="BD-rate with shared steps, percent (%(default)s)")
    return parser


if __name__ == "__main__":
    run_main(main)
