"""`sbatch launch/train.slurm` on a real SLURM of two nodes: one run through every way to be interrupted, the ladder,
two jobs on the same nodes, what is written down."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from os import kill

import pytest
from checkout import Checkout
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ENDLESS = 1_000_000


def test_one_run_through_every_interruption(cluster: Cluster, checkout: Checkout):
    """Two nodes, one rank each. Whatever stops it, the job comes back; in the end it has the bits of a quiet run."""
    run = checkout.run("stormy")
    job = checkout.train("stormy", checkout.config("endless", ENDLESS, every=10), options=("--nodes=2",))
    restarts = 0

    def interrupted(what: str, action: Callable[[], object], *, loses: bool = False) -> None:
        nonlocal restarts
        checkout.wait_training(run, f"{job}-{restarts}", f"before {what}")
        before = run.steps(f"{job}-{restarts}")[-1]
        action()
        restarts += 1
        cluster.start_again(job, restarts)
        assert loses or run.saved() >= before, f"{what}: steps were lost"
        # A stale file of the attempt before, or of somebody, must not stop the next one.
        (run.folder / "STOP").write_text("SIGUSR1\n")

    interrupted("USR1 to the script", lambda: cluster.signal(job, "USR1", batch=True))
    interrupted("TERM to the script", lambda: cluster.signal(job, "TERM", batch=True))
    interrupted("USR1 to the steps", lambda: cluster.signal(job, "USR1", batch=False))
    interrupted("TERM to the steps", lambda: cluster.signal(job, "TERM", batch=False))
    assert run.ends() == ["stopped"] * 4, run.attempts()

    # SLURM's own signal before the time limit: four minutes are the signal's lead, so that it comes at once.
    interrupted("the time limit", lambda: cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=4"))
    assert f"job {job} restart 4: SIGUSR1: asking for a checkpoint" in checkout.output("stormy")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1440")

    interrupted("preemption", lambda: preempt(cluster, checkout))
    interrupted("scontrol requeue", lambda: cluster.requeue(job), loses=True)
    interrupted("kill -9 of a rank", lambda: kill(cluster.ranks_of(job)[1], signal.SIGKILL), loses=True)
    assert "failed" in run.ends()[-2:], run.attempts()

    def power_cut() -> None:
        cluster.take_node_down("lalic2", job)
        cluster.wait(lambda: cluster.state(job) != "RUNNING", "the job is taken from the dead node", 300)
        cluster.bring_node_up("lalic2")

    interrupted("a node without power", power_cut, loses=True)

    # scancel without a signal: the user wants an end.
    checkout.wait_training(run, f"{job}-{restarts}", "before scancel")
    cluster.cancel(job)
    assert checkout.wait_over(job, "the cancelled run") == "CANCELLED"
    assert cluster.restarts(job) == restarts
    last = run.saved()

    quiet, name = checkout.run("quiet"), checkout.config("quiet", last)
    again = checkout.train("quiet", name, options=("--nodes=2",))
    assert checkout.wait_over(again, "the quiet run") == "COMPLETED"
    assert quiet.finished and cluster.restarts(again) == 0
    assert quiet.ends() == ["finished"]
    expected = quiet.tensors(last)
    assert len(expected) >= 2
    assert run.tensors(last) == expected

    # Requeued by hand it says so, and ends well.
    cluster.requeue(again)
    cluster.start_again(again, 1)
    assert checkout.wait_over(again, "the finished run") == "COMPLETED"
    assert "is finished: nothing to do" in checkout.output("quiet")


def preempt(cluster: Cluster, checkout: Checkout) -> None:
    """A job that is more urgent takes both nodes."""
    arguments = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.txt", "--wrap=srun hostname"]
    urgent = cluster.submit(checkout.folder, arguments)
    assert checkout.wait_over(urgent, "the urgent job") == "COMPLETED"


def test_what_is_written_down(cluster: Cluster, checkout: Checkout):
    """Two ranks on each of two nodes, in a `container`, with a file to source, and secrets around."""
    (checkout.folder / "setup.sh").write_text("export LALIC_FROM_SETUP=$SLURMD_NODENAME\n")
    environment = {
        "LALIC_PROCS_PER_NODE": "2",
        "LALIC_SETUP": str(checkout.folder / "setup.sh"),
        "LALIC_CONTAINER": "env LALIC_WITHIN=container",
        "LALIC_SRUN": "--export=ALL,LALIC_BY_SRUN=yes",
        "LALIC_SECRET_TOKEN": "hush-1",
        "AWS_SECRET_ACCESS_KEY": "hush-2",
        "LALIC_MIRROR": "https://someone:hush-3@example.org/x",
    }
    run = checkout.run("written")
    job = checkout.train("written", checkout.config("short", 3), options=("--nodes=2",), **environment)
    assert checkout.wait_over(job, "the run") == "COMPLETED", checkout.output("written")

    assert cluster.ranks_of(job) == []
    attempt = f"{job}-0"
    names = {p.name for p in (run.folder / "logs" / attempt).iterdir()}
    assert {*(f"rank{i}.log" for i in range(4)), "environment.txt"} < names
    assert {f"node{i}.{kind}" for i in range(2) for kind in ("log", "txt")} < names
    # Every rank has a log; the node's shows its first rank.
    assert "step 3/3" in run.log(attempt, "rank0.log") and "step 3/3" in run.log(attempt, "node0.log")
    assert "step 3/3" not in run.log(attempt, "rank1.log")

    text = run.log(attempt, "environment.txt")
    for expected in (f"SLURM_JOB_ID={job}", "nodes lalic[1-2]", "OMP_NUM_THREADS=1", "code ", "arguments configs/"):
        assert expected.replace("configs/", str(checkout.folder)) in text, text
    for node in (0, 1):
        text = run.log(attempt, f"node{node}.txt")
        for expected in ("torch 2.", "backend  state", f"LALIC_FROM_SETUP=lalic{node + 1}", "LALIC_WITHIN=container"):
            assert expected in text, text
        assert "LALIC_BY_SRUN=yes" in text and ("no nvidia-smi" in text or "driver_version" in text)
    written = "".join(p.read_text() for p in (run.folder / "logs").rglob("*.*")) + checkout.output("written")
    assert "LALIC_MIRROR=https://example.org/x" in written
    assert "hush" not in written


def test_deepspeed_on_two_nodes(cluster: Cluster, checkout: Checkout):
    """The launcher's file by name; DeepSpeed would start its ranks by ssh if it were not told otherwise."""
    pytest.importorskip("deepspeed")
    config = checkout.config("short", 3)
    environment = {"LALIC_ACCELERATE_CONFIG": "deepspeed_zero1"}
    job = checkout.train("deepspeed", config, options=("--nodes=2",), **environment)
    assert checkout.wait_over(job, "the run") == "COMPLETED", checkout.output("deepspeed")
    assert "2 node(s) x 1 with deepspeed_zero1.yaml" in checkout.output("deepspeed")
    meta = json.loads((checkout.run("deepspeed").folder / "checkpoints/step-00000003/meta.json").read_text())
    assert meta["world_size"] == 2 and meta["backend"] == "ZeRO-1"


