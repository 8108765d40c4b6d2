"""lalic.eval in several processes: the same result as in one, and an end in one line when a process dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rates import rates_model, save_rates

from lalic.evaluation.ranks import Place, Ranks, first_host, place
from lalic.model import LALIC, published_state_dict

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
VARYING = ("enc_time", "dec_time", "forward_time", "peak-memory-bytes", "timing", "process", "encoding_time")
VARYING += ("decoding_time",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two weights files, and images/ with five pictures and one that is none."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(published_state_dict(LALIC(**TINY)), folder / f"q{seed + 1}.pth")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 64), (64, 64), (70, 64), (64, 40), (30, 30)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "0-no-image.png").write_bytes(b"<html>")
    return folder


def arguments(inputs: Path, result: Path, *flags: str) -> list[str]:
    weights = [str(inputs / f"q{i}.pth") for i in (1, 2)]
    recon = str(result.with_suffix(""))
    return ["-p", *weights, "-i", str(inputs / "images"), "-o", recon, "--result", str(result), "--both", *flags]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a program that no launcher has started, with one thread for each process."""
    launchers = ("SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return {**clean, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LALIC_BACKEND": "torch", **changes}


def program(root: Path) -> list[str]:
    return [sys.executable, str(root / "tests" / "eval_program.py")]


def run(command: Sequence[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**changes))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_srun(command: Sequence[str], size: int, **changes: str) -> list[subprocess.Popen[str]]:
    """Start `size` processes with what srun sets; the job's number is one whose port is free."""
    job = next(n for n in range(os.getpid(), os.getpid() + 1000) if is_free(20000 + n * 7 % 12000))
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size)}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(size)}
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **changes),
        )
        for rank in range(size)
    ]


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Status and stderr of each process, all of which must end by themselves."""
    try:
        return [(p.returncode, err) for p in processes for _, err in [p.communicate(timeout=300)]]
    finally:
        for process in processes:
            process.kill()


def without_times(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    for row in (report["results"], *report["records"]):
        for key in VARYING:
            row.pop(key, None)
    for key in ("command", "reconstructions"):
        report.pop(key)
    report["environment"].pop("processes")
    return report


@pytest.fixture(scope="module")
def alone(root: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process."""
    result = tmp_path_factory.mktemp("alone") / "one.json"
    done = run([*program(root), *arguments(inputs, result)])
    assert done.returncode == 0, done.stderr
    return result


def launched(launcher: str, root: Path) -> list[str]:
    module = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}[launcher]
    flags = {
        "torchrun": ["--nproc_per_node=2", f"--master_port={free_port()}"],
        "accelerate": [f"--config_file={root}/launch/accelerate/cpu2.yaml", f"--main_process_port={free_port()}"],
    }[launcher]
    return [sys.executable, "-m", module, *flags, str(root / "tests" / "eval_program.py")]


def check_same(result: Path, alone: Path) -> None:
    assert without_times(result) == without_times(alone)
    report = json.loads(result.read_text())
    assert report["environment"]["processes"] == 2
    assert {r["process"] for r in report["records"]} == {0, 1}
    for record in report["records"]:
        name = Path(record["quality"]) / Path(record["file"]).name
        assert (result.with_suffix("") / name).read_bytes() == (alone.with_suffix("") / name).read_bytes()
    assert not result.with_name(f"{result.name}.progress").exists()


