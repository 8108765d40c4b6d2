"""Training curves of runs, with everything that interrupted them.

    lalic curves RUN [RUN ...] -o curves.svg [--over steps|hours] [--until X] [--labels NAME ...] [--title TEXT]
                 [--list]

One picture (.png, .svg, .pdf) for the width of a page: loss, bits per pixel and PSNR of training (lines) and of
validation (rings), steps per second, and a lane for each run with its interruptions; of a run on a range of rates a
line for every rung, the lighter the lower. Printed: a table of the runs, and one of their rungs; with --list, one of
every interruption. Reads log.jsonl and events.jsonl of the run folders and changes nothing; the runs may go on
meanwhile. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lalic.curves_picture import mean, plot_runs
from lalic.drawing import check_suffix
from lalic.durations import duration
from lalic.errors import LalicError, for_terminal, run_main
from lalic.run_history import KINDS, VALIDATED, RunHistory, read_history

log = logging.getLogger("lalic.curves")


def labels_of(runs: Sequence[RunHistory]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [Path(run.run).absolute().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def summary(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """A Markdown table of the runs, without a newline at its end; training is the mean of a tenth of the log lines."""
    titles = (
        "run",
        "steps",
        "hours",
        "steps/s",
        "starts",
        *KINDS,
        "training: loss, bpp, PSNR",
        "validation: loss, bpp, PSNR",
    )
    rows = [titles, ("---", *["---:"] * (len(titles) - 3), "---", "---")]
    for run, name in zip(runs, names, strict=True):
        speeds = [v for v in run.train.values["steps_per_second"] if math.isfinite(v)]
        trained, found = _ends(run)
        rows.append(
            (
                for_terminal(name),
                str(run.step),
                f"{run.hours:.2f}",
                f"{statistics.median(speeds):.3g}" if speeds else "-",
                str(run.starts),
                *(str(run.count(kind)) for kind in KINDS),
                trained or "-",
                f"{found} at step {run.validation.steps[-1]}" if found else "-",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def rungs_table(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """A Markdown table of every rung of the runs on a range of rates; the losses are not weighed. Empty without any."""
    rows = [("run", "rung", "training: loss, bpp, PSNR", "validation: loss, bpp, PSNR"), ("---",) * 4]
    for run, name in zip(runs, names, strict=True):
        for rung in run.rungs:
            trained, found = _ends(run, f"q{rung}/")
            rows.append((for_terminal(name), f"q{rung}", trained or "-", found or "-"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) if len(rows) > 2 else ""


def _ends(run: RunHistory, prefix: str = "") -> tuple[str, str]:
    """Loss, bpp and PSNR of the last tenth of the training lines, and of the last validation."""
    tail = max(1, len(run.train) // 10)
    last = {"train": tail, "validation": 1}
    trained, found = (
        _measured({key: mean(values.get(prefix + key, [])[-last[kind] :]) for key in VALIDATED})
        for kind, values in (("train", run.train.values), ("validation", run.validation.values))
    )
    return trained, found


def _measured(values: Mapping[str, float]) -> str:
    """Loss, bpp and PSNR; nothing where none is a number."""
    if not any(map(math.isfinite, values.values())):
        return ""
    decimals = {"psnr": 2}
    return ", ".join(f"{v:.{decimals.get(key, 4)}f}" if math.isfinite(v) else "-" for key, v in values.items())


def interruptions(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """A Markdown table of every interruption, in the order of the runs and of time."""
    rows: list[tuple[str, ...]] = [("run", "UTC", "step", "what", "went on at", "after", "detail"), ("---",) * 7]
    for run, name in zip(runs, names, strict=True):
        for each in sorted(run.interruptions, key=lambda one: one.hours):
            when = "-" if each.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each.time))
            detail = for_terminal(each.detail).replace("|", "\\|")
            if len(detail) > 100:
                detail = detail[:97] + "..."
            onward = "-" if each.resumed_step is None else str(each.resumed_step)
            away = "-" if each.away is None else duration(each.away)
            rows.append((for_terminal(name), when, str(each.step), KINDS[each.kind], onward, away, detail))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _end(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor a number of hours")
    return value


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `lalic curves`."""
    parser = argparse.ArgumentParser(
        prog="lalic curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--over", choices=("steps", "hours"), default="steps", help="to the right (%(default)s)")
    parser.add_argument(
        "--until", type=_end, metavar="X", help="the runs as they were at this step, or after these hours (--over)"
    )
    parser.add_argument("--labels", nargs="+", help="names of the runs (default: their folders')")
    parser.add_argument("--title", default="", help="title of the picture")
    parser.add_argument("--list", action="store_true", help="print every interruption as well")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every glyph that goes into a PDF
    check_suffix(args.output)
    if args.labels and len(args.labels) != len(args.runs):
        raise LalicError(f"{len(args.runs)} runs but {len(args.labels)} labels: give one for each")
    runs = [read_history(run) for run in args.runs]
    if args.until is not None:
        runs = [run.until(args.over, args.until) for run in runs]
    names = args.labels or labels_of(runs)
    for run in runs:
        if not len(run.train):
            log.warning(
                "%s has logged no step yet: it is not in the picture",
                for_terminal(run.run),
            )
    begun = [(run, name) for run, name in zip(runs, names, strict=True) if len(run.train)]
    if not begun:
        raise LalicError("nothing to draw: no run has logged a step yet")
    runs, names = [run for run, _ in begun], [name for _, name in begun]
    plot_runs(runs, args.output, over=args.over, labels=names, title=args.title)
    print(summary(runs, names))
    if table := rungs_table(runs, names):
        print("\n" + table)
    if args.list and any(run.interruptions for run in runs):
        print("\n" + interruptions(runs, names))
    print(f"\n{args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
