"""One training program under DDP, ZeRO-1 and ZeRO-2: the same losses, the same skipped steps, one state on disk."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROOT, launch
from lives import environment, in_turn
from test_resume import assert_identical, assert_same_end, launch_two
from test_train import config_path, records  # noqa: F401 -- a fixture

from lalic.training import checkpoint

BACKENDS = ("DDP", "ZeRO-1", "ZeRO-2")
STEPS, MIDDLE = 24, 20

Outcome = dict[str, dict[str, Any]]


def orders(folder: Path, elsewhere: Path | None) -> list[dict[str, Any]]:
    """For every backend: all steps at once; from its own middle; from another backend's; with broken steps."""
    wanted: list[dict[str, Any]] = []
    for backend in BACKENDS:
        mine = str(folder / f"{backend}-middle.pt")
        wanted.append({"name": backend, "backend": backend, "last": STEPS, "save_at": MIDDLE, "save_to": mine})
        back = {"back_to": mine, "back_step": MIDDLE} if backend != "DDP" else {}
        wanted.append(
            {"name": f"{backend} resumed", "backend": backend, "first": MIDDLE, "last": STEPS, "from": mine, **back}
        )
        # The first step is broken as well: there are no moments yet.
        wanted.append({"name": f"{backend} broken", "backend": backend, "last": 4, "broken": [0, 2]})
        wanted.append({"name": f"{backend} unclipped", "backend": backend, "last": 2, "train": {"clip": 0.0}})
        wanted.append({"name": f"{backend} of a range of rates", "backend": backend, "last": 6, "quality": [2, 4]})
    for backend, other in zip(BACKENDS, ("ZeRO-2", "DDP", "ZeRO-1"), strict=True):
        source = (elsewhere or folder) / f"{other}-middle.pt"
        name = f"{backend} after another"
        wanted.append({"name": name, "backend": backend, "first": MIDDLE, "last": STEPS, "from": str(source)})
    return wanted


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On two processes; states of the other backends on two."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(folder, 2, orders(folder, None))


