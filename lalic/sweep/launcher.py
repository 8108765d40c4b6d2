"""One rung's training: `accelerate launch` as a subprocess, followed through its log, stopped through RUN/STOP.

The launcher has a session of its own, because a signal from the terminal would end it before its trainers could save.
It writes to a file and not to us, so that a sweep that is killed takes no training with it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lalic
from lalic.config import TrainSection
from lalic.errors import LalicError
from lalic.sweep.plan import Rung
from lalic.training.run_folder import STOP

_BLOCK = re.MULTILINE | re.DOTALL

LOG = Path("logs") / "sweep.log"
"""In the run folder, beside the logs of SLURM jobs."""


@dataclass(frozen=True)
class Launcher:
    """How `accelerate launch` is called for every rung."""

    config_file: Path
    arguments: tuple[str, ...] = ()

    def command(self, config: Path, rung: Rung) -> list[str]:
        """The whole command line for a rung."""
        # --quiet: without it the launcher prints a traceback of its own below each error line.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(self.config_file)]
        training = ["-m", "lalic.train", "--config", str(config), *rung.settings]
        return [*launch, *self.arguments, *training, f"loss.quality={rung.quality}", f"run.dir={rung.run}"]


def choose_launcher(train: TrainSection, config_file: Path | None, arguments: Sequence[str]) -> Launcher:
    """The launcher that was asked for, or the one for this machine's GPUs. Raises LalicError when it is not there."""
    if config_file is not None:
        if not config_file.is_file():
            raise LalicError(f"--launch {config_file}: no such file (launch/accelerate/ holds some)")
        return Launcher(config_file, tuple(arguments))
    gpus = _count_gpus()
    arguments = list(arguments)
    name = "multi_gpu" if gpus > 1 else "gpu1" if gpus else "cpu1"
    if gpus > 1 and not any(a.split("=")[0] in ("--num_processes", "--num-processes") for a in arguments):
        train.micro_batch(gpus)
        arguments = ["--num_processes", str(gpus), *arguments]
    for folder in (Path("launch"), Path(lalic.__file__).parent.parent / "launch"):
        file = folder / "accelerate" / f"{name}.yaml"
        if file.is_file():
            return Launcher(file, tuple(arguments))
    raise LalicError(
        f"there is no launch/accelerate/{name}.yaml here: call it from the checkout, or give --launch FILE"
    )


def _count_gpus() -> int:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class Training:
    """A launcher that is running, and what it wrote since it was started."""

    def __init__(self, command: Sequence[str], run: Path):
        self.run = run
        self.log = run / LOG
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {' '.join(command)}\n".encode())
            out.flush()
            self._start = self._shown = out.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._touched = 0.0

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None when it is still running after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def news(self) -> str:
        """Whole lines that were written since the last call."""
        new = self._read(self._shown)
        end = new.rfind(b"\n") + 1
        self._shown += end
        return new[:end].decode("utf-8", "replace")

    def ask_to_stop(self) -> None:
        """Touch RUN/STOP; to be called again and again, for a trainer that is just starting takes an old one away."""
        if time.monotonic() - self._touched > 1:
            self._touched = time.monotonic()
            with suppress(OSError):  # a full disk may have room a second later
                (self.run / STOP).touch()

    def kill(self) -> None:
        """End the launcher and all that it started, at once."""
        for pid in (self._process.pid, *_descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reason(self) -> str:
        """Why it failed, in one line, from what it wrote."""
        written = self._read(self._start).decode("utf-8", "replace")
        lines = [line.strip() for line in written.splitlines()]
        ours = [line for line in lines if line.startswith("error: ")]
        if ours:
            return ours[-1].removeprefix("error: ")
        # A rank that was killed makes others fail with errors of the network; torch's launcher says which it was.
        if killed := re.search(
            r"^Root Cause.*?^  rank +: (\d+).*?^  exitcode +: -\d+ .*?\((SIG\w+)\)", written, _BLOCK
        ):
            return f"rank {killed[1]} was ended by {killed[2]}"
        # What nobody foresaw, of the first rank that said so; the launcher's own errors say nothing about the cause.
        raised = (
            re.match(r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)", line) for line in lines
        )
        causes = [m[1] for m in raised if m and not re.match(r"(\w+\.)*(CalledProcess|ChildFailed)Error", m[1])]
        if causes:
            return causes[0][:300]
        return f"ended with status {self._process.returncode} and without an error message; it may have been killed"

    def _read(self, offset: int) -> bytes:
        with open(self.log, "rb") as file:
            file.seek(offset)
            return file.read()


def _descendants(pid: int) -> list[int]:
    """Children of a process, their children and so on; torch's launcher gives each a session of its own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            # The name stands in brackets and may hold anything.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
