"""The numbers of a report as HTML tables: checkpoints, BD-rate, single images, surroundings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from lalic.bdrate import Comparison
from lalic.report.html import number, size, text
from lalic.results import QUALITY_NAMES, Result


class Column(NamedTuple):
    """How a value of a result file is shown."""

    title: str
    unit: str
    digits: int
    sign: bool = False


COLUMNS = {
    "bpp": Column("Rate", "bpp", 4),
    "bpp-estimated": Column("Estimated", "bpp", 4),
    "bpp-gap-percent": Column("Gap", "%", 2, sign=True),
    "psnr": Column("PSNR", "dB", 2),
    "psnr-rgb": Column("PSNR", "dB", 2),
    "psnr-unrounded": Column("unrounded", "dB", 2),
    "ms-ssim-db": Column("MS-SSIM", "dB", 2),
    "ms-ssim": Column("MS-SSIM", "", 4),
    "ms-ssim-rgb": Column("MS-SSIM", "", 4),
    "enc_time": Column("Encode", "s", 2),
    "dec_time": Column("Decode", "s", 2),
    "encoding_time": Column("Encode", "s", 2),
    "decoding_time": Column("Decode", "s", 2),
    "forward_time": Column("Forward", "s", 2),
    "peak-memory-bytes": Column("Peak memory", "", 0),
}


def checkpoints(result: Result, labels: Sequence[str]) -> str:
    """One row for each operating point, the averages over the images."""
    results: Mapping[str, Any] = result["results"]
    shown = [
        (key, column)
        for key, column in COLUMNS.items()
        if isinstance(results.get(key), list) and len(results[key]) == len(labels) and not _told_twice(key, results)
    ]
    models = result.get("models")
    lambdas = [_lambda(m) for m in models] if isinstance(models, list) and len(models) == len(labels) else []
    head = ["Quality", *(["λ"] if any(lambdas) else []), *(_head(column) for _, column in shown)]
    rows = []
    for i, label in enumerate(labels):
        cells = [number_cell(results[key][i], key) for key, _ in shown]
        rows.append([text(label), *([lambdas[i] or "–"] if any(lambdas) else []), *cells])
    return table(head, rows, "Averages over the images, one row for each operating point")


def records(rows: Sequence[Result], names: Mapping[str, str]) -> str:
    """Every image of one checkpoint."""
    keys = [key for key in COLUMNS if any(key in row for row in rows) and not _told_twice(key, rows[0])]
    head = ["Image", "Size", *(_head(COLUMNS[key]) for key in keys)]
    body = []
    for row in rows:
        dimensions = f"{row['width']}×{row['height']}" if {"width", "height"} <= set(row) else "–"
        body.append([text(names[row["file"]]), text(dimensions), *(number_cell(row.get(key), key) for key in keys)])
    return table(head, body, "Every image")


# What a result file may hold twice: under CompressAI's names too, MS-SSIM in decibels and plainly.
_SAME = {
    "psnr-rgb": ("psnr",),
    "ms-ssim": ("ms-ssim-db",),
    "ms-ssim-rgb": ("ms-ssim-db", "ms-ssim"),
    "encoding_time": ("enc_time", "forward_time"),
    "decoding_time": ("dec_time", "forward_time"),
}


def _told_twice(key: str, values: Mapping[str, Any]) -> bool:
    return any(other in values for other in _SAME.get(key, ()))


def number_cell(value: Any, key: str) -> str:
    """A value as its column shows it."""
    if key == "peak-memory-bytes":
        return size(value) if isinstance(value, int | float) and not isinstance(value, bool) else "–"
    return number(value, COLUMNS[key].digits, COLUMNS[key].sign)


def bd_rates(comparisons: Sequence[Comparison]) -> str:
    """One row for each curve that the evaluation is compared with, and notes for what could not be computed."""
    anchors = list(dict.fromkeys(c.anchor for c in comparisons))
    metrics = [m for m in QUALITY_NAMES if any(c.metric == m for c in comparisons)]
    by_pair = {(c.anchor, c.metric): c for c in comparisons}
    reasons = list(dict.fromkeys(c.reason for c in comparisons if c.reason))
    rows = []
    for anchor in anchors:
        cells = [text(anchor)]
        for metric in metrics:
            pair = by_pair.get((anchor, metric))
            if pair is None:
                cells.append("–")
            elif pair.percent is None:
                note = reasons.index(pair.reason) + 1
                cells.append(f'<span class="none">not computed <sup><a href="#bd-note-{note}">{note}</a></sup></span>')
            else:
                kind = "better" if pair.percent < 0 else "worse"
                span = f"at {number(pair.low, 1)} – {number(pair.high, 1)} dB"
                cells.append(f'<b class="{kind}">{number(pair.percent, 2, sign=True)} %</b> <small>{span}</small>')
        rows.append(cells)
    head = ["Compared with", *(QUALITY_NAMES[metric] for metric in metrics)]
    notes = "".join(f'<li id="bd-note-{i}">{text(reason)}</li>' for i, reason in enumerate(reasons, 1))
    notes = f'<ol class="notes">{notes}</ol>' if notes else ""
    return table(head, rows, "Bjøntegaard delta rate of this evaluation", "left bd") + notes


def surroundings(result: Result) -> str:
    """What the numbers depend on: machine, versions, weights, the command."""
    pairs: list[tuple[str, str]] = []
    environment = result.get("environment")
    if isinstance(environment, Mapping):
        pairs += [(str(key).replace("_", " "), _plain(value)) for key, value in environment.items()]
    for key in ("description", "command", "arithmetic", "date"):
        if result.get(key):
            pairs.append((key, _plain(result[key])))
    items = "".join(
        f'<div class="{"wide" if len(value) > 40 else "short"}"><dt>{text(key)}</dt><dd>{text(value)}</dd></div>'
        for key, value in pairs
        if value
    )
    models = result.get("models")
    rows = []
    if isinstance(models, list):
        for m in models:
            if isinstance(m, Mapping):
                keys = ("quality", "name", "step", "fingerprint", "checkpoint")
                # The first 16 digits of a fingerprint tell weights apart; the JSON has all of them.
                values = ["–" if m.get(key) is None else _plain(m[key]) for key in keys]
                rows.append([text(v[:16] if key == "fingerprint" else v) for key, v in zip(keys, values, strict=True)])
    weights = table(["Quality", "Weights", "Step", "Fingerprint", "Read from"], rows, "Weights", "left") if rows else ""
    return (f'<dl class="facts">{items}</dl>' if items else "") + weights


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "figures") -> str:
    """Cells are HTML already. The table scrolls in a box of its own where the screen is too narrow for it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f'<caption class="hidden">{text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def display_names(files: Sequence[str], folder: str | None) -> dict[str, str]:
    """Images by what people call them: their path within the folder, or their name where that is unknown."""
    names = {}
    for file in files:
        path = PurePath(file)
        try:
            names[file] = str(path.relative_to(folder)) if folder else path.name
        except ValueError:
            names[file] = path.name
    return names


def _head(column: Column) -> str:
    return f"{text(column.title)}<small>{text(column.unit)}</small>" if column.unit else text(column.title)


def _lambda(model: Any) -> str:
    loss = model.get("loss") if isinstance(model, Mapping) else None
    value = loss.get("lambda") if isinstance(loss, Mapping) else None
    return f"{value:g}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, list):
        return " ".join(_plain(v) for v in value)
    return str(value)
