"""When launch/train.slurm starts a job, starts it again, and gives up, on the real SLURM."""

from __future__ import annotations

import os
import signal

import pytest
from checkout import Checkout
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

BROKEN = {"LALIC_PYTHON": "/bin/false"}
"""An environment in which nothing starts."""


def test_what_is_refused(cluster: Cluster, checkout: Checkout, tmp_path):
    """One line in the job's output, status 2, no restart."""
    config = checkout.config("refused", 5)
    jobs = {
        "no such config: nowhere.yaml": checkout.train("refused1", "nowhere.yaml"),
        "no such accelerate config: x": checkout.train("refused2", config, LALIC_ACCELERATE_CONFIG="x"),
        "LALIC_PORTS=9-1: write FIRST-LAST": checkout.train("refused3", config, LALIC_PORTS="9-1"),
        "is not the checkout: submit from there, or set LALIC_ROOT": cluster.submit(
            tmp_path, [f"--output={checkout.folder}/refused4.txt", str(checkout.folder / "launch/train.slurm"), config]
        ),
    }
    for message, job in jobs.items():
        assert checkout.wait_over(job, "the refused job") == "FAILED"
        assert cluster.field(job, "ExitCode") == "2:0" and cluster.restarts(job) == 0
        assert message in "".join(checkout.output(f"refused{i}") for i in range(1, 5))


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [(1, "", "cpu1"), (2, "", "cpu2"), (1, "1", "gpu1"), (1, "2", "multi_gpu"), (2, "1", "multi_node")],
)
def test_the_launcher_s_config_follows_from_nodes_and_gpus(
    cluster: Cluster, checkout: Checkout, nodes: int, gpus: str, expected: str
):
    """SLURM says how many GPUs a node has; here it is said in its place, and nothing is started."""
    name = f"choice{nodes}{gpus}"
    environment = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    config = checkout.config("choice", 5)
    job = checkout.train(name, config, options=(f"--nodes={nodes}",), LALIC_MAX_FAILURES="1", **environment, **BROKEN)
    assert checkout.wait_over(job, "the failure") == "FAILED"
    assert f"{nodes} node(s) x {gpus or 1} with {expected}.yaml, head lalic1 127.0.0.1:" in checkout.output(name)


def test_a_config_error_ends_the_job_at_once(cluster: Cluster, checkout: Checkout):
    job = checkout.train("bad", checkout.config("bad", 5, shards="absent"))
    assert checkout.wait_over(job, "the failure") == "FAILED"
    assert cluster.restarts(job) == 0 and checkout.run("bad").ends() == ["failed"]
    assert "not started again: error: " in checkout.output("bad") and "absent" in checkout.output("bad")
    assert "absent" in checkout.run("bad").log(f"{job}-0", "rank0.log")


def test_the_same_failure_without_progress_ends_the_job(cluster: Cluster, checkout: Checkout):
    job = checkout.train("broken", checkout.config("broken", 5), **BROKEN)
    for restarts in (1, 2):
        cluster.start_again(job, restarts)
    assert checkout.wait_over(job, "the third failure") == "FAILED"
    assert cluster.restarts(job) == 2 and checkout.run("broken").ends() == ["failed"] * 3
    assert "failed 3 times without a new checkpoint, the newest is step 0" in checkout.output("broken")


def test_done_of_an_earlier_submission_is_no_end(cluster: Cluster, checkout: Checkout):
    """A run is submitted again with more steps, and is requeued before it could take the old mark away."""
    run = checkout.run("longer")
    run.folder.mkdir(parents=True)
    (run.folder / "DONE").write_text("{}")
    job = checkout.train("longer", checkout.config("longer", 5), LALIC_MAX_FAILURES="2", **BROKEN)
    cluster.start_again(job, 1)
    assert checkout.wait_over(job, "the second failure") == "FAILED"
    assert run.ends() == ["failed"] * 2


def test_tasks_of_an_array_are_requeued_one_by_one(cluster: Cluster, checkout: Checkout):
    """The last task has the number of the whole array: a requeue of that number would take all tasks along."""
    arguments = ["--array=1-2", "--output=array-%a.txt", "launch/train.slurm", checkout.config("array", 5)]
    job = checkout.submit(arguments, LALIC_MAX_FAILURES="2", **BROKEN)
    tasks = [f"{job}_{q}" for q in (1, 2)]
    for task in tasks:
        cluster.start_again(task, 1)
    for q, task in enumerate(tasks, 1):
        assert checkout.wait_over(task, f"task {q}") == "FAILED"
        assert cluster.restarts(task) == 1 and checkout.run(f"array-q{q}").ends() == ["failed"] * 2


def test_attempts_that_are_killed_without_a_checkpoint_are_counted(cluster: Cluster, checkout: Checkout):
    """A node that dies again and again before the first checkpoint: such attempts leave no end in the record."""
    job = checkout.train("idle", checkout.config("idle", 1_000_000), LALIC_MAX_IDLE="1")
    run = checkout.run("idle")
    checkout.wait(lambda: (run.folder / "logs/attempts.tsv").exists(), "the first attempt")
    cluster.take_node_down("lalic1", job)
    cluster.bring_node_up("lalic1")
    cluster.start_again(job, 1)
    assert checkout.wait_over(job, "the second attempt") == "FAILED"
    assert "1 attempts were stopped or killed without a new checkpoint" in checkout.output("idle")
    assert [a["what"] for a in run.attempts()] == ["begun", "begun"]


def test_as_many_restarts_as_are_allowed(cluster: Cluster, checkout: Checkout):
    job = checkout.train("often", checkout.config("often", 5), LALIC_MAX_RESTARTS="1", **BROKEN)
    cluster.start_again(job, 1)
    assert checkout.wait_over(job, "the last attempt") == "FAILED"
    assert cluster.restarts(job) == 1
    assert "started again 1 times, enough" in checkout.output("often")


def test_stopped_by_hand_and_one_that_cannot_save(cluster: Cluster, checkout: Checkout):
    """A rank that hangs at the time limit costs the steps since a checkpoint; STOP made by somebody ends the job."""
    run = checkout.run("hung")
    config = checkout.config("endless1", 1_000_000, every=10)
    job = checkout.train("hung", config, LALIC_STOP_WAIT="4")
    checkout.wait_training(run, f"{job}-0", "before it hangs", steps=15)
    (rank,) = cluster.ranks_of(job)
    os.kill(rank, signal.SIGSTOP)
    cluster.signal(job, "USR1", batch=True)
    cluster.start_again(job, 1)
    assert "no checkpoint within 4 s of the signal" in checkout.output("hung")
    assert run.attempts()[-1]["status"] == "late"
    checkout.wait_training(run, f"{job}-1", "after it hung")
    (run.folder / "STOP").touch()
    assert checkout.wait_over(job, "the stopped job") == "COMPLETED"
    assert cluster.restarts(job) == 1 and run.ends()[-1] == "stopped" and not run.finished
    assert "stopped by runs/hung/STOP" in checkout.output("hung")
