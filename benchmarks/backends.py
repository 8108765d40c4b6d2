"""Loss curves of one process, DDP, ZeRO-1 and ZeRO-2 on the same photographs, and how far they lie apart.

python benchmarks/backends.py bsds500/train --val bsds500/val --output benchmarks/results/backends_cpu.json \
    --picture docs/backends.png

Every run is what people start: `accelerate launch --config_file launch/accelerate/X.yaml -m lalic.train`, on two
processes over gloo, or on one with two accumulation steps. Start, batches, crops and noise are the same, so all that
may differ is rounding. Training amplifies that, step by step, until the runs are two samples of the same thing. How
fast it does so by itself, the second run shows: one process again, with the limit of the gradient norm one float32
rounding step higher.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout

RUNS = {
    "one process": ("cpu1", ["train.accumulation=2"]),
    "the same, rounded": ("cpu1", ["train.accumulation=2", f"train.clip={1 + 2**-23}"]),
    "DDP on 2": ("cpu2", []),
    "ZeRO-1 on 2": ("deepspeed_zero1", []),
    "ZeRO-2 on 2": ("deepspeed_zero2", []),
}
"""The first one is what the others are compared with."""

CONFIG = """
run: {{seed: 1}}
model: {{N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}}
data: {{shards: {shards}, workers: 0, flip: true, val: {val}, val_crop: 128}}
loss: {{metric: mse, quality: 3}}
train: {{batch_size: 4, cpu_threads: 1, precision: {precision}}}
stages: [{{steps: {steps}, lr: 2e-4, crop: 64}}]
validate: {{every: {steps}}}
checkpoint: {{every: {steps}}}
log: {{every: 1, images: 0}}
"""
VALUES = ("loss", "bpp", "psnr", "aux", "gradient_norm")


def make_inputs(work: Path, folder: Path, val: Path | None, steps: int, precision: str) -> Path:
    """Shards of the photographs, and the config of the runs."""
    from lalic.data_prep import shard

    shard.main(["--input", str(folder), "--output", str(work / "shards"), "--workers", "1"])
    config = work / "backends.yaml"
    config.write_text(CONFIG.format(shards=work / "shards", val=val or "null", steps=steps, precision=precision))
    return config


def launch(yaml: str, config: Path, folder: Path, settings: Sequence[str]) -> list[dict[str, Any]]:
    """One run in `folder` through the launcher, or what is left of it; the records of its log."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml")]
    if yaml.startswith("deepspeed"):
        launcher += ["--num_processes", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [*launcher, "-m", "lalic.train", "--config", str(config), f"run.dir={folder}", *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the run in {folder} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(work: Path, config: Path, name: str) -> dict[str, Any]:
    """One run; its values at every step, and of the validation at the end."""
    yaml, settings = RUNS[name]
    records = launch(yaml, config, work / name.replace(" ", "-"), settings)
    steps = [r for r in records if r["kind"] == "train"]
    end = next((r for r in records if r["kind"] == "validation"), {})
    return {
        **{value: [r[value] for r in steps] for value in VALUES},
        "validation": {k: end[k] for k in ("loss", "bpp", "psnr") if k in end},
    }


def differences(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The largest and the mean relative difference of the losses over all steps, and the largest of `aux`."""
    apart = [abs(a - b) / abs(b) for a, b in zip(ours["loss"], reference["loss"], strict=True)]
    aux = [abs(a - b) / abs(b) for a, b in zip(ours["aux"], reference["aux"], strict=True)]
    tenth = max(1, len(apart) // 10)
    return {
        "loss_largest": max(apart),
        "loss_mean": sum(apart) / len(apart),
        "loss_largest_first_tenth": max(apart[:tenth]),
        "aux_largest": max(aux),
    }


def draw(path: Path, curves: dict[str, dict[str, Any]]) -> None:
    """The curves, and below how far each lies from the first one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 4.8), sharex=True, height_ratios=(3, 2))
    first, *others = curves
    for name, curve in curves.items():
        dashed = (0, (1 + 2 * list(curves).index(name), 2)) if name != first else "-"
        upper.plot(range(1, len(curve["loss"]) + 1), curve["loss"], label=name, linestyle=dashed, linewidth=1)
    for name in others:
        pairs = zip(curves[name]["loss"], curves[first]["loss"], strict=True)
        # What is equal to the last bit has no place on a logarithmic axis.
        apart = [abs(a - b) / abs(b) or float("nan") for a, b in pairs]
        lower.plot(range(1, len(apart) + 1), apart, ".", markersize=2, label=name, color=f"C{list(curves).index(name)}")
    upper.set_ylabel("loss")
    upper.set_yscale("log")
    upper.legend(fontsize=8)
    lower.set_ylabel(f"relative difference\nfrom {first}", fontsize=8)
    lower.set_yscale("log")
    lower.set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def run(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All curves, and what lies between them; printed as they come."""
    folder, val = arguments.folder.resolve(), arguments.val and arguments.val.resolve()
    config = make_inputs(work, folder, val, arguments.steps, arguments.precision)
    curves: dict[str, dict[str, Any]] = {}
    rows = []
    for name in RUNS:
        curves[name] = train(work, config, name)
        row = {"run": name, "first": curves[name]["loss"][0], "last": curves[name]["loss"][-1]}
        row |= {"validation": curves[name]["validation"]}
        row |= differences(curves[name], next(iter(curves.values())))
        rows.append(row)
        print(f"{name:17} loss {row['first']:.4f} -> {row['last']:.4f}")
        print(
            f"{'':17} apart by at most {row['loss_largest']:.1e} (first tenth of the steps "
            f"{row['loss_largest_first_tenth']:.1e}), on average {row['loss_mean']:.1e}",
            flush=True,
        )
    if arguments.picture:
        draw(arguments.picture, curves)
    settings = {"steps": arguments.steps, "batch": 4, "crop": 64, "precision": arguments.precision}
    return {"settings": settings, "rows": rows, "losses": {name: curve["loss"] for name, curve in curves.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them and the picture where asked."""
    parser = argparse.ArgumentParser(prog="benchmarks/backends.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="photographs to train on")
    parser.add_argument("--val", type=Path, help="photographs to validate on at the end")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="train.precision of all runs")
    parser.add_argument("--work", type=Path, help="make shards and runs in here (default: a temporary folder)")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)

    command = " ".join(["python benchmarks/backends.py", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        result = {"command": command, "environment": describe(1), **run(Path(work), arguments)}
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
