"""Which faults strike which runs, and how often."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from benchmarks import fault_kinds as kinds
from benchmarks import fault_slurm

FILES = ("model.pt", "optimizer.pt", "ema.pt", "rng.pt", "meta.json", "config.yaml", "MANIFEST.json")


@dataclass(frozen=True)
class Kind:
    """A fault, and what it needs."""

    label: str
    fault: kinds.Fault
    checkpoints: int = 0
    """That must be there before."""
    disk: str | None = None
    """What follows on a full disk."""


KINDS = {
    "rank0": Kind("kill -9 of rank 0", kinds.kill(0)),
    "rank1": Kind("kill -9 of rank 1", kinds.kill(1)),
    "ranks": Kind("kill -9 of all ranks", kinds.kill("ranks")),
    "everything": Kind("kill -9 of everything at once", kinds.kill("everything")),
    "launcher": Kind("kill -9 of the launcher", kinds.kill("launcher")),
    "starting": Kind("kill -9 of all ranks, and again while they start", kinds.kill_while_starting),
    "writing": Kind("kill -9 while a checkpoint is written", kinds.kill_while_writing),
    "term-launcher": Kind("SIGTERM to the launcher", kinds.ask(signal.SIGTERM, "launcher")),
    "term-rank": Kind("SIGTERM to one rank", kinds.ask(signal.SIGTERM, "one rank")),
    "usr1": Kind("SIGUSR1 to all ranks", kinds.ask(signal.SIGUSR1, "ranks")),
    "cut": Kind("newest checkpoint: a file truncated", kinds.damage("cut"), checkpoints=2),
    **{
        f"flipped-{name}": Kind("newest checkpoint: a bit flipped", kinds.damage("flipped", name), checkpoints=2)
        for name in FILES
    },
    "deleted": Kind("newest checkpoint: a file deleted", kinds.damage("deleted"), checkpoints=2),
    "full": Kind("disk full, space again later", kinds.kill("ranks"), checkpoints=1, disk="goes on"),
    "full-killed": Kind("disk full, then kill -9 of everything", kinds.kill(), checkpoints=1, disk="killed"),
    "full-stopped": Kind("disk full, then SIGTERM", kinds.kill(), checkpoints=1, disk="stopped"),
}

SLURM_KINDS = {
    "scancel-usr1": Kind("scancel --signal=USR1 --batch", fault_slurm.scancel("USR1", batch=True)),
    "scancel-term": Kind("scancel --signal=TERM --batch", fault_slurm.scancel("TERM", batch=True)),
    "scancel-steps": Kind("scancel --signal=USR1 to the steps", fault_slurm.scancel("USR1", batch=False)),
    "requeue": Kind("scontrol requeue", fault_slurm.requeue),
    "rank": Kind("kill -9 of a rank under srun", fault_slurm.kill_rank),
    "node": Kind("a node taken down, later up again", fault_slurm.node_down),
}
KINDS |= SLURM_KINDS


@dataclass(frozen=True)
class Setup:
    """How the runs are started, and how often each fault strikes them."""

    label: str
    accelerate_config: str
    processes: int
    plan: dict[str, int]


_FEW = {"everything": 1, "launcher": 1, "writing": 1, "term-launcher": 1, "flipped-optimizer.pt": 1}
SETUPS = {
    "ddp2": Setup(
        "two ranks, DDP",
        "cpu2",
        2,
        dict.fromkeys(("rank0", "rank1", "ranks", "launcher", "term-launcher", "term-rank", "usr1"), 3)
        | {"everything": 2, "starting": 2, "writing": 6, "cut": 4, "deleted": 4}
        | dict.fromkeys((f"flipped-{name}" for name in FILES), 1)
        | {"full": 2, "full-killed": 2, "full-stopped": 2},
    ),
    "one": Setup("one process", "cpu1", 1, {**_FEW, "usr1": 1, "full": 1}),
    "zero1": Setup("two ranks, DeepSpeed ZeRO-1", "deepspeed_zero1", 2, {**_FEW, "rank1": 1}),
    "zero2": Setup("two ranks, DeepSpeed ZeRO-2", "deepspeed_zero2", 2, {**_FEW, "rank0": 1}),
    "slurm": Setup("two nodes, SLURM", "cpu2", 2, dict.fromkeys(SLURM_KINDS, 2)),
}
QUICK = dict.fromkeys(
    ("rank1", "everything", "launcher", "term-launcher", "usr1", "writing", "flipped-model.pt", "full-killed"), 1
)
