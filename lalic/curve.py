"""A rate-distortion curve, and how result files spell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lalic.errors import LalicError

METRICS = ("psnr", "ms-ssim-db")
"""The qualities that curves are drawn and compared on, by their names in result files."""


@dataclass
class Curve:
    """A rate-distortion curve: averages over a set of pictures, one value for each operating point."""

    label: str
    bpp: list[float]
    psnr: list[float | None]
    ms_ssim_db: list[float | None] = field(default_factory=list)
    ms_ssim: list[float | None] = field(default_factory=list)
    name: str = ""
    """How a command line calls it: `vtm-9.1`, `avif`."""
    source: Literal["", "measured", "published"] = ""
    codec_version: str = ""
    settings: str = ""
    """How the codec was called; of a published curve, where it comes from."""
    points: list[float] = field(default_factory=list)
    """The codec's quality parameter at each point, where it has one."""
    metrics: tuple[str, ...] = ()
    """What the curve is meant to be compared on; empty: everything that it has values for."""

    def values(self, metric: str) -> list[float]:
        """Quality by its name in result files, `psnr` or `ms-ssim-db`; LalicError where it is missing."""
        values = {"psnr": self.psnr, "ms-ssim-db": self.ms_ssim_db}[metric]
        present = [v for v in values if v is not None]
        if not present or len(present) != len(self.bpp):
            raise LalicError(f"{self.label} has no {metric} for each of its {len(self.bpp)} points")
        return present

    def has(self, metric: str) -> bool:
        """Whether the curve can and should be compared on `metric`."""
        values = {"psnr": self.psnr, "ms-ssim-db": self.ms_ssim_db}[metric]
        complete = bool(values) and len(values) == len(self.bpp) and None not in values
        return complete and (not self.metrics or metric in self.metrics)

    def to_json(self) -> dict[str, Any]:
        """The curve as it stands in the list `anchors` of a result file."""
        return {
            "name": self.name,
            "label": self.label,
            "source": self.source,
            "codec_version": self.codec_version,
            "settings": self.settings,
            "metrics": list(self.metrics or filter(self.has, METRICS)),
            "points": self.points,
            "bpp": self.bpp,
            "psnr": self.psnr,
            "ms-ssim": self.ms_ssim,
            "ms-ssim-db": self.ms_ssim_db,
        }


def curves_of(data: Mapping[str, Any], what: str) -> list[Curve]:
    """The curves in the list `anchors` of a result or anchors file; LalicError, naming `what`, for what is none."""
    try:
        return [_curve(entry) for entry in data.get("anchors", [])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LalicError(f"{what}: its list of anchors is damaged ({error!r})") from error


def read_anchors(path: str | Path) -> list[Curve]:
    """The curves of a file that `lalic anchors` or `lalic eval --anchors` wrote."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LalicError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LalicError(f"{path} is not JSON ({error}): it was not written by lalic anchors or lalic eval") from error
    if not isinstance(data, Mapping) or not isinstance(data.get("anchors"), list):
        raise LalicError(f"{path} holds no list of anchors: write one with lalic anchors or lalic eval --anchors")
    return curves_of(data, str(path))


def _curve(entry: Mapping[str, Any]) -> Curve:
    bpp = [float(v) for v in entry["bpp"]]
    qualities = {key: _numbers(entry.get(key) or [], len(bpp)) for key in ("psnr", "ms-ssim", "ms-ssim-db")}
    return Curve(
        label=str(entry["label"]),
        bpp=bpp,
        psnr=qualities["psnr"],
        ms_ssim_db=qualities["ms-ssim-db"],
        ms_ssim=qualities["ms-ssim"],
        name=str(entry.get("name", "")),
        source=entry.get("source", ""),
        codec_version=str(entry.get("codec_version", "")),
        settings=str(entry.get("settings", "")),
        points=list(entry.get("points") or []),
        metrics=tuple(entry.get("metrics") or ()),
    )


def _numbers(values: list[Any], length: int) -> list[float | None]:
    if values and len(values) != length:
        raise ValueError(f"{length} rates and {len(values)} values of quality")
    return [None if v is None else float(v) for v in values]
