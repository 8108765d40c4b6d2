"""`lalic status`: from folders that are whole, half there, or no run at all, without touching them.

States of real runs, killed, stopped and failed, are in test_events.py.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lalic import status
from lalic.config import config_text, read_config
from lalic.errors import LalicError
from lalic.status import RunStatus, read_status
from lalic.training import checkpoint, events, run_folder

CONFIG = """
loss: {metric: mse, quality: 3}
stages:
- {steps: 600, lr: 1e-4, crop: 256}
- {steps: 400, lr: 1e-5, crop: 256}
log: {every: 10}
"""


def line(step: int, when: float, **values: Any) -> str:
    record = {"kind": "train", "step": step, "time": when, "stage": 1, "loss": 1.5, "bpp": 0.5, "psnr": 30.25}
    record |= {"images_per_second": 16.0, "step_seconds": 0.5, "data_wait_share": 0.125, "memory_gib": 2.0}
    record |= {"bad_samples": 0, "skipped_steps": 0, "skipped_steps_total": 3, "rollbacks": 1}
    return json.dumps({**record, **values}) + "\n"


def validated(step: int, when: float, loss: float | None) -> str:
    record = {"kind": "validation", "step": step, "time": when, "loss": loss, "bpp": 0.25, "psnr": 31.5}
    return json.dumps({**record, "ms_ssim": 0.97, "images": 24}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is at step 60 of 1000 now, at half a second a step, as far as its files tell."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "small.yaml").write_text(CONFIG)
    (folder / "config.yaml").write_text(config_text(read_config(tmp_path / "small.yaml", [f"run.dir={folder}"])))
    now = time.time()
    log = [line(step, now - 30 + step / 2) for step in range(10, 61, 10)]
    log += [validated(20, now - 20, 1.25), validated(40, now - 10, 1.75), validated(60, now, None)]
    (folder / "log.jsonl").write_text("".join(log))
    history = events.EventLog(folder, world_size=4)
    history.record("started", 0, total_steps=1000, job="17")
    history.record("resumed", 0, total_steps=1000, job="18")
    retime(folder, now - 31)
    for step in (20, 40):
        save(folder, step)
    return folder


def retime(run: Path, when: float) -> None:
    """Move the events of a run, and its lines of log to no later than that, for those that come after."""
    made = [{**event, "time": when} for event in events.read_events(run)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in made))


def save(run: Path, step: int) -> Path:
    meta = {"step": step, "total_steps": 1000, "stage": 1, "world_size": 4, "best": {"step": 20, "loss": 1.25}}
    meta |= {"metrics": {"step": 40, "loss": 1.75}, "health": {"skipped": 2, "rollbacks": 0}}
    tensors = {"model.pt": {"w": torch.zeros(10)}}
    return checkpoint.save(run, step, tensors=tensors, texts={"config.yaml": "x: 1\n"}, meta=meta)


def hold_lock(run: Path, held: Any, leave: Any) -> None:
    with open(run / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        held.set()
        leave.wait(60)


class Holder:
    """Another process that holds a run's lock, as one that trains does."""

    def __init__(self, run: Path):
        context = multiprocessing.get_context("fork")
        self.held, self.leave = context.Event(), context.Event()
        self.process = context.Process(target=hold_lock, args=(run, self.held, self.leave))

    def __enter__(self) -> Holder:
        self.process.start()
        assert self.held.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        self.process.join(60)


def test_running(run: Path) -> None:
    with Holder(run):
        found = read_status(run)
    assert (found.state, found.detail, found.step, found.total_steps) == ("running", "", 60, 1000)
    assert (found.stage, found.stages, found.metric, found.lmbda) == (1, 2, "mse", 0.0067)
    assert (found.loss, found.bpp, found.psnr) == (1.5, 0.5, 30.25)
    assert found.validation == {"step": 60, "loss": None, "bpp": 0.25, "psnr": 31.5, "ms_ssim": 0.97, "images": 24}
    assert found.best and (found.best["step"], found.best["loss"]) == (20, 1.25)
    assert (found.images_per_second, found.data_wait_share, found.memory_gib) == (16.0, 0.125, 2.0)
    assert found.eta_seconds == pytest.approx(940 * 0.5, rel=1e-3)
    assert (found.skipped_steps, found.rollbacks, found.restarts, found.world_size) == (3, 1, 1, 4)
    assert (found.last_checkpoint, [c.step for c in found.checkpoints], found.job) == (40, [40, 20], "18")
    assert found.last_event and found.last_event["kind"] == "resumed"
    assert found.updated == pytest.approx(time.time(), abs=60)


