"""The rungs of a ladder one after the other, each to its end, and what became of them."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from lalic.errors import for_terminal
from lalic.sweep.launcher import LOG, Launcher, Training
from lalic.sweep.plan import Ladder, Rung
from lalic.sweep.table import json_path, read_rows, rung_status, text, write_rows
from lalic.training.run_folder import STOP, is_held

_LOOK = 0.2
_REFRESH = 60.0
"""Seconds between looks at the training, and between writings of the table while it runs."""


class Asked:
    """Context manager: notes a signal that asks the sweep to stop, and a second Ctrl-C, which ends it at once."""

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.name: str | None = None
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        for number in self.signals:
            # Ignored is what nohup made it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.at_once or (number == signal.SIGINT and self.name == "SIGINT")
        self.name = self.name or signal.Signals(number).name


class Climb:
    """One call of `lalic sweep`: trains what is not finished."""

    def __init__(self, ladder: Ladder, launcher: Launcher):
        self.ladder, self.launcher = ladder, launcher
        self.failures: dict[int, str | None] = {}
        self._written = 0.0
        self._shown = False
        self._hurdle: str | None = None

    def run(self) -> int:
        """Train the rungs in their order. Returns 1 when one of them failed, 130 after a second Ctrl-C, else 0."""
        with Asked() as asked:
            for rung in self.ladder.rungs:
                if asked.name:
                    break
                if rung.finished:
                    say(f"== {rung.name}: {rung.run} is finished")
                    continue
                if rung.parent and not rung.begun and not rung.parent.finished:
                    say(
                        f"== {rung.name} begins with the weights of {rung.parent.name}, which is not finished: left out"
                    )
                    continue
                self._train(rung, asked)
                self._show()
                if self._is_shared(rung):
                    say("== the others would end with the same error and are not started")
                    break
        return self._closing_words(asked)

    def _train(self, rung: Rung, asked: Asked) -> None:
        """Train one rung until it is finished, stopped or failed."""
        while not rung.finished and not asked.name:
            if is_held(rung.run):
                self._wait_for_the_other(rung, asked)
                continue
            before = rung_status(rung.run)
            where = f"goes on after step {before.last_checkpoint}" if rung.begun else "a new run"
            where += f" with the weights of {rung.parent.name}" if rung.parent and not rung.begun else ""
            say(f"== {rung.name} (lambda {rung.config.loss.multiplier:g}): {rung.run}, {where}")
            self.failures[rung.quality] = None
            training = Training(self.launcher.command(self.ladder.config, rung), rung.run)
            try:
                status = self._follow(training, asked)
            except BaseException:
                training.ask_to_stop()
                raise
            if status == 0 or rung.finished:
                return
            if not is_held(rung.run):
                self.failures[rung.quality] = None if asked.at_once else training.reason()
                return
            # Another process took the folder while this one was starting.

    def _follow(self, training: Training, asked: Asked) -> int:
        """Show what a training writes until it ends; returns its exit status."""
        told = killed = False
        status = None
        while status is None:
            if asked.name:
                training.ask_to_stop()
                if not told:
                    again = "; Ctrl-C again ends it at once" if asked.name == "SIGINT" else ""
                    say(f"== {asked.name}: the training is asked to save a checkpoint and stop{again}")
                    told = True
            if asked.at_once and not killed:
                training.kill()
                killed = True
            status = training.wait(_LOOK)
            say(training.news(), end="")
            if time.monotonic() - self._written > _REFRESH:
                self._write()
        if told:
            with suppress(OSError):
                (training.run / STOP).unlink(missing_ok=True)
        return status

    def _wait_for_the_other(self, rung: Rung, asked: Asked) -> None:
        say(
            f"== {rung.name}: another process trains in {rung.run} (an array job, or what a killed sweep left); "
            f"waiting for its end (touch {rung.run / 'STOP'} asks it to stop)"
        )
        while is_held(rung.run) and not asked.name:
            time.sleep(_LOOK)
            if time.monotonic() - self._written > _REFRESH:
                self._write()

    def _is_shared(self, rung: Rung) -> bool:
        """Whether this rung fell at the same hurdle as the one before, before its first step: so would all others."""
        before, self._hurdle = self._hurdle, None
        if (reason := self.failures.get(rung.quality)) and not rung_status(rung.run).step:
            self._hurdle = reason.replace(str(rung.run), "RUN")
        return self._hurdle is not None and self._hurdle == before

    def _write(self) -> None:
        self._written = time.monotonic()
        rows = read_rows(self.ladder, self.failures)
        try:
            write_rows(self.ladder, rows)
        except OSError as error:
            say(f"the table could not be written to {json_path(self.ladder)}: {error.strerror}")

    def _show(self) -> None:
        self._shown = True
        self._write()
        say("\n" + text(self.ladder, read_rows(self.ladder, self.failures), time.time()) + "\n")

    def _closing_words(self, asked: Asked) -> int:
        if not self._shown:
            self._show()
        rungs = self.ladder.by_quality
        open_rungs = [r for r in rungs if not r.finished]
        failed = {r.quality: reason for r in rungs if (reason := self.failures.get(r.quality))}
        for rung in rungs:
            if rung.quality in failed:
                reason = " ".join(for_terminal(failed[rung.quality]).split())
                at = f"at step {rung_status(rung.run).step}"
                complain(f"error: {rung.name} failed {at}: {reason} (log: {rung.run / LOG})")
        if not open_rungs:
            say(f"all {len(rungs)} finished; next: lalic export --sweep {self.ladder.prefix} --output release/")
        else:
            names = ", ".join(r.name for r in open_rungs)
            why = f"stopped ({asked.name}); " if asked.name else ""
            say(f"{why}not finished: {names}; the same command goes on with them")
        return 130 if asked.at_once else 1 if failed else 0


def say(message: str, end: str = "\n") -> None:
    """Print to a terminal that may have gone away: the training is worth more than its picture."""
    _print(message, end, sys.stdout)


def complain(message: str) -> None:
    """As `say`, on stderr."""
    _print(message, "\n", sys.stderr)


def _print(message: str, end: str, stream: Any) -> None:
    try:
        if message:
            print(message, end=end, file=stream, flush=True)
    except OSError:
        # Later prints, and Python's own flush at the end, must not meet the same error again.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
