"""What `lalic eval` found out about released weights, for their bundle and its model card.

One entry for each test set: {"dataset", "images", "coding", "metrics": {name: number}, "environment"}. With weights of
several rates, one for each test set and quality, under "quality".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalic.errors import LalicError
from lalic.published import DATASETS, images_of
from lalic.release_files import read_json

NAMES = {
    "bpp": "rate (bits per pixel)",
    "bpp-estimated": "estimated rate (bits per pixel)",
    "psnr": "PSNR (dB, RGB, 8-bit)",
    "psnr-unrounded": "PSNR (dB, before rounding)",
    "ms-ssim": "MS-SSIM",
    "ms-ssim-db": "MS-SSIM (dB)",
}
"""Metrics that belong to weights rather than to a machine, as the card calls them."""


QUALITY = "q"
"""Of a model in a result file: the quality that weights of several rates were measured at."""


def read_evaluations(results: Sequence[Path], fingerprint: str) -> list[dict[str, Any]]:
    """The entries for weights of this fingerprint in result files of `lalic eval`; LalicError for another file."""
    found: list[dict[str, Any]] = []
    for path in results:
        report = read_json(path, most=1 << 28)
        try:
            found += _entries(report, fingerprint)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise LalicError(f"{path} is no result of `lalic eval`: it does not say which weights it is of") from error
    return found


def _entries(report: Mapping[str, Any], fingerprint: str) -> list[dict[str, Any]]:
    entries = []
    for i, model in enumerate(report["models"]):
        if model["fingerprint"] != fingerprint:
            continue
        values = {key: report["results"][key][i] for key in NAMES if key in report["results"]}
        images = report["images"]
        entries.append(
            {
                "dataset": report.get("dataset") or images.get("dataset") or _name_of_folder(images),
                **({} if model.get(QUALITY) is None else {"quality": float(model[QUALITY])}),
                "images": images["used"],
                "coding": "estimated" if "coding: estimation" in report["description"] else "real",
                "metrics": {k: v for k, v in values.items() if isinstance(v, int | float)},
                "environment": report.get("environment") or {},
            }
        )
    return entries


def joined(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All entries, those of `new` in place of those of `old` for the same test set, coding and quality."""
    entries = {
        (str(e.get("dataset")), str(e.get("coding")), float(e.get("quality") or 0)): dict(e) for e in [*old, *new]
    }
    return [entry for _, entry in sorted(entries.items())]


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table for each test set, with a line for each quality where there are several."""
    sets: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in entries:
        sets.setdefault((str(entry["dataset"]), str(entry.get("coding"))), []).append(entry)
    parts = []
    for (dataset, coding), rows in sets.items():
        rate = "rate from the likelihoods" if coding == "estimated" else "rate from real bytes"
        title = f"Means over the {rows[0]['images']} images of {_plain(dataset)}, {rate}"
        parts.append(f"{title}:\n\n{_curve(rows) if 'quality' in rows[0] else _table(rows[0])}")
    return "\n".join(parts)


def _table(entry: Mapping[str, Any]) -> str:
    rows = "".join(f"| {NAMES[k]} | {v:.4f} |\n" for k, v in entry["metrics"].items() if k in NAMES)
    return f"| | |\n|---|---|\n{rows}"


def _curve(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line for each quality, a column for each metric."""
    names = [key for key in NAMES if any(key in entry["metrics"] for entry in entries)]
    lines = [["quality", *(NAMES[key] for key in names)], ["---"] * (len(names) + 1)]
    for entry in entries:
        values = [entry["metrics"].get(key) for key in names]
        lines.append([f"{entry.get('quality', 0):g}", *("-" if v is None else f"{v:.4f}" for v in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def model_index(name: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for a model hub: `model-index` of a card's front matter."""
    results = [
        {
            "task": {"type": "image-to-image", "name": "image compression"},
            "dataset": {"type": _plain(entry["dataset"]), "name": _dataset_name(entry)},
            "metrics": [
                {"type": key, "name": NAMES[key], "value": round(float(value), 6)}
                for key, value in entry["metrics"].items()
                if key in NAMES
            ],
        }
        for entry in entries
        if entry["metrics"]
    ]
    return [{"name": name, "results": results}] if results else []


def _name_of_folder(images: Mapping[str, Any]) -> str:
    """For results that name no test set. A part of one is not told as the whole, whatever its folder is called."""
    name = Path(images["folder"]).name or "images"
    return f"part-of-{name}" if name in DATASETS and images["used"] < images_of(name) else name


def _dataset_name(entry: Mapping[str, Any]) -> str:
    """With the quality, which would not be told apart otherwise."""
    quality = f", quality {entry['quality']:g}" if "quality" in entry else ""
    return f"{_plain(entry['dataset'])}{quality}"


def _plain(name: str) -> str:
    """A folder's name without what has a meaning in Markdown."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in str(name))[:60]
