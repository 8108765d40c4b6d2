"""Runs that meet their end at a chosen place, for the tests of resuming.

This file is also the program that the tests start. `python tests/lives.py ORDERS.json` forks one run per order, each
killed or stopped as it says; under `accelerate launch`, `... lives.py --one ORDER.json` is one rank of one run.

An order: "run" (folder), "settings", "kill" with "at" (below), "rank" (the one that is killed) and "written" (not
before the checkpoint of that step is), "broken" (steps that are not finite) with "broken_rank", "data" ("unreadable" or
"late") with "data_rank" and "data_at", "full" (steps whose checkpoint finds no room, once), "record" (note what was
read), "damage" (flip a bit of the newest checkpoint instead of running).
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkout_root import ROOT

from lalic.training import checkpoint, events

SETTINGS = ["train.ema=0.9"]
"""Of every run here."""


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(order: dict[str, Any]) -> None:
    """Make this process meet its end where the order says. `at` counts from 0 for steps ("once": the first), as
    saved for saves."""
    from lalic.training.step import TrainStep

    rank = int(os.environ.get("RANK", "0"))
    if rank == order.get("broken_rank", rank):
        break_steps(order.get("broken", []))
    if rank == order.get("data_rank", 0) and "data" in order:
        spoil_data(order["data"], order["data_at"])
    if order.get("record"):
        record_what_is_read(Path(order["run"]))
    if rank == 0 and "full" in order:
        fill_disk(order["full"])
    kill, at = order.get("kill"), order.get("at", 0)
    if kill is None or rank != order.get("rank", rank):
        return
    if kill == "drift":
        update = TrainStep._auxiliary_step

        def drifted(self: TrainStep) -> Any:
            with torch.no_grad():
                self.bare.quantiles()[0].view(-1)[0].nextafter_(torch.tensor(9.0))
            return update(self)

        TrainStep._auxiliary_step = drifted  # type: ignore[method-assign]
    elif kill in ("step", "SIGTERM", "SIGUSR1", "SIGINT", "STOP"):
        stop_in_step(order, kill, at)
    else:
        {
            "writing": kill_while_writing,
            "behind": kill_while_writing_behind,
            "renamed": kill_after_rename,
            "pruning": kill_while_pruning,
            "validation": kill_in_validation,
            "event": kill_at_event,
        }[kill](at)


def break_steps(broken: list[int]) -> None:
    """The loss of these steps, counted from 0, is not finite on this rank."""
    from lalic.training.step import TrainStep

    backward = TrainStep._backward

    def breaks(self: TrainStep, batch: Any, step: int, *more: int) -> Any:
        terms = backward(self, batch, step, *more)
        return {**terms, "loss": terms["loss"] * float("nan")} if step in broken else terms

    TrainStep._backward = breaks  # type: ignore[method-assign]


def spoil_data(how: str, at: int) -> None:
    """The batch of step `at` cannot be read on this rank, or does not come."""
    from lalic.errors import LalicError
    from lalic.training.session import Session

    micro_batches = Session.micro_batches

    def spoiled(self: Session) -> Any:
        batches = micro_batches(self)
        while True:
            if self.step == at and how == "unreadable":
                raise LalicError("the shard is gone")
            if self.step == at:
                print("waits for its data", file=sys.stderr, flush=True)
                time.sleep(400)
            yield next(batches)

    Session.micro_batches = spoiled  # type: ignore[method-assign]


def fill_disk(steps: list[int]) -> None:
    """The first write of the checkpoints of these steps finds no room on the disk."""
    sync, left = checkpoint._sync, list(steps)

    def full(descriptor: int) -> None:
        step = int(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name.rsplit("-", 1)[-1])
        if step in left:
            left.remove(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    checkpoint._sync = full


def stop_in_step(order: dict[str, Any], kill: str, at: int | str) -> None:
    """Killed, or asked to stop, in the backward pass of step `at`."""
    from lalic.training import stop
    from lalic.training.step import TrainStep

    backward = TrainStep._backward
    stop._LOOK_EVERY = 0.01  # else the file may be seen a second later, which is some steps

    def stopped(self: TrainStep, batch: Any, step: int, *more: int) -> Any:
        values = backward(self, batch, step, *more)
        if at not in (step, "once"):
            pass
        elif kill == "step":
            wait_until_written(Path(order["run"]), order.get("written"))
            end()
        elif kill == "STOP":
            Path(order["run"], "STOP").touch()
        else:
            os.kill(os.getpid(), getattr(signal, kill))
        return values

    TrainStep._backward = stopped  # type: ignore[method-assign]


def wait_until_written(run: Path, step: int | None) -> None:
    """Until the history of a run, whose checkpoints are written behind its back, tells of that of `step`."""
    while step is not None and not tells_of_checkpoint(run, step):
        time.sleep(0.02)


def tells_of_checkpoint(run: Path, step: int) -> bool:
    """Whether the history of a run tells that the checkpoint of `step` is on the disk."""
    return ("checkpoint", step) in {(event["kind"], event["step"]) for event in events.read_events(run)}


def kill_while_writing(at: int) -> None:
    """By the writing thread, when the first file of the checkpoint of step `at` is synced."""
    sync = checkpoint._sync

    def cut(descriptor: int) -> None:
        sync(descriptor)
        if f"step-{at:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            end()

    checkpoint._sync = cut


def kill_while_writing_behind(at: int) -> None:
    """In the backward pass of step `at`, the next one, while the checkpoint of `at` steps is half written."""
    from lalic.training.step import TrainStep

    sync, backward, half_written = checkpoint._sync, TrainStep._backward, threading.Event()

    def held(descriptor: int) -> None:
        if f"step-{at:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            half_written.set()
            threading.Event().wait()
        sync(descriptor)

    def stopped(self: TrainStep, batch: Any, step: int, *more: int) -> Any:
        if step == at:
            assert half_written.wait(100)
            end()
        return backward(self, batch, step, *more)

    checkpoint._sync = held
    TrainStep._backward = stopped  # type: ignore[method-assign]


def kill_after_rename(at: int) -> None:
    move = checkpoint._move_into_place

    def moved(temporary: Path, final: Path) -> None:
        move(temporary, final)
        if final.name == f"step-{at:08d}":
            end()

    checkpoint._move_into_place = moved


def kill_while_pruning(at: int) -> None:
    """When an old checkpoint has lost its name and not yet its files."""
    remove = checkpoint.remove

    def removed(folder: Path) -> None:
        if folder.name.startswith(".deleted-") and folder.exists():
            end()
        remove(folder)

    checkpoint.remove = removed


def kill_in_validation(at: int) -> None:
    """At the image number `at` of all that are measured, from 0."""
    from lalic.training import validate

    measure, images = validate._measure, iter(range(1000))

    def measured(*arguments: Any) -> Any:
        if next(images) == at:
            end()
        return measure(*arguments)

    validate._measure = measured


def kill_at_event(at: int) -> None:
    """Before the event number `at`, from 1: a step, a copy, a sync, a rename, a deletion, an image, a log line ..."""
    from lalic.training import checkpoint, snapshot, tracking, validate, writer
    from lalic.training.step import TrainStep

    numbers = iter(range(1, 1_000_000))

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_do(*arguments: Any, **more: Any) -> Any:
            if next(numbers) == at:
                end()
            return action(*arguments, **more)

        return count_and_do

    places: list[tuple[Any, str]] = [
        (TrainStep, "_backward"),
        (TrainStep, "_auxiliary_step"),
        (snapshot.HostCopy, "take"),
        (checkpoint, "_sync"),
        (checkpoint, "read_back"),
        (checkpoint, "_move_into_place"),
        (checkpoint, "remove"),
        (writer, "told"),
        (validate, "_measure"),
        (tracking.Tracker, "add"),
        (tracking.Tracker, "_write"),
    ]
    for owner, name in places:
        setattr(owner, name, counted(getattr(owner, name)))


def record_what_is_read(run: Path) -> None:
    """One line for each step of this rank in RUN/read-RANK-PID.jsonl: place, positions and sums of its images."""
    from lalic.training.step import TrainStep

    call, rank = TrainStep.__call__, int(os.environ.get("RANK", "0"))

    def recorded(self: TrainStep, micro_batches: Any, *, step: int, **more: Any) -> Any:
        size = self.accelerator.num_processes
        with open(run / f"read-{rank}-{os.getpid()}.jsonl", "a") as file:
            for i, batch in enumerate(micro_batches):
                sums = [zlib.crc32(image.contiguous().numpy().tobytes()) for image in batch["x"]]
                line = {"step": step, "place": i * size + rank, "positions": batch["positions"].tolist(), "sums": sums}
                file.write(json.dumps(line) + "\n")
        return call(self, micro_batches, step=step, **more)

    TrainStep.__call__ = recorded  # type: ignore[method-assign]


def what_was_read(run: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> (position, sum of the image), in the order of the global batch, of all ranks and lives of a run."""
    lines = [json.loads(line) for file in run.glob("read-*.jsonl") for line in file.read_text().splitlines()]
    batches: dict[int, list[tuple[int, int]]] = {}
    for line in sorted(lines, key=lambda line: (line["step"], line["place"])):
        batches.setdefault(line["step"], []).extend(zip(line["positions"], line["sums"], strict=True))
    return batches


