"""What the user sees: progress while it runs, and what was left out and why."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType

from tqdm import tqdm

from lalic.errors import for_terminal

from .output import OutputFolder

LEFT_OUT_NAME = "left_out.csv"

_LOG_EVERY = 30.0

logger = logging.getLogger("lalic.data_prep")


class Progress:
    """A bar on a terminal, a line now and then in a log file."""

    def __init__(
        self,
        total: int | None,
        done: int = 0,
        what: str = "sharding",
        unit: str = "images",
        note: Callable[[], str] = str,
    ) -> None:
        """`total`: None when nobody knows; `note`: what else to say, empty for nothing."""
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit.removesuffix("s"),
            desc=what,
            disable=not sys.stderr.isatty(),
            smoothing=0.1,
        )
        self._total, self._done, self._unit, self._note = total, done, unit, note
        self._begun_at = done
        self._begun = self._logged = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def reach(self, done: int, **counts: int) -> None:
        """`done` are dealt with; `counts`: what became of them."""
        if self._total is not None and done > self._total:
            # Images beyond the limit stand in for unusable ones before it.
            self._total = self._bar.total = done
        self._bar.update(done - self._done)
        if not self._bar.disable:
            self._bar.set_postfix_str(
                ", ".join([*(f"{k}={n}" for k, n in counts.items()), self._note()]), refresh=False
            )
        self._done = done
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= _LOG_EVERY:
            self._logged = now
            rate = (done - self._begun_at) / (now - self._begun)
            became = "".join(f", {count} {name.replace('_', ' ')}" for name, count in counts.items())
            note = f", {self._note()}" if self._note() else ""
            if self._total is None:
                logger.info("%d %s%s, %.0f %s/s%s", done, self._unit, became, rate, self._unit, note)
                return
            left = (self._total - done) / rate if rate else float("inf")
            logger.info(
                "%d of %d %s%s, %.0f %s/s%s, %s left",
                *(done, self._total, self._unit, became, rate, self._unit, note),
                tqdm.format_interval(left) if rate else "?",
            )


class LeftOut:
    """Counts per reason, with the first example of each."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, path: str, reason: str, detail: str) -> None:
        self.reasons[reason] += 1
        self._examples.setdefault(reason, for_terminal(printable(path)) + (f": {detail}" if detail else ""))

    def lines(self) -> list[str]:
        """One line per reason, the most frequent first."""
        return [
            f"  {count:>8}  {reason}, for example {self._examples[reason]}"
            for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        ]

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


def write_left_out(output: OutputFolder, rows: Iterable[list[str]]) -> None:
    """Write the table of path, reason and detail, atomically."""
    write_table(output, LEFT_OUT_NAME, ["path", "reason", "detail"], rows)


def write_table(output: OutputFolder, name: str, titles: list[str], rows: Iterable[list[str]]) -> None:
    """Write a CSV file, atomically."""
    with output.open_text(name) as file:
        table = csv.writer(file, lineterminator="\n")
        # A carriage return ends a row for every reader; Python's writer quotes it only where it ends rows itself.
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writerow(titles)
        for row in rows:
            cells = [printable(cell) for cell in row]
            (quoted if any("\r" in cell for cell in cells) else table).writerow(cells)


def printable(path: str) -> str:
    """The path with bytes that are no UTF-8 written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
