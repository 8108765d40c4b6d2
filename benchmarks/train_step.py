"""One training step on the CPU: images/s and peak memory, beside the published formulation of the same model.

    python benchmarks/train_step.py [--model full|small|demo] [--crop 256] [--batch 2] [--output FILE.json]

Variants, all with the same weights, images, loss, clip and Adam:

    plain           the published step's way: OmniShift in separate branches, (B, C, H, W) memory with rearranging
                    around every mix, BiWKV in plain PyTorch (its CUDA operator has no CPU twin), Adam one
                    parameter at a time
    fp32            ours: train.precision=fp32
    bf16            ours: train.precision=bf16
    fp32+ckpt, bf16+ckpt   ours with train.gradient_checkpointing

Every variant lives in a process of its own, so that each has a peak of its own; their steps take turns, so that
what else the machine does falls on all alike. Times are medians, ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout
from benchmarks.plain import use_plain_formulation  # noqa: E402

VARIANTS = ("plain", "fp32", "bf16", "fp32+ckpt", "bf16+ckpt")
MODELS = {"full": "lalic.yaml", "small": "small.yaml", "demo": "demo.yaml"}


def build_step(variant: str, arguments: argparse.Namespace) -> Any:
    """A function that does one optimiser step and returns the loss."""
    import dataclasses

    import torch

    from lalic.config import read_config
    from lalic.model import LALIC
    from lalic.training.distributed import seed_from, start_processes
    from lalic.training.loss import rate_distortion
    from lalic.training.step import TrainStep

    config = read_config(ROOT / "configs" / MODELS[arguments.model], [f"train.batch_size={arguments.batch}"])
    train = dataclasses.replace(
        config.train,
        cpu_threads=arguments.threads,
        precision="bf16" if variant.startswith("bf16") else "fp32",
        gradient_checkpointing=variant.endswith("+ckpt"),
    )
    accelerator = start_processes(train)
    torch.manual_seed(0)
    model = LALIC(**config.model.arguments())
    coarse = torch.rand(arguments.batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, arguments.crop, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).to(torch.uint8)
    if variant != "plain":
        stepper = TrainStep(accelerator, model, train, config.loss, seed=0)

        def ours(number: int) -> float:
            return float(stepper([{"x": pixels, "bad": 0}], step=number, lr=1e-4).values["loss"])

        return ours

    use_plain_formulation(model)
    model.train()
    optimizer = torch.optim.Adam(model.main_parameters(), lr=1e-4, foreach=False)
    aux_optimizer = torch.optim.Adam(model.quantiles(), lr=1e-3, foreach=False)

    def published(number: int) -> float:
        torch.manual_seed(seed_from(0, number, 0))
        x = pixels.float() / 255
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        loss = rate_distortion(model(x), x, config.loss.metric, config.loss.multiplier)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        model.aux_loss().backward()
        aux_optimizer.step()
        return float(loss.detach())

    return published


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(arguments: argparse.Namespace) -> None:
    """One variant: a step for every line on stdin, a line of JSON on stdout for every step."""
    step = build_step(arguments.worker, arguments)
    idle = peak_mib()
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        loss = step(number)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mib": peak_mib(), "idle_mib": idle}), flush=True)


def start_worker(variant: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", variant, "--threads", str(arguments.threads)]
    command += ["--model", arguments.model, "--crop", str(arguments.crop), "--batch", str(arguments.batch)]
    backend = {"LALIC_BACKEND": "torch"} if variant == "plain" else {}
    environment = {**os.environ, **MALLOC, **backend, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def one_step(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin and worker.stdout
    worker.stdin.write("step\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker died with status {worker.wait()}")
    return json.loads(line)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of all variants in turn; the first of each is warm-up, and their losses must agree."""
    results: dict[str, list[dict[str, Any]]] = {v: [] for v in arguments.variants}
    workers = {v: start_worker(v, arguments) for v in arguments.variants}
    try:
        for _ in range(arguments.rounds + 1):
            for variant, worker in workers.items():
                results[variant].append(one_step(worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    check_same_computation(results)
    return {variant: summary(steps, arguments.batch) for variant, steps in results.items()}


def check_same_computation(results: dict[str, list[dict[str, Any]]]) -> None:
    """A speed-up is worth reporting only where the first loss is the same."""
    losses = {variant: steps[0]["loss"] for variant, steps in results.items()}
    expected = losses.get("fp32", next(iter(losses.values())))
    for variant, loss in losses.items():
        tolerance = 0.02 if variant.startswith("bf16") else 1e-3
        if abs(loss - expected) > tolerance * abs(expected):
            raise SystemExit(f"{variant} computes another loss: {loss} instead of {expected}")


def summary(steps: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    seconds = [s["seconds"] for s in steps[1:]]
    return {
        "images_per_second": batch / statistics.median(seconds),
        "seconds": [round(s, 4) for s in seconds],
        "peak_mib": round(steps[-1]["peak_mib"], 1),
        "idle_mib": round(steps[-1]["idle_mib"], 1),
        "first_loss": steps[0]["loss"],
    }


def print_table(variants: dict[str, Any]) -> None:
    """Images/s and peak memory, and their ratios to `plain` (or the first variant)."""
    base = variants.get("plain") or next(iter(variants.values()))
    print(f"{'variant':<10} {'images/s':>9} {'speed-up':>9} {'peak MiB':>9} {'of base':>8}")
    for name, v in variants.items():
        ratios = [b / s for b, s in zip(base["seconds"], v["seconds"], strict=True)]
        v["speed_up"] = statistics.median(ratios)
        v["peak_of_base"] = v["peak_mib"] / base["peak_mib"]
        print(
            f"{name:<10} {v['images_per_second']:>9.3f} {v['speed_up']:>8.2f}x {v['peak_mib']:>9.0f} "
            f"{100 * v['peak_of_base']:>6.0f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="write the figures and the environment as JSON")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    variants = measure(arguments)
    settings = {k: getattr(arguments, k) for k in ("model", "crop", "batch", "rounds", "threads")}
    print(", ".join(f"{k} {v}" for k, v in settings.items()))
    print_table(variants)
    if arguments.output:
        command = " ".join(["python benchmarks/train_step.py", *sys.argv[1:]])
        report = {
            "command": command,
            "settings": settings,
            "variants": variants,
            "environment": describe(arguments.threads),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
