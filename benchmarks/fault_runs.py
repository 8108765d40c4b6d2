"""Training runs that the fault benchmark starts, watches and ends: the commands people use, in processes of their own.

A run is followed by what it prints. Nothing here waits for a time: only for steps, files and ends of processes, with
one deadline behind which a run counts as stuck.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lalic.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 600.0
"""Seconds without what is waited for, after which a run counts as stuck."""
LOOK_EVERY = 0.02

CONFIG = """\
run: {{seed: {seed}}}
model: {{N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}}
data: {{shards: {shards}, workers: 1, val: {val}, val_crop: 64, flip: true}}
loss: {{metric: mse, quality: 3}}
train: {{batch_size: 4, cpu_threads: 1, ema: 0.99}}
stages: [{{steps: {first}, lr: 1e-3, crop: 64}}, {{steps: {second}, lr: 2e-4, crop: 64}}]
validate: {{every: 5}}
checkpoint: {{every: {every}, keep: 8}}
log: {{every: 1, images: 1}}
"""

_STEP = re.compile(r"lalic\.train step (\d+)/\d+ \(")
_RESUMED = re.compile(r"lalic\.train resumed from \S+: step (\d+) of \d+")
_WRITTEN = re.compile(r"lalic\.train checkpoint \S*step-(\d+)(?=:|\s*$)", re.MULTILINE)
_MARK = "LALIC_FAULTS_RUN"
T = TypeVar("T")


class Stuck(Exception):
    """A run that does not do what is waited for; its last words are in the message."""


@dataclass(frozen=True)
class Material:
    """Shards of photographs, images to validate on, and the config of all runs."""

    folder: Path
    config: Path
    steps: int
    every: int


def prepare(folder: Path, photos: Path, *, steps: int, every: int, seed: int, count: int = 40) -> Material:
    """Pack `count` of the photographs with data_prep/shard.py, keep three more to validate on, write the config."""
    images = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(images) < 6:
        raise SystemExit(f"error: {photos} holds {len(images)} photographs, at least 6 are needed")
    for name, chosen in (("photos", images[: min(count, len(images) - 3)]), ("val", images[-3:])):
        (folder / name).mkdir(parents=True)
        for image in chosen:
            shutil.copy(image, folder / name)
    command = [sys.executable, "-m", "lalic.data_prep.shard", "--input", str(folder / "photos")]
    command += ["--output", str(folder / "shards"), "--min-side", "64", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    config, first = folder / "faults.yaml", steps * 3 // 5
    places = {"shards": folder / "shards", "val": folder / "val", "seed": seed, "every": every}
    config.write_text(CONFIG.format(**places, first=first, second=steps - first))
    return Material(folder, config, steps, every)


@dataclass
class Attempt:
    """One start of a run, and what it has printed."""

    output: Path
    launcher: subprocess.Popen[bytes] | None = None
    also: Path | None = None
    """What else may tell why it ended."""

    def text(self) -> str:
        """Everything so far."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    @property
    def step(self) -> int:
        """The last step that it has told as done, else that from which it went on, else 0."""
        text = self.text()
        return max(map(int, _STEP.findall(text)), default=self.resumed_from or 0)

    @property
    def resumed_from(self) -> int | None:
        """The step of the checkpoint that it went on from; 0 for a new run, None before it is known."""
        text = self.text()
        if found := _RESUMED.search(text):
            return int(found[1])
        return 0 if "lalic.train new run: " in text else None

    @property
    def training(self) -> bool:
        """Whether it has done a step of its own."""
        return _STEP.search(self.text()) is not None

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that it has written."""
        return [int(step) for step in _WRITTEN.findall(self.text())]

    def last_words(self) -> str:
        """The end of what it printed, for messages."""
        also = self.also.read_text(errors="replace") if self.also and self.also.exists() else ""
        return self.text()[-3000:] + also[-3000:]


@dataclass
class Run:
    """One run folder, and the command that trains in it: `accelerate launch ... -m lalic.train`."""

    folder: Path
    material: Material
    accelerate_config: str
    processes: int
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def command(self) -> list[str]:
        """The same for every start."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        launcher += ["--config_file", f"launch/accelerate/{self.accelerate_config}.yaml"]
        if self.processes > 1:
            launcher += ["--num_processes", str(self.processes)]
        run = ["--config", str(self.material.config), f"run.dir={self.folder}", *self.settings]
        return [*launcher, "-m", "lalic.train", *run]

    @property
    def attempt(self) -> Attempt:
        """The present one."""
        return self.attempts[-1]

    def start(self) -> None:
        """Start the command, in a session of its own."""
        output = self.folder.with_name(f"{self.folder.name}-{len(self.attempts)}.txt")
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE", _MARK: self.mark}
        environment |= self.environment
        with open(output, "wb") as file:
            launcher = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.attempts.append(Attempt(output, launcher))

    def come_back(self, resumed: Callable[[int], None]) -> None:
        """Start it again, call `resumed` with the step that it goes on from, and wait for its first step."""
        self.start()
        self.wait(lambda: self.attempt.resumed_from is not None, "the restart")
        resumed(self.attempt.resumed_from or 0)
        self.wait(lambda: self.attempt.training, "the first step after the restart")

    def wait(self, ready: Callable[[], T], what: str, *, alive: bool = True) -> T:
        """The first true value of `ready`; Stuck after DEADLINE, or when the launcher ends before (`alive`)."""
        began = time.monotonic()
        while True:
            ended = alive and self.ended
            if value := ready():
                return value
            if ended:
                raise Stuck(f"{what}: the command ended before\n{self.attempt.last_words()}")
            if time.monotonic() - began > DEADLINE:
                raise Stuck(f"{what}: not within {DEADLINE:.0f} s\n{self.attempt.last_words()}")
            time.sleep(LOOK_EVERY)

    @property
    def ended(self) -> bool:
        """Whether the launcher is gone."""
        launcher = self.attempt.launcher
        return launcher is None or launcher.poll() is not None

    def wait_for_step(self, step: int) -> None:
        """Until `step` steps are done."""
        self.wait(lambda: self.attempt.step >= step and self.attempt.training, f"step {step}")

    def wait_for_end(self) -> int:
        """Until the launcher is gone; its status."""
        self.wait(lambda: self.ended, "the end of the launcher", alive=False)
        launcher = self.attempt.launcher
        return launcher.returncode if launcher else 0

    def wait_for_nobody(self) -> None:
        """Until no process of the run is left."""
        self.wait_for_end()
        self.wait(lambda: not self.everyone(), "the end of all processes", alive=False)

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        there = checkpoint.steps_on_disk(self.folder)
        return [s for s in there if checkpoint.problem(checkpoint.folder_of(self.folder, s), contents=False) is None]

    def saving(self) -> Path | None:
        """The folder of a checkpoint that is being written."""
        return next(iter((self.folder / checkpoint.FOLDER).glob(".saving-*")), None)

    # ---- its processes

    def everyone(self) -> list[int]:
        """All processes of the run: launcher, ranks and those that load data, whoever their parent is by now."""
        mark = f"{_MARK}={self.mark}".encode()
        return [pid for pid in _processes() if mark in environment_of(pid)]

    def ranks(self) -> dict[int, int]:
        """The training processes: {rank: pid}."""
        chosen = [pid for pid in self.everyone() if is_trainer(pid)]
        return {rank_of(pid): pid for pid in chosen if parent(pid) not in chosen}

    def strays(self) -> list[int]:
        """Processes of earlier attempts."""
        launcher = self.attempt.launcher
        known = {launcher.pid} if launcher else set()
        everyone = self.everyone()
        while more := {pid for pid in everyone if parent(pid) in known} - known:
            known |= more
        return [pid for pid in everyone if pid not in known]

    def kill_everyone(self) -> None:
        """SIGKILL to all that is left of the run."""
        while pids := self.everyone():
            for pid in pids:
                send(pid, signal.SIGKILL)
            if self.attempts and self.attempt.launcher:
                self.attempt.launcher.wait()
            time.sleep(LOOK_EVERY)

    def close(self) -> None:
        """End it for good."""
        self.kill_everyone()


def send(pid: int, number: int) -> None:
    """A signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_trainer(pid: int) -> bool:
    """Whether the process runs lalic.train itself: a rank, or a process that it forked to load data."""
    words = _read(pid, "cmdline").split(b"\0")
    return b"lalic.train" in words and b"accelerate.commands.launch" not in words and b"python" in words[0]


def rank_of(pid: int) -> int:
    """RANK of a training process; 0 where there is only one."""
    found = [item[5:] for item in environment_of(pid) if item.startswith(b"RANK=")]
    return int(found[0]) if found else 0


def parent(pid: int) -> int | None:
    """The parent of a process; None when it is gone."""
    status = _read(pid, "stat").rpartition(b")")[2].split()
    return int(status[1]) if len(status) > 1 else None


def _processes() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]


def environment_of(pid: int) -> list[bytes]:
    return _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
