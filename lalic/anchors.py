"""Codecs to compare with: published points, and codecs measured live on the same pictures through Pillow.

    lalic anchors IMAGES -o anchors.json [--formats jpeg avif ...] [--published]

Rates count the bytes of whole files, headers included; quality is that of the decoded 8-bit RGB picture, by the
same functions as in `lalic eval`. One quality parameter is used for all pictures of a point, and rates and
qualities are averaged over the pictures, as for learned codecs.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from tqdm import tqdm

from lalic.curve import Curve, curves_of, read_anchors
from lalic.data.images import list_images, read_rgb
from lalic.errors import LalicError, run_main
from lalic.files import write_json
from lalic.metrics import bits_per_pixel, decibels, finite_mean, json_ready, ms_ssim, psnr
from lalic.published import DATASETS, dataset_of, published, title_of

__all__ = [
    "DATASETS",
    "FORMATS",
    "Curve",
    "curves_of",
    "dataset_of",
    "measure_pillow",
    "published",
    "read_anchors",
    "title_of",
]

log = logging.getLogger("lalic.anchors")

Source = str | Path | NDArray[np.uint8]
Point = tuple[float, float, float | None]
"""bpp, PSNR and MS-SSIM of one picture."""


@dataclass(frozen=True)
class Format:
    """How one codec is called. Threads are one, where that can be chosen: the bytes may depend on it."""

    label: str
    pillow: str
    points: tuple[int, ...]
    options: Callable[[float], dict[str, Any]]
    """From a point of the curve to what Pillow's `save` takes."""
    settings: str
    version: Callable[[], str | None]
    """Name and version of the library; None where it is not installed."""
    missing: str


def _feature(name: str, library: str, module: str = "") -> str | None:
    return f"{library} {features.version(name)}" if features.check(module or name) else None


def _jpeg() -> str | None:
    turbo = features.check("jpg") and features.check("libjpeg_turbo")
    return _feature("libjpeg_turbo", "libjpeg-turbo") if turbo else _feature("jpg", "libjpeg")


def _avif() -> str | None:
    try:
        from PIL import _avif as plugin  # type: ignore[attr-defined]
    except ImportError:  # Pillow before 11.3, or one that was built without it
        return None
    encoders = [codec for codec in plugin.codec_versions().split(", ") if codec.startswith("aom")]
    return f"libavif {plugin.libavif_version}, {encoders[0]}" if encoders else None


def _jxl() -> str | None:
    try:
        import pillow_jxl  # noqa: F401  (registers the format)
    except ImportError:
        return None
    return f"pillow-jxl-plugin {version('pillow-jxl-plugin')} (with its own libjxl)"


_PILLOW = "this Pillow cannot write it: install one of its wheels (pip install --upgrade 'pillow>=11.3')"

FORMATS: dict[str, Format] = {
    "JPEG": Format(
        "JPEG",
        "JPEG",
        (5, 10, 20, 30, 40, 50, 60, 70, 80, 90),
        lambda q: {"quality": q, "subsampling": "4:2:0", "optimize": True},
        "quality, 4:2:0, optimised Huffman tables",
        _jpeg,
        _PILLOW,
    ),
    "WEBP": Format(
        "WebP",
        "WEBP",
        (1, 10, 20, 30, 40, 50, 60, 70, 80, 90),
        lambda q: {"quality": q, "method": 6},
        "quality, lossy (4:2:0), method 6",
        partial(_feature, "webp", "libwebp"),
        _PILLOW,
    ),
    "AVIF": Format(
        "AVIF",
        "AVIF",
        (10, 20, 30, 40, 50, 60, 70, 80),
        lambda q: {"quality": q, "subsampling": "4:4:4", "speed": 4, "max_threads": 1, "codec": "aom"},
        "quality, 4:4:4, speed 4",
        _avif,
        _PILLOW,
    ),
    "JPEG2000": Format(
        "JPEG 2000",
        "JPEG2000",
        (26, 28, 30, 32, 34, 36, 38, 40),
        # Without `mct` Pillow codes R, G and B as three pictures, which takes nearly twice the bytes.
        lambda q: {"quality_mode": "dB", "quality_layers": [q], "irreversible": True, "mct": 1},
        "quality in dB, wavelet 9/7, irreversible colour transform",
        partial(_feature, "jpg_2000", "OpenJPEG"),
        _PILLOW,
    ),
    "JPEGXL": Format(
        "JPEG XL",
        "JXL",
        (1, 10, 20, 30, 50, 60, 70, 80, 90, 95),
        lambda q: {"quality": q, "effort": 7, "lossless": False, "num_threads": 0},
        "quality, lossy (VarDCT), effort 7",
        _jxl,
        "JPEG XL needs the plugin: pip install 'lalic[anchors]'",
    ),
}


