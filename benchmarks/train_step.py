"""One training step: images/s and peak memory, beside the published code's way of doing it.

    python benchmarks/train_step.py [--model full|medium|small|demo] [--crop 256] [--batch 8 16 32] [--device cuda]
        [--published CHECKOUT] [--variants ...] [--tf32 on|off] [--output FILE.json]

Variants, all with the same weights, images, loss and learning rates:

    published       with --published: the published model with its CUDA operator, and its train.py's step
    plain           that step on the published formulation of our model: OmniShift in separate branches,
                    (B, C, H, W) memory with rearranging around every mix. On CUDA with our BiWKV operator; on the
                    CPU with BiWKV in plain PyTorch, since theirs has no CPU twin
    fp32, bf16      ours, with that train.precision
    ...+compile     with train.compile
    ...+ckpt        with train.gradient_checkpointing

The published step: images arrive as float32, two Adams with torch's defaults (not fused), the clip over all
parameters, nothing read from the device. `published` or else `plain` is the baseline of the ratios.

Every variant lives in a process of its own, so that each has a peak of its own; they take turns, so that what else
the machine does falls on all alike. A turn is one step on the CPU; on CUDA one step that is not counted and
`--steps` that are, between two synchronisations, after which the process gives its free memory back to the device.
The first turn is warm-up and compilation. Times are medians of turns, ratios medians of the turns' ratios. A variant
that cannot run, for want of memory say, or computes another loss, is reported as such and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
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
from benchmarks.stepping import (  # noqa: E402
    MODELS,
    make_images,
    new_model,
    read_model_config,
    start,
    wait_for,
)
from lalic.memory import PeakMemory  # noqa: E402

BASELINES = ("published", "plain")
VARIANTS = ("plain", *(p + c + k for p in ("fp32", "bf16") for k in ("", "+ckpt") for c in ("", "+compile")))


def build_step(variant: str, arguments: argparse.Namespace) -> Any:
    """A function that does one optimiser step and returns the loss, a scalar on the device."""
    if variant in BASELINES:
        return build_baseline(variant, arguments)
    from lalic.training.step import TrainStep

    precision, *switches = variant.split("+")
    config = read_model_config(
        arguments.model,
        f"train.batch_size={arguments.batch}",
        f"train.cpu_threads={arguments.threads}",
        f"train.precision={precision}",
        f"train.compile={'compile' in switches}",
        f"train.gradient_checkpointing={'ckpt' in switches}",
    )
    accelerator = start(config, arguments.device)
    stepper = TrainStep(accelerator, new_model(config), config.train, config.loss, seed=0)
    images = make_images(arguments.batch, arguments.crop, pinned=arguments.device == "cuda")

    def step(number: int) -> Any:
        return stepper([{"x": images, "bad": 0}], step=number, lr=1e-4).values["loss"]

    return step


def build_baseline(variant: str, arguments: argparse.Namespace) -> Any:
    """The step of the published train.py, on the published model or on the plain formulation of ours."""
    import torch

    from lalic.training.distributed import seed_from

    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    config = read_model_config(arguments.model)
    model = new_model(config)
    if variant == "published":
        from benchmarks.published import load_published

        model = load_published(arguments.published, model)
    else:
        use_plain_formulation(model)
    model = model.to(arguments.device).train()
    named = dict(model.named_parameters())
    main = [named[name] for name in sorted(named) if not name.endswith(".quantiles")]
    optimizer = torch.optim.Adam(main, lr=1e-4)
    quantiles = [named[name] for name in sorted(named) if name.endswith(".quantiles")]
    aux_optimizer = torch.optim.Adam(quantiles, lr=1e-3)
    images = make_images(arguments.batch, arguments.crop).float() / 255

    def step(number: int) -> Any:
        torch.manual_seed(seed_from(0, number, 0))
        x = images.to(arguments.device)
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        output = model(x)
        bits = sum(torch.log2(p).sum() for p in output["likelihoods"].values())
        distortion = 255**2 * torch.nn.functional.mse_loss(output["x_hat"], x)
        loss = config.loss.multiplier * distortion - bits / (x.numel() / 3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        aux = model.aux_loss()
        aux.backward()
        aux_optimizer.step()
        return loss.detach()

    return step


def work(arguments: argparse.Namespace) -> None:
    """One variant: a turn for every line on stdin, a line of JSON on stdout for every turn.

    It makes itself ready before the first line comes, while the others do the same.
    """
    import torch

    cuda = arguments.device == "cuda"
    if arguments.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32 == "on"
    # What a build prints, its compiler too, must not stand between the lines.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peak, done, step, idle = PeakMemory(torch.device(arguments.device)), 0, None, 0
    problem: BaseException | None = None
    try:
        step = build_step(arguments.worker, arguments)
        idle = peak.bytes()
    except (Exception, SystemExit) as error:
        problem = error
    for _ in sys.stdin:
        try:
            if problem is not None:
                raise problem
            first = step(done) if cuda or not done else None
            warm = int(first is not None)
            wait_for(arguments.device)
            started = time.perf_counter()
            # On the CPU the first step of all is a turn of its own.
            count = arguments.steps if cuda else 1 - warm
            losses = [step(done + warm + i) for i in range(count)]
            wait_for(arguments.device)
            seconds = (time.perf_counter() - started) / max(1, count)
            loss = float(first if first is not None else losses[0])
            done += warm + count
            memory = {"peak_mib": peak.bytes() / 2**20, "idle_mib": idle / 2**20}
            reply = {"seconds": seconds, "loss": loss, **memory}
        except (Exception, SystemExit) as error:
            reply = {"error": reason(error)}
        print(json.dumps(reply), file=replies, flush=True)
        if "error" in reply:
            return
        if cuda:
            torch.cuda.empty_cache()  # the other variants need the room


def reason(error: BaseException) -> str:
    """One line on why a variant cannot run."""
    kind = "out of memory" if "out of memory" in str(error).lower() else type(error).__name__
    return f"{kind}: {' '.join(str(error).split())[:200]}"


def start_worker(variant: str, batch: int, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", variant, "--threads", str(arguments.threads)]
    command += ["--model", arguments.model, "--crop", str(arguments.crop), "--batch", str(batch)]
    command += ["--device", arguments.device, "--steps", str(arguments.steps)]
    command += ["--tf32", arguments.tf32] if arguments.tf32 else []
    command += ["--published", str(arguments.published)] if arguments.published else []
    environment = {**os.environ, **MALLOC}
    if arguments.device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", **({"LALIC_BACKEND": "torch"} if variant == "plain" else {})}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def one_turn(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """What the worker measured, or {"error": why not}."""
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write("turn\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass
    line = worker.stdout.readline()
    return json.loads(line) if line else {"error": f"the process died with status {worker.wait()}"}


def measure(batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Turns of all variants; the first of each is warm-up, and their losses must agree."""
    results: dict[str, list[dict[str, Any]]] = {v: [] for v in arguments.variants}
    errors: dict[str, str] = {}
    workers = {variant: start_worker(variant, batch, arguments) for variant in arguments.variants}
    try:
        for _ in range(arguments.rounds + 1):
            for variant in arguments.variants:
                if variant in errors:
                    continue
                turn = one_turn(workers[variant])
                if "error" in turn:
                    errors[variant] = turn["error"]
                else:
                    results[variant].append(turn)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    complete = {variant: turns for variant, turns in results.items() if variant not in errors}
    errors |= other_computations(complete)
    complete = {variant: turns for variant, turns in complete.items() if variant not in errors}
    summaries = {variant: summary(turns, batch) for variant, turns in complete.items()}
    add_ratios(summaries)
    return {**summaries, **{variant: {"error": error} for variant, error in errors.items()}}


