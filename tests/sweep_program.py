"""The program of test_sweep.py: `lalic sweep` whose launcher starts a trainer that only counts.

    python sweep_program.py sweep ARGUMENTS ...       lalic sweep
    python sweep_program.py train key=value ...       the trainer; it obeys STOP, writes a log, checkpoints and DONE

What a trainer does beside counting to STEPS stands in orders.json beside its run folder, {"q2": {"fail": "..."}}:
    fail        ends with this error, after "at" steps (default 0)
    die         ends by SIGKILL after "at" steps
    hold        goes on until RUN/GO exists
    deaf        does not look for STOP
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 4


def train(settings: list[str]) -> int:
    run = Path(next(s.removeprefix("run.dir=") for s in settings if s.startswith("run.dir=")))
    orders = run.parent / "orders.json"
    order = json.loads(orders.read_text()).get(run.name.rsplit("-", 1)[1], {}) if orders.exists() else {}
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / ".lock", "a")  # noqa: SIM115 -- held until the process ends
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (run / "STOP").unlink(missing_ok=True)
    with open(run.parent / "started.txt", "a") as file:
        file.write(" ".join([run.name, *settings]) + "\n")
    event(run, "started", 0, total_steps=STEPS)
    step = max([int(p.name[5:]) for p in run.glob("checkpoints/step-*")], default=0)
    while step < STEPS or (order.get("hold") and not (run / "GO").exists()):
        if step == order.get("at", 0) and "fail" in order:
            print(order["fail"], file=sys.stderr)
            event(run, "failed", step, error=order["fail"].removeprefix("error: "))
            return 2
        if step == order.get("at", 0) and "die" in order:
            os.kill(os.getpid(), signal.SIGKILL)
        if not order.get("deaf") and (run / "STOP").exists():
            print(f"stopped at step {step}")
            event(run, "stopped", step, reason="STOP exists")
            return 0
        if step < STEPS:
            step += 1
            log(run, step)
            print(f"step {step}", flush=True)
            save(run, step)
        time.sleep(0.02)
    (run / "DONE").write_text("{}")
    return 0


def event(run: Path, kind: str, step: int, **facts: Any) -> None:
    record = {"time": time.time(), "kind": kind, "step": step, "host": socket.gethostname(), **facts}
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def log(run: Path, step: int) -> None:
    record = {
        "kind": "train",
        "step": step,
        "time": time.time(),
        "stage": 1,
        "loss": 1 / step,
        "bpp": 0.5,
        "psnr": 20.0,
    }
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({**record, "images_per_second": 10.0}) + "\n")


def save(run: Path, step: int) -> None:
    """A checkpoint that is complete, as far as its manifest goes."""
    folder = run / "checkpoints" / f".saving-step-{step:08d}"
    folder.mkdir(parents=True)
    meta: dict[str, Any] = {"step": step, "total_steps": STEPS, "stage": 1, "best": None, "metrics": None}
    (folder / "meta.json").write_text(json.dumps(meta))
    data = (folder / "meta.json").read_bytes()
    files = {"meta.json": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / "MANIFEST.json").write_text(json.dumps({"version": 1, "files": files}))
    folder.rename(folder.with_name(f"step-{step:08d}"))


def counting_command(self: Any, config: Path, rung: Any) -> list[str]:
    """In place of `Launcher.command`."""
    return [sys.executable, __file__, "train", *rung.settings, f"run.dir={rung.run}"]


if __name__ == "__main__":
    if sys.argv[1] == "train":
        sys.exit(train(sys.argv[2:]))
    # A sweep leaves alone what it was told to ignore (nohup, a shell's background), and so were the tests, perhaps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from lalic.errors import run_main
    from lalic.sweep.cli import main
    from lalic.sweep.launcher import Launcher

    Launcher.command = counting_command  # type: ignore[method-assign, assignment]
    run_main(lambda: main(sys.argv[2:]))