def format_of(name: str) -> str:
    """The key of FORMATS that a user means; LalicError where there is none, or its codec is not installed."""
    key = name.upper().replace(" ", "").replace("-", "").replace("_", "")
    key = {"JPG": "JPEG", "JP2": "JPEG2000", "J2K": "JPEG2000", "JXL": "JPEGXL"}.get(key, key)
    if key not in FORMATS:
        raise LalicError(f"unknown anchor {name}: choose from {', '.join(FORMATS)}")
    if FORMATS[key].version() is None:
        raise LalicError(f"the anchor {FORMATS[key].label} cannot be measured: {FORMATS[key].missing}")
    return key


def measure_pillow(
    images: str | Path | Sequence[Source],
    format: str,
    qualities: Sequence[float] | None = None,
    with_ms_ssim: bool = False,
    *,
    jobs: int = 1,
    progress: bool = False,
) -> Curve:
    """Code pictures with one of Pillow's codecs; rates count whole files, quality is that of 8-bit RGB.

    Args:
        images: a folder, or paths and (H, W, 3) uint8 arrays.
        format: a key of FORMATS, in any case.
        qualities: the codec's parameter, one point each; the default covers 0.1 to 1.5 bpp or so.
        with_ms_ssim: also measure MS-SSIM, which takes most of the time.
        jobs: processes to share the pictures between.
        progress: show a bar.

    Raises LalicError for an unknown format, a codec that is not installed, and a picture that cannot be read.
    """
    key = format_of(format)
    codec = FORMATS[key]
    points = list(codec.points if qualities is None else qualities)
    sources: list[Source] = list(list_images(images) if isinstance(images, str | Path) else images)
    if not sources or not points:
        raise LalicError(f"{codec.label}: nothing to measure, there are {len(sources)} images, {len(points)} qualities")
    each = partial(_measure, key=key, points=points, with_ms_ssim=with_ms_ssim)
    rows = list(tqdm(_map(each, sources, jobs), codec.label, len(sources), unit="image", disable=not progress))
    curve = Curve(
        label=codec.label,
        bpp=[],
        psnr=[],
        name=key.lower(),
        source="measured",
        codec_version=codec.version() or "",
        settings=codec.settings,
        points=points,
    )
    for point in zip(*rows, strict=True):
        rates, psnrs, similarities = zip(*point, strict=True)
        curve.bpp.append(sum(rates) / len(rates))
        curve.psnr.append(finite_mean(psnrs))
        if with_ms_ssim:
            curve.ms_ssim.append(finite_mean(similarities))
            curve.ms_ssim_db.append(finite_mean(decibels(s) for s in similarities))
    return curve


def _map(function: Callable[[Source], list[Point]], sources: Sequence[Source], jobs: int) -> Iterator[list[Point]]:
    if jobs <= 1 or len(sources) == 1:
        yield from map(function, sources)
        return
    # A fork of a process with torch's threads in it may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(sources)), context, initializer=_take_one_core) as pool:
        yield from pool.map(function, sources)


def _take_one_core() -> None:
    """In a worker: with as many threads as the machine has cores in each, they would wait for each other, spinning."""
    import torch

    torch.set_num_threads(1)


