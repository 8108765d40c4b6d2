"""Faults of a job on a real SLURM of two nodes on this host: signals, requeues, nodes that go down."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "slurm"))

from cluster import NODES, Cluster, missing_programs  # noqa: E402 -- the cluster of the tests

from benchmarks.fault_kinds import Fault, Injected, phase, within_a_step  # noqa: E402
from benchmarks.fault_runs import Attempt, Run, Stuck, environment_of, rank_of, send  # noqa: E402

__all__ = ["Cluster", "SlurmRun", "kill_rank", "missing_programs", "node_down", "requeue", "scancel"]

_LOOK_EVERY = 0.5
"""Seconds between two questions to SLURM."""


@dataclass(kw_only=True)
class SlurmRun(Run):
    """`sbatch launch/train.slurm`: one job, which SLURM starts again."""

    cluster: Cluster
    job: str = ""
    _restart: int = 0
    _asked: float = 0.0
    _ended: bool = False

    @property
    def command(self) -> list[str]:
        """Given once."""
        run = [f"run.dir={self.folder}", *self.settings]
        return ["sbatch", f"--nodes={self.processes}", "launch/train.slurm", str(self.material.config), *run]

    def start(self) -> None:
        """Submit the job; later, spare it the two minutes for which SLURM lets a requeued job wait."""
        if not self.job:
            output = f"--output={self.folder}-job.txt"
            words = self.command
            # Another cluster on this host, that of the tests, may have a job of the same number.
            environment = {"LALIC_PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE", "LALIC_PORTS": "28000-31999"}
            self.job = self.cluster.submit(ROOT, [output, *words[1:]], **environment, **self.environment)
        else:
            self._start_again()
        self._ended = False
        logs = self.folder / "logs" / f"{self.job}-{self._restart}"
        self.attempts.append(Attempt(logs / "rank0.log", also=Path(f"{self.folder}-job.txt")))

    def _start_again(self) -> None:
        """Wait until SLURM has requeued the job, and until it runs."""
        cluster, job = self.cluster, self.job
        cluster.wait(lambda: cluster.restarts(job) > self._restart, f"the requeue of job {job}", 300)
        time.sleep(3)  # in the second of the kill, slurmd takes the new start for the job that it has just killed

        def running() -> bool:
            # After the loss of a node it may run already. Else nothing may be on its way to the nodes any more: a
            # signal to the step before, which a busy node did not take, is sent again, and means the new step.
            if cluster.state(job) == "PENDING" and not self.cluster.messages_left():
                cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return cluster.state(job) == "RUNNING"

        cluster.wait(running, f"job {job} runs again", 300)
        self._restart = cluster.restarts(job)

    def come_back(self, resumed: Callable[[int], None]) -> None:
        """As often as the job starts again by itself, and three times at most: a busy host kills attempts, too."""
        for left in (2, 1, 0):
            try:
                super().come_back(resumed)
                return
            except Stuck:
                if not left or not self.ended or self.cluster.over(self.job):
                    raise

    @property
    def ended(self) -> bool:
        """Whether the present attempt is over: the job waits to be started again, or is over itself."""
        if time.monotonic() - self._asked > _LOOK_EVERY:
            self._asked = time.monotonic()
            again = self.cluster.restarts(self.job) > self._restart
            self._ended = again or self.cluster.over(self.job) is not None
        return self._ended

    def wait_for_end(self) -> int:
        """Until the attempt is over; 0 when the job is complete or goes on later."""
        self.wait(lambda: self.ended, "the end of the attempt", alive=False)
        return int(self.cluster.over(self.job) not in (None, "COMPLETED"))

    def everyone(self) -> list[int]:
        """All processes of the job."""
        return self.cluster.processes_of(self.job) if self.job else []

    def ranks(self) -> dict[int, int]:
        """The training processes: {rank: pid}."""
        return {rank_of(pid): pid for pid in self.cluster.ranks_of(self.job)}

    def strays(self) -> list[int]:
        """Processes of earlier attempts."""
        now = f"SLURM_RESTART_COUNT={self._restart}".encode()
        return [pid for pid in self.everyone() if self._restart and now not in environment_of(pid)]

    def kill_everyone(self) -> None:
        """Cancel the job."""
        if self.job and self.cluster.over(self.job) is None:
            self.cluster.cancel(self.job)
            self.cluster.wait(lambda: self.cluster.over(self.job), f"the end of job {self.job}", 120)


def _job(run: Run) -> SlurmRun:
    assert isinstance(run, SlurmRun)
    return run


def _strike(run: SlurmRun, generator: random.Random, action: Callable[[], object], detail: str = "") -> Injected:
    within_a_step(run, generator)
    done = Injected(run.attempt.step, phase(run), detail, time.monotonic())
    action()
    run.wait_for_end()
    if over := run.cluster.over(run.job):
        raise Stuck(f"the job is {over}\n{run.attempt.last_words()}")
    return done


def scancel(name: str, *, batch: bool) -> Fault:
    """`scancel --signal`: to the batch script, or to the steps."""

    def fault(run: Run, generator: random.Random) -> Injected:
        job = _job(run)
        return _strike(job, generator, lambda: job.cluster.signal(job.job, name, batch=batch))

    return fault


def requeue(run: Run, generator: random.Random) -> Injected:
    """`scontrol requeue` from outside: the job is killed without a word."""
    job = _job(run)
    return _strike(job, generator, lambda: job.cluster.requeue(job.job))


def kill_rank(run: Run, generator: random.Random) -> Injected:
    """kill -9 of a rank on one of the nodes."""
    job, ranks = _job(run), run.ranks()
    rank = generator.choice(sorted(ranks))
    return _strike(job, generator, lambda: send(ranks[rank], 9), f"rank {rank}")


def node_down(run: Run, generator: random.Random) -> Injected:
    """slurmd and all processes of the job on a node are killed, SLURM takes the node down; it comes back later."""
    job, node = _job(run), generator.choice(NODES)
    done = _strike(job, generator, lambda: job.cluster.take_node_down(node, job.job), node)
    job.cluster.bring_node_up(node)
    return done


def cluster_in(folder: Path) -> Cluster:
    """A cluster that is up. SystemExit with one line where SLURM is not installed or this is not root."""
    if missing := missing_programs():
        raise SystemExit(f"error: no {', '.join(missing)}: install slurmctld, slurmd, slurm-client and munge")
    if os.geteuid() != 0:
        raise SystemExit("error: slurmd needs root")
    cluster = Cluster(folder)
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster
