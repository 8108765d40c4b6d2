"""Puts the page together. It asks for nothing from anywhere: style, script and pictures are in the one file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from lalic import __version__
from lalic.bdrate import Comparison, compare
from lalic.curve import METRICS, Curve, curves_of
from lalic.files import json_text, write_text
from lalic.plot import AXES
from lalic.published import published, title_of
from lalic.report import tables, viewer
from lalic.report.chart import Series, chart, legend
from lalic.report.html import number, text
from lalic.report.pictures import PictureOptions, gallery
from lalic.results import QUALITY_NAMES, Result, curve_of, dataset_of_result, distinct, folder_of_images, records_of


def write_report(
    result: Result,
    path: str | Path,
    images: str | Path | None = None,
    reconstructions: str | Path | None = None,
    *,
    compared: Sequence[Curve] = (),
    with_published: bool = True,
    options: PictureOptions | None = None,
) -> None:
    """Write the report of one evaluation as one HTML file that needs nothing else.

    Args:
        result: what `lalic eval` writes as JSON, or another result file that lalic.results understands.
        path: the HTML file.
        images: folder of the originals; None: where the result says that they were.
        reconstructions: the folder that `lalic eval -o` wrote; None: where the result says that it is, or no pictures.
        compared: more curves to draw and to compare with.
        with_published: also those published for the test set that the images are.
        options: how much of the pictures is embedded.

    Missing pictures are told in the report. Raises LalicError for a result without a curve.
    """
    path = Path(path)
    originals = Path(images) if images is not None else None
    reconstructions = reconstructions or result.get("reconstructions")
    folder = Path(reconstructions) if isinstance(reconstructions, str | Path) else None
    page = build(result, str(path), originals, folder, compared, with_published, options or PictureOptions())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def build(
    result: Result,
    source: str,
    images: Path | None,
    reconstructions: Path | None,
    compared: Sequence[Curve],
    with_published: bool,
    options: PictureOptions,
) -> str:
    """The page as text; the same arguments give the same text."""
    own = curve_of(result, source)
    labels = _labels(result, len(own.bpp))
    dataset = dataset_of_result(result)
    others = _others(result, source, own, dataset if with_published else None, compared)
    pairs = [compare(own, other, m) for m in METRICS if own.has(m) for other in others if _judges(other, m)]
    rows = records_of(result)
    names = tables.display_names([row["file"] for row in rows], folder_of_images(result))
    shown = gallery(result, labels, images, reconstructions, options)
    by_image = {(row["file"], str(row.get("quality"))): row for row in rows}

    where = title_of(dataset).split(",")[0] if dataset else PurePath(folder_of_images(result) or "").name
    title = f"{own.label} on {where}" if where else f"{own.label}, evaluated"
    sections = [
        ("curves", "Curves", _curves(own, others)),
        ("table", "Operating points", _points(result, labels)),
        ("bd-rate", "BD-rate", _bd_rate(own, pairs, bool(others))),
        ("pictures", "Pictures", viewer.section(shown, labels, names, by_image, options)),
        ("images", "Every image", _records(rows, labels, names)),
        ("surroundings", "How it was measured", _surroundings(result)),
    ]
    sections = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{content}</section>' for anchor, name, content in sections)
    header = (
        f'<header class="top"><p class="eyebrow">Evaluation report</p><h1>{text(title)}</h1>'
        f'<p class="lead">{_lead(result, labels, rows)}</p>{_tiles(own, pairs, result)}'
        f'<nav aria-label="Sections">{links}</nav></header>'
    )
    return _document(title, f"{header}<main>{body}</main>{_end(result)}", viewer.style(labels))


def _document(title: str, body: str, extra_style: str) -> str:
    script = _asset("page.js")
    # The browser itself keeps the promise that nothing is fetched and that no script runs but this one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="lalic {__version__}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{_asset('page.css')}{extra_style}\n</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("lalic.report").joinpath(name).read_text(encoding="utf-8")


def _labels(result: Result, count: int) -> list[str]:
    """Names of the operating points; numbers where the result has none."""
    labels = result.get("qualities")
    if isinstance(labels, list) and len(labels) == count == len({str(label) for label in labels}):
        return [str(label) for label in labels]
    return [str(i) for i in range(1, count + 1)]


def _others(result: Result, source: str, own: Curve, dataset: str | None, compared: Sequence[Curve]) -> list[Curve]:
    """What the evaluation is compared with; published points come from this package where it has them."""
    shipped = [c for c in curves_of(result, source) if not (dataset and c.source == "published")]
    known = published(dataset) if dataset else []
    return distinct([own, *compared, *known, *shipped])[1:]


def _judges(curve: Curve, metric: str) -> bool:
    """Whether a comparison on `metric` is worth a line: not where the curve was never meant for it."""
    return not curve.metrics or metric in curve.metrics


def _lead(result: Result, labels: Sequence[str], rows: Sequence[Result]) -> str:
    """One sentence that says what was measured, and how."""
    images = len({row["file"] for row in rows})
    if not images and isinstance(result.get("images"), dict):
        images = result["images"].get("used") or 0
    points = f"{len(labels)} operating point{'s' if len(labels) > 1 else ''}"
    what = f"{points} on {images} image{'s' if images != 1 else ''}" if images else points
    results = result["results"]
    estimated = rows and "bytes" not in rows[0] and "forward_time" in results
    rate = "rates estimated from the likelihoods" if estimated else "rates from real bytes" if rows else ""
    environment = result.get("environment")
    machine = environment.get("device_name") if isinstance(environment, dict) else None
    return text(". ".join(filter(None, [", ".join(filter(None, [what, rate])), machine])) + ".")


def _tiles(own: Curve, pairs: Sequence[Comparison], result: Result) -> str:
    """The few numbers that people look for first."""
    tiles = []
    found = [pair for pair in pairs if pair.percent is not None]
    # The usual yardstick first, if it is there.
    for pair in sorted(found, key=lambda p: not p.anchor.startswith("VTM"))[:2]:
        kind = "better" if pair.percent is not None and pair.percent < 0 else "worse"
        value = f'<span class="{kind}">{number(pair.percent, 2, sign=True)}</span> <small>%</small>'
        anchor = pair.anchor.replace("-", "\u2011")  # not broken at its hyphen
        tiles.append((f"BD-rate to {anchor}, {QUALITY_NAMES[pair.metric]}", value))
    tiles.append(("Rate in bpp", _span(own.bpp, 3)))
    tiles += [(f"{QUALITY_NAMES[m]} in dB", _span(own.values(m), 2)) for m in METRICS if own.has(m)]
    gaps = result["results"].get("bpp-gap-percent")
    if isinstance(gaps, list) and all(isinstance(gap, int | float) for gap in gaps) and gaps:
        largest = max(gaps, key=abs)
        tiles.append(("Real to estimated rate, at most", f"{number(largest, 2, sign=True)} <small>%</small>"))
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in tiles)
    # Six make two rows of three; fewer stand in one.
    columns = len(tiles) if len(tiles) < 6 else 3
    return f'<dl class="tiles" style="--share:{90 // columns}%">{items}</dl>'


def _span(values: Sequence[float], digits: int) -> str:
    low, high = number(min(values), digits), number(max(values), digits)
    return low if low == high else f"{low} – {high}"


def _curves(own: Curve, others: Sequence[Curve]) -> str:
    # A codec may have one curve for each quality; they share colour and line of the legend.
    order = list(dict.fromkeys([own.label, *(other.label for other in others)]))
    series = [Series(own, 0, True), *(Series(other, order.index(other.label), False) for other in others)]
    panels = []
    for metric in METRICS:
        if not own.has(metric):
            continue
        drawn = chart(series, metric, AXES[metric])
        panels.append(f"<figure><figcaption>{text(AXES[metric])}</figcaption>{drawn}</figure>")
    if not panels:
        return '<p class="remark">The result has no quality for each of its points, so there is nothing to draw.</p>'
    listed = list({s.index: s for s in reversed(series)}.values())[::-1]
    return f'<div class="charts">{"".join(panels)}</div>{legend(listed)}'


def _points(result: Result, labels: Sequence[str]) -> str:
    skipped = result.get("skipped")
    remark = ""
    if isinstance(skipped, list) and skipped:
        lines = [f"{s.get('file')} ({s.get('reason')})" if isinstance(s, dict) else str(s) for s in skipped]
        count = "1 image" if len(lines) == 1 else f"{len(lines)} images"
        listed = text("; ".join(lines))
        remark = f'<p class="remark">{count} could not be read and count in no number: {listed}</p>'
    return tables.checkpoints(result, labels) + remark


def _bd_rate(own: Curve, pairs: Sequence[Comparison], with_others: bool) -> str:
    if not with_others:
        return (
            '<p class="remark">There is nothing to compare with: the images are no test set with published points, '
            "and the result holds no measured anchors (lalic eval --anchors).</p>"
        )
    lacking = [name for metric, name in QUALITY_NAMES.items() if not own.has(metric)]
    remark = (
        f'<p class="remark">Not on {" and ".join(lacking)}, which this result does not have.</p>' if lacking else ""
    )
    if not pairs:
        return remark or '<p class="remark">No curve is meant to be compared on the qualities that there are.</p>'
    return (
        "<p>How many percent fewer (−) or more (+) bits this evaluation needs at equal quality, averaged over the "
        "range of quality that both curves cover; PCHIP over the logarithm of the rate.</p>"
        f"{tables.bd_rates(pairs)}{remark}"
    )


def _records(rows: Sequence[Result], labels: Sequence[str], names: dict[str, str]) -> str:
    if not rows:
        return '<p class="remark">The result has no records of single images.</p>'
    out = []
    for label in labels:
        mine = [row for row in rows if str(row.get("quality")) == label]
        if mine:
            count = f"<small>{len(mine)} images</small>"
            out.append(f"<details><summary>{text(label)}{count}</summary>{tables.records(mine, names)}</details>")
    return "".join(out)


def _surroundings(result: Result) -> str:
    return tables.surroundings(result)


def _end(result: Result) -> str:
    data = base64.b64encode(json_text(_jsonable(result)).encode("utf-8", "backslashreplace")).decode()
    return (
        f'<footer class="end">Written by lalic {__version__}. <a download="result.json" '
        f'href="data:application/json;base64,{data}">All numbers as JSON</a></footer>'
    )


def _jsonable(value: Any) -> Any:
    from lalic.metrics import json_ready

    return json_ready(value)
