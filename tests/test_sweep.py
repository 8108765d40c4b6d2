"""`lalic sweep`: the rungs one after the other, killed, stopped, failing, and the table of their state.

Most of it is tried with a trainer that only counts (sweep_program.py); the last test trains.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sweep_program
from checkout_root import ROOT
from sweep_program import STEPS

from lalic.errors import LalicError
from lalic.ladder import MSE
from lalic.sweep import launcher
from lalic.sweep.cli import main
from lalic.sweep.plan import check_runs, parse_qualities, read_ladder

PROGRAM = Path(sweep_program.__file__)

CONFIG = """
model: {N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}
data: {shards: SHARDS, workers: 0}
loss: {metric: mse, quality: 3}
train: {batch_size: 4, cpu_threads: 1}
stages: [{steps: 4, lr: 1e-3, crop: 64}]
checkpoint: {every: 1}
log: {every: 1}
"""


TORCHRUN = """\
E1127 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 31)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
lalic.train FAILED
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 30)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-27_09:42:37
  rank      : 1 (local_rank: 1)
  exitcode  : {}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


class Sweeps:
    """A folder with a config, and `lalic sweep` called there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self._capsys = folder, capsys
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG)
        self.runs = folder / "runs"
        self.runs.mkdir()

    def arguments(self, *more: str) -> list[str]:
        return [str(self.config), "--runs", str(self.runs), "--launch", str(self.config), *more]

    def __call__(self, *more: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a sweep in this process."""
        status = main(self.arguments(*more))
        out, err = self._capsys.readouterr()
        return status, out, err

    def start(self, *more: str) -> subprocess.Popen[str]:
        """A sweep in a process of its own, whose output is in out.txt and err.txt."""
        with open(self.folder / "out.txt", "w") as out, open(self.folder / "err.txt", "w") as err:
            command = [sys.executable, str(PROGRAM), "sweep", *self.arguments(*more)]
            return subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment())

    def order(self, **orders: Any) -> None:
        (self.runs / "orders.json").write_text(json.dumps(orders))

    def started(self) -> list[str]:
        """The rungs in the order in which their trainings were started."""
        file = self.runs / "started.txt"
        return (
            [line.split()[0].removeprefix("tiny-") for line in file.read_text().splitlines()] if file.exists() else []
        )

    def run(self, quality: int) -> Path:
        return self.runs / f"tiny-q{quality}"

    def table(self) -> dict[int, dict[str, Any]]:
        """The whole ladder's, as it was written last."""
        rungs = json.loads((self.runs / "tiny.sweep.json").read_text())["rungs"]
        assert [rung["quality"] for rung in rungs] == [1, 2, 3, 4, 5, 6]
        return {rung["quality"]: rung for rung in rungs}

    def states(self, *qualities: int) -> list[str]:
        return [self.table()[quality]["state"] for quality in qualities]

    def said(self) -> str:
        return (self.folder / "out.txt").read_text() + (self.folder / "err.txt").read_text()


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def wait_for(condition: Callable[[], Any], sweeps: Sweeps) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, sweeps.said()
        time.sleep(0.02)


@pytest.fixture
def sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeps]:
    monkeypatch.setattr(launcher.Launcher, "command", sweep_program.counting_command)
    yield Sweeps(tmp_path, capsys)


