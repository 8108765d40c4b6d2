"""`sbatch launch/eval.slurm`: wrong arguments, preemption. (The ladder's test evaluates an array.)"""

from __future__ import annotations

import json

import pytest
import torch
from checkout import Checkout
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_an_array_whose_tasks_would_all_do_the_same(cluster: Cluster, checkout: Checkout):
    job = checkout.submit(["--array=1", "--output=same.txt", "launch/eval.slurm", "-p", "runs/x", "-i", "photos"])
    assert checkout.wait_over(f"{job}_1", "the refused job") == "FAILED"
    assert "needs %a in its arguments" in checkout.output("same")


def test_the_status_of_the_evaluation_is_the_job_s(cluster: Cluster, checkout: Checkout):
    job = checkout.submit(["--output=nothing.txt", "launch/eval.slurm", "-p", "nowhere.pth", "-i", "photos"])
    assert checkout.wait_over(job, "the failed evaluation") == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert "no such checkpoint: nowhere.pth" in checkout.output("nothing")


def test_a_preempted_evaluation_starts_again(cluster: Cluster, checkout: Checkout):
    """SIGTERM to the steps alone is what SLURM sends; here while the first attempt waits on its node."""
    from lalic.model import LALIC

    model = LALIC(N=8, dims=(8, 12, 16, 32, 16, 8), depths=(1, 1, 1, 1), groups=(4, 4, 8, 16))
    torch.save(model.state_dict(), checkout.folder / "tiny.pth")
    setup, mark = checkout.folder / "wait.sh", checkout.folder / "prepared"
    wait = f'elif [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then touch {mark}.evaluating; sleep 3600; fi'
    setup.write_text(f"if [ ! -e {mark} ]; then touch {mark}; {wait}\n")
    arguments = ["--output=preempted.txt", "launch/eval.slurm", "-p", "tiny.pth", "-i", "photos", "-r", "tiny.json"]
    job = checkout.submit(arguments, LALIC_SETUP=str(setup), LALIC_EVAL_LOGS="eval-logs")
    checkout.wait(mark.with_name("prepared.evaluating").exists, "the evaluation begins")
    cluster.signal(job, "TERM", batch=False)
    cluster.start_again(job, 1)
    assert checkout.wait_over(job, "the second attempt") == "COMPLETED", checkout.output("preempted")
    assert "SIGTERM: requeue" in checkout.output("preempted")
    assert len(json.loads((checkout.folder / "tiny.json").read_text())["records"]) == 6
    assert (checkout.folder / f"eval-logs/eval-{job}-1/environment.txt").exists()


def test_processes_on_two_nodes_share_the_images(cluster: Cluster, checkout: Checkout):
    from lalic.model import LALIC

    model = LALIC(N=8, dims=(8, 12, 16, 32, 16, 8), depths=(1, 1, 1, 1), groups=(4, 4, 8, 16))
    torch.save(model.state_dict(), checkout.folder / "tiny.pth")
    arguments = [
        "--nodes=2",
        "--output=two.txt",
        "launch/eval.slurm",
        "-p",
        "tiny.pth",
        "-i",
        "photos",
        "-r",
        "two.json",
    ]
    job = checkout.submit(arguments, LALIC_EVAL_LOGS="eval-logs")
    assert checkout.wait_over(job, "the evaluation on two nodes") == "COMPLETED", checkout.output("two")
    report = json.loads((checkout.folder / "two.json").read_text())
    assert report["environment"]["processes"] == 2
    assert sorted(r["process"] for r in report["records"]) == [0, 0, 0, 1, 1, 1]
