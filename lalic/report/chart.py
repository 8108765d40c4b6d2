"""Rate-distortion curves as SVG within the page: no library, and colours that follow the reader's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lalic.curve import Curve
from lalic.plot import colour, window
from lalic.report.html import number, text

WIDTH, HEIGHT = 480, 380
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 12, 48


@dataclass(frozen=True)
class Series:
    """A curve and how it is drawn, the same in every chart and in the legend."""

    curve: Curve
    index: int
    own: bool

    @property
    def classes(self) -> str:
        kind = "own" if self.own else "published" if self.curve.source == "published" else "measured"
        return f"s{colour(self.index)} {kind}"


def chart(series: Sequence[Series], metric: str, title: str) -> str:
    """One panel, bits per pixel to the right and quality upwards; "" where no curve has this quality."""
    shown = [s for s in series if s.curve.has(metric)]
    if not shown:
        return ""
    curves = [s.curve for s in shown]
    right, low, high = window(curves, [s.curve for s in shown if s.own], metric)

    def x(rate: float) -> float:
        return round(LEFT + rate / right * (WIDTH - LEFT - RIGHT), 2)

    def y(quality: float) -> float:
        return round(TOP + (high - quality) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)

    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(_in_words(shown, metric, title))}">',
        f'<defs><clipPath id="clip-{metric}">'
        f'<rect x="{LEFT}" y="{TOP}" width="{end - LEFT}" height="{bottom - TOP}"/></clipPath></defs>',
    ]
    for tick in ticks(low, high, 8):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{end}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 5}" text-anchor="end">{_label(tick)}</text>')
    for tick in ticks(0, right, 6):
        parts.append(f'<path class="grid" d="M{x(tick)} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 20}" text-anchor="middle">{_label(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{end}"/>')
    parts.append(
        f'<text class="name" x="{(LEFT + end) / 2}" y="{HEIGHT - 6}" text-anchor="middle">bits per pixel</text>'
    )
    parts.append(f'<g clip-path="url(#clip-{metric})">')
    for s in sorted(shown, key=lambda s: s.own):
        named = [f"{s.curve.label} at quality {q:g}" for q in s.curve.points] if s.own and s.curve.points else []
        names = named or [s.curve.label] * len(s.curve.bpp)
        points = sorted(zip(s.curve.bpp, s.curve.values(metric), names, strict=True))
        path = "L".join(f"{x(rate)} {y(quality)}" for rate, quality, _ in points)
        parts.append(f'<g class="curve {s.classes}"><path class="line" d="M{path}"/>')
        for rate, quality, name in points:
            if rate <= right and low <= quality <= high:
                said = f"{name}: {rate:.3f} bpp, {quality:.2f} dB"
                parts.append(f"<g><title>{text(said)}</title>{marker(s, x(rate), y(quality))}</g>")
        parts.append("</g>")
    return "".join([*parts, "</g></svg>"])


def legend(series: Sequence[Series]) -> str:
    """What the colours stand for, and where each curve comes from."""
    items = []
    for s in series:
        sample = (
            f'<svg class="sample {s.classes}" viewBox="0 0 36 16" aria-hidden="true">'
            f'<path class="line" d="M1 8H35"/>{marker(s, 18, 8)}</svg>'
        )
        said = s.curve.codec_version if s.curve.source == "measured" else s.curve.source
        origin = "this evaluation" if s.own else said or "compared"
        items.append(f"<li>{sample}<span>{text(s.curve.label)} <small>{text(origin)}</small></span></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def marker(series: Series, x: float, y: float) -> str:
    """Shapes as well as colours, for grey print and for eyes that do not tell the colours apart."""
    r = 5.0 if series.own else 3.6
    shapes = (
        f'<circle cx="{x}" cy="{y}" r="{r}"/>',
        f'<path d="M{x - r} {y - r}h{2 * r}v{2 * r}h{-2 * r}z"/>',
        f'<path d="M{x} {y - 1.4 * r:.2f}l{1.3 * r:.2f} {2.4 * r:.2f}h{-2.6 * r:.2f}z"/>',
        f'<path d="M{x} {y - 1.4 * r:.2f}l{1.4 * r:.2f} {1.4 * r:.2f}l{-1.4 * r:.2f} {1.4 * r:.2f}'
        f'l{-1.4 * r:.2f} {-1.4 * r:.2f}z"/>',
        f'<path d="M{x} {y + 1.4 * r:.2f}l{1.3 * r:.2f} {-2.4 * r:.2f}h{-2.6 * r:.2f}z"/>',
    )
    return shapes[series.index % len(shapes)].replace(" cx", ' class="dot" cx').replace(" d=", ' class="dot" d=')


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, roughly `about` of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(tick: float) -> str:
    return f"{tick:g}".replace("-", "−")


def _in_words(series: Sequence[Series], metric: str, title: str) -> str:
    """The chart for those who do not see it."""
    ends = []
    for s in series:
        points = sorted(zip(s.curve.bpp, s.curve.values(metric), strict=True))
        (first, low), (last, high) = points[0], points[-1]
        start, end = f"{number(first, 3)} bpp, {number(low, 2)} dB", f"{number(last, 3)} bpp, {number(high, 2)} dB"
        ends.append(f"{s.curve.label} from {start} to {end}")
    return f"{title} over rate. " + "; ".join(ends)