def _measure(source: Source, key: str, points: Iterable[float], with_ms_ssim: bool) -> list[Point]:
    """All points of one picture."""
    rgb = source if isinstance(source, np.ndarray) else read_rgb(source)
    out = []
    for point in points:
        data = encode(rgb, key, point)
        decoded = decode(data)
        similarity = ms_ssim(rgb, decoded) if with_ms_ssim else None
        out.append((bits_per_pixel(len(data), *rgb.shape[:2]), psnr(rgb, decoded), similarity))
    return out


def encode(rgb: NDArray[np.uint8], key: str, point: float, **changed: Any) -> bytes:
    """The file of an (H, W, 3) uint8 picture, by a key of FORMATS and its quality parameter.

    `changed`: options of Pillow's `save` beside or in place of the format's own.
    """
    codec = FORMATS[key]
    codec.version()  # registers the plugin, in a worker too
    buffer = io.BytesIO()
    try:
        Image.fromarray(rgb).save(buffer, format=codec.pillow, **{**codec.options(point), **changed})
    except (OSError, ValueError) as error:
        size = f"{rgb.shape[1]}x{rgb.shape[0]}"
        raise LalicError(f"{codec.label} cannot code a picture of {size} at {point}: {error}") from error
    return buffer.getvalue()


def decode(data: bytes) -> NDArray[np.uint8]:
    """The (H, W, 3) uint8 picture in a file that `encode` made."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check(names: Sequence[str], dataset: str | None) -> list[str]:
    """The keys of FORMATS that a user's list means: formats, `all` (that are installed) and `published`.

    Raises LalicError for a format that is unknown or not installed, and for `published` without a known test set.
    """
    wanted: list[str] = []
    for name in names:
        if name.lower() == "all":
            wanted += [key for key, codec in FORMATS.items() if codec.version()]
        elif name.lower() != "published":
            wanted.append(format_of(name))
        elif dataset is None:
            raise LalicError(
                f"no published points for these images: they are none of {', '.join(DATASETS)}, by names and sizes"
            )
    return list(dict.fromkeys(wanted))


def gather(
    images: str | Path | Sequence[str | Path | NDArray[np.uint8]],
    names: Sequence[str],
    dataset: str | None,
    *,
    jobs: int = 1,
    progress: bool = False,
) -> list[Curve]:
    """Curves by a user's list, see `check`; `all` includes published points where `dataset` has some."""
    wanted = check(names, dataset)
    curves = []
    if dataset and {"all", "published"} & {name.lower() for name in names}:
        curves = published(dataset)
    for key in wanted:
        log.info("measuring %s", FORMATS[key].label)
        curves.append(measure_pillow(images, key, with_ms_ssim=True, jobs=jobs, progress=progress))
    return curves


def main(argv: Sequence[str] | None = None) -> int | None:
    """Measure other codecs on a folder of images."""
    parser = argparse.ArgumentParser(
        prog="lalic anchors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["all"],
        metavar="FORMAT",
        help=f"{', '.join(f.lower() for f in FORMATS)}; all: those installed, and published points (default)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the images (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    images = list_images(args.images)
    dataset = dataset_of(images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    curves = gather(images, args.formats, dataset, jobs=args.jobs, progress=True)
    report = {
        "name": "anchors",
        "dataset": dataset,
        "images": {"folder": str(args.images), "used": len(images)},
        "anchors": [curve.to_json() for curve in curves],
    }
    write_json(args.output, json_ready(report))
    print(table(curves))
    return 0


def table(curves: Sequence[Curve]) -> str:
    """One line for each curve: how it was made and what range it covers."""
    lines = []
    for curve in curves:
        quality = [v for v in curve.psnr if v is not None]
        span = f"{min(quality):.2f} to {max(quality):.2f} dB" if quality else "no PSNR"
        how = curve.codec_version or "published"
        lines.append(f"{curve.label:<16} {min(curve.bpp):.3f} to {max(curve.bpp):.3f} bpp, {span}  ({how})")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