class TestPlan:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(CONFIG)
        return path

    def test_the_whole_ladder(self, config: Path) -> None:
        ladder = read_ladder(config, ["train.precision=bf16"])
        assert {r.quality: r.config.loss.multiplier for r in ladder.rungs} == MSE
        assert [str(r.run) for r in ladder.rungs] == [f"runs/tiny-q{q}" for q in range(1, 7)]
        assert {r.config.train.precision for r in ladder.rungs} == {"bf16"}

    def test_other_folders(self, config: Path, tmp_path: Path) -> None:
        assert str(read_ladder(config, runs=tmp_path).rungs[2].run) == str(tmp_path / "tiny-q3")
        # As launch/train.slurm takes it.
        assert str(read_ladder(config, ["run.dir=elsewhere/big"]).rungs[2].run) == "elsewhere/big-q3"

    def test_ms_ssim(self, config: Path) -> None:
        settings = ["loss.metric=ms-ssim", "stages=[{steps: 4, lr: 1e-3, crop: 192}]"]
        assert [r.config.loss.multiplier for r in read_ladder(config, settings, qualities=[1, 6]).rungs] == [2.4, 60.5]

    def test_warm_start(self, config: Path) -> None:
        for warm_start, parents in (("highest", [5, 5]), ("previous", [5, 3])):
            settings = ["train.init_from=old.pth", "train.clip=2"]
            rungs = read_ladder(config, settings, qualities=[1, 3, 5], warm_start=warm_start).rungs
            assert [r.quality for r in rungs] == [5, 3, 1]
            assert rungs[0].parent is None and rungs[0].config.train.init_from == "old.pth"
            assert [r.parent.quality for r in rungs[1:]] == parents
            assert [r.config.train.init_from for r in rungs[1:]] == [f"runs/tiny-q{q}" for q in parents]
            assert {r.config.train.clip for r in rungs} == {2}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["loss.quality=2"], "choose with --qualities"),
            (["loss.lambda=0.1"], "choose with --qualities"),
            (["trian.clip=1"], "unknown key"),
            (["run.dir=/"], "no name for run folders"),
            (["train.batch_size=0"], "at least 1"),
        ],
    )
    def test_settings_that_cannot_be(self, config: Path, settings: list[str], message: str) -> None:
        with pytest.raises(LalicError, match=message):
            read_ladder(config, settings)

    @pytest.mark.parametrize("text", ["quality: [1, 6]", "quality:\n  - 1\n  - 6"])
    def test_a_config_of_a_range_of_rates(self, text: str, config: Path, tmp_path: Path) -> None:
        several = tmp_path / "several.yaml"
        several.write_text(re.sub(r"^loss:.*$", f"loss:\n  {text}", config.read_text(), flags=re.MULTILINE))
        with pytest.raises(LalicError, match=r"several\.yaml: loss\.quality \[1, 6\] is one run for a range"):
            read_ladder(several)
        with pytest.raises(LalicError, match="choose with --qualities"):
            read_ladder(config, ["loss.quality=[1, 6]"])

    def test_runs_and_run_dir(self, config: Path) -> None:
        with pytest.raises(LalicError, match="exclude each other"):
            read_ladder(config, ["run.dir=a/b"], runs=Path("c"))

    def test_qualities(self) -> None:
        assert parse_qualities("1-6") == [1, 2, 3, 4, 5, 6]
        assert parse_qualities("5,1-2,2") == [1, 2, 5]
        for text in ("0", "7", "3-1", "", "1-", "a", "1;2", "-1"):
            with pytest.raises(LalicError, match="1-6 or 1,3,5"):
                parse_qualities(text)


