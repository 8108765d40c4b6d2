"""Runs that are killed, stopped and damaged, on one process and on two: the end is the same, bit for bit.

This file is also the program that the tests start. `python tests/test_resume.py ORDERS.json` forks one run per
order, each killed or stopped as it says; under `accelerate launch`, `... test_resume.py --one ORDER.json` is one
rank of one run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import config_path, records  # noqa: F401 -- a fixture

from lalic.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent

KILLS = {
    "during a step": {"kill": "step", "at": 3},
    "while a checkpoint is written": {"kill": "writing", "at": 6},
    "right after the rename": {"kill": "renamed", "at": 6},
}


def break_steps(broken: list[int]) -> None:
    """The loss of these steps, counted from 0, is not finite on this rank."""
    from lalic.training.step import TrainStep

    backward = TrainStep._backward

    def breaks(self: TrainStep, pixels: Any, step: int, *more: int) -> Any:
        terms = backward(self, pixels, step, *more)
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


def arrange(order: dict[str, Any]) -> None:
    """Make this process meet its end where the order says. `at` counts from 0 for steps ("once": the first), as
    saved for saves."""
    from lalic.training.step import TrainStep

    rank = int(os.environ.get("RANK", "0"))
    if rank == order.get("broken_rank", rank):
        break_steps(order.get("broken", []))
    if rank == order.get("data_rank", 0) and "data" in order:
        spoil_data(order["data"], order["data_at"])
    kill, at = order.get("kill"), order.get("at")
    if str(order.get("rank", os.environ.get("RANK", "0"))) != os.environ.get("RANK", "0"):
        return

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kill == "drift":
        update = TrainStep._auxiliary_step

        def drifted(self: TrainStep) -> Any:
            with torch.no_grad():
                self.bare.quantiles()[0].view(-1)[0].nextafter_(torch.tensor(9.0))
            return update(self)

        TrainStep._auxiliary_step = drifted  # type: ignore[method-assign]
    elif kill in ("step", "SIGTERM", "SIGUSR1", "SIGINT", "STOP"):
        backward = TrainStep._backward

        def stopped(self: TrainStep, pixels: Any, step: int, *more: int) -> Any:
            values = backward(self, pixels, step, *more)
            if at not in (step, "once"):
                pass
            elif kill == "step":
                end()
            elif kill == "STOP":
                Path(order["run"], "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, kill))
            return values

        TrainStep._backward = stopped  # type: ignore[method-assign]
    elif kill == "writing":
        sync = checkpoint._sync

        def cut(descriptor: int) -> None:
            sync(descriptor)
            if f"step-{at:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
                end()

        checkpoint._sync = cut
    elif kill == "renamed":
        move = checkpoint._move_into_place

        def moved(temporary: Path, final: Path) -> None:
            move(temporary, final)
            if final.name == f"step-{at:08d}":
                end()

        checkpoint._move_into_place = moved


def obey(order: dict[str, Any]) -> int:
    """One run in this process; returns its exit status."""
    from lalic.errors import run_main
    from lalic.train import main

    arrange(order)
    settings = [f"run.dir={order['run']}", *order.get("settings", [])]
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


def launch_two(folder: Path, config: Path, order: dict[str, Any], yaml: str = "cpu2") -> tuple[int, str]:
    """One order on two processes, started by accelerate as people start it."""
    order = {"config": str(config), **order, "run": str(folder / order["run"])}
    file = folder / "order.json"
    file.write_text(json.dumps(order))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml"), "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, __file__, "--one", str(file)], capture_output=True, text=True, timeout=500, env=environment()
    )
    return done.returncode, done.stderr + done.stdout


def environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), str(Path(__file__).parent), keep.get("PYTHONPATH", "")]
    return {**keep, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def assert_same_end(run: Path, reference: Path) -> None:
    """Weights, both optimisers, random numbers, best so far, and every step's loss."""
    ours, theirs = checkpoint.find_checkpoint(run), checkpoint.find_checkpoint(reference)
    assert ours.name == theirs.name == "step-00000007"
    for name in ("model.pt", "optimizer.pt", "rng.pt"):
        a, b = (torch.load(path / name, weights_only=True) for path in (ours, theirs))
        assert_identical(a, b, name)
    a, b = checkpoint.read_meta(ours), checkpoint.read_meta(theirs)
    # The code's version changes when somebody commits while the tests run.
    assert {**a, "versions": None} == {**b, "versions": None}
    for kind, names in (("train", ("loss", "gradient_norm", "aux")), ("validation", ("loss", "bpp"))):
        histories = [[(r["step"], *(r[n] for n in names)) for r in records(r, kind)] for r in (run, reference)]
        assert histories[0] == histories[1]
    assert (run / "DONE").exists()


