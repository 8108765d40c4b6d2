"""The processes of one evaluation: how many there are, and the little that they tell each other.

torchrun and `accelerate launch` say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under plain
`srun` the same follows from SLURM's own variables. The processes measure by themselves and speak only to agree on the
work and to gather the numbers, over gloo. A process that dies closes its connections, so the others notice.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lalic.errors import LalicError

log = logging.getLogger("lalic.eval")

START = timedelta(minutes=15)
"""How long the processes wait for each other at the start: nodes may load their libraries slowly."""
WORK = timedelta(days=7)
"""How long a process waits for another one's measurements."""

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, in all and on its machine, and where the first one listens."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0


def place(environment: Mapping[str, str]) -> Place:
    """This process's place, from what its launcher has set; alone where there is none."""
    try:
        if int(environment.get("WORLD_SIZE", 1)) > 1 or "RANK" in environment:
            return _from_launcher(environment)
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone, not in a batch script
            return _from_srun(environment)
    except (KeyError, ValueError) as error:
        raise LalicError(f"what the launcher says about its processes cannot be understood: {error!r}") from error
    return Place()


def _from_launcher(environment: Mapping[str, str]) -> Place:
    size = int(environment["WORLD_SIZE"])
    if size == 1:
        return Place(local_rank=int(environment.get("LOCAL_RANK", 0)))
    return Place(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
    )


def _from_srun(environment: Mapping[str, str]) -> Place:
    # "4(x2),1": four tasks on each of two nodes, one on another.
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=int(tasks.group()) if tasks else 1,
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        # Jobs, and steps of one job, that share a machine should not meet.
        port=int(environment.get("MASTER_PORT") or 20000 + (job * 7 + step) % 12000),
    )


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list of them: `node[03-05,7],x1` -> `node03`."""
    host = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if host is None:
        raise ValueError(f"no machine in {nodes!r}")
    prefix, number, suffix = host.groups(default="")
    return prefix + number + suffix


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Ranks:
    """This process among those of the evaluation; all of them call `together`, `share` and `gather` in one order."""

    def __init__(self, here: Place) -> None:
        self.rank, self.size, self.local_rank = here.rank, here.size, here.local_rank
        self._group: Any = None
        if here.size == 1:
            return
        if here.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cpus() // here.local_size))
        where = f"tcp://{here.address}:{here.port}"
        # A launcher that has its own store at that port says so; srun has none, and the first process opens it.
        method = "env://" if os.environ.get("MASTER_PORT") else where
        try:
            dist.init_process_group("gloo", init_method=method, rank=here.rank, world_size=here.size, timeout=START)
            # While there still is an interpreter: gloo's threads drop their last tensors with its lock, and a process
            # that ends right after it was told something would be aborted by the one that comes too late.
            atexit.register(self.close)
            self._group = dist.new_group(backend="gloo", timeout=WORK)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise LalicError(f"the {here.size} processes did not come together at {where}: {reason}") from error

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes the result."""
        return self.rank == 0

    def together(self, function: Callable[[], T]) -> T:
        """`function()` in every process; where it fails in any, all end: the first prints one line for all."""
        value: T | None = None
        message = None
        try:
            value = function()
        except LalicError as error:
            if self.size == 1:
                raise
            message = str(error)
        messages = self.gather(message)
        failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
        if failed:
            rank, text = failed[0]
            if not self.first:
                raise SystemExit(2)
            raise LalicError(text if rank == 0 else f"process {rank} of {self.size}: {text}")
        return value  # type: ignore[return-value]

    def share(self, value: Any) -> Any:
        """The first process's value, which JSON can hold, in all of them."""
        return self.gather(value if self.first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in all of them."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([data.numel()]), group=self._group)
            longest = max(int(n) for n in lengths)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.cat([data, torch.zeros(longest - data.numel(), dtype=torch.uint8)])
            dist.all_gather(parts, padded, group=self._group)
        except RuntimeError as error:
            log.debug("gloo: %s", error)
            raise LalicError(
                "another process of this evaluation has ended, its own message says why; what was measured is kept "
                "beside the result file, and the same command goes on from there"
            ) from error
        return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, lengths, strict=True)]

    def close(self) -> None:
        """Leave the group; on the way out of an error it is left by itself."""
        self._group = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