def test_words_and_table(run: Path) -> None:
    with Holder(run):
        (run / "STOP").touch()
        found = read_status(run)
    assert found.updated is not None
    words = status.text(found, now=found.updated + 3)
    for expected in (
        "run: running, asked to stop\n  step 60 of 1000 (6.0 %), stage 1 of 2, eta 0:07:50\n",
        "  training: loss 1.5000, bpp 0.5000, psnr 30.25\n",
        "  validation: bpp 0.2500, psnr 31.50, ms_ssim 0.9700 at step 60\n",
        "  best: loss 1.2500, bpp 0.2500, psnr 31.50, ms_ssim 0.9700 at step 20\n",
        "  speed: 16.0 images/s, data wait 12 %, memory 2.0 GiB\n",
        "  checkpoints: 20, 40\n  health: 3 skipped steps, 1 rollback, 1 restart\n",
        ", 4 processes, job 18\n  last event: resumed at step 0 0:00:34 ago\n  last sign of life: 0:00:03 ago\n",
    ):
        assert expected in words, words
    head, first, second = status.table([found, found], now=found.updated).splitlines()
    assert first == second and len(head.split()) == len(first.split()) + 1  # "val loss" has two words
    assert first.split()[1:4] == ["running", "60/1000", "6.0"] and first.endswith("0:00:00")


def test_finished(run: Path) -> None:
    (run / "log.jsonl").write_text(line(1000, 1e9))
    (run / "DONE").write_text('{"step": 1000}')
    found = read_status(run)
    assert (found.state, found.step, found.eta_seconds) == ("finished", 1000, 0.0)
    # A run that is given more steps goes on.
    with Holder(run):
        assert read_status(run).state == "running"


@pytest.mark.parametrize(
    ("kind", "facts", "state", "detail", "step"),
    [
        ("stopped", {"reason": "SIGUSR1 on rank 1"}, "stopped", "SIGUSR1 on rank 1", 63),
        ("failed", {"error": "the disk is full"}, "failed", "the disk is full", 63),
        ("stalled", {"message": "stalled: rank 3"}, "failed", "stalled: rank 3", 63),
        ("checkpoint", {}, "stopped", "ended without a word: killed, or its machine is gone", 60),
    ],
)
def test_ended(kind: str, facts: dict[str, Any], state: str, detail: str, step: int, run: Path) -> None:
    """A checkpoint does not tell where the run is: it is written behind it."""
    log = events.EventLog(run, world_size=4)
    if kind != "checkpoint":
        log.record(kind, 63, **facts)
    log.record("checkpoint", 50)
    found = read_status(run)
    assert (found.state, found.detail, found.step) == (state, detail, step)


def test_new(tmp_path: Path, run: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / "config.yaml", only)
    found = read_status(only)
    assert (found.state, found.step, found.total_steps, found.loss, found.last_checkpoint) == (
        "new",
        0,
        None,
        None,
        None,
    )
    assert "only: new\n  step 0\n" in status.text(found)


def test_run_of_another_machine_is_judged_by_its_last_sign_of_life(run: Path) -> None:
    """Its lock is not seen from here, as on a file system without locks."""
    made = [{**event, "host": "elsewhere"} for event in events.read_events(run)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in made))
    assert (read_status(run).state, read_status(run).host) == ("running", "elsewhere")
    old = "".join(line(step, time.time() - 86_400 + step) for step in (10, 20))
    (run / "log.jsonl").write_text(old)
    (run / "events.jsonl").write_text("".join(json.dumps({**e, "time": time.time() - 200_000}) + "\n" for e in made))
    assert (read_status(run).state, read_status(run).step) == ("stopped", 20)
    # A line every three hours: a day is no long silence then.
    (run / "log.jsonl").write_text("".join(line(s, time.time() - 86_400 + 1000 * (s - 20)) for s in (10, 20)))
    assert read_status(run).state == "running"


def test_run_that_says_nothing_for_long(run: Path) -> None:
    (run / "log.jsonl").write_text(line(60, time.time() - 86_400))
    retime(run, time.time() - 90_000)
    with Holder(run):
        found = read_status(run)
    assert found.state == "running" and "said nothing for longer" in found.detail


