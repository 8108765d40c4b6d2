"""The faults: what each does to a training run. Every one happens at a moment that the run's progress sets."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_runs import Run, Stuck, send
from lalic.training import checkpoint

MIB = 1 << 20


@dataclass
class Injected:
    """What was done to a run."""

    step: int
    """Steps done when it began, as far as the run had told."""
    phase: str
    """What the run was at."""
    detail: str = ""
    began: float = 0.0
    """time.monotonic() of the blow."""
    restarts: bool = True
    """Whether the command has to be started again."""
    expected: bool = True
    """Whether the run ended as it says it does; `detail` tells what was seen instead."""


Fault = Callable[[Run, random.Random], Injected]


def phase(run: Run) -> str:
    """What a run is at: "checkpoint" while one is being written, "validation", or "step"."""
    if run.saving():
        return "checkpoint"
    text = run.attempt.text()
    last, step = text.rfind("lalic.train step "), run.attempt.step
    validating = step and step % 5 == 0 and "validation at" not in text[last:]
    return "validation" if validating and last >= 0 else "step"


def within_a_step(run: Run, generator: random.Random) -> None:
    """Let a random part of a step's time pass, so that the blow does not always fall behind a log line."""
    time.sleep(generator.random() * 0.3)


def kill(*which: int | str) -> Fault:
    """kill -9 of ranks (numbers), of "ranks" (all of them), of the "launcher", or of "everything"."""

    def fault(run: Run, generator: random.Random) -> Injected:
        ranks = run.ranks()
        launcher = run.attempt.launcher
        assert launcher is not None
        chosen = {
            "ranks": list(ranks.values()),
            "launcher": [launcher.pid],
            "everything": run.everyone(),
        }
        pids = [pid for name in which for pid in (chosen[name] if isinstance(name, str) else [ranks[name]])]
        within_a_step(run, generator)
        return _blow(run, lambda: [send(pid, signal.SIGKILL) for pid in pids])

    return fault


def ask(number: int, whom: str) -> Fault:
    """A signal that asks to stop: to the "launcher", to "one rank" or to "ranks"."""

    def fault(run: Run, generator: random.Random) -> Injected:
        ranks = run.ranks()
        launcher = run.attempt.launcher
        assert launcher is not None
        rank = generator.choice(sorted(ranks))
        pids = {"launcher": [launcher.pid], "one rank": [ranks[rank]], "ranks": list(ranks.values())}[whom]
        within_a_step(run, generator)
        done = _blow(run, lambda: [send(pid, number) for pid in pids])
        if whom == "one rank":
            done.detail = f"rank {rank}"
        return done

    return fault


def _blow(run: Run, action: Callable[[], Any]) -> Injected:
    """Do it, note when and in which phase, and wait for the launcher's end."""
    done = Injected(run.attempt.step, phase(run), began=time.monotonic())
    action()
    run.wait_for_end()
    return done


def kill_while_writing(run: Run, generator: random.Random) -> Injected:
    """kill -9 of everything when so many files of a checkpoint are in its temporary folder."""
    pids, files = run.everyone(), generator.randint(0, 6)
    step = run.attempt.step

    def written() -> Path | None:
        folder = run.saving()
        try:
            return folder if folder and sum(1 for _ in folder.iterdir()) >= files else None
        except OSError:
            return None

    began = time.monotonic()
    while not (folder := written()):  # closer than Run.wait looks: a file takes milliseconds
        if run.ended or time.monotonic() - began > 600:
            raise Stuck(f"a checkpoint being written\n{run.attempt.last_words()}")
    done = Injected(step, "checkpoint", began=time.monotonic())
    for pid in pids:
        send(pid, signal.SIGKILL)
    done.step = run.attempt.step
    run.wait_for_nobody()
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if folder.exists():
        done.detail = f"{folder.name.removeprefix('.saving-')}, {len(there)} files there"
    else:
        done.detail, done.phase = f"{folder.name.removeprefix('.saving-')}, just renamed", "checkpoint, renamed"
    return done