class TestLauncher:
    @pytest.mark.parametrize(("gpus", "name", "more"), [(0, "cpu1", ()), (1, "gpu1", ()), (4, "multi_gpu", ("4",))])
    def test_is_chosen_by_the_machine(
        self, gpus: int, name: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, root: Path
    ) -> None:
        monkeypatch.chdir(root)
        monkeypatch.setattr(launcher, "_count_gpus", lambda: gpus)
        ladder = read_ladder(root / "configs" / "lalic.yaml")
        chosen = launcher.choose_launcher(ladder.rungs[0].config.train, None, ["--debug"])
        assert chosen.config_file == Path("launch/accelerate") / f"{name}.yaml" and chosen.config_file.is_file()
        assert chosen.arguments == (*(("--num_processes", *more) if more else ()), "--debug")
        command = chosen.command(ladder.config, ladder.rungs[2])
        assert command[-2:] == ["loss.quality=3", "run.dir=runs/lalic-q3"]

    def test_gpus_that_do_not_divide_the_batch(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        monkeypatch.setattr(launcher, "_count_gpus", lambda: 3)
        train = read_ladder(root / "configs" / "lalic.yaml").rungs[0].config.train
        with pytest.raises(LalicError, match="not a multiple of 3"):
            launcher.choose_launcher(train, None, [])
        assert launcher.choose_launcher(train, None, ["--num_processes", "2"]).arguments == ("--num_processes", "2")

    def test_that_is_not_there(self, root: Path, tmp_path: Path) -> None:
        train = read_ladder(root / "configs" / "lalic.yaml").rungs[0].config.train
        with pytest.raises(LalicError, match="no such file"):
            launcher.choose_launcher(train, tmp_path / "no.yaml", [])

    @pytest.mark.parametrize(
        ("written", "reason"),
        [
            ("loading\nerror: no such shards\nsubprocess.CalledProcessError: Command\n", "no such shards"),
            ("Traceback\nRuntimeError: first\n[rank1]: RuntimeError: second\n", "RuntimeError: first"),
            ("[rank1]: torch.OutOfMemoryError: CUDA\nsome.ChildFailedError: \n", "torch.OutOfMemoryError: CUDA"),
            (
                "[rank0]: RuntimeError: reset by peer\n" + TORCHRUN.format("-9 (pid: 31)  (SIGKILL)"),
                "rank 1 was ended by SIGKILL",
            ),
            ("[rank0]: ValueError: mine\n" + TORCHRUN.format("1 (pid: 31) "), "ValueError: mine"),
            ("step 1\n", r"status 3 and without an error message"),
        ],
    )
    def test_reason_of_a_failure(self, written: str, reason: str, tmp_path: Path) -> None:
        log = tmp_path / launcher.LOG
        log.parent.mkdir()
        log.write_text("error: of an earlier start\n")
        program = f"import sys; sys.stderr.write({written!r}); sys.exit(3)"
        training = launcher.Training([sys.executable, "-c", program], tmp_path)
        assert training.wait(60) == 3
        assert training.news() == written
        assert re.search(reason, training.reason())


class TestClimb:
    def test_every_rung_once(self, sweeps: Sweeps) -> None:
        status, out, err = sweeps("--qualities", "1-3", "train.clip=2")
        assert (status, err) == (0, "")
        assert sweeps.started() == ["q1", "q2", "q3"]
        assert "train.clip=2" in (sweeps.runs / "started.txt").read_text()
        assert all((sweeps.run(q) / "DONE").exists() for q in (1, 2, 3))
        assert f"lalic export --sweep {sweeps.runs / 'tiny'}" in out
        assert sweeps.states(1, 2, 3, 4) == ["finished"] * 3 + ["waiting"]
        assert (sweeps.table()[2]["step"], sweeps.table()[2]["total_steps"]) == (STEPS, STEPS)
        assert len(out.rpartition("checkpoint\n")[2].split("\n\n")[0].splitlines()) == 3
        assert f"step {STEPS}\n" in (sweeps.run(1) / "logs" / "sweep.log").read_text()

    def test_finished_rungs_are_left_alone(self, sweeps: Sweeps) -> None:
        sweeps("--qualities", "1,2")
        before = {p: p.stat().st_mtime_ns for q in (1, 2) for p in sweeps.run(q).rglob("*")}
        status, out, _ = sweeps("--qualities", "1-3")
        assert status == 0 and "q1: " in out and out.count("lambda  state") == 1
        assert sweeps.started() == ["q1", "q2", "q3"]
        assert before == {p: p.stat().st_mtime_ns for p in before}

    def test_a_failing_rung_keeps_none_of_the_others(self, sweeps: Sweeps) -> None:
        sweeps.order(q2={"fail": "error: disk on fire", "at": 2})
        status, out, err = sweeps("--qualities", "1-3")
        assert status == 1 and sweeps.started() == ["q1", "q2", "q3"]
        assert err == f"error: q2 failed at step 2: disk on fire (log: {sweeps.run(2)}/logs/sweep.log)\n"
        assert "not finished: q2" in out
        assert sweeps.states(1, 2, 3) == ["finished", "failed", "finished"]
        # Another process that asks later is told why, too.
        _, out, _ = sweeps("--qualities", "1-3", "--status")
        assert (
            "q2 failed: disk on fire" in out
            and "q2 failed: disk on fire" in (sweeps.runs / "tiny.sweep.md").read_text()
        )
        sweeps.order()
        status, out, err = sweeps("--qualities", "1-3")
        assert (status, err) == (0, "") and sweeps.started()[3:] == ["q2"]
        assert "failed" not in sweeps("--qualities", "1-3", "--status")[1]
        assert sweeps.table()[2]["error"] is None

    def test_parts_of_a_ladder_share_the_table(self, sweeps: Sweeps) -> None:
        sweeps.order(q2={"fail": "error: disk on fire", "at": 2})
        sweeps("--qualities", "1-2")
        sweeps("--qualities", "4")
        assert sweeps.states(1, 2, 3, 4) == ["finished", "failed", "waiting", "finished"]
        assert sweeps.table()[2]["error"] == "disk on fire"

    def test_a_trainer_that_was_killed(self, sweeps: Sweeps) -> None:
        sweeps.order(q1={"die": True, "at": 1})
        status, _, err = sweeps("--qualities", "1,2")
        assert status == 1 and sweeps.started() == ["q1", "q2"]
        assert "q1 failed at step 1: ended with status -9" in err

    def test_an_error_that_all_share_ends_it(self, sweeps: Sweeps) -> None:
        """The folder's name in it does not make it another one; the same error after some steps may be chance."""
        sweeps.order(**{f"q{q}": {"fail": f"error: {sweeps.run(q)}: no shards"} for q in range(1, 5)})
        status, out, err = sweeps("--qualities", "1-4")
        assert status == 1 and sweeps.started() == ["q1", "q2"]
        assert err.count("error: q") == 2
        assert "would end with the same error" in out and "not finished: q1, q2, q3, q4" in out
        sweeps.order(**{f"q{q}": {"fail": "error: out of memory", "at": 2} for q in range(1, 4)})
        sweeps("--qualities", "1-3")
        assert sweeps.started()[2:] == ["q1", "q2", "q3"]

    def test_warm_start_waits_for_its_weights(self, sweeps: Sweeps) -> None:
        sweeps.order(q3={"fail": "error: broken", "at": 1})
        status, out, _ = sweeps("--qualities", "1-3", "--warm-start", "highest")
        assert status == 1 and sweeps.started() == ["q3"]
        assert "q2 begins with the weights of q3, which is not finished" in out
        sweeps.order()
        assert sweeps("--qualities", "1-3", "--warm-start", "highest")[0] == 0
        assert sweeps.started() == ["q3", "q3", "q2", "q1"]
        lines = (sweeps.runs / "started.txt").read_text().splitlines()
        assert [f"train.init_from={sweeps.run(3)}" in line for line in lines] == [False, False, True, True]

    def test_a_config_of_other_runs_is_refused_before_anything(self, sweeps: Sweeps) -> None:
        for quality in (1, 2):
            sweep_program.save(sweeps.run(quality), 2)
            text = CONFIG.replace("quality: 3", f"quality: {quality}")
            (sweeps.run(quality) / "checkpoints" / "step-00000002" / "config.yaml").write_text(text)
        check_runs(read_ladder(sweeps.config, runs=sweeps.runs))
        with pytest.raises(LalicError, match=r"tiny-q1 holds another run.*train\.clip.*--runs"):
            sweeps("train.clip=3")
        assert sweeps.started() == []

    def test_more_steps_for_runs_that_were_finished(self, sweeps: Sweeps) -> None:
        sweeps("--qualities", "1")
        newest = sweeps.run(1) / "checkpoints" / f"step-{STEPS:08d}" / "config.yaml"
        newest.write_text(CONFIG.replace("quality: 3", "quality: 1"))
        assert read_ladder(sweeps.config, runs=sweeps.runs).rungs[0].finished
        assert not read_ladder(sweeps.config, ["stages.0.steps=9"], runs=sweeps.runs).rungs[0].finished

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
    def test_asked_to_stop(self, name: str, sweeps: Sweeps) -> None:
        """The trainer saves and leaves, the sweep ends well and says how to go on; then it goes on."""
        sweeps.order(q2={"hold": True})
        process = sweeps.start("--qualities", "1-3")
        wait_for(lambda: (sweeps.run(2) / "checkpoints").exists(), sweeps)
        process.send_signal(getattr(signal, name))
        assert process.wait(300) == 0, sweeps.said()
        assert sweeps.started() == ["q1", "q2"]
        assert "stopped at step" in sweeps.said() and f"stopped ({name}); not finished: q2, q3" in sweeps.said()
        assert not (sweeps.run(2) / "STOP").exists()
        assert sweeps.states(1, 2, 3) == ["finished", "stopped", "waiting"]
        sweeps.order()
        assert sweeps("--qualities", "1-3")[0] == 0
        assert sweeps.started() == ["q1", "q2", "q2", "q3"]

    def test_a_second_ctrl_c_ends_it_at_once(self, sweeps: Sweeps) -> None:
        sweeps.order(q1={"hold": True, "deaf": True})
        process = sweeps.start("--qualities", "1,2")
        wait_for(lambda: (sweeps.run(1) / "checkpoints").exists(), sweeps)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "Ctrl-C again" in sweeps.said(), sweeps)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
        assert sweeps.started() == ["q1"] and sweeps.table()[1]["state"] == "stopped"
        # The trainer is gone: its folder can be had.
        assert not launcher_holds(sweeps.run(1))

    def test_of_one_run_asked_to_stop_by_its_file(self, sweeps: Sweeps) -> None:
        sweeps.order(q1={"hold": True})
        process = sweeps.start("--qualities", "1,2")
        wait_for(lambda: (sweeps.run(1) / "checkpoints").exists(), sweeps)
        (sweeps.run(1) / "STOP").touch()
        assert process.wait(300) == 0, sweeps.said()
        assert sweeps.started() == ["q1", "q2"] and "not finished: q1" in sweeps.said()

    def test_killed_without_warning(self, sweeps: Sweeps) -> None:
        """The training outlives its sweep; the next sweep waits for it instead of starting a second one."""
        sweeps.order(q1={"hold": True})
        process = sweeps.start("--qualities", "1,2")
        wait_for(lambda: (sweeps.run(1) / "checkpoints").exists(), sweeps)
        process.kill()
        process.wait(60)
        process = sweeps.start("--qualities", "1,2")
        wait_for(lambda: "another process trains" in sweeps.said(), sweeps)
        _, out, _ = sweeps("--qualities", "1,2", "--status")
        assert "running" in out
        (sweeps.run(1) / "GO").touch()
        assert process.wait(300) == 0, sweeps.said()
        assert sweeps.started() == ["q1", "q2"]
        assert sweeps.said().count("lambda  state") == 2


def launcher_holds(run: Path) -> bool:
    from lalic.training.run_folder import is_held

    return is_held(run)
