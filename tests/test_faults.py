"""The benchmark of faults: real runs that are hit and come back, and comparisons that find what differs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_train import write_images

from benchmarks import fault_bits, faults
from benchmarks.fault_kinds import SmallDisk
from benchmarks.fault_plan import FILES
from benchmarks.fault_runs import Attempt, Run
from lalic.training import checkpoint


def made(folder: Path, loss: float = 1.5) -> Path:
    """A run folder with one checkpoint and one line of log."""
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(4, 3, generator=generator), "scale": torch.ones(())}
    rng = {0: {"torch": torch.arange(5, dtype=torch.uint8), "log": {"busy": random.random(), "steps": 2}}}
    tensors = {"model.pt": state, "optimizer.pt": {"main": [state["weight"] * 2]}, "rng.pt": rng}
    meta = {"step": 6, "metrics": {"step": 5, "loss": loss}, "best": {"step": 5, "loss": loss}, "versions": {"x": "1"}}
    checkpoint.save(folder, 6, tensors=tensors, texts={"config.yaml": "a: 1\n"}, meta=meta)
    line = {"kind": "train", "step": 6, "time": random.random(), "loss": loss, "data_wait_share": random.random()}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def change(folder: Path, name: str, action: Callable[[dict], None]) -> None:
    """Put another tensor file in the place of one of the checkpoint's."""
    path = checkpoint.folder_of(folder, 6) / name
    state = torch.load(path, weights_only=True)
    action(state)
    torch.save(state, path)


def flip(tensor: torch.Tensor) -> None:
    tensor.view(-1)[-1:].view(torch.uint8)[0] ^= 1


def test_the_last_bit_of_everything_is_compared(tmp_path: Path) -> None:
    reference, same = made(tmp_path / "reference"), made(tmp_path / "same")
    assert fault_bits.differences(same, reference, 6) == []
    assert fault_bits.log_differences(same, reference) == []
    changes: dict[str, tuple[str, Callable[[dict], None]]] = {
        "model.pt.weight": ("model.pt", lambda s: flip(s["weight"])),
        "model.pt.scale": ("model.pt", lambda s: flip(s["scale"])),
        "optimizer.pt.main.0": ("optimizer.pt", lambda s: flip(s["main"][0])),
        "rng.pt.0.torch": ("rng.pt", lambda s: flip(s[0]["torch"])),
        "rng.pt.0.log.steps: 3 instead of 2": ("rng.pt", lambda s: s[0]["log"].update(steps=3)),
    }
    for number, (expected, (name, action)) in enumerate(changes.items()):
        other = made(tmp_path / str(number))
        change(other, name, action)
        assert fault_bits.differences(other, reference, 6) == [expected]
    other = made(tmp_path / "loss", loss=1.5000000000000002)
    assert [text.split()[1] for text in fault_bits.differences(other, reference, 6)] == ["best", "metrics"]
    assert fault_bits.log_differences(other, reference) == [
        "log.jsonl: train step 6.loss: 1.5000000000000002 instead of 1.5"
    ]


def test_a_checkpoint_is_held_while_the_run_deletes_it(tmp_path: Path) -> None:
    reference, run = made(tmp_path / "reference"), made(tmp_path / "run")
    with fault_bits.held(run, 6) as folder:
        checkpoint.remove(checkpoint.folder_of(run, 6))
        assert fault_bits.differences(folder, reference, 6) == []
    with pytest.raises(FileNotFoundError), fault_bits.held(run, 6):
        pass
    assert not folder.exists()


def test_what_a_run_prints_is_followed(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "out.txt")
    assert (attempt.step, attempt.resumed_from, attempt.training, attempt.checkpoints) == (0, None, False, [])
    head = "2026-01-01 00:00:00,000 lalic.train "
    attempt.output.write_text(f"{head}checkpoint r/checkpoints/step-00000009 is passed over: rng.pt is missing\n")
    with open(attempt.output, "a") as file:
        file.write(f"{head}resumed from r/checkpoints/step-00000006: step 6 of 90\n")
    assert (attempt.step, attempt.resumed_from, attempt.training) == (6, 6, False)
    with open(attempt.output, "a") as file:
        file.write(f"{head}step 7/90 (7.8 %) stage 1/2 loss 70.3\n{head}checkpoint r/checkpoints/step-00000007\n")
        file.write(f"{head}step 8/90 (8.9 %) stage 1/2 loss 70.3\n{head}checkpoint r/step-00000008: stood still\n")
    assert (attempt.step, attempt.resumed_from, attempt.training, attempt.checkpoints) == (8, 6, True, [7, 8])


