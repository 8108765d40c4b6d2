"""The cost of the recipe on a cluster: the arithmetic by hand, what counts as measured, and the committed figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout_root import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.cluster_cost import (
    Assumptions,
    StepTime,
    cost,
    curve_table,
    fast_cost,
    main,
    measured_in,
    recipe,
    table,
)
from lalic.errors import LalicError

STAGES = [
    {"crop": 256, "lr": 1e-4, "epochs": 2, "images": 2000},
    {"crop": 512, "lr": 1e-5, "epochs": 1, "images": 1000},
]


def test_by_hand() -> None:
    """100 ms for 10 images: 200 steps of 0.1 s and 100 of 0.4 s; on 5 GPUs a fifth, at half the speed."""
    time = StepTime(0.1, 10, "assumed", "")
    assumed = Assumptions(images=1000, price=2.0, crop_512=4.0, overhead=0.0)
    alone = cost(STAGES, time, 1, 1.0, assumed)
    assert (alone["global_batch"], alone["steps"]) == (10, 300)
    assert alone["one"]["hours"] == pytest.approx(60 / 3600)
    assert alone["one"]["dollars"] == pytest.approx(2 * 60 / 3600)
    five = cost(STAGES, time, 5, 0.5, assumed)
    assert (five["global_batch"], five["steps"]) == (50, 60)
    assert five["one"]["hours"] == pytest.approx(24 / 3600)
    assert five["one"]["gpu_hours"] == pytest.approx(120 / 3600)
    assert five["six"]["gpu_hours"] == pytest.approx(720 / 3600)
    assert cost(STAGES, time, 1, 1.0, Assumptions(1000, 2.0, 4.0, 0.5))["one"]["hours"] == pytest.approx(120 / 3600)


def test_a_last_batch_that_is_not_full_is_a_step() -> None:
    time = StepTime(1.0, 300, "assumed", "")
    row = cost(STAGES, time, 1, 1.0, Assumptions(1000, 1.0, 4.0, 0.0))
    assert row["steps"] == 7 + 4
    assert row["one"]["hours"] == pytest.approx((7 + 4 * 4) / 3600)


def test_the_published_recipe() -> None:
    stages = recipe(ROOT / "configs" / "lalic.yaml", 400_000)
    assert [(s["crop"], s["epochs"]) for s in stages] == [(256, 40), (256, 4), (512, 4)]
    row = cost(stages, StepTime(0.33, 8, "measured", ""), 1, 1.0, Assumptions(overhead=0.0))
    assert row["steps"] == 2_400_000
    assert row["one"]["hours"] == pytest.approx(0.33 * (2_200_000 + 4 * 200_000) / 3600)


class TestWholeCurve:
    def test_by_hand(self) -> None:
        """Ten images at once, 40 to a batch: four passes of 0.1 s; Muon adds 0.5 of the 0.08 s that 8 images take."""
        time = StepTime(0.1, 10, "assumed", "")
        assumed = Assumptions(1000, 2.0, 4.0, 0.0, muon=0.5)
        alone = fast_cost(STAGES, 40, time, 1, 1.0, assumed)
        assert (alone["global_batch"], alone["steps"]) == (40, 50 + 25)
        assert alone["hours"] == pytest.approx((50 * (4 * 0.1 + 0.04) + 25 * (4 * 0.4 + 0.04)) / 3600)
        assert alone["dollars"] == pytest.approx(2 * alone["gpu_hours"])

    def test_more_gpus_than_the_batch_fills(self) -> None:
        time = StepTime(0.1, 10, "assumed", "")
        row = fast_cost(STAGES, 40, time, 10, 0.5, Assumptions(1000, 2.0, 4.0, 0.0, muon=0.0))
        assert (row["global_batch"], row["steps"]) == (100, 20 + 10)
        assert row["gpu_hours"] == pytest.approx(10 * (20 * 0.1 + 10 * 0.4) / 0.5 / 3600)

    def test_the_fast_recipe_is_a_tenth_of_six_published_ones(self) -> None:
        assumed = Assumptions(overhead=0.0, muon=0.0)
        time = StepTime(0.33, 8, "measured", "")
        published, fast = (recipe(ROOT / "configs" / f"{name}.yaml", 400_000) for name in ("lalic", "lalic-fast"))
        six = cost(published, time, 1, 1.0, assumed)["six"]["gpu_hours"]
        assert fast_cost(fast, 32, time, 1, 1.0, assumed)["gpu_hours"] == pytest.approx(six / 10, rel=1e-3)


def test_a_recipe_in_steps_is_refused() -> None:
    with pytest.raises(LalicError, match="given in steps"):
        recipe(ROOT / "configs" / "demo.yaml", 1000)


class TestMeasured:
    RESULT: dict[str, Any] = {  # noqa: RUF012 -- never changed
        "settings": {"model": "full", "crop": 256},
        "environment": {"device": "NVIDIA H100"},
        "batches": {
            "8": {
                "published": {"images_per_second": 99.0},
                "bf16": {"images_per_second": 16.0},
                "fp32": {"images_per_second": 8.0},
            },
            "32": {"bf16": {"error": "out of memory"}},
        },
    }

    def test_the_fastest_of_ours(self) -> None:
        (time,) = measured_in(self.RESULT, "x.json")
        assert (time.seconds, time.batch, time.kind) == (0.5, 8, "measured")
        assert "H100" in time.source and "bf16" in time.source and "x.json" in time.source

    @pytest.mark.parametrize("change", [{"settings": {"model": "small", "crop": 256}}, {"batches": {}}])
    def test_what_does_not_count(self, change: dict[str, Any]) -> None:
        with pytest.raises(LalicError):
            measured_in({**self.RESULT, **change}, "x.json")

    def test_of_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "r.json").write_text(json.dumps(self.RESULT))
        main(["--measured", str(tmp_path / "r.json"), "--efficiency", "16=0.5"])
        out = capsys.readouterr().out
        assert "| 500 ms, measured | 16 | 128 |" in out and "assumed |" not in out.splitlines()[-1]
        (tmp_path / "r.json").write_text('{"settings": 3}')
        with pytest.raises(LalicError, match="no result of benchmarks/train_step"):
            main(["--measured", str(tmp_path / "r.json")])

    def test_a_given_time_is_assumed_unless_said_where_it_was_measured(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["--step-time", "0.2", "--efficiency", "8=1"])
        assert "| 200 ms, assumed | 8 | 64 |" in capsys.readouterr().out
        main(["--step-time", "0.2", "--measured-on", "8 A100", "--efficiency", "8=1"])
        assert "| 200 ms, measured | 8 | 64 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["--efficiency", "8"], ["--efficiency", "8=2"], ["--price", "-1"], ["--overhead", "1"], ["--images", "0.5"]],
)
def test_bad_arguments_end_in_one_line(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/cluster_cost.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr.splitlines()[-1]


def test_committed_figures_are_those_of_the_script(tmp_path: Path) -> None:
    committed = json.loads((ROOT / "benchmarks/results/cluster_cost.json").read_text())
    main(["--output", str(tmp_path / "now.json")])
    now = json.loads((tmp_path / "now.json").read_text())
    for result in (committed, now):
        del result["command"]
    assert committed == now
    assert table(committed) in (ROOT / "benchmarks" / "README.md").read_text()
    # The report has the rows of the clusters.
    report = (ROOT / "docs" / "training-report.md").read_text()
    rows = [line for line in table(committed).splitlines() if re.search(r"\| (8|64|256) \| [\d,]+ \| [\d,]+ \|", line)]
    assert len(rows) == 6 and all(row in report for row in rows)
    assert curve_table(committed) in (ROOT / "benchmarks" / "README.md").read_text()
    page = (ROOT / "docs" / "recipe.md").read_text()
    rows = [
        line for line in curve_table(committed).splitlines() if re.search(r"(measured|assumed) \| (1|8|64) \|", line)
    ]
    assert len(rows) == 6 and all(row in page for row in rows)
