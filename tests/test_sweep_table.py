"""The table of a ladder: from whole, damaged and missing run folders, for people and for programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sweep_program

from lalic.status import RunStatus
from lalic.sweep import table
from lalic.sweep.cli import main
from lalic.sweep.plan import Ladder, read_ladder

CONFIG = """
loss: {quality: 3}
stages: [{steps: 4, lr: 1e-3, crop: 64}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def ladder(config: Path, tmp_path: Path) -> Ladder:
    return read_ladder(config, runs=tmp_path / "runs")


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The printed table by quality, without its head."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line for line in lines[1:] if line}


def test_of_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asking makes no folder."""
    assert main([str(config), "--runs", str(tmp_path / "runs"), "--status"]) == 0
    lines = lines_of(capsys)
    assert [line[1:3] for line in lines.values()] == [
        [value, "waiting"] for value in ("0.0018", "0.0035", "0.0067", "0.013", "0.025", "0.0483")
    ]
    assert not (tmp_path / "runs").exists()


def test_of_damaged_folders(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    whole, cut, damaged, file, strange = (runs / f"tiny-q{q}" for q in range(1, 6))
    for run in (whole, cut, damaged):
        sweep_program.event(run, "started", 0, total_steps=sweep_program.STEPS)
        for step in (1, 2):
            sweep_program.save(run, step)
            sweep_program.log(run, step)
    (whole / "DONE").write_text("{}")
    # Half a line, as a kill leaves it, and a newer checkpoint without its manifest.
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 3, "lo')
    (cut / "checkpoints" / "step-00000003").mkdir()
    for path in damaged.rglob("*"):
        if path.is_file():
            path.write_bytes(os.urandom(64))
    file.write_text("not a folder")
    (strange / "checkpoints" / "step-00000007").mkdir(parents=True)
    (strange / "checkpoints" / "step-00000007" / "MANIFEST.json").write_text('{"files": {"meta.json": 3}}')
    (strange / "log.jsonl").write_text('[1]\n{"kind": "train"}\n{"kind": "train", "step": "x", "loss": NaN}\nnull\n')
    (runs / "tiny.sweep.json").write_text('{"rungs": [{"quality": "x"}, 3]}')

    assert main([str(config), "--runs", str(runs), "--status"]) == 0
    lines = lines_of(capsys)
    assert len(lines) == 6
    assert lines["1"][2:7] == ["finished", "2/4", "0.5000", "0.500", "20.00"]
    assert lines["2"][2:5] == ["stopped", "2/4", "0.5000"] and "2" in lines["2"]
    assert lines["6"][2] == "waiting"
    for name in ("tiny.sweep.json", "tiny.sweep.md"):
        assert (runs / name).is_file()
    rungs = json.loads((runs / "tiny.sweep.json").read_text(), parse_constant=pytest.fail)["rungs"]
    assert [rung["quality"] for rung in rungs] == [1, 2, 3, 4, 5, 6]
    assert rungs[0]["run"] == str(whole) and rungs[1]["last_checkpoint"] == 2
    assert (runs / "tiny.sweep.md").read_text().count("\n| ") == 8


def status(run: Path, state: Any, step: int = 0, total: int | None = None, **more: Any) -> RunStatus:
    return RunStatus(str(run), state, step=step, total_steps=total, **more)


def statuses(ladder: Ladder) -> dict[Path, RunStatus]:
    runs = [rung.run for rung in ladder.by_quality]
    validation = {"step": 1000, "bpp": 0.1234, "psnr": 30.126, "ms_ssim": 0.97, "loss": 1.5}
    seen = {"stage": 1, "loss": 1.23456, "bpp": 0.25, "psnr": 28.5, "validation": validation}
    best = {"step": 1000, "loss": 1.5}
    speed = {"images_per_second": 61.25, "eta_seconds": 18_700.0, "skipped_steps": 3, "rollbacks": 1}
    found = [
        status(runs[0], "finished", 2000, 2000, **seen, best=best, last_checkpoint=2000),
        status(runs[1], "running", 120, 2000, **speed, last_checkpoint=100),
        status(runs[2], "stopped", 50, None, loss=float("nan")),
        status(runs[3], "failed", 7, 2000, detail="no gradient"),
        status(runs[4], "new"),
        status(runs[5], "new"),
    ]
    return {Path(s.run): s for s in found}


TEXT = """\
q  lambda  state          step    loss    bpp   PSNR  val bpp  val PSNR           best  img/s         eta  checkpoint
1  0.0018  finished  2000/2000  1.2346  0.250  28.50    0.123     30.13  1.5000 @ 1000      -           -  2000 (2 min ago)
2  0.0035  running    120/2000       -      -      -        -         -              -   61.2  5 h 11 min  100 (2 min ago)
3  0.0067  stopped        50/?       -      -      -        -         -              -      -           -  -
4   0.013  failed       7/2000       -      -      -        -         -              -      -           -  -
5   0.025  failed            -       -      -      -        -         -              -      -           -  -
6  0.0483  waiting           -       -      -      -        -         -              -      -           -  -
q2: 3 steps skipped, 1 rollback
q4 failed: no gradient
q5 failed: no space
"""  # noqa: E501


def test_text(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = statuses(ladder)
    monkeypatch.setattr(table, "read_status", known.__getitem__)
    for step, run in ((2000, 0), (100, 1)):
        manifest = ladder.by_quality[run].run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        os.utime(manifest, (1000, 1000))
    rows = table.read_rows(ladder, {5: "no space"})
    assert table.text(ladder, rows, 1000 + 130) + "\n" == TEXT


def test_ms_ssim_has_a_column(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["loss.metric=ms-ssim", "stages.0.crop=192"]
    ladder = read_ladder(config, settings, runs=tmp_path / "runs")
    monkeypatch.setattr(table, "read_status", statuses(ladder).__getitem__)
    lines = table.text(ladder, table.read_rows(ladder), 0).splitlines()
    assert "val MS-SSIM" in lines[0] and "0.9700" in lines[1]


def test_a_reason_holds_until_the_run_moves(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {rung.run: status(rung.run, "stopped", 5, 10) for rung in ladder.rungs}
    monkeypatch.setattr(table, "read_status", lambda run: known[run])
    table.write_rows(ladder, table.read_rows(ladder, {1: "no space", 2: None}))
    assert [row.error for row in table.read_rows(ladder)][:2] == ["no space", None]
    first = ladder.rungs[0].run
    for state, step in (("running", 5), ("finished", 5), ("stopped", 6)):
        known[first] = status(first, state, step, 10)
        assert (row := table.read_rows(ladder)[0]).error is None and row.state == state


def test_a_folder_that_cannot_be_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table, "write_rows", full)
    (tmp_path / "runs").mkdir()
    assert main([str(config), "--runs", str(tmp_path / "runs"), "--status"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7 and "No space left" in err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3.0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_spans(seconds: float, shown: str) -> None:
    assert table._span(seconds) == shown
