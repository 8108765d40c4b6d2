"""Published rate-distortion points, and which of the known test sets a folder of pictures is.

The points are in `anchor_data/DATASET.json`, with their sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from lalic.curve import Curve, curves_of
from lalic.data.images import list_images
from lalic.errors import LalicError

DATASETS = ("kodak", "clic_professional_valid", "tecnick")

_KODAK = {f"kodim{i:02d}" for i in range(1, 25)}
_TECNICK = {f"rgb_or_1200x1200_{i:03d}" for i in range(1, 101)}


def published(dataset: str, metric: str | None = None) -> list[Curve]:
    """Curves published for a test set, by ascending rate; with `metric`, those to compare on it.

    Without `metric` Kodak has two curves of VTM-9.1: one for PSNR, and one of another run for MS-SSIM.
    Raises LalicError for a test set without published points.
    """
    if dataset not in DATASETS:
        raise LalicError(f"no published points for {dataset!r}: there are some for {', '.join(DATASETS)}")
    curves = curves_of(_data(dataset), dataset)
    return [curve for curve in curves if metric is None or curve.has(metric)]


def images_of(dataset: str) -> int:
    """How many pictures a test set has."""
    return int(_data(dataset)["images"])


def title_of(dataset: str) -> str:
    """What people call a test set, with the number of its pictures."""
    return str(_data(dataset)["title"])


@lru_cache
def _data(dataset: str) -> dict[str, Any]:
    return json.loads((files("lalic") / "anchor_data" / f"{dataset}.json").read_text(encoding="utf-8"))


def dataset_of(images: str | Path | Iterable[str | Path]) -> str | None:
    """Which test set with published points a folder, or a list of pictures' paths, is; None when it is none.

    Only the whole set counts, since published points are averages over all of it. It is told by the names of the
    files and, of files that are there, by their sizes.
    """
    if isinstance(images, str | Path):
        try:
            paths: Sequence[Path] = list_images(images)
        except LalicError:
            return None
    else:
        paths = [Path(image) for image in images]
    stems = {path.stem.lower() for path in paths}
    if len(stems) != len(paths):
        return None
    if stems == _KODAK and _sizes(paths) <= {(768, 512), (512, 768)}:
        return "kodak"
    if stems == _TECNICK and _sizes(paths) <= {(1200, 1200)}:
        return "tecnick"
    clic = _data("clic_professional_valid")
    if len(paths) == clic["images"] and stems.issuperset(clic["some_names"]):
        return "clic_professional_valid" if all(max(size) <= 2048 for size in _sizes(paths)) else None
    return None


def _sizes(paths: Sequence[Path]) -> set[tuple[int, int]]:
    """Sizes of those files that are there; (0, 0) for one that is no image."""
    sizes = set()
    for path in paths:
        if path.exists():
            try:
                with Image.open(path) as image:
                    sizes.add(image.size)
            except Exception:  # Pillow raises nearly anything on files that are no images
                sizes.add((0, 0))
    return sizes
