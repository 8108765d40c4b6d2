"""What a recipe costs on clusters: the published one for one rate and for six, and one model of all rates by Muon.

    python benchmarks/cluster_cost.py [--output FILE.json] [--price 3] [--efficiency 8=0.95 64=0.9 256=0.85] ...
    python benchmarks/cluster_cost.py --measured benchmarks/results/train_step_cuda.json
    python benchmarks/cluster_cost.py --step-time 0.120 --batch 16 --measured-on "8 H100, bf16, batch 16 each"

Arithmetic on step times, not a measurement. Each step time is marked measured or assumed, with where it comes from;
everything else is assumed and can be given. The stages and their epochs are those of the config. Every GPU keeps its
batch, so the global batch grows with the GPUs: that is another recipe than the published one of batch 8, whose learning
rate has to be found anew. The ladder is trained one rate after another on all GPUs; side by side, each rate on a sixth
of them, takes the same time with smaller batches.

The second table is a whole curve by both recipes: six published trainings, and the one of `--fast`, which trains a
model on all rates. Its batch is that of its config, or as many images as fill all GPUs. What Muon adds to a step is
assumed, a little above what was counted (benchmarks/optimizer_launches.py), and was not measured on a GPU. Whether the
weights are as good is another question: docs/recipe.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RATES = 6


@dataclass(frozen=True)
class StepTime:
    """Seconds that one GPU takes for a training step of the full model at crop 256."""

    seconds: float
    batch: int
    """Images on that GPU."""
    kind: str
    """"measured" or "assumed"."""
    source: str


STEP_TIMES = (
    StepTime(
        0.330,
        8,
        "measured",
        "One H200, bf16: mean of five steps while a compiler ran on 2 of 16 cores; bound by starting 10,000 kernels",
    ),
    StepTime(
        0.067,
        8,
        "assumed",
        "One H200, bf16: the kernels' own time in that step by the profiler, as if starting them took none",
    ),
)
"""What is known of the full model on a GPU (README, "What is not here yet")."""


@dataclass(frozen=True)
class Assumptions:
    """What is not measured."""

    images: int = 400_000
    price: float = 3.0
    """US dollars for a GPU-hour."""
    crop_512: float = 4.0
    """What a step at crop 512 costs, in steps at crop 256: it has four times the pixels."""
    overhead: float = 0.02
    """Share of the time that goes on validation, checkpoints and starts."""
    muon: float = 0.3
    """What Muon adds to a step of any batch, in steps of 8 images at crop 256. Counted are 22 % of the operations of
    such a step and 14 % of its launches."""


EFFICIENCY = {1: 1.0, 8: 0.95, 64: 0.90, 256: 0.85}
"""By number of GPUs: the share of the speed of so many single GPUs that they reach together."""


def recipe(config: Path, images: int) -> list[dict[str, Any]]:
    """Crop, learning rate, epochs and images of each stage of a config whose stages are given in epochs."""
    from lalic.config import read_config
    from lalic.errors import LalicError

    stages = []
    for i, stage in enumerate(read_config(config).stages):
        if stage.epochs is None:
            raise LalicError(f"{config}: stage {i + 1} is given in steps; the cost of a recipe follows from epochs")
        stages.append({"crop": stage.crop, "lr": stage.lr, "epochs": stage.epochs, "images": stage.epochs * images})
    return stages


def cost(
    stages: Sequence[Mapping[str, Any]], time: StepTime, gpus: int, efficiency: float, assumed: Assumptions
) -> dict[str, Any]:
    """One row: the whole recipe on `gpus` GPUs, each with `time.batch` images a step."""
    batch = gpus * time.batch
    steps = seconds = 0.0
    for stage in stages:
        count = -(-stage["images"] // batch)
        steps += count
        # Between the crops that were given, by the number of pixels.
        times = 1 + (assumed.crop_512 - 1) * ((stage["crop"] / 256) ** 2 - 1) / 3
        seconds += count * time.seconds * times / efficiency
    hours = seconds / (1 - assumed.overhead) / 3600
    one = {"hours": hours, "gpu_hours": hours * gpus, "dollars": hours * gpus * assumed.price}
    ladder = {name: value * RATES for name, value in one.items()}
    return {
        "gpus": gpus,
        "global_batch": batch,
        "steps": int(steps),
        "efficiency": efficiency,
        "one": one,
        "six": ladder,
    }


def fast_cost(
    stages: Sequence[Mapping[str, Any]], batch: int, time: StepTime, gpus: int, efficiency: float, assumed: Assumptions
) -> dict[str, Any]:
    """One row: one training on all rates by Muon. A GPU takes `time.batch` images at once, several times in a step
    where `batch` asks for more than all GPUs hold."""
    together = gpus * time.batch
    times_each = max(1, -(-batch // together))
    batch = times_each * together
    steps = seconds = 0.0
    for stage in stages:
        count = -(-stage["images"] // batch)
        steps += count
        times = 1 + (assumed.crop_512 - 1) * ((stage["crop"] / 256) ** 2 - 1) / 3
        seconds += (
            count * (times_each * time.seconds * times + assumed.muon * time.seconds * 8 / time.batch) / efficiency
        )
    hours = seconds / (1 - assumed.overhead) / 3600
    return {
        "gpus": gpus,
        "global_batch": batch,
        "steps": int(steps),
        "efficiency": efficiency,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "dollars": hours * gpus * assumed.price,
    }


def measured_in(result: Mapping[str, Any], source: str) -> list[StepTime]:
    """The fastest of our variants at each batch in a result of benchmarks/train_step.py; full model, crop 256."""
    from lalic.errors import LalicError

    settings = result.get("settings", {})
    if settings.get("model") != "full" or settings.get("crop") != 256:
        raise LalicError(f"{source} was measured with the {settings.get('model')} model at crop {settings.get('crop')}")
    device, times = result["environment"]["device"], []
    for batch, variants in result["batches"].items():
        speeds = {
            name: row["images_per_second"]
            for name, row in variants.items()
            if "images_per_second" in row and name not in ("plain", "published")
        }
        if speeds:
            name = max(speeds, key=lambda name: speeds[name])
            times.append(StepTime(int(batch) / speeds[name], int(batch), "measured", f"{device}, {name}: {source}"))
    if not times:
        raise LalicError(f"{source} has no step of ours that ran")
    return times


def table(result: Mapping[str, Any]) -> str:
    """The rows as Markdown; what is measured and what is assumed stands above."""
    assumed = result["assumptions"]
    stages = "; ".join(f"{s['epochs']} epochs at crop {s['crop']}, learning rate {s['lr']:g}" for s in result["recipe"])
    lines = [
        f"{assumed['images']:,} images. {stages}.",
        "",
        f"- **assumed**: ${assumed['price']:g} for a GPU-hour; a step at crop 512 costs {assumed['crop_512']:g} at "
        f"crop 256; {100 * assumed['overhead']:g} % more for validation, checkpoints and starts; the scaling in the "
        "table",
    ]
    times = [StepTime(**each) for each in result["step_times"]]
    lines += [
        f"- **{t.kind}**: {1e3 * t.seconds:.0f} ms for a step of {t.batch} images on a GPU. {t.source}" for t in times
    ]
    lines += [
        "",
        "Each GPU keeps its batch. Above a global batch of 8 that is another recipe than the published one, and its",
        "learning rate has to be found anew. Six rates one after another on all GPUs; side by side, each on a sixth of",
        "them, they take the same time with smaller batches.",
    ]
    titles = ("step", "GPUs", "global batch", "steps", "scaling, assumed", "one rate: hours", "GPU-hours", "$")
    titles += ("six rates: hours", "GPU-hours", "$")
    lines += ["", "| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for time, rows in zip(times, result["rows"], strict=True):
        for row in rows:
            one, six = row["one"], row["six"]
            cells = (
                f"{1e3 * time.seconds:.0f} ms, {time.kind}",
                str(row["gpus"]),
                str(row["global_batch"]),
                f"{row['steps']:,}",
                f"{100 * row['efficiency']:g} %",
                *(figure(one[key]) for key in ("hours", "gpu_hours", "dollars")),
                *(figure(six[key]) for key in ("hours", "gpu_hours", "dollars")),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table(result: Mapping[str, Any]) -> str:
    """A whole curve by both recipes, as Markdown."""
    fast, assumed = result["curve"], result["assumptions"]
    parts = [f"{s['epochs']} epochs at crop {s['crop']}" for s in fast["recipe"]]
    stages = "; ".join([*parts, f"batch {fast['batch']} or more"])
    lines = [
        f"Six trainings as above, and one of `configs/{fast['config']}` ({stages}). **Assumed** besides the above: "
        f"Muon adds {assumed['muon']:g} of a step of 8 images at crop 256 to every step.",
        "",
    ]
    titles = ("step", "GPUs", "six, as published: GPU-hours", "$", "one, by Muon: global batch", "steps", "hours")
    titles += ("GPU-hours", "$", "of six")
    lines += ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for time, published, rows in zip(result["step_times"], result["rows"], fast["rows"], strict=True):
        for six, row in zip(published, rows, strict=True):
            cells = (
                f"{1e3 * time['seconds']:.0f} ms, {time['kind']}",
                str(row["gpus"]),
                figure(six["six"]["gpu_hours"]),
                figure(six["six"]["dollars"]),
                str(row["global_batch"]),
                f"{row['steps']:,}",
                *(figure(row[key]) for key in ("hours", "gpu_hours", "dollars")),
                f"{100 * row['gpu_hours'] / six['six']['gpu_hours']:.0f} %",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(value: float) -> str:
    """Two digits where they matter, whole numbers with separators from ten on."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _efficiency(text: str) -> tuple[int, float]:
    gpus, _, share = text.partition("=")
    if not gpus.isdecimal() or int(gpus) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write GPUS=SHARE, as 64=0.9")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the share is a number above 0 and at most 1")
    return int(gpus), value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def main(argv: Sequence[str] | None = None) -> int | None:
    """Print the table, and write the figures."""
    from lalic.config import read_config
    from lalic.errors import LalicError
    from lalic.files import write_json

    args = _parser().parse_args(argv)
    assumed = Assumptions(int(args.images), args.price, args.crop_512, args.overhead, args.muon)
    if not 0 <= assumed.overhead < 1 or assumed.images < 1 or not 0 <= assumed.muon < 100:
        raise LalicError("--overhead is a share, 0 or more and less than 1, --images 1 or more, --muon 0 or more")
    times = list(STEP_TIMES)
    if args.measured:
        try:
            times = measured_in(json.loads(args.measured.read_text()), str(args.measured))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LalicError(f"{args.measured} is no result of benchmarks/train_step.py: {error!r}") from error
    elif args.step_time:
        kind = "measured" if args.measured_on else "assumed"
        times = [StepTime(args.step_time, args.batch, kind, args.measured_on or "given with --step-time")]
    stages, fast = recipe(args.config, assumed.images), recipe(args.fast, assumed.images)
    batch = read_config(args.fast).train.batch_size
    efficiency = dict(sorted(args.efficiency)) if args.efficiency else EFFICIENCY
    words = [*(sys.argv[1:] if argv is None else argv)]
    result = {
        "command": shlex.join(["python", "benchmarks/cluster_cost.py", *words]),
        "config": args.config.name,
        "recipe": stages,
        "assumptions": asdict(assumed),
        "step_times": [asdict(time) for time in times],
        "rows": [[cost(stages, time, n, share, assumed) for n, share in efficiency.items()] for time in times],
        "curve": {
            "config": args.fast.name,
            "recipe": fast,
            "batch": batch,
            "rows": [
                [fast_cost(fast, batch, time, n, share, assumed) for n, share in efficiency.items()] for time in times
            ],
        },
    }
    if args.output:
        write_json(args.output, result)
    print(f"{table(result)}\n\n{curve_table(result)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Assumptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lalic.yaml", help="the recipe's stages")
    parser.add_argument(
        "--fast", type=Path, default=ROOT / "configs" / "lalic-fast.yaml", help="of one model for all rates"
    )
    parser.add_argument("--images", type=_positive, default=default.images, help="of the training set (%(default)s)")
    parser.add_argument("--price", type=_positive, default=default.price, help="$ for a GPU-hour (%(default)s)")
    parser.add_argument(
        "--efficiency", nargs="+", type=_efficiency, metavar="GPUS=SHARE",
        help=f"numbers of GPUs and their scaling (default: {' '.join(f'{n}={e:g}' for n, e in EFFICIENCY.items())})",
    )  # fmt: skip
    parser.add_argument(
        "--crop-512", type=_positive, default=default.crop_512, help="cost of a step at crop 512 (%(default)s)"
    )
    parser.add_argument("--overhead", type=float, default=default.overhead, help="share besides steps (%(default)s)")
    parser.add_argument(
        "--muon", type=float, default=default.muon, help="what Muon adds to a step, in steps of 8 images (%(default)s)"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--measured", type=Path, help="take the step times of this result of benchmarks/train_step.py")
    given.add_argument("--step-time", type=_positive, help="seconds of a step on one GPU, in place of those known")
    parser.add_argument("--batch", type=int, default=8, choices=range(1, 4097), metavar="N", help="images in it (8)")
    parser.add_argument("--measured-on", help="where --step-time was measured; without it, it counts as assumed")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    from lalic.errors import run_main

    run_main(main)
