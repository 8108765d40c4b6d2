"""Bjontegaard delta rate: how many percent fewer bits one codec needs than another at equal quality.

The logarithm of the rate is interpolated over quality by PCHIP (monotone piecewise cubics), as in the common
test conditions of JVET, and the difference is averaged over the range of quality that both curves cover.

    python -m lalic.bdrate ANCHOR.json TEST.json [--metric psnr]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from lalic.errors import LalicError, run_main

MIN_POINTS = 4
"""Fewer points do not tell the shape of a curve; the common test conditions use four."""


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
    """Print the BD-rate between two result files of `lalic.eval` (or any JSON with their `results`)."""
    from lalic.plot import read_curve

    parser = argparse.ArgumentParser(prog="lalic.bdrate", description=main.__doc__)
    parser.add_argument("anchor", help="result file of the codec to compare with")
    parser.add_argument("test", help="result file of the codec that is judged")
    parser.add_argument("--metric", choices=("psnr", "ms-ssim-db"), default="psnr")
    args = parser.parse_args(argv)
    anchor, test = read_curve(args.anchor), read_curve(args.test)
    value = bd_rate(anchor.bpp, anchor.values(args.metric), test.bpp, test.values(args.metric))
    print(f"BD-rate of {test.label} against {anchor.label} ({args.metric}): {value:+.2f} %")
    return 0


if __name__ == "__main__":
    run_main(main)
