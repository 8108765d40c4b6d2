"""Rate-distortion curves, and pictures side by side.

    lalic plot RESULT.json [MORE.json ...] -o rd.svg [--metric psnr ms-ssim-db] [--anchor NAME_OR_FILE ...]
               [--images FOLDER [--formats jpeg avif ...]] [--title TEXT]

Drawn beside the results: the anchors in them and the curves published for their test set, or those that --anchor
names; with --images, other codecs are measured live on the pictures of that folder. The suffix of the output
chooses the format (.png, .svg, .pdf), and the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lalic.anchors import FORMATS, measure_pillow
from lalic.captions import font, wrapped
from lalic.curve import METRICS, Curve
from lalic.drawing import COLOURS, check_suffix, figure, quiet_axes, write_picture
from lalic.errors import LalicError, run_main
from lalic.published import DATASETS, title_of
from lalic.results import Collection, read_curve

__all__ = ["Curve", "plot_rd", "read_curve", "side_by_side"]

AXES = {"psnr": "PSNR (dB), 8-bit RGB", "ms-ssim-db": "MS-SSIM (dB)"}
_MARKERS = "osD^vPX"


def plot_rd(
    curves: Sequence[Curve],
    path: str | Path,
    title: str,
    metric: str | Sequence[str] = "psnr",
    *,
    focus: Sequence[Curve] = (),
    columns: float = 1.0,
) -> None:
    """Draw R-D curves to `path` (.png, .svg or .pdf), bits per pixel to the right, quality upwards.

    Args:
        metric: "psnr", "ms-ssim-db" or both; each gets a panel. A curve without a quality is left out of its panel.
        focus: the curves that the picture is about: drawn stronger, and the axes end a little beyond them, however far
            the others reach. Empty: all of `curves`.
        columns: width of the picture, in panels of 4.6 inches each; 0.75 fits a column of a paper.

    Raises LalicError for another suffix, and where no curve has the quality of a panel.
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    with figure(Path(path), 4.6 * columns * len(metrics), 3.5 * columns) as drawn:
        for axes, name in zip(drawn.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _panel(axes, curves, focus or curves, name)
        if title:
            drawn.suptitle(title, fontsize=10)


def colour(index: int) -> int:
    """Which colour a curve has. When all are used up the first two, those of what the picture is about, stay theirs."""
    count = len(COLOURS)
    return index if index < count else count - 1 - (index - count) % (count - 2)


def _panel(axes: Any, curves: Sequence[Curve], focus: Sequence[Curve], metric: str) -> None:
    # By its label, so that a curve looks the same in every panel.
    order = list(dict.fromkeys(curve.label for curve in curves))
    shown = [(order.index(curve.label), curve) for curve in curves if curve.has(metric)]
    if not shown:
        curves[0].values(metric)  # says what is missing
        raise LalicError(f"no curve is to be compared on {metric}")
    for i, curve in reversed(shown):
        points = sorted(zip(curve.bpp, curve.values(metric), strict=True))
        strong, line = curve in focus, len(points) > 1
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[colour(i)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=(4.5 if strong else 3) if line else 6,
            markeredgewidth=0,
            linestyle=("--" if curve.source == "published" and not strong else "-") if line else "none",
            linewidth=1.8 if strong else 1.1,
            label=curve.label,
            zorder=3 if strong else 2,
        )
    axes.set_xlabel("Rate (bits per pixel)")
    axes.set_ylabel(AXES[metric])
    right, low, high = window([c for _, c in shown], [c for _, c in shown if c in focus], metric)
    axes.set_xlim(0, right)
    axes.set_ylim(low, high)
    quiet_axes(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", frameon=False)


def window(curves: Sequence[Curve], focus: Sequence[Curve], metric: str) -> tuple[float, float, float]:
    """The part of the plane to draw, (right, bottom, top): what `focus` covers, and a little more of the others."""
    wanted = focus or curves
    right = max(rate for curve in wanted for rate in curve.bpp) * 1.15
    if all(len(curve.bpp) < 2 for curve in wanted):
        right *= 1.5  # around a single point there is room for the others
    inside = [q for c in curves for r, q in zip(c.bpp, c.values(metric), strict=True) if r <= right]
    core = [q for curve in wanted for q in curve.values(metric)]
    # Others may lie far below, at rates that nobody compares: they may stretch the picture by half, not squash it.
    span = max(max(core) - min(core), 4.0)
    low = max(min(inside + core), min(core) - span / 2)
    high = min(max(inside + core), max(core) + span / 2)
    margin = 0.05 * (high - low or 1.0)
    return right, low - margin, high + margin


def side_by_side(
    original: NDArray[np.uint8],
    reconstruction: NDArray[np.uint8],
    path: str | Path,
    captions: tuple[str, str] = ("original", "reconstruction"),
) -> None:
    """Write `original | reconstruction`, each (H, W, 3) uint8 and shown pixel for pixel, captions above."""
    if original.shape != reconstruction.shape:
        raise ValueError(f"pictures of different sizes: {original.shape} and {reconstruction.shape}")
    height, width = original.shape[:2]
    gap = 8
    font_size, line_height = 15, 20
    lines = [wrapped(caption, width - 8, font_size) for caption in captions]
    top = line_height * max(len(text) for text in lines) + gap
    canvas = Image.new("RGB", (2 * width + gap, height + top), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, text) in enumerate(zip((original, reconstruction), lines, strict=True)):
        left = i * (width + gap)
        for row, line in enumerate(text):
            draw.text((left + 4, 3 + row * line_height), line, fill="black", font=font(font_size))
        canvas.paste(Image.fromarray(picture), (left, top))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_picture(Path(path), buffer)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Draw the curves of result files."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every glyph that goes into a PDF
    check_suffix(args.output)
    collection = Collection(args.results, args.anchor, args.dataset, args.labels or ())
    metrics = METRICS if "both" in args.metric else tuple(dict.fromkeys(args.metric))
    tests: list[Curve] = []
    others: list[Curve] = []
    for metric in metrics:  # the published curve of one name may be another one for another quality
        tests += [c for c in collection.tests(metric) if c not in tests]
        others += [c for c in collection.others(metric) if c not in others]
    if args.images:
        with_ms_ssim = "ms-ssim-db" in metrics
        others += [measure_pillow(args.images, name, with_ms_ssim=with_ms_ssim, progress=True) for name in args.formats]
    title = args.title if args.title is not None else title_of(collection.dataset) if collection.dataset else ""
    plot_rd([*tests, *others], args.output, title, metrics, focus=tests, columns=args.width)
    print(args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="result file, one curve each, or name of a published curve"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--labels", nargs="+", help="names of the curves (default: the name in each file)")
    parser.add_argument(
        "--anchor",
        nargs="*",
        metavar="NAME_OR_FILE",
        help="draw these beside them (default: what is known; none: none)",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="test set of the published curves (default: the results')")
    parser.add_argument("--images", type=Path, help="measure other codecs on the pictures of this folder")
    parser.add_argument(
        "--formats", "--anchors", nargs="+", default=["jpeg", "webp"], metavar="FORMAT",
        help=f"which (default: jpeg webp): {', '.join(f.lower() for f in FORMATS)}",
    )  # fmt: skip
    parser.add_argument(
        "--metric", nargs="+", choices=(*METRICS, "both"), default=["psnr"], help="one panel each (default: psnr)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="scale of a panel; 0.75 fits a column of a paper")
    parser.add_argument("--title", help="title (default: the test set)")
    return parser


if __name__ == "__main__":
    run_main(main)
