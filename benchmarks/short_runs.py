"""Short trainings on photographs, measured on others as they go: what `optimizers.py` and `rates.py` compare.

    BSDS500/train, BSDS500/val ─► shards ─► the project's loader, step and moving average ─► points of a curve
    every fifth of BSDS500/val ─────────────────────────────────────────────────────────────────┘

A run is trained in this process by `TrainStep` in float32 on one thread, with a learning rate that is constant after a
short warm-up, so that the point at 750 steps of a run of 3,000 is the end of one of 750. Its averaged weights are
measured on the held-out photographs. The clock is the processor time of the process (data and step; not the
measuring): what else the machine does hardly changes it.

`WORK/NAME.pt` holds a run's state at its last point, `WORK/NAME.json` its points for readers. A run that is asked for
again goes on from there, with the bits of one that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lalic.config import RunConfig, read_config  # noqa: E402 -- found from the checkout
from lalic.data.images import list_images  # noqa: E402
from lalic.errors import LalicError  # noqa: E402
from lalic.files import atomic_open, write_json, write_text  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """What one run differs in from another."""

    optimizer: str
    """"adam" or "muon"."""
    lr: float
    quality: int | tuple[int, int]
    """One rung of the ladder, or the first and the last of a range."""
    seed: int
    """Of the weights, the order, the crops and the noise."""

    @property
    def name(self) -> str:
        """Of the run's files."""
        q = self.quality
        rungs = f"q{q}" if isinstance(q, int) else f"q{q[0]}-{q[1]}"
        return f"{self.optimizer}-{self.lr:g}-{rungs}-seed{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all runs of a benchmark share."""

    work: Path
    config: Path
    batch: int = 8
    crop: int = 128
    warmup: int = 50
    """Steps in which the learning rate rises from nothing."""
    every: int = 125
    """Steps between points."""
    val_crop: int = 256
    """Side of the centre of each held-out photograph that is measured."""
    threads: int = 1
    heldout: tuple[Path, ...] = field(default=(), repr=False)

    def facts(self) -> dict[str, Any]:
        """For results, and to tell whether a run in `work` is of the same setup."""
        names = ("batch", "crop", "warmup", "every", "val_crop", "threads")
        return {
            **{name: getattr(self, name) for name in names},
            "config": self.config.name,
            "precision": "fp32",
            "heldout": len(self.heldout),
        }

    def run_config(self, recipe: Recipe) -> RunConfig:
        """The configuration of a run; its stages say nothing of its length."""
        q = recipe.quality
        settings = [
            f"run.seed={recipe.seed}",
            f"loss.quality={q if isinstance(q, int) else list(q)}",
            f"train.batch_size={self.batch}",
            f"train.cpu_threads={self.threads}",
            "train.precision=fp32",
            f"stages=[{{steps: 1, lr: {recipe.lr}, crop: {self.crop}}}]",
        ]
        if recipe.optimizer != "adam":
            settings.append(f"train.optimizer={recipe.optimizer}")
        config = read_config(self.config, settings)
        if config.train.ema is None:
            raise LalicError(f"{self.config}: train.ema is null, but the averaged weights are what is measured")
        return config


def prepare(bsds500: Path, setup: Setup) -> Setup:
    """Shards in `setup.work` of BSDS500's train and val without every fifth of val; the setup with those held out."""
    from lalic.data_prep import shard

    val = list_images(bsds500 / "val")
    heldout = val[4::5]
    if not heldout:
        raise LalicError(f"{bsds500 / 'val'} has {len(val)} images: every fifth is held out, so five are needed")
    training = [path for path in (*list_images(bsds500 / "train"), *val) if path not in set(heldout)]
    setup.work.mkdir(parents=True, exist_ok=True)
    write_text(setup.work / "training.txt", "".join(f"{path.resolve()}\n" for path in training))
    words = ["--input", str(setup.work / "training.txt"), "--output", str(setup.work / "shards"), "--workers", "1"]
    shard.main([*words, "--min-side", str(setup.crop)])
    return Setup(**{**setup.__dict__, "heldout": tuple(heldout)})