def test_all_processes_of_a_run_are_found_and_ended(tmp_path: Path) -> None:
    """Also those whose parent is gone, and no others."""

    class Sleepers(Run):
        @property
        def command(self) -> list[str]:
            return ["sh", "-c", "setsid sleep 1000 & setsid sleep 1000 & exec sleep 1000"]

    other = subprocess.Popen(["sleep", "1000"])
    run = Sleepers(tmp_path / "run", None, "cpu1", 1)  # type: ignore[arg-type]
    try:
        run.start()
        run.wait(lambda: len(run.everyone()) == 3, "three processes")
        run.attempt.launcher.kill()
        run.wait_for_end()
        assert len(run.everyone()) == 2 == len(run.strays())
        run.kill_everyone()
        assert run.everyone() == [] and other.poll() is None
    finally:
        run.kill_everyone()
        other.kill()
        other.wait()


WRITER = """
import sys
for line in sys.stdin:
    try:
        with open(line.strip(), "wb", buffering=0) as file:
            written = file.write(bytes(100_000))
            print("whole" if written == 100_000 else "cut", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


@pytest.mark.parametrize("mounted", [True, False])
def test_a_small_disk_is_full_and_has_space_again(mounted: bool, tmp_path: Path, monkeypatch) -> None:
    """The file system of its own; and the limit for the ranks, where none can be mounted."""
    if not mounted:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
    disk = SmallDisk(tmp_path / "run", size=4 << 20)
    if disk.mounted != mounted:
        pytest.skip("no file system can be mounted here")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writer = subprocess.Popen([sys.executable, "-c", WRITER], **pipes)

    class OneRank(Run):
        def ranks(self) -> dict[int, int]:
            return {0: writer.pid}

    def write(name: str) -> str:
        writer.stdin.write(f"{disk.folder / name}\n")
        writer.stdin.flush()
        return writer.stdout.readline().strip()

    run = OneRank(disk.folder, None, "cpu1", 1)  # type: ignore[arg-type]
    try:
        assert write("before") == "whole"
        disk.fill(run, 50_000)
        assert write("while") != "whole" and write("again") != "whole"
        disk.free(run)
        assert write("after") == "whole"
    finally:
        writer.kill()
        writer.wait()
        disk.close()
    assert not disk.folder.is_mount()


def test_the_plan_is_as_large_as_promised() -> None:
    counts = [len(faults.planned(name, False, None, random.Random(0))) for name in faults.SETUPS]
    assert sum(counts) >= 60
    assert len(faults.planned("ddp2", True, None, random.Random(0))) == 8
    assert set(faults.planned("ddp2", False, ["flipped"], random.Random(0))) == {f"flipped-{n}" for n in FILES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_faults_on_two_ranks(tmp_path: Path, root: Path) -> None:
    """Every run comes back with the bits of the undisturbed one, and loses no more than it must."""
    write_images(tmp_path / "photos")
    command = [sys.executable, str(root / "benchmarks" / "faults.py"), str(tmp_path / "photos"), "--quick"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "faults.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "faults.json").read_text())["setups"].values()
    assert len(found["records"]) == 8
    for record in found["records"]:
        assert record["resumed"] and record["bits_equal"] and record["differences"] == [], record
        asked = record["kind"].startswith("SIG") or record["kind"].endswith("of the launcher")
        assert record["lost_steps"] == 0 if asked else record["lost_steps"] <= 2 * faults.EVERY, record
    assert all(end["finished"] and end["bits_equal"] for end in found["ends"]), found["ends"]
