"""The benchmarks of recipes: arithmetic on curves by hand, and whole ones in small that go on after a kill."""

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

from lalic.bdrate import bd_rate
from lalic.errors import LalicError

sys.path.insert(0, str(ROOT))

from benchmarks import optimizers, rates, short_runs, tables
from benchmarks.short_runs import Recipe, Setup

CONFIG = """
model: {N: 8, dims: [8, 12, 16, 32, 16, 16], depths: [0, 1, 0, 0], groups: [16, 16], context_rate: 1}
loss: {quality: 4}
train: {ema: 0.99}
stages: [{steps: 1, lr: 1e-3, crop: 64}]
"""


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """As BSDS500: five pictures in val, of which the last is held out, and one in train."""
    for folder, count in (("train", 1), ("val", 5)):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(photo_like(96, 112, seed=10 * len(folder) + i)).save(
                tmp_path / "photos" / folder / f"{i}.png"
            )
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "photos"


def words(photographs: Path, *more: str) -> list[str]:
    """A command line for tiny runs, kept in `work` beside the photographs."""
    folder = photographs.parent
    tiny = ["--work", str(folder / "work"), "--config", str(folder / "tiny.yaml"), "--output", str(folder / "o.json")]
    tiny += ["--crop", "64", "--batch", "1", "--val-crop", "64", "--warmup", "1", "--picture", str(folder / "o.png")]
    return [str(photographs), *tiny, *more]


def curve(losses: list[float], every: int = 100, seconds: float = 1.0, quality: int = 4) -> list[dict[str, Any]]:
    """Points whose steps take `seconds` each."""
    return [
        {
            "step": every * (i + 1),
            "seconds": every * (i + 1) * seconds,
            "training": loss,
            "skipped": 0,
            "heldout": {str(quality): {"loss": loss, "bpp": 0.5, "psnr": 30.0}},
        }
        for i, loss in enumerate(losses)
    ]


class TestReach:
    def test_by_hand(self) -> None:
        row = optimizers.reach(curve([9.0, 5.0, 3.0]), curve([6.0, 3.0, 2.0], seconds=2.0), 3.0, 4)
        assert (row["loss"], row["adam_end"], row["steps"], row["seconds"]) == (3.0, 3.0, 200, 400.0)
        assert row["of_steps"] == pytest.approx(2 / 3) and row["of_seconds"] == pytest.approx(4 / 3)

    def test_never(self) -> None:
        row = optimizers.reach(curve([9.0, 2.0]), curve([6.0, 2.1]), 2.0, 4)
        assert row["steps"] is None and row["of_seconds"] is None

    def test_the_goal_is_the_least_loss_of_any_run_of_the_seed(self) -> None:
        """A learning rate may go wrong late: what it had before counts."""
        runs = {1e-3: {1: curve([9.0, 4.0]), 2: curve([9.0, 5.0])}, 2e-3: {1: curve([3.0, 7.0])}}
        assert optimizers.goals_of(runs, 4) == {1: 3.0, 2: 5.0}

    def test_the_median_of_seeds_in_wall_clock_time(self) -> None:
        """Muon gets there after 2/4, 1/4 and never: the median is 2/4 of the steps, which take 1.5 times as long."""
        adam = curve([8.0, 6.0, 5.0, 4.0])
        muon = {1: curve([7.0, 4.0]), 2: curve([4.0, 3.0]), 3: curve([9.0, 5.0])}
        runs: optimizers.Runs = {
            "adam": {1e-3: {1: curve([8.0])}, 2e-3: dict.fromkeys((1, 2, 3), adam)},
            "muon": {6e-3: muon},  # type: ignore[dict-item]
        }
        speed = {"adam": {"ratio": 1.0}, "muon": {"ratio": 1.5}}
        found = optimizers.compare(runs, {"adam": 2e-3, "muon": 6e-3}, speed, 4)
        assert found["rates"] == {"adam": 2e-3, "muon": 6e-3}
        assert found["median"]["of_steps"] == pytest.approx(0.5)
        assert found["median"]["of_wall_clock"] == pytest.approx(0.75)
        assert found["seeds"]["3"]["of_wall_clock"] is None