class Run:
    """One training in memory. `points` is its curve: a dict with "step", "seconds", "training" (the mean loss since the
    point before), "skipped" (steps that were not finite) and "heldout" ({quality: {"loss", "bpp", "psnr"}})."""

    def __init__(self, setup: Setup, recipe: Recipe):
        self.setup, self.recipe = setup, recipe
        self.points = read_points(setup, recipe)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.points[-1]["step"]) if self.points else 0

    def advance(self, steps: int, enough: Callable[[dict[str, Any]], bool]) -> None:
        """Train until `steps` are done or a point is enough. There is one every `setup.every`; each is written down."""
        stepper, index = self._build()
        from lalic.data.loader import build_loader

        loader = build_loader(
            index,
            crop=self.setup.crop,
            seed=self.recipe.seed,
            first_epoch=0,
            start_step=self.step,
            num_steps=steps - self.step,
            batch_size=self.setup.batch,
            workers=0,
            flip=True,
            rungs=self.setup.run_config(self.recipe).loss.rungs,
        )
        batches = iter(loader)
        while self.step < steps and not (self.points and enough(self.points[-1])):
            self.points.append(self._segment(stepper, batches, self._next_point(steps)))
            self._save(stepper)
            print(f"{self.recipe.name:28} {told(self.points[-1])}", flush=True)

    def _next_point(self, steps: int) -> int:
        """Points lie on multiples of `setup.every`, wherever a run was stopped."""
        return min(steps, (self.step // self.setup.every + 1) * self.setup.every)

    def _build(self) -> tuple[Any, Any]:
        """The step and the shards' index, as they were at the last point."""
        import torch

        from benchmarks.stepping import start
        from lalic.data.index import ShardIndex
        from lalic.training.distributed import seed_from
        from lalic.training.ema import SavedAverage
        from lalic.training.inputs import new_model
        from lalic.training.step import TrainStep

        config = self.setup.run_config(self.recipe)
        accelerator = start(config, "cpu")
        torch.manual_seed(seed_from(config.run.seed))
        model = new_model(config)
        # Rates that are too high are part of the comparison: their steps are counted and left out, however many.
        stepper = TrainStep(accelerator, model, config.train, config.loss, config.run.seed, max_skipped=10**9)
        if self.points:
            state = torch.load(self.setup.work / f"{self.recipe.name}.pt", weights_only=True)
            stepper.bare.load_state_dict(state["model"])
            stepper.load_state_dict(state["optimizer"])
            stepper.average.load(SavedAverage(state["average"], state["updates"]), stepper.bare)
        return stepper, ShardIndex.load(self.setup.work / "shards")

    def _segment(self, stepper: Any, batches: Any, end: int) -> dict[str, Any]:
        """The steps up to the next point, and the point."""
        import torch

        begin, losses, skipped = self.step, [], 0
        started = time.process_time()
        for step in range(begin, end):
            lr = self.recipe.lr * min(1.0, (step + 1) / self.setup.warmup)
            result = stepper([next(batches)], step=step, lr=lr)
            losses.append(result.values["loss"])
            skipped += int(result.left_out)
        seconds = time.process_time() - started
        before = self.points[-1] if self.points else {"seconds": 0.0, "skipped": 0}
        return {
            "step": end,
            "seconds": before["seconds"] + seconds,
            "training": float(torch.stack(losses).mean()),
            "skipped": before["skipped"] + skipped,
            "heldout": self._measure(stepper),
        }

    def _measure(self, stepper: Any) -> dict[str, dict[str, float]]:
        """{rung: {"loss", "bpp", "psnr"}} of the averaged weights, means over the held-out photographs."""
        from lalic.training.validate import validate

        loss = self.setup.run_config(self.recipe).loss
        crop = self.setup.val_crop
        metrics, _ = validate(stepper.accelerator, stepper.average.model, self.setup.heldout, loss, crop=crop)
        rungs = metrics.get("rungs", {str(self.recipe.quality): metrics})
        return {rung: {name: row[name] for name in ("loss", "bpp", "psnr")} for rung, row in rungs.items()}

    def _save(self, stepper: Any) -> None:
        """State and points in one file, so that neither is ahead of the other; the points for readers as well."""
        import torch

        path = self.setup.work / f"{self.recipe.name}.pt"
        record = {"recipe": asdict(self.recipe), "setup": self.setup.facts(), "points": self.points}
        state = {
            "record": json.dumps(record),
            "model": stepper.bare.state_dict(),
            "optimizer": stepper.state_dict(),
            "average": stepper.average.model.state_dict(),
            "updates": stepper.average.updates,
        }
        with atomic_open(path) as file:
            torch.save(state, file)
        write_json(path.with_suffix(".json"), record)


def read_points(setup: Setup, recipe: Recipe) -> list[dict[str, Any]]:
    """The points of a run that were written down, also by a process that was killed; none for a new run."""
    import torch

    path = setup.work / f"{recipe.name}.pt"
    if not path.exists():
        return []
    record = json.loads(torch.load(path, weights_only=True)["record"])
    if other := [name for name, value in setup.facts().items() if record["setup"].get(name) != value]:
        raise LalicError(f"{path} was made with another {other[0]}: take another --work")
    points: list[dict[str, Any]] = record["points"]
    return points


def train(
    setup: Setup, recipe: Recipe, steps: int, enough: Callable[[dict[str, Any]], bool] = lambda point: False
) -> list[dict[str, Any]]:
    """The points of a run up to `steps`, or up to one that is enough; what is not done yet is trained."""
    run = Run(setup, recipe)
    if run.step < steps and not any(enough(point) for point in run.points):
        run.advance(steps, enough)
    return [point for point in run.points if point["step"] <= steps]


def told(point: dict[str, Any]) -> str:
    """A point in a line."""
    rows = (f"q{q} {m['loss']:.3f} ({m['bpp']:.3f} bpp, {m['psnr']:.2f} dB)" for q, m in point["heldout"].items())
    skipped = f", {point['skipped']} steps left out" if point["skipped"] else ""
    return f"{point['step']:5} {point['seconds']:6.0f} s  {'  '.join(rows)}{skipped}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks can be told."""
    parser.add_argument("bsds500", type=Path, help="folder with train/ and val/ of BSDS500")
    parser.add_argument("--work", type=Path, required=True, help="keep shards and runs in here, and go on from them")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "small.yaml", help="whose model it is")
    for name, what in (("batch", "crops of a step"), ("crop", "their side"), ("warmup", "steps of warm-up"),
                       ("every", "steps between points"), ("val-crop", "side of what is measured")):  # fmt: skip
        default = getattr(Setup, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The setup that the command line describes, its shards made."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    names = ("config", "batch", "crop", "warmup", "every", "val_crop")
    given = {name: getattr(arguments, name) for name in names}
    if wrong := [n for n in names[1:] if given[n] < 1]:
        raise LalicError(f"--{wrong[0].replace('_', '-')} must be at least 1, not {given[wrong[0]]}")
    return prepare(arguments.bsds500, Setup(arguments.work.resolve(), **given))
