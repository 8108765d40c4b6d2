"""Rate-distortion curves, and pictures side by side.

    lalic plot result.json [more.json ...] -o rd.png [--images FOLDER] [--metric psnr] [--title TEXT]

With `--images`, JPEG and WebP are measured live on the pictures of that folder and drawn beside. The suffix
of the output chooses the format (.png, .svg, .pdf).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lalic.anchors import FORMATS, Curve, measure_pillow
from lalic.errors import LalicError, run_main
from lalic.files import atomic_open

SUFFIXES = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
AXES = {"psnr": "PSNR (dB), RGB, 8-bit", "ms-ssim-db": "MS-SSIM (dB)"}
# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def read_curve(path: str | Path, label: str | None = None) -> Curve:
    """The curve in a result file of `lalic.eval`, of the published code, or of CompressAI."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        results = data["results"]
        bpp, psnr = [float(v) for v in results["bpp"]], list(results["psnr"])
    except OSError as error:
        raise LalicError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LalicError(f"{path} is not a result file: it has no lists results.bpp and results.psnr") from error
    if not bpp or len(bpp) != len(psnr):
        raise LalicError(f"{path} has {len(bpp)} rates and {len(psnr)} PSNR values: it is not a curve")
    return Curve(label or str(data.get("name", Path(path).stem)), bpp, psnr, list(results.get("ms-ssim-db", [])))


def plot_rd(curves: Sequence[Curve], path: str | Path, title: str, metric: str = "psnr") -> None:
    """Draw R-D curves to `path` (.png, .svg or .pdf), bits per pixel to the right, quality upwards."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise LalicError(f"{path}: the picture can be written as {', '.join(SUFFIXES)}")
    figure_class = _matplotlib()
    figure = figure_class(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        points = sorted(zip(curve.bpp, curve.values(metric), strict=True))
        axes.plot(
            *zip(*points, strict=True),
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5 if len(points) > 1 else 9,
            linestyle="-" if len(points) > 1 else "none",
            linewidth=1.8,
            label=curve.label,
        )
    axes.set_xlabel("Rate (bits per pixel)")
    axes.set_ylabel(AXES[metric])
    axes.set_title(title, fontsize=11)
    axes.set_xlim(left=0)
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", framealpha=0.9, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=SUFFIXES[path.suffix.lower()], dpi=160)
    _write(path, buffer)


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
    lines = [_wrapped(caption, width) for caption in captions]
    font = _font()
    line_height = 20
    top = line_height * max(len(text) for text in lines) + gap
    canvas = Image.new("RGB", (2 * width + gap, height + top), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, text) in enumerate(zip((original, reconstruction), lines, strict=True)):
        left = i * (width + gap)
        for row, line in enumerate(text):
            draw.text((left + 4, 3 + row * line_height), line, fill="black", font=font)
        canvas.paste(Image.fromarray(picture), (left, top))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    _write(Path(path), buffer)


def _wrapped(caption: str, width: int) -> list[str]:
    """Caption broken at blanks into lines that fit `width` pixels; a longer word stands alone."""
    font, lines = _font(), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font() -> Any:
    return ImageFont.load_default(size=15)


def _write(path: Path, buffer: io.BytesIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        file.write(buffer.getbuffer())


def _matplotlib() -> Any:
    """Matplotlib's Figure, which draws without a display; matplotlib is an optional dependency."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LalicError("drawing curves needs matplotlib: pip install 'lalic[plot]'") from error
    return Figure


def main(argv: Sequence[str] | None = None) -> int | None:
    """Draw the curves of result files."""
    parser = argparse.ArgumentParser(
        prog="lalic plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="result files of lalic.eval, one curve each")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--labels", nargs="+", help="names of the curves (default: the name in each file)")
    parser.add_argument("--images", type=Path, help="measure JPEG and WebP on the pictures of this folder")
    parser.add_argument(
        "--anchors", nargs="+", choices=[f.lower() for f in FORMATS], default=[f.lower() for f in FORMATS]
    )
    parser.add_argument("--metric", choices=tuple(AXES), default="psnr")
    parser.add_argument("--title", default="Rate-distortion")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    labels = args.labels or [None] * len(args.results)
    if len(labels) != len(args.results):
        raise LalicError(f"{len(args.results)} result files but {len(labels)} labels")
    curves = [read_curve(path, label) for path, label in zip(args.results, labels, strict=True)]
    if args.images:
        for anchor in args.anchors:
            curves.append(measure_pillow(args.images, anchor, with_ms_ssim=args.metric == "ms-ssim-db"))
    plot_rd(curves, args.output, args.title, args.metric)
    print(args.output)
    return 0


if __name__ == "__main__":
    run_main(main)