def assert_identical(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def assert_tensorboard_steps_stand_once(run: Path) -> None:
    """Steps that were done twice, because of a kill, are purged from the board."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [e.step for e in board.Scalars("validation/loss")] == [3, 6, 7]


ORDERS = [
    {"run": "reference"},
    *({"run": "killed", **kill} for kill in KILLS.values()),
    {"run": "killed"},
    {"run": "asked", "kill": "SIGTERM", "at": 0},
    # Step 3 is also to be validated: the resumed run makes up for it.
    {"run": "asked", "kill": "SIGUSR1", "at": 2},
    {"run": "asked", "kill": "STOP", "at": 3, "settings": ["data.workers=1"]},
    {"run": "asked", "kill": "SIGINT", "at": 5},
    {"run": "asked"},
    {"run": "damaged", "kill": "step", "at": 5},
    {"run": "damaged", "damage": True},
    {"run": "damaged"},
    {"run": "longer", "settings": ["stages=[{steps: 3, lr: 1e-3, crop: 64}]"]},
    {"run": "longer"},
    {"run": "longer"},
]
"""All runs on one process, in one list, because starting Python and torch takes longer than a run."""


class Outcomes:
    """What became of ORDERS."""

    def __init__(self, folder: Path, statuses: list[int], said: list[str]):
        self.folder, self._statuses, self._said = folder, statuses, said

    def of(self, run: str) -> tuple[list[int], list[str]]:
        """Exit statuses and messages of one run folder's orders."""
        chosen = [i for i, order in enumerate(ORDERS) if order["run"] == run]
        return [self._statuses[i] for i in chosen], [self._said[i] for i in chosen]


@pytest.fixture(scope="module")
def outcomes(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:  # noqa: F811
    folder = tmp_path_factory.mktemp("resume")
    result = Outcomes(folder, *in_turn(folder, config_path, ORDERS))
    statuses, said = result.of("reference")
    assert statuses == [0], said
    return result


def test_killed_at_three_points_and_resumed_on_one_process(outcomes: Outcomes) -> None:
    """SIGKILL in a step, in a save and right after one; then to the end."""
    statuses, said = outcomes.of("killed")
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0], said
    run = outcomes.folder / "killed"
    assert_same_end(run, outcomes.folder / "reference")
    assert not list((run / "checkpoints").glob(".*"))
    assert_tensorboard_steps_stand_once(run)


def test_asked_to_stop_and_resumed(outcomes: Outcomes) -> None:
    """Each signal and the stop file: exit 0, a checkpoint of that very step, and the same end."""
    statuses, said = outcomes.of("asked")
    assert statuses == [0] * 5, said
    for text, step, reason in zip(said, (1, 3, 4, 6), ("SIGTERM", "SIGUSR1", "STOP exists", "SIGINT"), strict=False):
        assert re.search(rf"stopped at step {step}: .*{reason}", text), text
        assert f"checkpoints/step-{step:08d}" in text
    assert_same_end(outcomes.folder / "asked", outcomes.folder / "reference")
    assert not (outcomes.folder / "asked" / "STOP").exists()


def test_damaged_newest_checkpoint_is_passed_over(outcomes: Outcomes) -> None:
    (_, damaged_step, status), said = outcomes.of("damaged")
    assert status == 0
    assert f"step-{damaged_step:08d} is passed over: model.pt has another SHA-256" in said[2]
    assert_same_end(outcomes.folder / "damaged", outcomes.folder / "reference")


def test_a_run_goes_on_beyond_its_end(outcomes: Outcomes) -> None:
    """A shorter run that is given more steps ends as if it had had them from the start."""
    statuses, said = outcomes.of("longer")
    assert statuses == [0] * 3
    assert ["nothing to do" in text for text in said] == [False, False, True]
    runs = (outcomes.folder / "longer", outcomes.folder / "reference")
    ours, theirs = (torch.load(checkpoint.find_checkpoint(run) / "model.pt", weights_only=True) for run in runs)
    assert_identical(ours, theirs, "model")


def test_two_runs_in_one_folder_are_refused(config_path: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    import multiprocessing

    from lalic.config import read_config
    from lalic.errors import LalicError
    from lalic.training import run_folder

    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE", 0.0)
    config = read_config(config_path, [f"run.dir={tmp_path}"])
    context = multiprocessing.get_context("fork")
    opened, leave = context.Event(), context.Event()

    def hold() -> None:
        folder = run_folder.RunFolder(tmp_path)
        folder.open(config)
        opened.set()
        leave.wait(60)

    holder = context.Process(target=hold)
    holder.start()
    assert opened.wait(60)
    with pytest.raises(LalicError, match="another process is training"):
        run_folder.RunFolder(tmp_path).open(config)
    leave.set()
    holder.join(60)
    run_folder.RunFolder(tmp_path).open(config)


def test_two_processes_are_one_run(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two ranks, and one rank with two accumulation steps: the same batches, the same noise, the same weights."""
    status, said = launch_two(tmp_path, config_path, {"run": "two"})
    assert status == 0, said
    assert said.count("finished after 7 steps") == 1
    assert checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path / "two"))["world_size"] == 2
    statuses, _ = in_turn(tmp_path, config_path, [{"run": "one", "settings": ["train.accumulation=2"]}])
    assert statuses == [0]
    for kind in ("train", "validation"):
        two, one = (records(tmp_path / run, kind) for run in ("two", "one"))
        assert [r["step"] for r in two] == [r["step"] for r in one]
        assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    a, b = (
        torch.load(checkpoint.find_checkpoint(tmp_path / run) / "model.pt", weights_only=True) for run in ("two", "one")
    )
    for name in a:
        if a[name].numel():
            assert float((a[name].double() - b[name].double()).abs().mean()) < 1e-5, name


@pytest.mark.slow
def test_killed_at_three_points_and_resumed_on_two_processes(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """As on one process; the rank that is killed takes the other one with it."""
    status, said = launch_two(tmp_path, config_path, {"run": "reference"})
    assert status == 0, said
    for rank, kill in zip((1, 0, 0), KILLS.values(), strict=True):
        status, said = launch_two(tmp_path, config_path, {"run": "killed", "rank": rank, **kill})
        assert status != 0 and "SIGKILL" in said, said
        assert not (tmp_path / "killed" / "DONE").exists()
    status, said = launch_two(tmp_path, config_path, {"run": "killed"})
    assert status == 0, said
    assert_same_end(tmp_path / "killed", tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu1", "cpu2"])
def test_ranks_do_not_train_on_without_their_launcher(config: str, config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """kill -9 of the launcher: its ranks save a checkpoint and leave, and the next start has the folder."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{config}.yaml"), "-m", "lalic.train"]
    settings = [f"run.dir={tmp_path / 'run'}", "data.val=", "checkpoint.every=100000"]
    long = "stages=[{steps: 100000, lr: 1e-4, crop: 64}]"
    command = [*launcher, "--config", str(config_path), *settings, long]
    with open(tmp_path / "said", "w+") as said:
        running = subprocess.Popen(command, stderr=said, stdout=said, env=environment())
        log = tmp_path / "run" / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert running.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        running.kill()
        running.wait()
    steps = len(log.read_text().splitlines())
    try:
        # The next start waits for the orphans' lock, and finds what they have saved.
        end = {"run": "run", "settings": [*settings[1:], long], "kill": "SIGTERM", "at": "once"}
        (status,), (text,) = in_turn(tmp_path, config_path, [end])
        assert status == 0, text
    finally:
        (tmp_path / "run" / "STOP").touch()  # an orphan that has not heard of anything does not stay behind
    first, *_ = sorted(checkpoint.steps_on_disk(tmp_path / "run"))
    assert first >= steps and f"resumed from {checkpoint.folder_of(tmp_path / 'run', first)}" in text


@pytest.mark.slow
def test_one_rank_of_two_is_asked_to_stop(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """The ranks agree on the step, save and exit with 0; and another number of ranks goes on."""
    status, said = launch_two(tmp_path, config_path, {"run": "r", "rank": 1, "kill": "SIGUSR1", "at": 2})
    assert status == 0, said
    assert "stopped at step 3: SIGUSR1 on rank 1" in said
    assert checkpoint.find_checkpoint(tmp_path / "r").name == "step-00000003"
    statuses, said = in_turn(tmp_path, config_path, [{"run": "r", "settings": ["train.accumulation=2"]}])
    assert statuses == [0]
    assert "world_size 2 -> 1" in said[0]


@pytest.mark.slow
def test_errors_of_two_ranks_are_one_line(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    for settings in (["train.batch_size=3"], ["data.shards=/nowhere"], ["loss.quality=9"]):
        status, said = launch_two(tmp_path, config_path, {"run": "r", "settings": settings})
        assert status != 0
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said


@pytest.mark.slow
def test_ranks_that_drift_apart_are_found(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """The last bit of one quantile on one rank is enough, and nothing of it reaches a checkpoint."""
    status, said = launch_two(tmp_path, config_path, {"run": "r", "rank": 1, "kill": "drift"})
    assert status != 0 and "different weights in 1 of" in said
    assert checkpoint.steps_on_disk(tmp_path / "r") == []


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        sys.exit(obey(json.loads(Path(sys.argv[2]).read_text())))
    print(json.dumps(obey_all(json.loads(Path(sys.argv[1]).read_text()))))
