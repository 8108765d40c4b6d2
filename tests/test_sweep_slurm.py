"""`lalic sweep --slurm`: what is handed to sbatch, which here is a script that notes its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sweep_program

from lalic.errors import LalicError
from lalic.sweep.cli import main

CONFIG = """
loss: {quality: 3}
stages: [{steps: 4, lr: 1e-3, crop: 64}]
"""

SBATCH = """#!/bin/sh
printf '%s\\n' "$*" >> "$FAKE_SLURM/submitted"
[ -e "$FAKE_SLURM/refuse" ] && { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "$((100 + $(wc -l < "$FAKE_SLURM/submitted")));cluster"
"""

SQUEUE = """#!/bin/sh
cat "$FAKE_SLURM/queue" 2>/dev/null || { echo "slurm_load_jobs error: Unable to contact controller" >&2; exit 1; }
"""


class Slurm:
    """A checkout that the test stands in, and what its fake SLURM was told."""

    def __init__(self, folder: Path):
        self.folder = folder

    def submitted(self) -> list[str]:
        file = self.folder / "submitted"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def queue(self, *jobs: str) -> None:
        (self.folder / "queue").write_text("".join(job + "\n" for job in jobs))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> Slurm:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shutil.copytree(root / "launch", tmp_path / "launch")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    return Slurm(tmp_path)


def sweep(*more: str) -> int:
    return main(["configs/tiny.yaml", "--slurm", *more])


def finish(quality: int) -> None:
    folder = Path("runs") / f"tiny-q{quality}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "DONE").write_text("{}")


def test_the_rungs_that_are_not_finished(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    finish(2)
    assert sweep("train.clip=2", "--", "--partition=gpu", "--gpus-per-node=8") == 0
    assert slurm.submitted() == [
        "--parsable --array=1,3,4,5,6 --partition=gpu --gpus-per-node=8 launch/train.slurm configs/tiny.yaml "
        "train.clip=2 run.dir=runs/tiny"
    ]
    out = capsys.readouterr().out
    assert "q2: runs/tiny-q2 is finished" in out and "q1, q3, q4, q5, q6: submitted as job 101" in out


def test_the_script_uses_the_same_folders(slurm: Slurm) -> None:
    """What was submitted, run as SLURM would when the job is requeued: it finds that the run is finished."""
    finish(3)
    sweep("--qualities", "1-2", "run.dir=elsewhere/tiny")
    for run, given in (("runs/tiny-q3", []), ("elsewhere/tiny-q2", slurm.submitted()[0].split()[4:])):
        (Path(run) / "logs").mkdir(parents=True, exist_ok=True)
        (Path(run) / "DONE").write_text("{}")
        attempt = ("2026-11-27T10:00:00+0000", f"7_{run[-1]}", "0", "finished", "4", "0")
        (Path(run) / "logs" / "attempts.tsv").write_text("\t".join(attempt) + "\n")
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": run[-1],
            "SLURM_JOB_NUM_NODES": "1",
        }
        done = subprocess.run(
            ["bash", "launch/train.slurm", "configs/tiny.yaml", *given],
            env={**os.environ, **job, "SLURM_RESTART_COUNT": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and f"{run} is finished" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("section", "given"),
    [
        ("loss: {metric: mse, quality: [1, 6]}", []),
        ("loss:\n  metric: mse\n  quality:\n  - 1  # the lowest\n  - 6", []),
        ('loss: {"quality" : [2,\n 3]}', []),
        ("loss: {metric: mse, quality: 3}", ["loss.quality=[1, 6]"]),
    ],
)
def test_the_script_trains_no_range_of_rates_in_every_task(section: str, given: list[str], slurm: Slurm) -> None:
    Path("configs/several.yaml").write_text(f"# quality: [of comments]\ntrain: {{clip: 1}}\n{section}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NUM_NODES": "1"}
    command = ["bash", "launch/train.slurm", "configs/several.yaml", *given]
    done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "error: loss.quality is a range of rates" in done.stderr and "without --array" in done.stderr
    assert not Path("runs").exists()


def test_a_finished_rung_that_was_given_more_steps(slurm: Slurm) -> None:
    finish(1)
    sweep_program.save(Path("runs/tiny-q1"), 4)
    (Path("runs/tiny-q1") / "checkpoints" / "step-00000004" / "config.yaml").write_text(CONFIG.replace("3}", "1}"))
    sweep("--qualities", "1")
    assert slurm.submitted() == []
    sweep("--qualities", "1", "stages.0.steps=9")
    assert [line.split()[1] for line in slurm.submitted()] == ["--array=1"]


def test_again_leaves_alone_what_is_in_the_queue(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("--qualities", "1-3")
    assert len(slurm.submitted()) == 1
    finish(1)
    slurm.queue("99_2", "101_3")
    sweep("--qualities", "1-4")
    assert [line.split()[1] for line in slurm.submitted()] == ["--array=2,4"]
    assert "q3: job 101_3 is in the queue already" in capsys.readouterr().out
    for quality in (2, 3, 4):
        finish(quality)
    sweep("--qualities", "1-4")
    assert slurm.submitted() == []


@pytest.mark.parametrize(
    ("warm_start", "expected"),
    [
        ("highest", [("3", ""), ("1,2", "101_3")]),
        ("previous", [("3", ""), ("2", "101_3"), ("1", "102_2")]),
    ],
)
def test_warm_start_waits_for_its_job(slurm: Slurm, warm_start: str, expected: list[tuple[str, str]]) -> None:
    sweep("--qualities", "1-3", "--warm-start", warm_start)
    lines = slurm.submitted()
    assert [line.split()[1] for line in lines] == [f"--array={array}" for array, _ in expected]
    for line, (_, parent) in zip(lines, expected, strict=True):
        assert (f"--dependency=afterok:{parent} " in line) is bool(parent)
        assert ("--dependency" in line) is ("train.init_from=runs/tiny-q" in line) is bool(parent)
    slurm.queue("101_3")
    sweep("--qualities", "1-3", "--warm-start", "highest")
    assert [line.split()[1:3] for line in slurm.submitted()] == [["--array=1,2", "--dependency=afterok:101_3"]]
    finish(3)
    slurm.queue()
    sweep("--qualities", "1-3", "--warm-start", "highest")
    (line,) = slurm.submitted()
    assert "--array=1,2" in line and "--dependency" not in line and "train.init_from=runs/tiny-q3" in line


def test_what_sbatch_refuses(slurm: Slurm) -> None:
    (slurm.folder / "refuse").touch()
    with pytest.raises(LalicError, match="status 1: sbatch: error: invalid partition"):
        sweep()
    assert not Path("runs").exists()


def test_without_slurm_or_checkout(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        with pytest.raises(LalicError, match="no sbatch on this machine"):
            sweep()
    with pytest.raises(LalicError, match="a job chooses by its own resources"):
        sweep("--num_processes", "2")
    shutil.rmtree("launch")
    with pytest.raises(LalicError, match="submit from the checkout"):
        sweep()