def test_a_curve(root: Path, inputs: Path, tmp_path: Path) -> None:
    """Weights of several rates at two qualities; killed, the processes go on where they were."""
    weights = save_rates(rates_model(), tmp_path / "w.safetensors")
    command = [*program(root), "-p", str(weights), "-q", "1", "2.5", "-i", str(inputs / "images"), "--both"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = run([*command, "-o", str(tmp_path / "one"), "--result", str(one)])
    assert done.returncode == 0, done.stderr
    command += ["-o", str(tmp_path / "two"), "--result", str(two)]
    assert [status for status, _ in ends(as_srun(command, 2, LALIC_FAULT="kill:1:4"))] == [2, -signal.SIGKILL]
    (first, error), (second, _) = ends(as_srun(command, 2))
    assert (first, second) == (0, 0), error
    assert "2.5: " in error and "of 6 images were measured before" in error
    check_same(two, one)
    command[command.index("2.5")] = "7"
    (first, error), (second, other) = ends(as_srun(command, 2))
    assert (first, second) == (2, 2) and "error:" not in other
    assert error.splitlines()[-1] == "error: quality 7 is not one of the model: it has 1 to 6"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(root: Path, inputs: Path, alone: Path, tmp_path: Path, launcher: str) -> None:
    result = tmp_path / "two.json"
    done = run([*launched(launcher, root), *arguments(inputs, result)])
    assert done.returncode == 0, done.stderr
    check_same(result, alone)
    assert done.stdout.count("1 of 6 images could not be read") == 1


def test_a_killed_process_ends_the_job_and_loses_nothing(root: Path, inputs: Path, alone: Path, tmp_path: Path) -> None:
    """As under srun. The second process is killed at its second picture of the first checkpoint."""
    result = tmp_path / "two.json"
    command = [*program(root), *arguments(inputs, result)]
    (first, error), (second, _) = ends(as_srun(command, 2, LALIC_FAULT="kill:1:1"))
    assert second == -signal.SIGKILL
    assert first == 2
    assert error.splitlines()[-1].startswith("error: another process of this evaluation has ended")
    kept = (tmp_path / "two.json.progress").glob("*.jsonl")
    lines = [line for path in kept for line in path.read_text().splitlines() if line]
    # The first process's two (its third file is no image) and one of the second's.
    assert len(lines) == 3
    # Started again, the first process has one missing picture and two of the other checkpoint's to measure; one more
    # would kill it.
    (first, error), (second, _) = ends(as_srun(command, 2, LALIC_FAULT="kill:0:3"))
    assert (first, second) == (0, 0), error
    assert "q1: 3 of 6 images were measured before" in error
    check_same(result, alone)


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed(root: Path, inputs: Path, alone: Path, tmp_path: Path) -> None:
    result = tmp_path / "two.json"
    command = [*launched("torchrun", root), *arguments(inputs, result)]
    done = run(command, LALIC_FAULT="kill:1:1")
    assert done.returncode != 0
    again = run([*launched("torchrun", root), *arguments(inputs, result)])
    assert again.returncode == 0, again.stderr
    assert without_times(result) == without_times(alone)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(root: Path, inputs: Path, tmp_path: Path) -> None:
    command = [*program(root), *arguments(inputs, tmp_path / "r.json")]
    (first, first_error), (second, second_error) = ends(as_srun(command, 2, LALIC_FAULT="error:1:0"))
    assert (first, second) == (2, 2)
    assert "the fault of the test" in second_error.splitlines()[-1]
    assert "another process of this evaluation has ended" in first_error.splitlines()[-1]


def test_what_is_wrong_for_all_is_said_once(root: Path, inputs: Path, tmp_path: Path) -> None:
    command = [*program(root), "-p", "missing.pth", "-i", str(inputs / "images")]
    (first, first_error), (second, second_error) = ends(as_srun(command, 2))
    assert (first, second) == (2, 2)
    assert first_error.splitlines()[-1] == "error: no such checkpoint: missing.pth"
    assert "error:" not in second_error


def test_the_group_is_left_before_the_interpreter_ends(tmp_path: Path) -> None:
    """Else gloo's threads come too late, and one process in twenty is aborted on its way out."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import os, sys\n"
        "import torch.distributed as dist\n"
        "from lalic.evaluation.ranks import Ranks, place\n"
        "leave = dist.destroy_process_group\n"
        "dist.destroy_process_group = lambda: (leave(), print('left', file=sys.stderr, flush=True))\n"
        "ranks = Ranks(place(os.environ))\n"
        "assert ranks.share('told') == 'told'\n"
        "raise SystemExit(2)\n"
    )
    for status, error in ends(as_srun([sys.executable, str(script)], 2)):
        assert (status, error.splitlines()[-1]) == (2, "left")


class TestPlace:
    def test_no_launcher(self) -> None:
        assert place({}) == Place()
        # A batch script without srun, and a launcher of one process.
        assert place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == Place()
        assert place({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == Place()

    def test_launcher(self) -> None:
        given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        given |= {"MASTER_ADDR": "head", "MASTER_PORT": "29500", "SLURM_STEP_NUM_TASKS": "2"}
        assert place(given) == Place(5, 8, 1, 4, "head", 29500)

    def test_srun(self) -> None:
        given = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6"}
        given |= {"SLURM_LOCALID": "2", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
        assert place(given) == Place(6, 8, 2, 4, "gpu007", 20085)

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [
            ("a", "a"),
            ("a,b", "a"),
            ("n[3-5],x1", "n3"),
            ("n[03,07]", "n03"),
            ("r[1-2]-ib,x", "r1-ib"),
            ("a-b1", "a-b1"),
        ],
    )
    def test_first_host(self, nodes: str, first: str) -> None:
        assert first_host(nodes) == first

    @pytest.mark.parametrize("given", [{"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "many"}])
    def test_what_makes_no_sense(self, given: dict[str, str]) -> None:
        from lalic.errors import LalicError

        with pytest.raises(LalicError, match="launcher"):
            place(given)

    def test_one_process_talks_to_itself(self) -> None:
        ranks = Ranks(Place())
        assert ranks.gather({"a": None}) == [{"a": None}]
        assert ranks.share([1]) == [1]
        assert ranks.together(lambda: 3) == 3