def kill_while_starting(run: Run, generator: random.Random) -> Injected:
    """kill -9 of all ranks, the run is started again, and all ranks are killed once more before their first step."""
    done = kill("ranks")(run, generator)
    run.start()
    run.wait(lambda: run.attempt.resumed_from is not None, "the second start")
    for pid in run.ranks().values():
        send(pid, signal.SIGKILL)
    run.wait_for_end()
    done.detail = "and again while starting"
    return done


def damage(how: str, name: str | None = None) -> Fault:
    """kill -9 of everything, and the newest checkpoint is damaged: a file "cut", "flipped" (one bit) or "deleted"."""

    def fault(run: Run, generator: random.Random) -> Injected:
        done = kill("everything")(run, generator)
        run.wait_for_nobody()
        folder = checkpoint.folder_of(run.folder, run.saved()[0])
        there = sorted(p.name for p in folder.iterdir())
        file = folder / (name if name in there else generator.choice(there))
        size = file.stat().st_size
        if how == "cut":
            left = generator.randrange(size)
            os.truncate(file, left)
            done.detail = f"{folder.name}/{file.name} cut to {left} of {size} bytes"
        elif how == "flipped":
            place, bit = generator.randrange(size), generator.randrange(8)
            content = bytearray(file.read_bytes())
            content[place] ^= 1 << bit
            file.write_bytes(content)
            done.detail = f"{folder.name}/{file.name} bit {bit} of byte {place} of {size}"
        else:
            file.unlink()
            done.detail = f"{folder.name}/{file.name} deleted"
        return done

    return fault


class SmallDisk:
    """A file system of its own for a run folder, which can be filled and freed: tmpfs, which needs root.

    Where it cannot be mounted, the ranks may not write files beyond a size (RLIMIT_FSIZE) instead.
    """

    def __init__(self, folder: Path, size: int = 128 * MIB):
        folder.mkdir(parents=True)
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "lalic-faults", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        self.name = f"tmpfs of {size // MIB} MiB" if self.mounted else "RLIMIT_FSIZE of the ranks"

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self, run: Run, left: int) -> None:
        """Leave `left` bytes."""
        if not self.mounted:
            for pid in run.ranks().values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(left, 4096), resource.RLIM_INFINITY))
            return
        free = shutil.disk_usage(self.folder).free - left
        # The run writes meanwhile: there may be less.
        with open(self._ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while free > 0 and (written := file.write(bytes(min(free, MIB)))):
                free -= written

    def free(self, run: Run) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)
        if not self.mounted:
            for pid in run.ranks().values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        """Unmount it; processes that were killed a moment ago may still have files open."""
        for way in ([], [], [], [], ["-l"]):
            if self.folder.is_mount() and subprocess.run(["umount", *way, self.folder], capture_output=True).returncode:
                time.sleep(1)


def fill_disk(disk: SmallDisk, then: str) -> Fault:
    """The disk is full when a checkpoint is due. `then`: the run "goes on" until there is space, or is "killed" or
    "stopped" (SIGTERM to the launcher) before there is."""

    def fault(run: Run, generator: random.Random) -> Injected:
        newest = checkpoint.folder_of(run.folder, run.saved()[0])
        size = sum(p.stat().st_size for p in newest.iterdir())
        left = generator.randrange(size * 9 // 10)
        done = Injected(run.attempt.step, phase(run), f"{left} bytes left for {size}", time.monotonic())
        disk.fill(run, left)
        run.wait(lambda: "could not be written" in run.attempt.text(), "the error of a full disk")
        failed = run.attempt.step
        run.wait(lambda: run.attempt.step > failed, "steps after the error")
        if then == "goes on":
            done.restarts = False
        else:
            end = kill("everything") if then == "killed" else ask(signal.SIGTERM, "launcher")
            blow = end(run, generator)
            done.step, done.phase, done.began = blow.step, blow.phase, blow.began
        if then == "stopped":
            run.wait_for_nobody()
            said = [line for line in run.attempt.text().splitlines() if line.startswith("error: ")]
            done.expected = len(said) == 1 and "older checkpoints are intact" in said[0]
            if not done.expected:
                done.detail += f"; it said {said}"
        disk.free(run)
        return done

    return fault