def test_the_best_learning_rate_is_that_of_the_median_seed() -> None:
    runs = {
        1e-3: {1: curve([9.0, 3.0]), 2: curve([9.0, 3.1]), 3: curve([9.0, 9.0])},
        2e-3: {1: curve([9.0, 1.0]), 2: curve([9.0, 4.0]), 3: curve([9.0, float("nan")])},
    }
    assert optimizers.best_rate(runs, 4) == 1e-3


class TestStagedPlan:
    def trained(self, monkeypatch: pytest.MonkeyPatch, optimizer: str, *more: str) -> list[tuple[float, int, int]]:
        """(learning rate, seed, steps) in the order in which they are asked for; 4e-3 is best, then 2e-3."""
        asked: list[tuple[float, int, int]] = []

        def train(_setup: Setup, recipe: Recipe, steps: int, _enough: Any) -> list[dict[str, Any]]:
            asked.append((recipe.lr, recipe.seed, steps))
            return curve([abs(recipe.lr - 3.5e-3)], every=steps)

        monkeypatch.setattr(optimizers, "train", train)
        arguments = optimizers._parser().parse_args(["photos", "--work", "w", *more])
        best, runs = optimizers.run_all(Setup(Path(), Path()), arguments, optimizer)
        assert len(runs[best]) == len(arguments.seeds)
        return asked

    def test_halving_of_adams_rates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.trained(monkeypatch, "adam", "--staged")
        assert asked == [
            *((rate, 1, 500) for rate in (1e-3, 2e-3, 4e-3, 8e-3)),
            *((rate, 1, 3000) for rate in (4e-3, 2e-3)),
            *((4e-3, seed, 3000) for seed in (1, 2, 3)),
        ]

    def test_halving_of_muons_rates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.trained(monkeypatch, "muon", "--staged", "--seeds", "7", "8")
        assert asked == [
            *((rate, 7, 250) for rate in (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
            *((rate, 7, 500) for rate in (3e-3, 1.5e-3)),
            *((3e-3, seed, 1200) for seed in (7, 8)),
        ]

    def test_the_whole_grid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.trained(monkeypatch, "adam")
        assert len(asked) == 12 and {steps for _, _, steps in asked} == {3000}


def ladder(shift: float) -> rates.Ladder:
    """Four rungs whose rates are `shift` times those of ladder(1), at the same PSNR."""
    return {
        str(q): {"loss": 2.0 * shift, "bpp": shift * 0.1 * 2**i, "psnr": 28.0 + 2 * i}
        for i, q in enumerate(range(3, 7))
    }


class TestDifference:
    def test_bd_rate_is_that_of_the_package(self) -> None:
        one, singles = ladder(0.8), ladder(1.0)
        one["4"]["psnr"] += 0.3
        row = rates.difference(one, singles)
        bpp, psnr = ([[m[key] for m in side.values()] for side in (singles, one)] for key in ("bpp", "psnr"))
        assert row["bd_rate"] == bd_rate(bpp[0], psnr[0], bpp[1], psnr[1])
        assert row["loss"]["3"] == pytest.approx(-0.2)

    def test_a_fifth_fewer_bits(self) -> None:
        assert rates.difference(ladder(0.8), ladder(1.0))["bd_rate"] == pytest.approx(-20)

    def test_a_decibel_at_equal_rate(self) -> None:
        one = ladder(1.0)
        for row in one.values():
            row["psnr"] += 1
        assert rates.difference(one, ladder(1.0))["bd_psnr"] == pytest.approx(1)

    def test_a_model_that_is_above_all_single_ones(self) -> None:
        """Its lowest rung has more PSNR than the highest single one at a quarter less bits."""
        one = {q: {**row, "bpp": row["bpp"] * 6, "psnr": row["psnr"] + 7} for q, row in ladder(1.0).items()}
        found = rates.difference(one, ladder(1.0))
        assert found["bd_rate"] is None and found["bound"] == pytest.approx(-25)
        assert rates.saved(found) == "no shared quality; beyond -25.0 %"

    def test_curves_that_cannot_be_compared(self) -> None:
        one = ladder(1.0)
        one["6"]["psnr"] = 20.0
        row = rates.difference(one, ladder(1.0))
        assert row["bd_rate"] is None and row["bound"] is None and "must rise with its quality" in row["reason"]


def test_single_models_share_the_steps_or_have_them_each() -> None:
    def points(value: float, rungs: range) -> list[dict[str, Any]]:
        return [
            {**point, "heldout": {str(q): ladder(value + point["step"] / 1e4)[str(q)] for q in rungs}}
            for point in curve([1.0] * 8)
        ]

    singles = {str(q): points(1.0, range(q, q + 1)) for q in range(3, 7)}
    found = rates.compare(points(0.5, range(3, 7)), singles, [400, 800])
    assert [(r["steps"], r["steps_of_each"]) for r in found["shared"]] == [(400, 100), (800, 200)]
    assert [(r["steps"], r["steps_of_each"]) for r in found["apart"]] == [(400, 400), (800, 800)]
    assert found["apart"][1]["bd_rate"] == pytest.approx(100 * (0.58 / 1.08 - 1))
    # Where the end shares no quality with the single ones, the last point that does has fewer steps.
    far = points(0.5, range(3, 7))
    for row in far[-1]["heldout"].values():
        row["psnr"] += 9
    (last,) = rates.compare(far, singles, [800])["shared"]
    assert last["bd_rate"] is None and last["earlier"]["steps"] == 700
    assert last["earlier"]["bd_rate"] == pytest.approx(100 * (0.57 / 1.02 - 1))
    assert (last["earlier"]["low"], last["earlier"]["high"]) == (28.0, 34.0)
    # A single run that is not so far: no row.
    assert rates.compare(points(0.5, range(3, 7)), {**singles, "5": singles["5"][:3]}, [800])["apart"] == []


def test_stretches_answer_the_shared_question_first() -> None:
    order = rates.stretches(range(3, 7), 3000)
    assert order[:5] == [(3, 750), (4, 750), (5, 750), (6, 750), (None, 3000)]
    assert order[5:] == [(q, steps) for steps in (1500, 3000) for q in range(3, 7)]


@pytest.mark.parametrize(
    "program, more, message",
    [
        (rates, ["--quality", "3", "5"], "at least 4 rungs"),
        (rates, ["--steps", "3001"], "a multiple of 1000"),
        (rates, ["--crop", "0"], "--crop must be at least 1"),
        (optimizers, ["--stop"], "--stop goes with --staged"),
        (optimizers, ["--muon-steps", "0"], "--muon-steps and --rounds must be at least 1"),
    ],
)
def test_bad_arguments(program: Any, more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(LalicError, match=message):
        program.main([str(tmp_path), "--work", str(tmp_path / "work"), *more])


def test_too_few_photographs_to_hold_any_out(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        Image.fromarray(photo_like(96, 112)).save(tmp_path / folder / "0.png")
    with pytest.raises(LalicError, match="every fifth is held out"):
        rates.main([str(tmp_path), "--work", str(tmp_path / "work")])


def test_a_config_without_an_average_is_refused(photographs: Path) -> None:
    (photographs.parent / "tiny.yaml").write_text(CONFIG.replace("0.99", "null"))
    with pytest.raises(LalicError, match="averaged weights are what is measured"):
        rates.main(words(photographs, "--steps", "8", "--every", "1"))


class TestRuns:
    def setup_of(self, photographs: Path, every: int = 2) -> Setup:
        arguments = rates._parser().parse_args(words(photographs, "--every", str(every)))
        return short_runs.setup_of(arguments)

    @pytest.mark.parametrize("recipe", [Recipe("adam", 1e-3, 4, 1), Recipe("muon", 3e-3, (3, 6), 1)], ids=str)
    def test_goes_on_with_the_same_bits(self, photographs: Path, recipe: Recipe, tmp_path: Path) -> None:
        setup = self.setup_of(photographs)
        whole = short_runs.train(setup, recipe, 6)
        other = short_runs.prepare(photographs, Setup(**{**setup.__dict__, "work": tmp_path / "other"}))
        assert [p["step"] for p in short_runs.train(other, recipe, 3)] == [2, 3]
        parts = short_runs.train(other, recipe, 6)
        assert [p["step"] for p in parts] == [2, 3, 4, 6]
        assert parts[-1]["heldout"] == whole[-1]["heldout"]
        assert set(parts[-1]["heldout"]) == ({"4"} if recipe.optimizer == "adam" else {"3", "4", "5", "6"})
        states = [torch.load(s.work / f"{recipe.name}.pt", weights_only=True)["model"] for s in (setup, other)]
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
        # What is there is not trained again.
        before = (other.work / f"{recipe.name}.json").read_bytes()
        assert short_runs.train(other, recipe, 4) == parts[:3]
        assert (other.work / f"{recipe.name}.json").read_bytes() == before

    def test_ends_at_a_point_that_is_enough(self, photographs: Path) -> None:
        setup, recipe = self.setup_of(photographs), Recipe("adam", 1e-3, 4, 1)
        points = short_runs.train(setup, recipe, 8, lambda point: point["step"] >= 3)
        assert [p["step"] for p in points] == [2, 4]
        assert short_runs.train(setup, recipe, 8, lambda point: point["step"] == 2) == points
        assert [p["step"] for p in short_runs.train(setup, recipe, 6)] == [2, 4, 6]

    def test_held_out_photographs_are_not_trained_on(self, photographs: Path) -> None:
        setup = self.setup_of(photographs)
        assert [path.name for path in setup.heldout] == ["4.png"]
        listed = (setup.work / "training.txt").read_text().split()
        assert len(listed) == 5 and str(setup.heldout[0].resolve()) not in listed

    def test_of_another_setup_is_refused(self, photographs: Path) -> None:
        recipe = Recipe("adam", 1e-3, 4, 1)
        short_runs.train(self.setup_of(photographs), recipe, 2)
        with pytest.raises(LalicError, match="another every: take another --work"):
            short_runs.train(self.setup_of(photographs, every=3), recipe, 4)

    def test_steps_that_are_not_finite_are_counted(self, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        point = short_runs.train(self.setup_of(photographs), Recipe("adam", 1e30, 4, 1), 4)[-1]
        assert point["skipped"] > 0 and "steps left out" in short_runs.told(point)


def test_optimizers_in_small(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--staged", "--adam-rates", "1e-3", "2e-3", "--muon-rates", "3e-3", "--adam-steps", "12"]
    more += ["--muon-steps", "4", "--every", "2", "--seeds", "1", "2", "--rounds", "2", "--limit", "9"]
    ends = optimizers.main(words(photographs, *more))
    result = json.loads((photographs.parent / "o.json").read_text())
    assert ends == int(result["compared"]["median"]["of_wall_clock"] is None)
    assert {name: len(seeds) for name, seeds in result["runs"]["adam"].items()} in (
        {"0.001": 1, "0.002": 2},
        {"0.001": 2, "0.002": 1},
    )
    assert result["speed"]["adam"]["ratio"] == 1 and result["speed"]["muon"]["ms"] > 0
    # Adam keeps two numbers for each that it trains, Muon one for most.
    assert result["memory"]["muon"]["state_mib"] < result["memory"]["adam"]["state_mib"]
    assert (photographs.parent / "o.png").stat().st_size > 5000
    assert "median: of steps" in capsys.readouterr().out
    text = tables.optimizers(result)
    assert "**median**" in text and "| muon | 0.003 |" in text


def test_rates_in_small(photographs: Path) -> None:
    ends = rates.main(words(photographs, "--steps", "8", "--every", "1", "--limit", "1000"))
    result = json.loads((photographs.parent / "o.json").read_text())
    assert [(r["steps"], r["steps_of_each"]) for r in result["shared"] + result["apart"]] == [
        *((4, 1), (8, 2)),
        *((2, 2), (4, 4), (8, 8)),
    ]
    assert ends in (0, 1)
    assert set(result["runs"]["singles"]) == {"3", "4", "5", "6"}
    assert (photographs.parent / "o.png").stat().st_size > 5000
    text = tables.rates(result)
    assert "| the one model, 8 steps |" in text and "| single ones, 2 steps |" in text
