"""`lalic sweep --slurm` on a real SLURM: a warm start, one job waiting for another, and what stands in the queue."""

from __future__ import annotations

import subprocess
import sys

import pytest
from checkout import Checkout
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_a_ladder_that_begins_with_its_highest_rung(cluster: Cluster, checkout: Checkout) -> None:
    config = checkout.config("warm", 2)

    def sweep(*more: str) -> str:
        program = "from lalic.cli import main; main()"
        command = [
            sys.executable,
            "-c",
            program,
            "sweep",
            config,
            "--qualities",
            "1-2",
            "--warm-start",
            "highest",
            *more,
        ]
        environment = {**cluster.environment, "LALIC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=checkout.folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Held, so that both are in the queue when it is asked again.
    said = sweep("--slurm", "--", "--output=warm-%a.txt", "--hold")
    runs = {q: checkout.run(f"warm-q{q}") for q in (1, 2)}
    jobs = {q: (run.folder / "slurm-job").read_text().strip() for q, run in runs.items()}
    assert f"q2: submitted as job {jobs[2].split('_')[0]}\n" in said and "after q2" in said
    again = sweep("--slurm")
    assert [line for line in again.splitlines() if "in the queue already" in line] == again.splitlines()
    for job in jobs.values():
        cluster.run("scontrol", "release", job)
    for quality in (2, 1):
        assert checkout.wait_over(jobs[quality], f"rung {quality}") == "COMPLETED", checkout.output(f"warm-{quality}")
    logged = "".join(path.read_text(errors="replace") for path in runs[1].folder.glob("logs/*/*.log"))
    assert "weights from runs/warm-q2/checkpoints/step-00000002" in logged
    lines = [line.split()[:4] for line in sweep("--status").splitlines()[1:]]
    assert lines == [["1", "0.0018", "finished", "2/2"], ["2", "0.0035", "finished", "2/2"]]
    # Finished rungs are not submitted again, and a sweep has nothing to do either: the runs are the same.
    assert "submitted" not in sweep("--slurm")
    assert "all 2 finished" in sweep("--launch", "launch/accelerate/cpu1.yaml")
