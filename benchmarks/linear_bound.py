"""What a linear transform of as many channels as y would reach: the PSNR that principal components leave.

    python benchmarks/linear_bound.py PHOTOGRAPHS --test KODAK [--channels 64 88 112 320] [--output FILE.json]

y has M numbers for 16 x 16 pixels of three colours. The M principal components of such blocks, found on one set of
photographs and kept without quantisation, give on another the PSNR that no block transform with M linear channels can
exceed. g_a and g_s are no block transform and not linear, so they may; a hardly trained model is near it, whatever
rate lambda asks for. So a small M costs most at high rates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout
from lalic.data.images import list_images, read_rgb  # noqa: E402
from lalic.errors import LalicError, run_main  # noqa: E402
from lalic.files import write_json  # noqa: E402

SIDE = 16


def blocks_of(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixels (H, W, 3) uint8 -> blocks (n, 768) in [0, 1]; what is over at the right and bottom is left out."""
    rows, columns = (side // SIDE for side in rgb.shape[:2])
    pixels = rgb[: rows * SIDE, : columns * SIDE].astype(np.float64) / 255
    return pixels.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def measure(training: Sequence[Path], test: Sequence[Path], channels: Sequence[int]) -> dict[int, float]:
    """Number of channels -> mean PSNR of the test pictures in dB."""
    together = np.concatenate([blocks_of(read_rgb(path)) for path in training])
    mean = together.mean(axis=0)
    _, components = np.linalg.eigh(np.cov(together, rowvar=False))
    components = components[:, ::-1]  # largest variance first
    found: dict[int, list[float]] = {m: [] for m in channels}
    for path in test:
        blocks = blocks_of(read_rgb(path)) - mean
        coefficients = blocks @ components
        for m in channels:
            # The components are orthonormal: what is left out is the error.
            error = np.square(coefficients[:, m:]).sum() / blocks.size
            found[m].append(float(-10 * np.log10(error)))
    return {m: float(np.mean(values)) for m, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it where asked."""
    parser = argparse.ArgumentParser(prog="benchmarks/linear_bound.py", description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="folder of photographs that the components are found on")
    parser.add_argument("--test", type=Path, required=True, help="folder of photographs to measure on")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 88, 112, 128, 192, 320])
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if wrong := [m for m in args.channels if not 1 <= m < 3 * SIDE**2]:
        raise LalicError(f"--channels {wrong[0]}: a block has 1 to {3 * SIDE**2 - 1}")
    psnr = measure(list_images(args.training), list_images(args.test), args.channels)
    for m, value in psnr.items():
        print(f"M {m:4d}: {value:6.2f} dB")
    if args.output:
        command = " ".join(["python", "benchmarks/linear_bound.py", *(sys.argv[1:] if argv is None else argv)])
        write_json(args.output, {"command": command, "environment": describe(1), "psnr": psnr})
    return 0


if __name__ == "__main__":
    run_main(main)
