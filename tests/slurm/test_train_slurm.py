"""`sbatch launch/train.slurm` on a real SLURM of two nodes: a whole run, and one that is stopped and requeued."""

from __future__ import annotations

import shutil
import sys
import time

import numpy as np
import pytest
from cluster import Cluster, missing_programs
from PIL import Image

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

CONFIG = """\
run: {seed: 3}
model: {N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}
data: {shards: SHARDS, workers: 0}
loss: {metric: mse, quality: 3}
train: {batch_size: 4, cpu_threads: 1}
stages: [{steps: STEPS, lr: 1e-3, crop: 64}]
checkpoint: {every: 1000, keep: 2}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, root):
    """What a user submits from: launch/ and configs/ of this checkout, tiny shards, a tiny config."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "configs"):
        shutil.copytree(root / name, folder / name)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (96, 80, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    from lalic.data_prep.shard import main

    main(["--input", str(folder / "photos"), "--output", str(folder / "shards"), "--min-side", "64"])
    return folder


def _config(folder, steps):
    path = folder / "configs" / f"tiny{steps}.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder / "shards")).replace("STEPS", str(steps)))
    return str(path)


def _submit(cluster, folder, config, run, *options):
    output = f"--output={run.replace('/', '-')}-%j.txt"
    arguments = ["--nodes=2", output, *options, "launch/train.slurm", config, f"run.dir={run}"]
    return cluster.submit(folder, arguments, LALIC_PYTHON=sys.executable, OMP_NUM_THREADS="1")


def _wait(condition, what, folder, seconds=300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.5)
    texts = {p: p.read_text(errors="replace")[-1500:] for p in [*folder.glob("*.txt"), *folder.rglob("logs/*.log")]}
    pytest.fail(f"{what}: not within {seconds} s\n" + "\n".join(f"-- {p}\n{t}" for p, t in texts.items()))


def _weights(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.name.startswith("model")}


def _ended(cluster, job):
    state = cluster.state(job)
    return state if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") else None


def test_two_nodes_then_stopped_and_requeued(cluster, checkout):
    config = _config(checkout, 120)
    whole = _submit(cluster, checkout, config, "runs/whole")
    assert _wait(lambda: _ended(cluster, whole), "the run ends", checkout) == "COMPLETED"
    assert (checkout / "runs/whole/DONE").exists()
    assert cluster.field(whole, "Restarts") == "0"
    logs = sorted(p.name for p in (checkout / "runs/whole/logs").glob("*.log"))
    assert len([n for n in logs if "node" in n]) == 2, logs

    stopped = _submit(cluster, checkout, config, "runs/stopped")
    run = checkout / "runs/stopped"
    _wait(lambda: (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text()) > 400, "first steps", checkout)
    cluster.run("scancel", "--batch", "--signal=USR1", stopped)
    _wait(lambda: cluster.field(stopped, "Restarts") == "1", "the requeue", checkout)
    assert not (run / "DONE").exists()
    assert len(_weights(run)) >= 1
    # SLURM lets a requeued job wait for two minutes; an administrator may start it at once.
    _wait(lambda: cluster.state(stopped) == "PENDING", "pending again", checkout)
    time.sleep(3)  # in the second of the kill, slurmd takes the new start for the job that it has just killed
    cluster.run("scontrol", "update", f"JobId={stopped}", "StartTime=now")
    assert _wait(lambda: _ended(cluster, stopped), "the resumed run ends", checkout) == "COMPLETED"
    assert (run / "DONE").exists()
    assert _weights(run) == _weights(checkout / "runs/whole")


def test_a_run_that_cannot_start_is_not_requeued(cluster, checkout):
    bad = checkout / "configs" / "bad.yaml"
    bad.write_text(CONFIG.replace("SHARDS", str(checkout / "absent")).replace("STEPS", "5"))
    job = _submit(cluster, checkout, str(bad), "runs/bad", "--nodes=1")
    assert _wait(lambda: _ended(cluster, job), "the failure", checkout) == "FAILED"
    assert cluster.field(job, "Restarts") == "0"
    text = "".join(p.read_text() for p in (checkout / "runs/bad/logs").glob("*.log"))
    assert "error: " in text and "absent" in text


def test_the_ladder_as_an_array(cluster, checkout):
    config = _config(checkout, 2)
    arguments = ["--array=1-2", "--nodes=1", "--output=ladder-%a.txt", "launch/train.slurm", config]
    job = cluster.submit(checkout, arguments, LALIC_PYTHON=sys.executable)
    runs = [checkout / f"runs/tiny2-q{q}" for q in (1, 2)]
    _wait(lambda: all((run / "DONE").exists() for run in runs), "both rungs", checkout)
    _wait(lambda: all(_ended(cluster, f"{job}_{q}") == "COMPLETED" for q in (1, 2)), "both jobs end", checkout)
    assert "quality: 2" in (runs[1] / "config.yaml").read_text()
