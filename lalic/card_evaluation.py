"""What `lalic eval` found out about released weights, for their bundle and its model card.

One entry for each test set: {"dataset", "images", "coding", "metrics": {name: number}, "environment"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalic.errors import LalicError
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
                "dataset": report.get("dataset") or images.get("dataset") or Path(images["folder"]).name or "images",
                "images": images["used"],
                "coding": "estimated" if "coding: estimation" in report["description"] else "real",
                "metrics": {k: v for k, v in values.items() if isinstance(v, int | float)},
                "environment": report.get("environment") or {},
            }
        )
    return entries


def joined(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All entries, those of `new` in place of those of `old` for the same test set and coding."""
    entries = {(str(e.get("dataset")), str(e.get("coding"))): dict(e) for e in [*old, *new]}
    return [entry for _, entry in sorted(entries.items())]


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table for each test set."""
    parts = []
    for entry in entries:
        rate = "rate from the likelihoods" if entry.get("coding") == "estimated" else "rate from real bytes"
        rows = "".join(f"| {NAMES[k]} | {v:.4f} |\n" for k, v in entry["metrics"].items() if k in NAMES)
        title = _plain(entry["dataset"])
        parts.append(f"Means over the {entry['images']} images of {title}, {rate}:\n\n| | |\n|---|---|\n{rows}")
    return "\n".join(parts)


def model_index(name: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for a model hub: `model-index` of a card's front matter."""
    results = [
        {
            "task": {"type": "image-to-image", "name": "image compression"},
            "dataset": {"type": _plain(entry["dataset"]), "name": _plain(entry["dataset"])},
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


def _plain(name: str) -> str:
    """A folder's name without what has a meaning in Markdown."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in str(name))[:60]