def other_computations(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """What is wrong with the variants whose first loss is another one: their times mean nothing."""
    losses = {variant: turns[0]["loss"] for variant, turns in results.items()}
    expected = losses.get("fp32", next(iter(losses.values()), 0.0))
    problems = {}
    for variant, loss in losses.items():
        # The published operator deviates from the formula.
        tolerance = 0.05 if variant == "published" else 0.02 if variant.startswith("bf16") else 1e-3
        if not abs(loss - expected) <= tolerance * abs(expected):
            problems[variant] = f"computes another loss: {loss:.6g} instead of {expected:.6g}"
    return problems


def summary(turns: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    seconds = [s["seconds"] for s in turns[1:]]
    return {
        "images_per_second": batch / statistics.median(seconds),
        "seconds": [round(s, 5) for s in seconds],
        "peak_mib": round(turns[-1]["peak_mib"], 1),
        "idle_mib": round(turns[-1]["idle_mib"], 1),
        "first_loss": turns[0]["loss"],
    }


def add_ratios(variants: dict[str, Any]) -> None:
    """Speed-up over and memory of the baseline: `published`, else `plain`, else the first variant."""
    names = [name for name in (*BASELINES, *variants) if name in variants]
    for v in variants.values():
        base = variants[names[0]]
        v["baseline"] = names[0]
        v["speed_up"] = statistics.median(b / s for b, s in zip(base["seconds"], v["seconds"], strict=True))
        v["peak_of_base"] = v["peak_mib"] / base["peak_mib"]


def print_table(batch: int, variants: dict[str, Any]) -> None:
    """Images/s and peak memory, and their ratios to the baseline."""
    print(f"\nbatch {batch}\n{'variant':<18} {'images/s':>9} {'speed-up':>9} {'peak MiB':>9} {'of base':>8}")
    for name, v in variants.items():
        if "error" in v:
            print(f"{name:<18} {v['error']}")
            continue
        print(
            f"{name:<18} {v['images_per_second']:>9.3f} {v['speed_up']:>8.2f}x {v['peak_mib']:>9.0f} "
            f"{100 * v['peak_of_base']:>6.0f} %"
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="one or more (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a turn on CUDA (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tf32", choices=("on", "off"), help="for all variants, in place of torch's defaults")
    parser.add_argument("--published", type=Path, metavar="DIR", help="a checkout of the published code; CUDA only")
    parser.add_argument("--variants", nargs="+", choices=("published", *VARIANTS), help="default: all")
    parser.add_argument("--output", type=Path, help="write the figures and the environment as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.published and arguments.device == "cpu":
        parser.error("the published operator has no CPU form: --published needs --device cuda")
    arguments.variants = arguments.variants or [*(["published"] if arguments.published else []), *VARIANTS]
    if "published" in arguments.variants and not arguments.published:
        parser.error("the variant published needs --published DIR, a checkout of the published code")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.worker:
        (arguments.batch,) = arguments.batch
        work(arguments)
        return
    settings = {k: getattr(arguments, k) for k in ("model", "crop", "device", "rounds", "steps", "threads", "tf32")}
    environment = describe(arguments.threads, arguments.device, arguments.tf32) | {"malloc": MALLOC}
    print(", ".join(f"{k} {v}" for k, v in settings.items() if v is not None), f"on {environment['device']}")
    batches = {}
    for batch in arguments.batch:
        batches[str(batch)] = measure(batch, arguments)
        print_table(batch, batches[str(batch)])
    if arguments.output:
        from lalic.files import write_json

        command = " ".join(["python benchmarks/train_step.py", *sys.argv[1:]])
        write_json(
            arguments.output,
            {"command": command, "settings": settings, "batches": batches, "environment": environment},
        )


if __name__ == "__main__":
    main()
