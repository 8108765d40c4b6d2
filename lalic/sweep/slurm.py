"""The rungs that are not finished as SLURM jobs: `sbatch --array=... launch/train.slurm`.

RUN/slurm-job notes the array task that a rung was given, so that submitting again leaves alone what still waits in
the queue.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from lalic.errors import LalicError
from lalic.files import write_text
from lalic.sweep.plan import Ladder, Rung
from lalic.training.run_folder import is_held

JOB = "slurm-job"


def submit(ladder: Ladder, options: Sequence[str]) -> list[str]:
    """Submit what is neither finished nor running nor queued; returns what to tell the user, a line each.

    Rungs that begin with another one's weights wait for its job to end well. Raises LalicError when sbatch fails.
    """
    if not _script().is_file():
        raise LalicError(f"there is no {_script()}: submit from the checkout, or set LALIC_ROOT")
    queued = _queued()
    told: list[str] = []
    jobs = {r.quality: job for r in ladder.rungs if (job := _job_of(r)) is not None and job in queued}
    open_rungs: list[Rung] = []
    for rung in ladder.rungs:
        if rung.finished:
            told.append(f"{rung.name}: {rung.run} is finished")
        elif rung.quality in jobs:
            told.append(f"{rung.name}: job {jobs[rung.quality]} is in the queue already")
        elif is_held(rung.run):
            told.append(f"{rung.name}: another process trains in {rung.run}")
        else:
            open_rungs.append(rung)
    for rungs in _together(open_rungs):
        parent = rungs[0].parent
        waits = []
        if parent and not parent.finished and not all(r.begun for r in rungs):
            if parent.quality not in jobs:
                raise LalicError(f"{parent.name}, with whose weights others begin, is trained by no job of the queue")
            waits = [f"--dependency=afterok:{jobs[parent.quality]}"]
        number = _sbatch(ladder, rungs, [*waits, *options])
        for rung in rungs:
            jobs[rung.quality] = f"{number}_{rung.quality}"
            rung.run.mkdir(parents=True, exist_ok=True)
            write_text(rung.run / JOB, jobs[rung.quality] + "\n")
        after = f", after {parent.name}" if parent and waits else ""
        told.append(f"{', '.join(r.name for r in rungs)}: submitted as job {number}{after}")
    return told


def _together(rungs: Iterable[Rung]) -> list[list[Rung]]:
    """Rungs with the same settings are one array job."""
    groups: dict[tuple[str, ...], list[Rung]] = {}
    for rung in rungs:
        groups.setdefault(rung.settings, []).append(rung)
    return list(groups.values())


def _sbatch(ladder: Ladder, rungs: Sequence[Rung], options: Sequence[str]) -> str:
    """Submit one array job and return its number."""
    array = ",".join(str(r.quality) for r in sorted(rungs, key=lambda r: r.quality))
    command = ["sbatch", "--parsable", f"--array={array}", *options, str(_script()), str(ladder.config)]
    command += [*rungs[0].settings, f"run.dir={ladder.prefix}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise LalicError("there is no sbatch on this machine: leave --slurm out, or log in to the cluster") from None
    number = re.match(r"\d+", done.stdout.strip())
    if done.returncode or not number:
        said = " ".join((done.stderr or done.stdout).split())
        raise LalicError(f"sbatch ended with status {done.returncode}: {said}")
    return number[0]


def _script() -> Path:
    """In the checkout, which the script looks for in the same way."""
    return Path(os.environ.get("LALIC_ROOT", "")) / "launch" / "train.slurm"


def _job_of(rung: Rung) -> str | None:
    try:
        return (rung.run / JOB).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _queued() -> set[str]:
    """Array tasks of this user that wait or run; empty when SLURM cannot be asked."""
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return set()
    return {*done.stdout.split()} if done.returncode == 0 else set()