def test_two_jobs_on_the_same_nodes_do_not_meet(cluster: Cluster, checkout: Checkout):
    config = checkout.config("short", 3)
    jobs = {name: checkout.train(name, config, options=("--nodes=2", "--hold")) for name in ("one", "two")}
    first, last = 20000, 31999
    port = first + int(jobs["one"]) * 7 % (last - first + 1)
    with socket.create_server(("127.0.0.1", port)):  # what the first job would take is taken
        for job in jobs.values():
            cluster.run("scontrol", "release", job)
        for name, job in jobs.items():
            assert checkout.wait_over(job, name) == "COMPLETED", checkout.output(name)
    heads = [checkout.output(name).split("head lalic1 127.0.0.1:")[1].split(",")[0] for name in jobs]
    assert heads[0] == str(port + 1) and heads[1] not in (heads[0], str(port))
    starts = [cluster.field(job, "StartTime") for job in jobs.values()]
    ends = [cluster.field(job, "EndTime") for job in jobs.values()]
    assert max(starts) <= min(ends), "they did not run at the same time"


def test_the_ladder_as_an_array(cluster: Cluster, checkout: Checkout):
    arguments = ["--array=1-2", "--output=ladder-%a.txt", "launch/train.slurm", checkout.config("rung", 2)]
    job = checkout.submit(arguments)
    runs = [checkout.run(f"rung-q{q}") for q in (1, 2)]
    for q in (1, 2):
        assert checkout.wait_over(f"{job}_{q}", f"rung {q}") == "COMPLETED"
    assert all(run.finished for run in runs)
    assert "quality: 2" in (runs[1].folder / "config.yaml").read_text()

    # The ladder again, straight from the runs: one result for each.
    arguments = ["--array=1-2", "--output=eval-%a.txt", "launch/eval.slurm", "-p", "runs/rung-q%a"]
    arguments += ["-i", "photos", "-o", "recon", "--result", "eval/q%a.json", "--real"]
    job = checkout.submit(arguments)
    check_results(cluster, checkout, job)


def check_results(cluster: Cluster, checkout: Checkout, job: str) -> None:
    for q in (1, 2):
        assert checkout.wait_over(f"{job}_{q}", f"eval {q}") == "COMPLETED", checkout.output(f"eval-{q}")
        result = json.loads((checkout.folder / f"eval/q{q}.json").read_text())
        assert result["models"][0]["checkpoint"] == f"runs/rung-q{q}" and len(result["records"]) == 6
        assert len(list((checkout.folder / f"recon/rung-q{q}").glob("*.png"))) == 6
        assert "psnr" in checkout.output(f"eval-{q}")  # the table
        assert "SLURM_ARRAY_TASK_ID" in (checkout.folder / f"logs/eval-{job}_{q}-0/environment.txt").read_text()