@pytest.fixture(scope="session")
def four(two: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On four processes; what is resumed from another backend comes from two."""
    folder = tmp_path_factory.mktemp("four")
    return folder, launch(folder, 4, orders(folder, two[0]))


@pytest.fixture(scope="session")
def one(four: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """On one process; what is resumed from another backend comes from four."""
    folder = tmp_path_factory.mktemp("one")
    return folder, launch(folder, 1, orders(folder, four[0]))


@pytest.fixture(
    params=["two", pytest.param("four", marks=pytest.mark.slow), pytest.param("one", marks=pytest.mark.slow)]
)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return request.getfixturevalue(request.param)[1]


def column(values: list[dict[str, float]], name: str) -> list[float]:
    return [v[name] for v in values]


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Apart by what rounding makes of so few steps, with room for another machine's."""
    assert len(ours) == len(theirs) > 0
    for name, rel in (("loss", 2e-5), ("bpp", 2e-5), ("aux", 1e-6), ("gradient_norm", 1e-3)):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=rel), name


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("backend", ["ZeRO-1", "ZeRO-2"])
def test_deepspeed_gives_the_losses_of_ddp(outcome: Outcome, backend: str) -> None:
    ours, theirs = outcome[backend], outcome["DDP"]
    assert_close(ours["values"], theirs["values"])
    losses = column(theirs["values"], "loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # something was learnt
    for name, weights in ours["model"].items():
        if name.endswith("quantiles"):
            assert largest(weights, theirs["model"][name]) < 1e-5, name
            assert largest(weights, torch.zeros_like(weights)) > 1
        elif weights.is_floating_point() and weights.numel():
            difference = (weights.double() - theirs["model"][name].double()).abs().mean()
            assert float(difference) < 5e-6, name


@pytest.mark.parametrize("backend", ["ZeRO-1", "ZeRO-2"])
@pytest.mark.parametrize("clipped", [True, False])
def test_the_clip_is_that_of_ddp(outcome: Outcome, backend: str, clipped: bool) -> None:
    """Adam hardly shows it in the weights, so look at the moments, which hold the gradients that it got."""
    order = " broken" if clipped else " unclipped"
    ours, theirs = (outcome[b + order] for b in (backend, "DDP"))
    assert min(column(theirs["values"], "gradient_norm")) > 10  # far above the limit of 1
    squares = 0.0
    for number, state in theirs["optimizer"]["main"]["state"].items():
        mine = outcome[backend + order]["optimizer"]["main"]["state"][number]
        assert mine["exp_avg"].shape == state["exp_avg"].shape
        for moment in ("exp_avg", "exp_avg_sq"):
            assert largest(mine[moment], state[moment]) < 2e-2 * float(state[moment].abs().max()) + 1e-9
        squares += float(state["exp_avg"].double().square().sum())
    assert (squares**0.5 < 0.5) is clipped
    assert ours["optimizer"]["main"]["param_groups"] == theirs["optimizer"]["main"]["param_groups"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gains_are_trained_alike(outcome: Outcome, backend: str) -> None:
    """On a range of rates. In a step some rank sees no sample of a rung, whose gains all ranks change alike."""
    ours, theirs = (outcome[f"{b} of a range of rates"] for b in (backend, "DDP"))
    assert_close(ours["values"], theirs["values"])
    for name in ("rates.gain", "rates.inverse_gain"):
        learnt = ours["model"][name]
        assert largest(learnt, theirs["model"][name]) < 1e-5
        # They began the same for all channels of a rung.
        assert (learnt.amax(dim=1) - learnt.amin(dim=1)).min() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_broken_on_one_rank_is_applied_on_none(outcome: Outcome, backend: str) -> None:
    """Loss or gradient of the last rank: not a bit of weights, moments and step counts changes; and on it goes."""
    broken = outcome[f"{backend} broken"]
    assert set(broken["broken"]) == {f"{where} {step}" for where in ("loss", "gradient") for step in (0, 2)}
    for where in ("loss 2", "gradient 2"):
        before, after = broken["broken"][where]
        assert before == after, where
        assert len(set(after[:-1])) == 1, where  # all ranks alike
    # From before the first step on, there is no other way to the same bits than a step that left no trace.
    assert_identical(broken["values"], outcome[backend]["values"][:4], "values")
    steps = [float(s["step"]) for s in broken["optimizer"]["main"]["state"].values()]
    assert set(steps) == {4.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_with_the_same_bits(outcome: Outcome, backend: str) -> None:
    whole, resumed = outcome[backend], outcome[f"{backend} resumed"]
    assert_identical(resumed["values"], whole["values"][MIDDLE:], "values")
    for name in ("model", "optimizer"):
        assert_identical(resumed[name], whole[name], name)
    if backend != "DDP":
        assert_identical(resumed["again"], resumed["values"], "after a rollback")


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_from_another_backend(outcome: Outcome, backend: str) -> None:
    """DDP from ZeRO-2, ZeRO-1 from DDP, ZeRO-2 from ZeRO-1; on other numbers of processes in the slow ones."""
    assert_close(outcome[f"{backend} after another"]["values"], outcome["DDP"]["values"][MIDDLE:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_weights_of_the_checkerboard_stay_zero(outcome: Outcome, backend: str) -> None:
    weights = outcome[backend]["model"]
    masks = [name for name in weights if name.endswith("context_prediction.mask")]
    assert len(masks) == 4
    for name in masks:
        weight, mask = weights[name.replace(".mask", ".weight")], weights[name]
        assert float(weight[mask == 0].abs().max()) == 0
        assert float(weight[mask == 1].abs().min()) > 0


@pytest.mark.slow
def test_the_number_of_processes_changes_no_loss(
    one: tuple[Path, Outcome], two: tuple[Path, Outcome], four: tuple[Path, Outcome]
) -> None:
    for backend in BACKENDS:
        for _, outcome in (two, four):
            assert_close(outcome[backend]["values"], one[1]["DDP"]["values"])
            for name, weights in outcome[backend]["model"].items():
                if name.endswith("quantiles"):
                    assert largest(weights, one[1]["DDP"]["model"][name]) < 1e-5


@pytest.mark.slow
def test_a_run_under_deepspeed_is_killed_and_resumed(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """To the same end, bit for bit; and on one process under DDP, over the same batches."""
    yaml = "deepspeed_zero2"
    status, said = launch_two(tmp_path, config_path, {"run": "reference"}, yaml)
    assert status == 0, said
    status, said = launch_two(tmp_path, config_path, {"run": "killed", "rank": 1, "kill": "step", "at": 5}, yaml)
    assert status != 0 and "SIGKILL" in said, said
    shutil.copytree(tmp_path / "killed", tmp_path / "elsewhere")
    status, said = launch_two(tmp_path, config_path, {"run": "killed"}, yaml)
    assert status == 0, said
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path / "killed"))["backend"] == "ZeRO-2"
    statuses, texts = in_turn(tmp_path, config_path, [{"run": "elsewhere", "settings": ["train.accumulation=2"]}])
    assert statuses == [0], texts
    assert "world_size 2 -> 1, backend ZeRO-2 -> DDP" in texts[0]
    losses = [[(r["step"], r["loss"]) for r in records(tmp_path / run)] for run in ("elsewhere", "reference")]
    assert dict(losses[0]) == pytest.approx(dict(losses[1]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("yaml", ["multi_node", "deepspeed_zero2"])
def test_two_machines(config_path: Path, tmp_path: Path, yaml: str) -> None:  # noqa: F811
    """One launcher on each, both here, with what differs on the command line: one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml")]
    launcher += ["--num_machines", "2", "--num_processes", "2"]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    program = ["-m", "lalic.train", "--config", str(config_path), f"run.dir={tmp_path / 'run'}"]
    machines = [
        subprocess.Popen(
            [*launcher, "--machine_rank", str(rank), *program],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [machine.communicate(timeout=400)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.send_signal(signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "".join(said).count("finished after 7 steps") == 1
    assert checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path / "run"))["world_size"] == 2


@pytest.mark.slow
def test_settings_that_cannot_be_followed_end_the_run_in_one_line(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = ["train.clip=1.0"]
    bad = tmp_path / "zero3.json"
    bad.write_text('{"zero_optimization": {"stage": 3}}')
    yaml = tmp_path / "bad.yaml"
    text = (ROOT / "launch" / "accelerate" / "deepspeed_zero1.yaml").read_text()
    yaml.write_text(text.replace("launch/deepspeed/zero1.json", str(bad)))
    order = {"run": "r", "settings": settings}
    status, said = launch_two(tmp_path, config_path, order, str(yaml.with_suffix("")))
    assert status != 0 and not (tmp_path / "r").exists()
    assert said.count("error: ") == 1 and f"{bad}: zero_optimization.stage must be 1 or 2, not 3" in said
    assert "Traceback" not in said.split("error: ")[1].splitlines()[0]
