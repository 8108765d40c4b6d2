"""Bjontegaard delta rate: how many percent fewer bits one codec needs than another at equal quality.

    lalic bdrate RESULT.json [MORE.json ...] [--anchor NAME_OR_FILE ...] [--dataset kodak] [--metric psnr]

Without `--anchor`, every pair is compared: the result files, the anchors in them, and the curves published for the
test set, where the images of the results are one. With `--anchor vtm-9.1` or `--anchor other.json`, the results are
compared with those alone. A published curve may stand in the place of a result file too:

    lalic bdrate lalic-mse --anchor vtm-9.1 --dataset kodak

The logarithm of the rate is interpolated over quality by PCHIP (monotone piecewise cubics), as in the common
test conditions of JVET, and the difference is averaged over the range of quality that both curves cover.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from lalic.curve import METRICS, Curve
from lalic.errors import LalicError, for_terminal, run_main
from lalic.files import write_json
from lalic.published import DATASETS
from lalic.results import QUALITY_NAMES, Collection

MIN_POINTS = 4
"""Fewer points do not tell the shape of a curve; the common test conditions use four."""


@dataclass(frozen=True)
class Comparison:
    """BD-rate of one curve against another, or why there is none."""

    test: str
    anchor: str
    metric: str
    percent: float | None
    """Percent of rate; negative: `test` needs fewer bits."""
    low: float | None = None
    high: float | None = None
    """The range of quality in dB that both curves cover, and that the figure is an average over."""
    reason: str = ""
    """Why it could not be computed; empty where it was."""


def compare(test: Curve, anchor: Curve, metric: str) -> Comparison:
    """BD-rate of `test` against `anchor` on `psnr` or `ms-ssim-db`; what stands in the way becomes the reason."""
    for curve in (test, anchor):
        if not curve.has(metric):
            reason = f"{curve.label} has no {QUALITY_NAMES[metric]} for each of its points"
            return Comparison(test.label, anchor.label, metric, None, reason=reason)
    qualities = test.values(metric), anchor.values(metric)
    try:
        percent = bd_rate(anchor.bpp, qualities[1], test.bpp, qualities[0])
    except LalicError as error:
        return Comparison(test.label, anchor.label, metric, None, reason=str(error))
    low, high = max(map(min, qualities)), min(map(max, qualities))
    return Comparison(test.label, anchor.label, metric, percent, low, high)


def bd_rate(
    rate_anchor: Sequence[float],
    quality_anchor: Sequence[float],
    rate_test: Sequence[float],
    quality_test: Sequence[float],
) -> float:
    """BD-rate in percent of `test` against `anchor`; negative means that `test` needs fewer bits.

    Args:
        rate_anchor, rate_test: rates in any one unit (bpp), in any order, at least four points each.
        quality_anchor, quality_test: PSNR or MS-SSIM in dB, one value for each rate.

    Raises LalicError for too few points, values that are not positive and finite, a curve whose rate does not
    rise with its quality, and curves that share no range of quality.
    """
    q_anchor, log_anchor = _curve(rate_anchor, quality_anchor, "anchor")
    q_test, log_test = _curve(rate_test, quality_test, "test")
    low, high = max(q_anchor[0], q_test[0]), min(q_anchor[-1], q_test[-1])
    if low >= high:
        raise LalicError(
            f"the curves share no range of quality: anchor {q_anchor[0]:.2f} to {q_anchor[-1]:.2f} "
            f"dB, test {q_test[0]:.2f} to {q_test[-1]:.2f} dB; measure more points"
        )
    area_anchor = float(PchipInterpolator(q_anchor, log_anchor).integrate(low, high))
    area_test = float(PchipInterpolator(q_test, log_test).integrate(low, high))
    return math.expm1((area_test - area_anchor) / (high - low)) * 100


def _curve(
    rate: Sequence[float], quality: Sequence[float], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quality ascending and the logarithm of the rate."""
    if len(rate) != len(quality):
        raise LalicError(f"the {name} curve has {len(rate)} rates but {len(quality)} quality values")
    if len(rate) < MIN_POINTS:
        raise LalicError(f"BD-rate needs at least {MIN_POINTS} points, the {name} curve has {len(rate)}")
    if any(v is None for v in (*rate, *quality)):
        raise LalicError(f"the {name} curve has an empty value; leave that point out")
    r, q = np.asarray(rate, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if not (np.isfinite(r).all() and np.isfinite(q).all() and (r > 0).all()):
        raise LalicError(f"the {name} curve has a rate that is not positive or a value that is not finite")
    order = np.argsort(q, kind="stable")
    r, q = r[order], q[order]
    if (np.diff(q) <= 0).any() or (np.diff(r) <= 0).any():
        raise LalicError(f"the {name} curve is not a rate-distortion curve: its rate must rise with its quality")
    return q, np.log(r)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Compare result files with each other and with published curves."""
    args = _parser().parse_args(argv)
    collection = Collection(args.curves, args.anchor, args.dataset, args.labels or ())
    if collection.dataset:
        print(f"test set: {collection.dataset}")
    done: list[Comparison] = []
    for metric in METRICS if args.metric == "both" else (args.metric,):
        tests, anchors = collection.tests(metric), collection.others(metric)
        if args.anchor is None:
            tests = anchors = [*tests, *anchors]
        pairs = [compare(test, anchor, metric) for test in tests for anchor in anchors if test is not anchor]
        done += pairs
        if pairs and args.metric == "both" and all(pair.percent is None for pair in pairs):
            print(f"\n{QUALITY_NAMES[metric]}: not computed ({for_terminal(pairs[0].reason)})")
        elif pairs:
            print(f"\n{matrix(metric, [t.label for t in tests], [a.label for a in anchors], pairs)}")
    if not done:
        raise LalicError(
            "there is nothing to compare with: name a second result file, or a published curve with --anchor NAME "
            f"--dataset SET ({', '.join(DATASETS)})"
        )
    if all(pair.percent is None for pair in done):
        raise LalicError(f"no BD-rate could be computed: {done[0].reason}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, {"dataset": collection.dataset, "bd-rate": [asdict(pair) for pair in done]})
    return 0


def matrix(metric: str, tests: Sequence[str], anchors: Sequence[str], pairs: Sequence[Comparison]) -> str:
    """The comparisons as aligned text, one row for each test and one column for each anchor, reasons below."""
    reasons = list(dict.fromkeys(pair.reason for pair in pairs if pair.reason))
    cells = {}
    for pair in pairs:
        found = pair.percent is not None
        cells[pair.test, pair.anchor] = f"{pair.percent:+.2f}" if found else f"({reasons.index(pair.reason) + 1})"
    lines = [["", *map(for_terminal, anchors)]]
    lines += [[for_terminal(test), *(cells.get((test, anchor), "") for anchor in anchors)] for test in tests]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    title = f"BD-rate in percent, {QUALITY_NAMES[metric]}: rate of the row against the column (negative: fewer bits)"
    table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([title, *table, *(f"({i}) {for_terminal(reason)}" for i, reason in enumerate(reasons, 1))])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic bdrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="+", metavar="RESULT", help="result file, or name of a published curve")
    parser.add_argument(
        "--anchor", nargs="+", metavar="NAME_OR_FILE", help="compare with these (default: all pairs, and what is known)"
    )
    parser.add_argument("--dataset", choices=DATASETS, help="test set of the published curves (default: the results')")
    parser.add_argument("--metric", choices=(*METRICS, "both"), default="both", help="quality (default: both)")
    parser.add_argument("--labels", nargs="+", help="what to call the curves, one for each RESULT")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures to this JSON file")
    return parser


if __name__ == "__main__":
    run_main(main)
