"""A ladder of small runs that is really trained: killed, gone on with, and released."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_train import config_path, own_process_state, records  # noqa: F401 -- fixtures

from lalic import train
from lalic.export import main as export
from lalic.sweep.launcher import _descendants
from lalic.training import checkpoint

STEPS = 30


def sweep_command(config: Path, runs: Path, *more: str) -> list[str]:
    settings = ["data.val=null", f"stages=[{{steps: {STEPS}, lr: 1e-3, crop: 64}}]", "checkpoint.every=4"]
    program = "from lalic.cli import main; main()"
    return [
        sys.executable,
        "-c",
        program,
        "sweep",
        str(config),
        *settings,
        "--runs",
        str(runs),
        "--qualities",
        "1,3",
        *more,
    ]


def kill_in_the_middle(command: list[str], run: Path) -> bool:
    """SIGKILL for the sweep, its launcher and its trainer while `run` trains; False when it was finished by then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (run / "log.jsonl").exists() or len(checkpoint.steps_on_disk(run)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.02)
    for pid in (process.pid, *_descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return not (run / "DONE").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_ladder_that_is_killed(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The killed rung ends with the bits of a run that nothing happened to, the one before it is left alone."""
    monkeypatch.chdir(root)
    runs, config = tmp_path / "runs", config_path
    command = sweep_command(config, runs)
    first, second = runs / "tiny-q1", runs / "tiny-q3"
    while not kill_in_the_middle(command, second):
        shutil.rmtree(second)  # a machine so busy that the kill came too late
    assert (first / "DONE").exists()
    untouched = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    stopped = checkpoint.steps_on_disk(second)[0]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on after step {stopped}" in done.stdout or f"goes on after step {stopped - 4}" in done.stdout
    assert untouched == {p: p.stat().st_mtime_ns for p in untouched}
    assert [r["step"] for r in records(second)] == list(range(1, STEPS + 1))

    settings = [s for s in command if "=" in s and not s.startswith("from ")]
    train.main(["--config", str(config), *settings, "loss.quality=3", f"run.dir={tmp_path / 'reference'}"])
    ours, theirs = (torch.load(checkpoint.find_checkpoint(r) / "model.pt") for r in (second, tmp_path / "reference"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    status = subprocess.run([*command, "--status"], capture_output=True, text=True)
    lines = [line.split() for line in status.stdout.splitlines()]
    assert [line[:4] for line in lines[1:]] == [
        ["1", "0.0018", "finished", f"{STEPS}/{STEPS}"],
        ["3", "0.0067", "finished", f"{STEPS}/{STEPS}"],
    ]
    assert export(["--sweep", str(runs / "tiny"), "--output", str(tmp_path / "release")]) == 0
    names = ("lalic-mse-q1", "lalic-mse-q3")
    assert sorted(p.name for p in (tmp_path / "release").iterdir()) == ["SHA256SUMS", *names]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "release", check=True)
