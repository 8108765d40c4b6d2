"""Runs that are killed, stopped and damaged, on one process and on several: the end is the same, bit for bit."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import ROOT, environment, in_turn, launch, what_was_read
from test_train import config_path, records  # noqa: F401 -- a fixture

from lalic.training import checkpoint

KILLS = {
    "in the step after, while a checkpoint is written": {"kill": "behind", "at": 2},
    "during a step": {"kill": "step", "at": 3},
    "during validation": {"kill": "validation", "at": 1},
    "while a checkpoint is written": {"kill": "writing", "at": 6},
    "while an old one is deleted": {"kill": "pruning"},
    "right after the last rename": {"kill": "renamed", "at": 7},
}


def launch_two(folder: Path, config: Path, order: dict[str, Any], yaml: str = "cpu2") -> tuple[int, str]:
    return launch(2, folder, config, order, yaml)


def assert_same_end(run: Path, reference: Path) -> None:
    """Weights, their average, both optimisers, random numbers, best so far, and every line of both logs."""
    ours, theirs = checkpoint.find_checkpoint(run), checkpoint.find_checkpoint(reference)
    assert ours.name == theirs.name == "step-00000007"
    for name in ("model.pt", "ema.pt", "optimizer.pt", "rng.pt"):
        a, b = (torch.load(path / name, weights_only=True) for path in (ours, theirs))
        assert_identical(a, b, name)
    a, b = checkpoint.read_meta(ours), checkpoint.read_meta(theirs)
    # The code's version changes when somebody commits while the tests run.
    assert {**a, "versions": None} == {**b, "versions": None}
    for kind, names in (("train", TRAIN), ("validation", VALIDATION)):
        histories = [
            [(r["step"], r.get("rungs"), *(r[n] for n in names)) for r in records(r, kind)] for r in (run, reference)
        ]
        assert histories[0] == histories[1]
    assert board(run) == board(reference)
    assert (run / "DONE").exists()


TRAIN = ("loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr", "aux", "gradient_norm", "lr", "bad_samples", "skipped_steps")
VALIDATION = ("loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr")


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, without what depends on the clock: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = [f"train/{n}" for n in TRAIN] + [f"validation/{n}" for n in VALIDATION]
    tags += [tag for tag in events.Tags()["scalars"] if re.match(r"\w+/q\d/", tag)]
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    return shown | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}


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
    {"run": "full", "full": [3, 4], "kill": "SIGTERM", "at": 3},
    {"run": "full", "full": [7]},
    {"run": "full"},
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


def test_killed_at_many_points_and_resumed_on_one_process(outcomes: Outcomes) -> None:
    """SIGKILL in a step, in a validation, and in every phase of a save; then to the end."""
    statuses, said = outcomes.of("killed")
    assert statuses == [*[-signal.SIGKILL] * len(KILLS), 0], said
    run = outcomes.folder / "killed"
    assert_same_end(run, outcomes.folder / "reference")
    assert not list((run / "checkpoints").glob(".*"))
    assert [step for step, _ in board(run)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in board(run)["validation/loss"]] == [3, 6, 7]


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


RANGE = ["loss.quality=[1, 3]", "log.every=3", "data.workers=1"]
"""Checkpoints of steps 2 and 4 cut the intervals of the log, and a validation of step 3 has been done by step 4."""


def test_a_range_of_rates_killed_and_resumed_on_one_process(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    lives = [{"kill": "step", "at": 2, "written": 2}, {"kill": "SIGUSR1", "at": 4}, {"kill": "validation", "at": 7}, {}]
    orders = [{"run": "reference"}, *({"run": "killed", **life} for life in lives)]
    statuses, said = in_turn(tmp_path, config_path, [{**order, "settings": RANGE} for order in orders])
    assert statuses == [0, -signal.SIGKILL, 0, -signal.SIGKILL, 0], said
    assert "resumed from" in said[2] and "step 2 of 7" in said[2]
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert {f"train/q{q}/bpp" for q in (1, 2, 3)} <= board(tmp_path / "killed").keys()


@pytest.mark.slow
def test_a_range_of_rates_killed_and_resumed_on_two_processes(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {"settings": [s for s in RANGE if not s.startswith("data.workers")]}
    status, said = launch_two(tmp_path, config_path, {"run": "reference", **settings})
    assert status == 0, said
    for order in ({"kill": "step", "at": 2, "written": 2, "rank": 1}, {"kill": "SIGUSR1", "at": 4, "rank": 1}, {}):
        status, said = launch_two(tmp_path, config_path, {"run": "killed", **settings, **order})
        assert (status == 0) is (order.get("kill") != "step"), said
    assert_same_end(tmp_path / "killed", tmp_path / "reference")


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


def test_a_disk_that_is_full_for_a_while(outcomes: Outcomes) -> None:
    """Step 3, the best so far, step 4, where the run is stopped just then, and step 7, its end."""
    statuses, said = outcomes.of("full")
    assert statuses == [0, 2, 0], said
    assert f"step 3 could not be written to {outcomes.folder}/full: No space left on device; the run goes on" in said[0]
    assert said[0].count("step 4 could not be written") == 1 and "stopped at step 4" in said[0]
    assert said[0].count("checkpoints/step-00000004") == 1  # the second try
    (line,) = [line for line in said[1].splitlines() if line.startswith("error: ")]
    assert "step 7 could not be written" in line and line.endswith(
        "No space left on device; older checkpoints are intact"
    )
    assert_same_end(outcomes.folder / "full", outcomes.folder / "reference")


@pytest.mark.slow
def test_killed_at_random_and_resumed(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """Before any step, copy, sync, rename, deletion, image or log line; some of these lives get nowhere."""
    settings = ["log.every=2", "checkpoint.keep=1", "checkpoint.keep_every=4"]
    draw = random.Random(7)
    lives = [{"run": "killed", "kill": "event", "at": draw.randint(1, 40), "settings": settings} for _ in range(14)]
    orders = [{"run": "reference", "settings": settings}, *lives, {"run": "killed", "settings": settings}]
    statuses, said = in_turn(tmp_path, config_path, orders)
    assert statuses[0] == statuses[-1] == 0, said
    assert set(statuses[1:-1]) <= {0, -signal.SIGKILL} and statuses.count(-signal.SIGKILL) >= 3, statuses
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert sorted(checkpoint.steps_on_disk(tmp_path / "killed")) == sorted(
        checkpoint.steps_on_disk(tmp_path / "reference")
    )


@pytest.mark.slow
def test_killed_at_many_points_and_resumed_on_two_processes(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """As on one process; the rank that is killed takes the other one with it."""
    status, said = launch_two(tmp_path, config_path, {"run": "reference"})
    assert status == 0, said
    for rank, kill in zip((0, 1, 0, 0, 0, 0), KILLS.values(), strict=True):
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


def settings_of(size: int) -> list[str]:
    """Four micro-batches of one image, however they are shared out: the noise is the same too."""
    return [f"train.accumulation={4 // size}"]


def assert_close_rungs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """On a range of rates: the same rungs were drawn, and their means differ by rounding alone."""
    for a, b in zip(ours, theirs, strict=True):
        for rung, values in a.get("rungs", {}).items():
            expected = b["rungs"][rung]
            assert values.get("samples") == expected.get("samples")
            told = [{name: v for name, v in found.items() if v is not None} for found in (values, expected)]
            assert told[0] == pytest.approx(told[1], rel=1e-3)


def assert_elastic(sizes: list[int], folder: Path, config: Path, *more: str) -> None:
    """One run on changing numbers of processes, two steps on each, the rest on the last one.

    The same images in the same order as one process read without a break, and the same losses and weights but for
    rounding.
    """
    reference: dict[str, Any] = {"run": "reference", "record": True, "settings": [*settings_of(1), *more]}
    for i, size in enumerate(sizes):
        order: dict[str, Any] = {"run": "elastic", "record": True, "settings": [*settings_of(size), *more]}
        if i < len(sizes) - 1:
            order |= {"kill": "SIGUSR1", "at": 2 * i + 1, "rank": size - 1}
        if size > 1:
            status, said = launch(size, folder, config, order)
        else:
            (status, *others), (said, *_) = in_turn(folder, config, [order, *([reference] if i else [])])
            assert not any(others)
        assert status == 0, said
        if i:
            assert f"world_size {sizes[i - 1]} -> {size}" in said
        if i < len(sizes) - 1:
            assert f"stopped at step {2 * i + 2}" in said
    if sizes[-1] > 1:
        assert in_turn(folder, config, [reference])[0] == [0]
    runs = folder / "elastic", folder / "reference"
    ours, theirs = map(what_was_read, runs)
    assert ours == theirs
    # Four steps of the first stage, three of the second; each begins at position 0.
    places = [[position for position, _ in ours[step]] for step in range(7)]
    assert places == [list(range(4 * s, 4 * s + 4)) for s in (0, 1, 2, 3, 0, 1, 2)]
    for kind in ("train", "validation"):
        a, b = (records(run, kind) for run in runs)
        assert [r["step"] for r in a] == [r["step"] for r in b]
        assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-4)
        assert_close_rungs(a, b)
    for name in ("model.pt", "ema.pt"):
        a, b = (torch.load(checkpoint.find_checkpoint(run) / name, weights_only=True) for run in runs)
        for key in a:
            if a[key].numel():
                assert float((a[key].double() - b[key].double()).abs().mean()) < 1e-5, key


def test_two_processes_and_then_one(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_elastic([2, 1], tmp_path, config_path)


@pytest.mark.slow
def test_a_range_of_rates_on_two_processes_and_then_one(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_elastic([2, 1], tmp_path, config_path, "loss.quality=[1, 3]", "log.every=3")
    lines = records(tmp_path / "elastic")
    assert sum(values["samples"] for line in lines for values in line["rungs"].values()) == 7 * 4


@pytest.mark.slow
def test_one_process_and_then_two(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_elastic([1, 2], tmp_path, config_path)


@pytest.mark.slow
def test_two_processes_then_four_then_one(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_elastic([2, 4, 1], tmp_path, config_path)


@pytest.mark.slow
def test_more_ranks_than_images_to_validate_on(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without averaged weights; with them, four ranks are among those of the test above."""
    status, said = launch(4, tmp_path, config_path, {"run": "r", "settings": ["train.ema=null"]})
    assert status == 0, said


@pytest.mark.slow
def test_a_full_disk_is_the_same_to_both_ranks(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """They agree on when to save, whatever became of it on the first rank, and on the end."""
    status, said = launch_two(tmp_path, config_path, {"run": "r", "full": [3, 4, 7]})
    assert status != 0
    assert said.count("the run goes on") == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "step 7 could not be written" in line
    assert checkpoint.steps_on_disk(tmp_path / "r") == [6, 2]
    status, said = launch_two(tmp_path, config_path, {"run": "r"})
    assert status == 0 and checkpoint.find_checkpoint(tmp_path / "r").name == "step-00000007", said


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
    assert status != 0 and "different weights in 2 of" in said  # the quantile and its average
    assert checkpoint.steps_on_disk(tmp_path / "r") == []
