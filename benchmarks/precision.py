"""Does training in bfloat16 end where float32 ends? Whole runs of a small model on photographs, side by side.

python benchmarks/precision.py bsds500/train --val bsds500/val --work runs/precision \
    --output benchmarks/results/precision_cpu.json --picture docs/precision.png

Every run is what people start: `accelerate launch -m lalic.train`, the structure of configs/small.yaml cut down, one
thread. There are two comparisons, in each of which all runs take the same batches, crops and noise:

    new         from new weights
    trained     from the averaged weights at the end of the new float32 run

Beside float32 and bf16 a third run says how far float32 ends from itself, without which a difference says nothing.
From new weights it has the limit of the gradient norm one float32 rounding step higher, and parts from the first run
after a hundred steps; from trained weights it starts with them rounded to bf16, and parts at once, as bf16 does.

Compared are the mean training loss of the last tenth of the steps and the loss of the averaged weights on held-out
photographs. Ends with 1 when the trained run in bf16 ends farther from float32 than `--limit` in either. Stopped and
started again with the same --work, it goes on.
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

import torch  # noqa: E402 -- found from the checkout
from torch import Tensor  # noqa: E402

from benchmarks.backends import launch  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.parity import make_batches  # noqa: E402
from lalic.ladder import lambda_of  # noqa: E402
from lalic.model import published_state_dict  # noqa: E402
from lalic.training import checkpoint  # noqa: E402

REFERENCE, ROUNDED, BF16 = "fp32", "fp32, start rounded", "bf16"
NEW, TRAINED = "new", "trained"
BF16_SETTINGS = ["train.precision=bf16"]
KINDS = {
    NEW: {REFERENCE: [], "fp32, clip rounded": [f"train.clip={1 + 2**-23}"], BF16: BF16_SETTINGS},
    TRAINED: {REFERENCE: [], BF16: BF16_SETTINGS, ROUNDED: []},
}
"""Of each comparison the runs, and what they change; the first one is what the others are compared with."""

Runs = dict[str, dict[str, dict[str, Any]]]
"""{comparison: {run: what `read_run` gives}}."""

CONFIG = """
run: {{seed: {seed}}}
model: {{N: 16, dims: [16, 24, 32, 48, 32, 24], depths: [1, 1, 1, 1], groups: [8, 16, 24]}}
data: {{shards: {shards}, workers: 0, flip: true, val: {val}, val_crop: 128}}
loss: {{metric: mse, quality: 3}}
train: {{batch_size: {batch}, aux_lr: 1e-2, cpu_threads: 1, ema: 0.99}}
stages: [{{steps: {first}, lr: {lr}, crop: 64}}, {{steps: {last}, lr: {last_lr}, crop: 64}}]
validate: {{every: {steps}}}
checkpoint: {{every: 250, keep: 1}}
log: {{every: {window}, images: 0}}
"""
"""The last fifth of the steps has a tenth of the learning rate, as a run has when it ends."""


def make_config(work: Path, comparison: str, arguments: argparse.Namespace) -> Path:
    """The config of the runs of one comparison."""
    new = comparison == NEW
    steps, lr = (arguments.steps, 1e-3) if new else (arguments.more_steps, 3e-4)
    last = steps // 5
    config = work / f"{comparison}.yaml"
    config.write_text(
        CONFIG.format(
            shards=json.dumps(str(work / "shards")),
            val=json.dumps(str(arguments.val.resolve())),
            batch=arguments.batch,
            # Other crops than those that the weights were trained on.
            seed=arguments.seed if new else arguments.seed + 1,
            first=steps - last,
            last=last,
            lr=lr,
            last_lr=lr / 10,
            steps=steps,
            window=arguments.window,
        )
    )
    return config


def start_from(work: Path, comparison: str, *, rounded: bool) -> list[str]:
    """The setting that makes a run start where all runs of the comparison do, rounded to bf16 if so asked."""
    if comparison == NEW:
        return []
    trained = work / f"{NEW}-{folder_name(REFERENCE)}"
    if not rounded:
        return [f"train.init_from={trained}"]
    state = published_state_dict(checkpoint.load_model(checkpoint.find_checkpoint(trained)))
    path = work / "start-rounded.pth"
    torch.save({n: t.bfloat16().float() if t.is_floating_point() else t for n, t in state.items()}, path)
    return [f"train.init_from={path}"]


def folder_name(run: str) -> str:
    return run.replace(",", "").replace(" ", "-")


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
    """A row for every run: where it ends, and how far from float32 of the same comparison."""
    rows = []
    for comparison, found in runs.items():
        reference = found[REFERENCE]
        for name, run in found.items():
            ends = {"training": run["training"], "validation": run["validation"]["loss"]}
            begins = {"training": reference["training"], "validation": reference["validation"]["loss"]}
            rows.append(
                {
                    "comparison": comparison,
                    "run": name,
                    **ends,
                    "from_fp32": {what: relative(ends[what], begins[what]) for what in ends},
                    "bpp": run["validation"]["bpp"],
                    "psnr": run["validation"]["psnr"],
                    "skipped": run["skipped"],
                }
            )
    return rows


def draw(path: Path, runs: Runs, window: int) -> None:
    """The curves of both comparisons, and below how far each lies from its float32."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(runs), figsize=(8, 4.8), sharex="col", height_ratios=(3, 2), squeeze=False)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(n for found in runs.values() for n in found))}
    for (upper, lower), (comparison, found) in zip(axes.T, runs.items(), strict=True):
        reference = found[REFERENCE]["curve"]
        steps = [window * (i + 1) for i in range(len(reference))]
        for name, run in found.items():
            look = {"color": colours[name], "linewidth": 1}
            upper.plot(steps, run["curve"], label=name, **look)
            if name != REFERENCE:
                lower.plot(steps, [100 * relative(*pair) for pair in zip(run["curve"], reference, strict=True)], **look)
        upper.set_title(f"{comparison} weights", fontsize=9)
        upper.set_yscale("log")
        for axis in (upper.yaxis.set_major_formatter, upper.yaxis.set_minor_formatter):
            axis("{x:g}")
        upper.legend(fontsize=7)
        lower.axhspan(-1, 1, color="0.9")
        lower.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel(f"from {REFERENCE}, %", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def run(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after the other, and what lies between them; printed as they come."""
    from lalic.data_prep import shard

    shard.main(["--input", str(arguments.folder.resolve()), "--output", str(work / "shards"), "--workers", "1"])
    runs: Runs = {}
    for comparison in arguments.comparisons:
        kinds = KINDS[comparison]
        config, found = make_config(work, comparison, arguments), runs.setdefault(comparison, {})
        steps = arguments.steps if comparison == NEW else arguments.more_steps
        for name, settings in kinds.items():
            folder = work / f"{comparison}-{folder_name(name)}"
            if not (folder / "DONE").exists():
                start = start_from(work, comparison, rounded=name == ROUNDED)
                launch("cpu1", config, folder, [*start, *settings])
            records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            found[name] = read_run(records, steps, arguments.window)
            row = compare({comparison: found})[-1]
            ends = (f"{what} {row[what]:.4f} ({100 * row['from_fp32'][what]:+.2f} %)" for what in row["from_fp32"])
            print(f"{comparison + ', ' + name:28}", *ends, f"bpp {row['bpp']:.4f}", flush=True)
    if arguments.picture:
        draw(arguments.picture, runs, arguments.window)
    names = ("steps", "more_steps", "batch", "window", "seed", "limit")
    settings = {name: getattr(arguments, name) for name in names} | {"crop": 64}
    gradients = compare_gradients(work, arguments.folder)
    for row in gradients:
        turned = (f"{part} {row['length'][part]:.3f} long, cosine {row['cosine'][part]:.4f}" for part in PARTS)
        print(f"gradient, {row['run']:18} loss {100 * row['loss']:+.3f} %;", *turned, sep=" ", flush=True)
    return {"settings": settings, "rows": compare(runs), "gradients": gradients, "runs": runs}


PARTS = {"g_a": "g_a.", "g_s": "g_s.", "y": "latent_codec.y.", "hyper": "latent_codec.hyper."}
"""Parts of the model, and how the names of their parameters begin."""


def mean_gradients(model: Any, batches: Sequence[Tensor], *, bf16: bool) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the batches, and the mean gradient of every part of the model as one vector, float64."""
    from lalic.training.loss import rate_distortion

    model.train().set_compute_dtype(torch.bfloat16 if bf16 else None)
    model.zero_grad()
    losses = []
    for number, pixels in enumerate(batches):
        torch.manual_seed(number)
        x = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
        loss = rate_distortion(model(x), x, "mse", lambda_of("mse", 3))["loss"]
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
    named = [(n, p.grad.double().flatten()) for n, p in model.named_parameters() if p.grad is not None]
    parts = {part: torch.cat([g for n, g in named if n.startswith(begin)]) for part, begin in PARTS.items()}
    return statistics.fmean(losses), parts


def compare_gradients(work: Path, photographs: Path) -> list[dict[str, Any]]:
    """At the weights where the new float32 run ended: bf16, and weights rounded to bf16, beside float32.

    Of the mean over 16 batches of 8 crops: the relative difference of the loss, and for every part of the model the
    length of the gradient over that of float32's, and the cosine between the two.
    """
    torch.set_num_threads(1)
    folder = checkpoint.find_checkpoint(work / f"{NEW}-{folder_name(REFERENCE)}")
    batches = make_batches(photographs, 16, 8, 64)
    models = {name: checkpoint.load_model(folder) for name in (REFERENCE, BF16, ROUNDED)}
    with torch.no_grad():
        for p in models[ROUNDED].parameters():
            p.copy_(p.bfloat16())
    found = {name: mean_gradients(model, batches, bf16=name == BF16) for name, model in models.items()}
    loss, truth = found.pop(REFERENCE)
    return [
        {
            "run": name,
            "loss": relative(value, loss),
            "length": {part: float(gradient.norm() / truth[part].norm()) for part, gradient in parts.items()},
            "cosine": {
                part: float(torch.cosine_similarity(gradient, truth[part], dim=0)) for part, gradient in parts.items()
            },
        }
        for name, (value, parts) in found.items()
    ]


def missed(rows: list[dict[str, Any]], limit: float) -> list[str]:
    """What of the trained bf16 run ends farther from float32 than the limit."""
    found = [row["from_fp32"] for row in rows if row["comparison"] == TRAINED and row["run"] == BF16]
    return [what for row in found for what, apart in row.items() if not abs(apart) <= limit]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them and the picture where asked; 1 when the limit is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/precision.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="photographs to train on")
    parser.add_argument("--val", type=Path, required=True, help="held-out photographs")
    parser.add_argument("--steps", type=int, default=3000, help="of a run from new weights (%(default)s)")
    parser.add_argument("--more-steps", type=int, default=2000, help="of a run from trained weights (%(default)s)")
    parser.add_argument(
        "--comparisons", nargs="+", choices=(NEW, TRAINED), default=[NEW, TRAINED], help="default: both"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--window", type=int, default=50, help="steps that a point of a curve is the mean of")
    parser.add_argument("--limit", type=float, default=0.01, help="largest difference of bf16 from fp32 (%(default)s)")
    parser.add_argument("--work", type=Path, help="keep shards and runs in here (default: a temporary folder)")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if NEW not in arguments.comparisons:
        parser.error(f"--comparisons {TRAINED} needs {NEW}, whose weights it goes on from")
    for flag, steps in (("--steps", arguments.steps), ("--more-steps", arguments.more_steps)):
        if steps < 5 or steps % (5 * arguments.window):
            parser.error(f"{flag} {steps}: a fifth of it must be a multiple of --window {arguments.window}")

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
