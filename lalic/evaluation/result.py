"""From records to averages, the table on the screen, and the result file."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lalic.codec.quality import equivalent_lambda
from lalic.evaluation.options import Point
from lalic.measure import Row, gap_percent
from lalic.metrics import finite_mean
from lalic.release import Weights, versions
from lalic.remote import without_password

AVERAGED = ("bpp", "bpp-estimated", "psnr", "psnr-unrounded", "ms-ssim", "ms-ssim-db")
TIMES = ("enc_time", "dec_time", "forward_time")
MEMORY = "peak-memory-bytes"
COMPRESSAI = {"psnr-rgb": "psnr", "ms-ssim-rgb": "ms-ssim", "encoding_time": "enc_time", "decoding_time": "dec_time"}
"""What CompressAI's tools call some of our columns."""


def averages(rows: Sequence[Row]) -> Row:
    """Means over images by the names of the records; of the times, over the images that `timed` keeps."""
    out: Row = {}
    for key in AVERAGED:
        if key in rows[0]:
            out[key] = finite_mean(row[key] for row in rows)
    if "bpp-estimated" in out:
        out["bpp-gap-percent"] = gap_percent(out["bpp"], out["bpp-estimated"])
    for key in TIMES:
        if key in rows[0]:
            out[key] = finite_mean(row[key] for row in timed(rows))
    if MEMORY in rows[0]:
        out[MEMORY] = max(row[MEMORY] for row in rows)
    return out


def timed(rows: Sequence[Row]) -> Sequence[Row]:
    """The records whose times count, of the best kind that there is.

    Those of a size that the process had met before; where there are none, those that are not the first of a process;
    else all.
    """
    for unwanted in (("first", "new-size"), ("first",)):
        kept = [row for i, row in enumerate(rows) if row.get("timing", "warm" if i else "first") not in unwanted]
        if kept:
            return kept
    return rows


def table(models: Sequence[Row], results: Sequence[Row]) -> str:
    """The averages as aligned text, one line for each operating point; `models` is what `describe_weights` says.

    The points of weights of several rates have a column of the lambdas that their qualities stand for.
    """
    keys = [key for key in results[0] if key != MEMORY]
    curve = any("q" in model for model in models)
    lines = [["quality", "lambda", *keys, "memory"] if curve else ["label", *keys, "memory"]]
    for model, row in zip(models, results, strict=True):
        memory = f"{row[MEMORY] / 2**20:.0f} MiB"
        lmbda = (model["loss"] or {}).get("lambda")
        told = ["-" if lmbda is None else f"{lmbda:.4g}"] if curve else []
        lines.append([model["quality"], *told, *(short(row[key]) for key in keys), memory])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def short(value: Any) -> str:
    """A number for the screen."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def columns(results: Sequence[Row]) -> dict[str, list[Any]]:
    """The averages as lists over checkpoints, under our names and under CompressAI's."""
    out = {key: [row[key] for row in results] for key in results[0]}
    for theirs, ours in COMPRESSAI.items():
        # CompressAI's tools compute with the values at once, and know no gaps.
        if ours in out and None not in out[ours]:
            out[theirs] = out[ours]
    if "forward_time" in out and "enc_time" not in out:
        # As CompressAI's estimate: half of a forward pass for each direction.
        out["encoding_time"] = out["decoding_time"] = [v / 2 for v in out["forward_time"]]
    return out


def describe_weights(weights: Weights, point: Point, path: str) -> Row:
    """What the result file says about the weights of one operating point.

    Of weights of several rates, "q" is the quality as a number, and "loss" has the lambda that it stands for.
    """
    loss: Row = weights.loss
    if point.quality is not None and loss:
        loss = {"metric": loss.get("metric"), "lambda": equivalent_lambda(loss.get("metric"), point.quality)}
    return {
        "quality": point.label,
        **({} if point.quality is None else {"q": point.quality}),
        "checkpoint": without_password(path),
        "name": weights.name,
        "step": weights.step,
        "loss": loss or None,
        "fingerprint": weights.fingerprint,
    }


def environment(device: torch.device, precision: str, processes: int = 1) -> Row:
    """What the numbers, above all the times, depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("lalic", "torch", "compressai", "numpy", "pillow", "pytorch-msssim")
    return {
        "python": platform.python_version(),
        **versions(*packages),
        "device": device.type,
        "device_name": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def same_numbers(environment: Mapping[str, Any]) -> Row:
    """The part of the environment that a record depends on: not how many processes share the folder."""
    return {key: value for key, value in environment.items() if key != "processes"}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
