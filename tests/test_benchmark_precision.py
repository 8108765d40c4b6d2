"""The benchmark of bf16 against float32: what it makes of the runs' logs, and a whole one in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout_root import ROOT
from photo_like import photo_like
from PIL import Image

from lalic.model import LALIC

sys.path.insert(0, str(ROOT))

from benchmarks import precision, tables


def records(losses: list[float], validation: float) -> list[dict[str, Any]]:
    """A run's log with one line for every 10 steps, the last step validated."""
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 10 * (i + 1), "loss": loss, "skipped_steps_total": 0} for i, loss in enumerate(losses)
    ]
    last = 10 * len(losses)
    return [*lines, {"kind": "validation", "step": last, "loss": validation, "bpp": 0.5, "psnr": 25.0}]


def test_a_run_ends_with_the_mean_of_its_last_tenth() -> None:
    losses = [40.0 - i for i in range(20)]
    found = precision.read_run(records(losses, 3.0), steps=200, window=10)
    assert found["curve"] == losses
    assert found["training"] == pytest.approx((21 + 22) / 2)
    assert found["validation"] == {"loss": 3.0, "bpp": 0.5, "psnr": 25.0}


def test_a_resumed_run_counts_each_step_once() -> None:
    again = {"kind": "train", "step": 20, "loss": 8.0, "skipped_steps_total": 0}
    log = records([9.0, 7.0, 6.0], 3.0)
    assert precision.read_run([*log[:2], again, *log[2:]], steps=30, window=10)["curve"] == [9.0, 8.0, 6.0]
    with pytest.raises(SystemExit, match="lines of 2 steps instead of 3"):
        precision.read_run([log[0], *log[2:]], steps=30, window=10)


def runs_with(bf16: float, in_new: float = 0.5) -> precision.Runs:
    """float32 ends at 2 from new weights and at 1 from trained ones, bf16 by the given parts above."""

    def run(value: float) -> dict[str, Any]:
        return precision.read_run(records([value] * 10, 2 * value), steps=100, window=10)

    return {
        "new": {"fp32": run(2.0), "fp32, clip rounded": run(2.01), "bf16": run(2 * (1 + in_new))},
        "trained": {"fp32": run(1.0), "bf16": run(1 + bf16)},
    }


def test_differences_are_taken_within_a_comparison() -> None:
    rows = {(row["comparison"], row["run"]): row for row in precision.compare(runs_with(-0.02))}
    for what, factor in (("training", 1), ("validation", 2)):
        assert rows["trained", "bf16"]["from_fp32"][what] == pytest.approx(-0.02)
        assert rows["new", "bf16"]["from_fp32"][what] == pytest.approx(0.5)
        assert rows["new", "fp32, clip rounded"]["from_fp32"][what] == pytest.approx(0.005)
        assert rows["new", "fp32"][what] == 2 * factor and rows["new", "fp32"]["from_fp32"][what] == 0
    text = tables.precision(
        {"settings": SETTINGS, "environment": ENVIRONMENT, "command": "c", "rows": [*rows.values()]}
    )
    assert "seed 7" in text.splitlines()[0]
    assert "| trained | bf16 | 0.9800 (-2.00 %) | 1.9600 (-2.00 %) | 0.5000 | 25.00 |" in text


SETTINGS = {"steps": 100, "more_steps": 100, "batch": 4, "crop": 64, "seed": 7}
ENVIRONMENT = {"device": "cpu", "cpu": "X", "threads": 1, "torch": "2", "date": "2026-01-01"}


@pytest.mark.parametrize("bf16, problems", [(0.009, 0), (0.011, 2), (-0.011, 2), (float("nan"), 2)])
def test_the_limit_is_on_the_trained_weights(bf16: float, problems: int) -> None:
    assert len(precision.missed(precision.compare(runs_with(bf16)), 0.01)) == problems


def test_new_weights_alone_are_reported_without_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"new": runs_with(0.0)["new"]}
    assert precision.missed(precision.compare(runs), 0.01) == []
    with pytest.raises(SystemExit):
        precision.main(["photos", "--val", "photos", "--comparisons", "trained"])
    assert "--comparisons trained needs new" in capsys.readouterr().err


def test_mean_gradients_are_those_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (0, 1, 1, 1), "groups": (16, 16)}
    model = LALIC(**sizes)
    batches = [torch.from_numpy(photo_like(64, 64, seed=i)).movedim(2, 0)[None] for i in range(2)]
    loss, gradients = precision.mean_gradients(model, batches, bf16=False)
    rounded, in_bf16 = precision.mean_gradients(model, batches, bf16=True)
    assert list(gradients) == ["g_a", "g_s", "y", "hyper"] and 0 < abs(rounded / loss - 1) < 0.01
    # One step against the gradient of g_s lowers the loss by its squared length, to first order.
    start, rate = 0, 1e-7
    with torch.no_grad():
        for p in model.g_s.parameters():
            p -= rate * gradients["g_s"][start : start + p.numel()].view_as(p)
            start += p.numel()
    lower, _ = precision.mean_gradients(model, batches, bf16=False)
    assert (loss - lower) / rate == pytest.approx(float(gradients["g_s"].square().sum()), rel=0.1)
    for part, gradient in gradients.items():
        assert 0.8 < float(torch.cosine_similarity(gradient, in_bf16[part], dim=0)) < 1 - 1e-7, part


@pytest.mark.parametrize("flag", ["--steps", "--more-steps"])
def test_steps_that_do_not_fit_the_window(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precision.main(["photos", "--val", "photos", flag, "130", "--window", "10"])
    assert f"{flag} 130: a fifth of it must be a multiple of --window 10" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_benchmark_in_small_and_once_more(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(photo_like(256, 272, seed=i)).save(tmp_path / "photos" / f"{i}.png")
    output, picture, work = tmp_path / "precision.json", tmp_path / "precision.png", tmp_path / "work"
    arguments = [str(tmp_path / "photos"), "--val", str(tmp_path / "photos"), "--steps", "10", "--more-steps", "5"]
    arguments += ["--window", "1", "--batch", "1", "--limit", "0.5", "--work", str(work)]
    assert precision.main([*arguments, "--output", str(output), "--picture", str(picture)]) == 0
    result = json.loads(output.read_text())
    assert {name: list(found) for name, found in result["runs"].items()} == {
        "new": ["fp32", "fp32, clip rounded", "bf16"],
        "trained": ["fp32", "bf16", "fp32, start rounded"],
    }
    for comparison, found in result["runs"].items():
        # The same start, batch and noise, but for rounding, which is told by the first step, or by the next ones.
        first = {name: run["curve"][0] for name, run in found.items()}
        assert len(set(first.values())) == (2 if comparison == "new" else 3)
        assert max(first.values()) / min(first.values()) - 1 < 0.02
        assert len({tuple(run["curve"]) for run in found.values()}) == 3
    assert first["fp32"] < 0.7 * result["runs"]["new"]["fp32"]["curve"][0]  # trained weights, averaged
    assert [row["run"] for row in result["gradients"]] == ["bf16", "fp32, start rounded"]
    assert picture.stat().st_size > 5000
    # What is finished is not run again.
    logs = {log: log.read_bytes() for log in work.glob("*/log.jsonl")}
    assert len(logs) == 6
    again = tmp_path / "again.json"
    precision.main([*arguments, "--output", str(again)])
    assert {log: log.read_bytes() for log in logs} == logs
    assert json.loads(again.read_text())["rows"] == result["rows"]
