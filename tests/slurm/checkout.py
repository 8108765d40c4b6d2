"""What a user submits from: launch/ and configs/ of this checkout, tiny shards, tiny configs; and how a run stands."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from cluster import Cluster
from PIL import Image

T = TypeVar("T")

CONFIG = """\
run: {seed: 3}
model: {N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}
data: {shards: SHARDS, workers: 0}
loss: {metric: mse, quality: 3}
train: {batch_size: 4, cpu_threads: 1}
stages: [{steps: STEPS, lr: 1e-3, crop: 64}]
checkpoint: {every: EVERY, keep: 2}
log: {every: 1}
"""

_STEP = re.compile(r"lalic\.train step (\d+)/")


class Run:
    """A run folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def finished(self) -> bool:
        return (self.folder / "DONE").exists()

    def steps(self, attempt: str) -> list[int]:
        """The steps that an attempt (`JOB-RESTART`) has logged so far."""
        path = self.folder / "logs" / attempt / "rank0.log"
        return [int(step) for step in _STEP.findall(path.read_text(errors="replace"))] if path.exists() else []

    def saved(self) -> int:
        """The step of the newest checkpoint, 0 when there is none."""
        return max([0, *(int(p.name[5:]) for p in (self.folder / "checkpoints").glob("step-*"))])

    def tensors(self, step: int) -> dict[str, bytes]:
        """The files of a checkpoint that hold numbers."""
        return {p.name: p.read_bytes() for p in (self.folder / f"checkpoints/step-{step:08d}").glob("*.pt")}

    def attempts(self) -> list[dict[str, str]]:
        """The record that the job script keeps."""
        names = ("time", "job", "restart", "what", "step", "status")
        lines = (self.folder / "logs/attempts.tsv").read_text().splitlines()
        return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]

    def ends(self) -> list[str]:
        """How its attempts ended, in order."""
        return [a["what"] for a in self.attempts() if a["what"] != "begun"]

    def log(self, attempt: str, name: str) -> str:
        """A log of one attempt (`JOB-RESTART`)."""
        return (self.folder / "logs" / attempt / name).read_text(errors="replace")


class Checkout:
    def __init__(self, folder: Path, root: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        for name in ("launch", "configs"):
            shutil.copytree(root / name, folder / name)
        rng = np.random.default_rng(0)
        (folder / "photos").mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (96, 80, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
        from lalic.data_prep.shard import main

        main(["--input", str(folder / "photos"), "--output", str(folder / "shards"), "--min-side", "64"])

    def config(self, name: str, steps: int, every: int = 1000, shards: str = "shards") -> str:
        """Write a config; its path."""
        path = self.folder / "configs" / f"{name}.yaml"
        text = CONFIG.replace("SHARDS", str(self.folder / shards)).replace("STEPS", str(steps))
        path.write_text(text.replace("EVERY", str(every)))
        return str(path)

    def run(self, name: str) -> Run:
        return Run(self.folder / "runs" / name)

    def train(self, name: str, config: str, *settings: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """`sbatch launch/train.slurm` with the run folder runs/NAME and the output NAME.txt; the job's number."""
        arguments = [f"--output={name}.txt", *options, "launch/train.slurm", config, f"run.dir=runs/{name}", *settings]
        return self.submit(arguments, **environment)

    def submit(self, arguments: list[str], **environment: str) -> str:
        environment = {"LALIC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        return self.cluster.submit(self.folder, arguments, **environment)

    def output(self, name: str) -> str:
        """What a job has printed so far."""
        path = self.folder / f"{name}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, condition: Callable[[], T], what: str, seconds: float = 600) -> T:
        """The first true value of `condition`; fails with the logs when that takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.3)
        logs = [*self.folder.glob("*.txt"), *self.folder.glob("runs/*/logs/*.tsv"), *self.folder.rglob("logs/*/*.log")]
        texts = "\n".join(f"-- {p}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)
        pytest.fail(f"{what}: not within {seconds} s\n{self.cluster.run('squeue')}\n{texts}")

    def wait_over(self, job: str, what: str) -> str:
        """The state in which a job ended."""
        return self.wait(lambda: self.cluster.over(job), f"{what} ends")

    def wait_training(self, run: Run, attempt: str, what: str, steps: int = 3) -> None:
        """Until an attempt (`JOB-RESTART`) has logged some steps of its own."""
        self.wait(lambda: len(run.steps(attempt)) >= steps, f"{what}: {steps} steps")
