"""How pictures of this package are drawn and written: one style, and the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lalic.errors import LalicError
from lalic.files import atomic_open

SUFFIXES = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
    "svg.hashsalt": "lalic",  # ids in the file are random without it
    "path.simplify": False,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
# What would differ from one run, or one release of matplotlib, to the next.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def check_suffix(path: Path) -> str:
    """The format that the suffix of `path` names; LalicError for one that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise LalicError(f"{path}: the picture can be written as {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix.lower()]


@contextmanager
def figure(path: Path, width: float, height: float, **options: Any) -> Iterator[Any]:
    """A matplotlib Figure of width x height inches, which is written to `path` when the body ends.

    Raises LalicError for a suffix other than SUFFIXES, and where matplotlib is not installed.
    """
    format = check_suffix(path)
    matplotlib, figure_class = _matplotlib()
    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}):
        drawn = figure_class(figsize=(width, height), layout="constrained", **options)
        yield drawn
        drawn.savefig(buffer, format=format, dpi=300, metadata=_METADATA[format])
    write_picture(path, buffer)


def quiet_axes(axes: Any) -> None:
    """A light grid behind the curves, and no frame above and to the right."""
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def write_picture(path: Path, buffer: io.BytesIO) -> None:
    """Write a picture atomically; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        file.write(buffer.getbuffer())


def _matplotlib() -> tuple[Any, Any]:
    """matplotlib, and its Figure, which draws without a display; an optional dependency."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LalicError("drawing curves needs matplotlib: pip install 'lalic[plot]'") from error
    return matplotlib, Figure