def test_damaged_checkpoint_is_told(run: Path) -> None:
    os.truncate(save(run, 60) / "model.pt", 100)
    found = read_status(run)
    assert found.last_checkpoint == 40
    assert "checkpoints: 20, 40, 60 (damaged: model.pt has 100 bytes instead of" in status.text(found)


def test_checkpoints_alone_tell_enough(run: Path) -> None:
    """As when only they were copied."""
    for name in ("log.jsonl", "events.jsonl", "config.yaml"):
        (run / name).unlink()
    found = read_status(run)
    assert (found.step, found.total_steps, found.stage, found.world_size) == (40, 1000, 1, 4)
    assert (found.skipped_steps, found.validation, found.best) == (
        2,
        {"step": 40, "loss": 1.75},
        {"step": 20, "loss": 1.25},
    )


def test_whatever_is_cut_or_overwritten_is_survived(run: Path) -> None:
    """Every file of the folder cut anywhere, filled with rubbish, missing, or a folder; three values swapped in it."""
    generator = random.Random(0)
    save(run, 60)
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".pt"}
    assert len(whole) > 8
    values = [b"null", b"-1", b'"x"', b"[]", b"{}", b"NaN", b"1e999", b"true", b"10" * 200]

    def swapped(content: bytes) -> bytes:
        spots = list(re.finditer(rb"(?<=: )[^,{}\[\]\n]+", content))
        for spot in sorted(generator.sample(spots, min(3, len(spots))), key=lambda s: -s.start()):
            content = content[: spot.start()] + generator.choice(values) + content[spot.end() :]
        return content

    for path, content in whole.items():
        damages = [content[: generator.randrange(len(content) + 1)] for _ in range(8)]
        damages += [swapped(content) for _ in range(15)]
        damages += [b"", b"\xff\x00" * 50, b"[1]\n", b"{}", b"\n\n", b"[" * 10_000]
        for damaged in damages:
            path.write_bytes(damaged)
            assert_tells_something(run, damaged)
        path.unlink()
        assert_tells_something(run, b"")
        path.mkdir()
        assert_tells_something(run, b"")
        path.rmdir()
        path.write_bytes(content)


def assert_tells_something(run: Path, damaged: bytes) -> None:
    try:
        found = read_status(run)
        assert isinstance(found, RunStatus) and found.step is not None
        assert status.text(found) and status.table([found, found]) and json.dumps(vars(found), default=vars)
    except Exception as error:
        raise AssertionError(f"{damaged[:2000]!r}") from error


def test_the_lock_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts while others look at it is never refused, and nothing in the folder changes."""
    (run / ".lock").touch()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    stop = multiprocessing.get_context("fork").Event()
    looks = multiprocessing.get_context("fork").Value("i", 0)

    def look() -> None:
        while not stop.is_set():
            read_status(run)
            looks.value += 1

    watcher = multiprocessing.get_context("fork").Process(target=look)
    watcher.start()
    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE", 0.0)
    try:
        taken = 0
        while looks.value < 20 or taken < 200:
            folder = run_folder.RunFolder(run)
            folder._take_lock()
            assert folder._lock is not None
            folder._lock.close()
            taken += 1
    finally:
        stop.set()
        watcher.join(60)
    assert watcher.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def lalic(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lalic.cli import main; main()"]
    return subprocess.run([*command, "status", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_command(run: Path, tmp_path: Path) -> None:
    done = lalic(run)
    assert done.returncode == 0 and done.stdout.startswith(f"{run}: ") and done.stderr == ""
    done = lalic("--json", run, run)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["step"] == second["step"] == 60 and first["checkpoints"][0] == {"step": 40, "problem": None}
    done = lalic(run, tmp_path / "nowhere", run)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 3
    assert done.stderr == f"error: no such run folder: {tmp_path / 'nowhere'}\n"


def test_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(LalicError, match="is no run folder"):
        read_status(tmp_path)
    with pytest.raises(LalicError, match="no such run folder"):
        read_status(tmp_path / "photo.png")
    done = lalic(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is no run folder\n"


def test_neither_torch_nor_numpy_is_needed(run: Path) -> None:
    program = (
        "import sys; from lalic.cli import main\n"
        "try: main(['status', *sys.argv[1:]])\n"
        "finally: print(sorted({'torch', 'numpy', 'accelerate', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
