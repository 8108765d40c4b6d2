"""Codecs to compare with, measured live on the same pictures through Pillow."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from lalic.data.images import list_images, read_rgb
from lalic.errors import LalicError
from lalic.metrics import bits_per_pixel, decibels, finite_mean, ms_ssim, psnr

log = logging.getLogger("lalic.anchors")

QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90)

FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Name of the curve, Pillow's feature, what the format's users would choose for small files.
    "JPEG": ("JPEG (4:2:0, optimised)", "jpg", {"subsampling": "4:2:0", "optimize": True}),
    "WEBP": ("WebP (lossy, method 6)", "webp", {"method": 6}),
}


@dataclass
class Curve:
    """A rate-distortion curve: averages over a set of pictures, one value for each operating point."""

    label: str
    bpp: list[float]
    psnr: list[float | None]
    ms_ssim_db: list[float | None] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Quality by its name in result files, `psnr` or `ms-ssim-db`; LalicError where it is missing."""
        values = {"psnr": self.psnr, "ms-ssim-db": self.ms_ssim_db}[metric]
        present = [v for v in values if v is not None]
        if not present or len(present) != len(self.bpp):
            raise LalicError(f"{self.label} has no {metric} for each of its {len(self.bpp)} points")
        return present


def measure_pillow(
    images: str | Path | Sequence[str | Path | NDArray[np.uint8]],
    format: str,
    qualities: Sequence[int] = QUALITIES,
    with_ms_ssim: bool = False,
) -> Curve:
    """Code pictures with one of Pillow's codecs; rates count whole files, quality is that of 8-bit RGB.

    Args:
        images: a folder, or paths and (H, W, 3) uint8 arrays.
        format: "JPEG" or "WEBP".
        qualities: the codec's quality settings, one point each.
        with_ms_ssim: also measure MS-SSIM, which takes most of the time.
    """
    format = format.upper()
    if format not in FORMATS:
        raise LalicError(f"unknown anchor {format}: choose from {', '.join(FORMATS)}")
    label, feature, options = FORMATS[format]
    if not features.check(feature):
        raise LalicError(f"this Pillow cannot write {format}: install one that can, or leave that anchor out")
    sources = list_images(images) if isinstance(images, str | Path) else list(images)
    rows: list[list[tuple[float, float, float | None]]] = [[] for _ in qualities]
    for source in sources:
        rgb = source if isinstance(source, np.ndarray) else read_rgb(source)
        for row, quality in zip(rows, qualities, strict=True):
            row.append(_measure(rgb, format, quality, options, with_ms_ssim))
    curve = Curve(label, [], [], [])
    for row in rows:
        rates, psnrs, similarities = zip(*row, strict=True)
        curve.bpp.append(sum(rates) / len(rates))
        curve.psnr.append(finite_mean(psnrs))
        curve.ms_ssim_db.append(finite_mean(similarities))
    return curve


def _measure(
    rgb: NDArray[np.uint8], format: str, quality: int, options: dict[str, Any], with_ms_ssim: bool
) -> tuple[float, float, float | None]:
    """bpp, PSNR and MS-SSIM in dB of one picture."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=format, quality=quality, **options)
    size = buffer.tell()
    decoded = np.asarray(Image.open(buffer).convert("RGB"))
    similarity = decibels(ms_ssim(rgb, decoded)) if with_ms_ssim else None
    return bits_per_pixel(size, *rgb.shape[:2]), psnr(rgb, decoded), similarity
