"""Does training in bfloat16 end where float32 ends? Whole runs of a small model on photographs, side by side.

python benchmarks/precision.py bsds500/train --val bsds500/val --work runs/precision \
    --output benchmarks/results/precision_cpu.json --picture docs/precision.png

Every run is what people start: `accelerate launch -m lalic.train`, the structure of configs/small.yaml cut down, one
thread. The runs of one seed have the same start, batches, crops and noise; they differ in `train.precision` alone. One
more run, of the first seed, is in float32 with the limit of the gradient norm one rounding step higher. It says how far
float32 ends from itself, and the seeds how far runs end apart anyway: without them a difference says nothing.

Compared are the mean training loss of the last tenth of the steps, which all runs of a seed take over the same crops,
and the loss of the averaged weights on held-out photographs. Ends with 1 when the mean over the seeds of bf16's
difference from float32 is above `--limit` in either. Stopped and started again with the same --work, it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.backends import launch  # noqa: E402 -- found from the checkout
from benchmarks.machine import describe  # noqa: E402

REFERENCE = "fp32"
ROUNDED = "fp32, rounded"
RUNS = {
    REFERENCE: ["train.precision=fp32"],
    ROUNDED: ["train.precision=fp32", f"train.clip={1 + 2**-23}"],
    "bf16": ["train.precision=bf16"],
}
"""The first one is what the others of the same seed are compared with; the second one runs for the first seed alone."""

Runs = dict[str, dict[str, dict[str, Any]]]
"""{seed: {name: what `read_run` gives}}."""

CONFIG = """
model: {{N: 16, dims: [16, 24, 32, 48, 32, 24], depths: [1, 1, 1, 1], groups: [8, 16, 24]}}
data: {{shards: {shards}, workers: 0, flip: true, val: {val}, val_crop: 128}}
loss: {{metric: mse, quality: 3}}
train: {{batch_size: {batch}, aux_lr: 1e-2, cpu_threads: 1, ema: 0.99}}
stages: [{{steps: {first}, lr: 1e-3, crop: 64}}, {{steps: {last}, lr: 1e-4, crop: 64}}]
validate: {{every: {steps}}}
checkpoint: {{every: 250, keep: 1}}
log: {{every: {window}, images: 0}}
"""
"""The last fifth of the steps has a tenth of the learning rate, as a run has when it ends."""


def make_inputs(work: Path, arguments: argparse.Namespace) -> Path:
    """Shards of the photographs, and the config of the runs; what is there already stays."""
    from lalic.data_prep import shard

    shard.main(["--input", str(arguments.folder.resolve()), "--output", str(work / "shards"), "--workers", "1"])
    steps, last = arguments.steps, arguments.steps // 5
    config = work / "precision.yaml"
    config.write_text(
        CONFIG.format(
            shards=json.dumps(str(work / "shards")),
            val=json.dumps(str(arguments.val.resolve())),
            batch=arguments.batch,
            first=steps - last,
            last=last,
            steps=steps,
            window=arguments.window,
        )
    )
    return config


def read_run(records: list[dict[str, Any]], steps: int, window: int) -> dict[str, Any]:
    """Of the records of a finished run: its curve, one value per window, and where it ends.

    A run that was resumed may have written a step twice; the later line counts.
    """
    by_step = {r["step"]: r for r in records if r["kind"] == "train"}
    expected = list(range(window, steps + 1, window))
    if sorted(by_step) != expected:
        raise SystemExit(f"error: the log has lines of {len(by_step)} steps instead of {len(expected)}")
    curve = [by_step[step]["loss"] for step in expected]
    end = [r for r in records if r["kind"] == "validation" and r["step"] == steps][-1]
    return {
        "curve": curve,
        "training": statistics.fmean(curve[-max(1, len(curve) // 10) :]),
        "validation": {k: end[k] for k in ("loss", "bpp", "psnr")},
        "skipped": by_step[steps]["skipped_steps_total"],
    }


def relative(value: float, reference: float) -> float:
    return value / reference - 1


def compare(runs: Runs) -> list[dict[str, Any]]:
    """A row for every kind of run: where it ends, and how far from float32, seed by seed and on average."""
    rows = []
    for name in RUNS:
        seeds = [of_seed for of_seed in runs.values() if name in of_seed]
        row: dict[str, Any] = {"run": name}
        for what, pick in (("training", lambda r: r["training"]), ("validation", lambda r: r["validation"]["loss"])):
            ends = [pick(of_seed[name]) for of_seed in seeds]
            apart = [relative(pick(of_seed[name]), pick(of_seed[REFERENCE])) for of_seed in seeds]
            row[what] = {
                "loss": ends,
                "mean": statistics.fmean(ends),
                "seeds_apart": (max(ends) - min(ends)) / statistics.fmean(ends),
                "from_reference": apart,
                "mean_from_reference": statistics.fmean(apart),
            }
        for value in ("bpp", "psnr"):
            row["validation"][value] = [of_seed[name]["validation"][value] for of_seed in seeds]
        row["skipped"] = sum(of_seed[name]["skipped"] for of_seed in seeds)
        rows.append(row)
    return rows


def draw(path: Path, runs: Runs, window: int) -> None:
    """The curves, and below how far each lies from float32 of its seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 4.8), sharex=True, height_ratios=(3, 2))
    for number, (seed, of_seed) in enumerate(runs.items()):
        style = ("-", "--", ":")[number % 3]
        reference = of_seed[REFERENCE]["curve"]
        steps = [window * (i + 1) for i in range(len(reference))]
        for name, run in of_seed.items():
            look = {"color": f"C{list(RUNS).index(name)}", "linestyle": style, "linewidth": 1}
            upper.plot(steps, run["curve"], label=f"{name}, seed {seed}", **look)
            if name != REFERENCE:
                lower.plot(steps, [100 * relative(*pair) for pair in zip(run["curve"], reference, strict=True)], **look)
    upper.set_ylabel("training loss")
    upper.set_yscale("log")
    upper.legend(fontsize=8)
    lower.axhspan(-1, 1, color="0.9")
    lower.set_ylabel(f"from {REFERENCE}\nof the same seed, %", fontsize=8)
    lower.set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def run(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after the other, and what lies between them; printed as they come."""
    config = make_inputs(work, arguments)
    runs: Runs = {}
    for seed in map(str, arguments.seeds):
        runs[seed] = {}
        for name, settings in RUNS.items():
            if name == ROUNDED and len(runs) > 1:
                continue
            folder = work / f"{name.replace(', ', '-')}-{seed}"
            records = launch("cpu1", config, folder, [f"run.seed={seed}", *settings])
            runs[seed][name] = found = read_run(records, arguments.steps, arguments.window)
            print(
                f"seed {seed}, {name:14} training {found['training']:.4f} "
                f"({100 * relative(found['training'], runs[seed][REFERENCE]['training']):+.2f} %), "
                f"validation {found['validation']['loss']:.4f} "
                f"({100 * relative(found['validation']['loss'], runs[seed][REFERENCE]['validation']['loss']):+.2f} %)",
                flush=True,
            )
    if arguments.picture:
        draw(arguments.picture, runs, arguments.window)
    settings = {k: getattr(arguments, k) for k in ("steps", "batch", "window", "limit")} | {"crop": 64}
    return {"settings": settings, "rows": compare(runs), "runs": runs}


def missed(rows: list[dict[str, Any]], limit: float) -> list[str]:
    """What of bf16 ends farther from float32 than the limit."""
    bf16 = next(row for row in rows if row["run"] == "bf16")
    return [what for what in ("training", "validation") if not abs(bf16[what]["mean_from_reference"]) <= limit]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them and the picture where asked; 1 when the limit is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/precision.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="photographs to train on")
    parser.add_argument("--val", type=Path, required=True, help="held-out photographs")
    parser.add_argument("--steps", type=int, default=3000, help="a multiple of --window (%(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--window", type=int, default=50, help="steps that a point of a curve is the mean of")
    parser.add_argument("--limit", type=float, default=0.01, help="largest difference of bf16 from fp32 (%(default)s)")
    parser.add_argument("--work", type=Path, help="keep shards and runs in here (default: a temporary folder)")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.steps < 5 or arguments.steps % arguments.window or (arguments.steps // 5) % arguments.window:
        parser.error(f"--steps {arguments.steps}: a fifth of it must be a multiple of --window {arguments.window}")

    command = " ".join(["python benchmarks/precision.py", *(sys.argv[1:] if argv is None else argv)])
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        found = run(arguments.work.resolve(), arguments)
    else:
        with tempfile.TemporaryDirectory() as work:
            found = run(Path(work), arguments)
    result = {"command": command, "environment": describe(1), **found}
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    problems = missed(result["rows"], arguments.limit)
    for what in problems:
        print(f"error: the {what} loss of bf16 ends more than {arguments.limit:.1%} from that of fp32", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