def obey(order: dict[str, Any]) -> int:
    """One run in this process; returns its exit status."""
    from lalic.errors import run_main
    from lalic.train import main

    arrange(order)
    own = order.get("settings", [])
    usual = [setting for setting in SETTINGS if setting.split("=")[0] not in {s.split("=")[0] for s in own}]
    settings = [f"run.dir={order['run']}", *usual, *own]
    try:
        run_main(lambda: main(["--config", order["config"], *settings]))
    except SystemExit as leaving:
        return int(leaving.code or 0)


def obey_all(orders: list[dict[str, Any]]) -> list[int]:
    """Every order in a process of its own; forked, so that the imports are paid for once."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import tensorboard  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import lalic.training.session  # noqa: F401

    statuses = []
    for order in orders:
        print(f"# {order['name']}", file=sys.stderr, flush=True)
        if order.get("damage"):
            statuses.append(damage_newest(Path(order["run"])))
            continue
        child = os.fork()
        if child == 0:
            os._exit(obey(order))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return statuses


def damage_newest(run: Path) -> int:
    """Flip one bit in the model of the newest checkpoint; returns its step."""
    step = checkpoint.steps_on_disk(run)[0]
    file = checkpoint.folder_of(run, step) / "model.pt"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    file.write_bytes(damaged)
    return step


def in_turn(folder: Path, config: Path, orders: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Runs one after the other: exit status (negative: killed by that signal) and messages of each."""
    full = [
        {"config": str(config), "name": i, **order, "run": str(folder / order["run"])} for i, order in enumerate(orders)
    ]
    file = folder / "orders.json"
    file.write_text(json.dumps(full))
    done = subprocess.run(
        [sys.executable, __file__, str(file)], capture_output=True, text=True, timeout=500, env=environment()
    )
    assert done.returncode == 0, done.stderr
    said = re.split(r"^# \d+\n", done.stderr, flags=re.MULTILINE)[1:]
    return json.loads(done.stdout.splitlines()[-1]), said


def launch(processes: int, folder: Path, config: Path, order: dict[str, Any], yaml: str = "cpu2") -> tuple[int, str]:
    """One order on some processes, started by accelerate as people start it; `yaml`: of launch/accelerate."""
    order = {"config": str(config), **order, "run": str(folder / order["run"])}
    file = folder / "order.json"
    file.write_text(json.dumps(order))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml")]
    done = subprocess.run(
        [*launcher, __file__, "--one", str(file)], capture_output=True, text=True, timeout=500, env=environment()
    )
    return done.returncode, done.stderr + done.stdout


def environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), str(Path(__file__).parent), keep.get("PYTHONPATH", "")]
    return {**keep, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        sys.exit(obey(json.loads(Path(sys.argv[2]).read_text())))
    print(json.dumps(obey_all(json.loads(Path(sys.argv[1]).read_text()))))
