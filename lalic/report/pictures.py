"""The pictures of a report: which images are shown, where they lie, and how they are embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lalic.data.images import read_rgb
from lalic.errors import LalicError
from lalic.metrics import psnr
from lalic.report.html import number, size
from lalic.results import Result, folder_of_images, records_of

Picture = NDArray[np.uint8]

# Dark where nothing differs; every step of it is brighter than the one before, so it reads in grey as well.
_HEAT = ((6, 6, 16), (58, 16, 100), (150, 36, 104), (226, 84, 60), (250, 164, 40), (255, 250, 200))
_STRIP = 256
"""Rows at a time: whole pictures of 16-bit differences would be large."""


@dataclass(frozen=True)
class PictureOptions:
    """How much of the pictures goes into a report."""

    max_images: int = 8
    """Images that are shown: from the one with the lowest PSNR to the one with the highest, evenly."""
    max_side: int = 1024
    """Larger pictures are reduced to this many pixels on their longer side."""
    max_bytes: int = 40 * 2**20
    """No further image is added once the embedded files have this size."""
    quality: int = 90
    """Of the embedded WebP files."""
    lossless: bool = False
    """Embed the exact pixels of originals and reconstructions."""
    gain: int = 8
    """Amplification of the error maps."""

    def __post_init__(self) -> None:
        if self.max_images < 0 or self.max_side < 16 or self.max_bytes < 0:
            raise LalicError("a report's images must be 0 or more, and their sides 16 pixels or more")
        if not (1 <= self.quality <= 100 and 1 <= self.gain <= 255):
            raise LalicError("the quality of a report's pictures is 1 to 100, and the gain of its error maps 1 to 255")


@dataclass
class Version:
    """What one checkpoint makes of an image, as data URLs."""

    reconstruction: str
    error: str


@dataclass
class Shown:
    """One image with its reconstructions, by the label of the checkpoint."""

    file: str
    width: int
    height: int
    shown: tuple[int, int]
    original: str
    versions: dict[str, Version] = field(default_factory=dict)


@dataclass
class Gallery:
    """The pictures of a report, and what has to be said about them."""

    images: list[Shown] = field(default_factory=list)
    of: int = 0
    """How many images the evaluation has."""
    remarks: list[str] = field(default_factory=list)
    num_bytes: int = 0
    lowest_psnr: float = float("inf")
    """Of an embedded picture against the exact one."""
    reduced: bool = False


def gallery(
    result: Result, labels: Sequence[str], images: Path | None, reconstructions: Path | None, options: PictureOptions
) -> Gallery:
    """Read, reduce and embed pictures. Whatever is missing or does not fit becomes a remark."""
    by_file: dict[str, dict[str, Result]] = {}
    for record in records_of(result):
        by_file.setdefault(record["file"], {})[str(record.get("quality"))] = record
    out = Gallery(of=len(by_file))
    if not by_file:
        out.remarks.append("The result has no records of single images, so there are no pictures to show.")
    elif reconstructions is None:
        out.remarks.append("No folder of reconstructions was given (--reconstructions), so no pictures are shown.")
    if out.remarks or options.max_images == 0:
        return out
    folder = folder_of_images(result)
    missing: list[str] = []
    for file in chosen(by_file, labels, options.max_images):
        if out.num_bytes > options.max_bytes:
            out.remarks.append(f"No more images: the embedded ones have reached {size(options.max_bytes)}.")
            break
        try:
            original = read_rgb(_original(file, folder, images))
        except LalicError as error:
            missing.append(str(error))
            continue
        shown = _embed(original, by_file[file], labels, _within(file, folder), reconstructions, options, out, missing)
        if shown:
            out.images.append(shown)
    if missing:
        more = f" (and {len(missing) - 5} more)" if len(missing) > 5 else ""
        out.remarks.append(f"Not shown: {'; '.join(missing[:5])}{more}.")
    return out


def chosen(by_file: Mapping[str, Mapping[str, Result]], labels: Sequence[str], count: int) -> list[str]:
    """At most `count` files, evenly from the lowest PSNR to the highest at the middle label, in the order given."""
    files = list(by_file)
    if count >= len(files):
        return files
    middle = labels[len(labels) // 2] if labels else ""

    def quality(file: str) -> float:
        value = by_file[file].get(middle, {}).get("psnr")
        return float(value) if isinstance(value, int | float) else float("inf")

    ranked = sorted(files, key=quality)
    kept = {ranked[round(i)] for i in np.linspace(0, len(files) - 1, count)}
    return [file for file in files if file in kept]


def _embed(
    original: Picture,
    records: Mapping[str, Result],
    labels: Sequence[str],
    within: PurePath,
    reconstructions: Path | None,
    options: PictureOptions,
    out: Gallery,
    missing: list[str],
) -> Shown | None:
    height, width = original.shape[:2]
    versions = {}
    for label in labels:
        path = _reconstruction(within, label, reconstructions)
        if path is None:
            missing.append(f"no reconstruction of {within} by {label}")
            continue
        try:
            reconstruction = read_rgb(path)
        except LalicError as error:
            missing.append(str(error))
            continue
        said = _disagreement(original, reconstruction, records.get(label, {}))
        if said:
            missing.append(f"{path} {said}")
            continue
        error_map = heat(original, reconstruction, options.gain)
        versions[label] = Version(
            _picture(reconstruction, options, out), _webp(_reduced(error_map, options.max_side), 80, False, out)
        )
    if not versions:
        return None
    small = _reduced(original, options.max_side)
    out.reduced |= small.shape != original.shape
    embedded = _picture(original, options, out)
    return Shown(records_file(records), width, height, (small.shape[1], small.shape[0]), embedded, versions)


def records_file(records: Mapping[str, Result]) -> str:
    """The file that the records of one image are about."""
    return str(next(iter(records.values()))["file"])


def _disagreement(original: Picture, reconstruction: Picture, record: Result) -> str:
    """Why a file cannot be the reconstruction that the record is about; empty where it may well be."""
    if original.shape != reconstruction.shape:
        a, b = (f"{p.shape[1]}x{p.shape[0]}" for p in (reconstruction, original))
        return f"is {a} pixels large, the image {b}"
    recorded, measured = record.get("psnr"), psnr(original, reconstruction)
    if isinstance(recorded, int | float) and abs(recorded - measured) > 0.005:
        return f"has {number(measured, 2)} dB, but the result says {number(recorded, 2)} dB: it is of another run"
    return ""


def heat(original: Picture, reconstruction: Picture, gain: int) -> Picture:
    """Error map (H, W, 3): |difference|, averaged over R, G and B, times `gain`, as colours from dark to bright."""
    out, colours = np.empty_like(original), heat_colours()
    for top in range(0, len(original), _STRIP):
        rows = slice(top, top + _STRIP)
        difference = np.abs(original[rows].astype(np.int16) - reconstruction[rows]).sum(axis=2, dtype=np.int32)
        out[rows] = colours[np.minimum(difference * gain // 3, 255)]
    return out


def heat_colours() -> Picture:
    """The 256 colours of an error map, (256, 3)."""
    stops = np.linspace(0, 255, len(_HEAT))
    channels = [np.interp(np.arange(256), stops, [colour[c] for colour in _HEAT]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _reduced(picture: Picture, max_side: int) -> Picture:
    height, width = picture.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return picture
    target = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(target, Image.Resampling.BOX))


def _picture(picture: Picture, options: PictureOptions, out: Gallery) -> str:
    small = _reduced(picture, options.max_side)
    return _webp(small, options.quality, options.lossless, out, measure=not options.lossless)


def _webp(picture: Picture, quality: int, lossless: bool, out: Gallery, measure: bool = False) -> str:
    """`picture` as a data URL of a WebP file; its size, and how exact it is, are noted in `out`."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if lossless:
        image.save(buffer, "WEBP", lossless=True, quality=60, method=3)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
    out.num_bytes += buffer.tell()
    if measure:
        out.lowest_psnr = min(out.lowest_psnr, psnr(picture, np.asarray(Image.open(buffer).convert("RGB"))))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _within(file: str, folder: str | None) -> PurePath:
    """The path of an image within its folder; only its name where a result file says something stranger."""
    path = PurePath(file)
    try:
        inside = path.relative_to(folder) if folder else PurePath(path.name)
    except ValueError:
        inside = PurePath(path.name)
    return PurePath(path.name) if ".." in inside.parts or inside.is_absolute() else inside


def _original(file: str, folder: str | None, images: Path | None) -> Path:
    """Where an image lies now: in the folder that was given, or where it was when it was measured."""
    if images is None:
        return Path(file)
    inside = images / _within(file, folder)
    return inside if inside.exists() else images / PurePath(file).name


def _reconstruction(within: PurePath, label: str, folder: Path | None) -> Path | None:
    """The file that `lalic eval` wrote for an image: `.png` for its suffix, or behind it where two would be one."""
    if folder is None or "/" in label or label in ("", ".", ".."):
        return None
    for name in (within.with_name(f"{within.name}.png"), within.with_suffix(".png")):
        path = folder / label / name
        if path.is_file():
            return path
    return None
