"""BiWKV: our operator beside plain PyTorch and beside a copy of one tensor, in one interleaved run.

    python benchmarks/biwkv.py [--threads 2] [--shape 2 16384 96] [--rounds 40] [--output FILE.json]
    python benchmarks/biwkv.py --device cuda [--batch 8] [--published CHECKOUT] [--rounds 20] [--output FILE.json]

On a GPU it is beside the published kernel and the byte floor: see biwkv_cuda.py. On the CPU the baselines are:

    copy        torch copy_ of one (B, T, C) float32 tensor: what touching memory costs on this machine
    chunked     the portable PyTorch form of this package in float32 (kernels/chunked.py)
    cumsum      BiWKV by cumulative sums of e^(k + w t) in float64, differentiated by autograd: the short way of
                writing it, which needs float64 for its range

Every round runs each of them once, so that what else the machine does falls on all alike. A ratio is given twice:
the ratio of the fastest runs, which a busy machine disturbs least, and the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout

# name: (numerator, denominator, demanded, whether a larger ratio is better)
RATIOS = {
    "forward vs chunked": ("chunked forward", "forward", 10.0, True),
    "forward + backward vs cumsum": ("cumsum forward + backward", "forward + backward", 15.0, True),
    "forward / copy": ("forward", "copy", 6.0, False),
    "backward / copy": ("backward", "copy", 14.0, False),
}


def cumsum_form(w: Any, u: Any, k: Any, v: Any) -> Any:
    """BiWKV in float64 by cumulative sums from both ends. (C,), (C,), (B, T, C), (B, T, C) -> (B, T, C)."""
    import torch

    dtype = v.dtype
    w, u, k, v = (x.double() for x in (w, u, k, v))
    t = torch.arange(k.shape[1], dtype=torch.float64)[:, None]

    def both_sides(x: Any) -> Any:
        rising, falling = torch.exp(k + t * w) * x, torch.exp(k - t * w) * x
        left = (rising.cumsum(1) - rising) * torch.exp((1 - t) * w)
        right = (falling.flip(1).cumsum(1).flip(1) - falling) * torch.exp((1 + t) * w)
        return left + right

    own = torch.exp(u + k)
    return ((both_sides(v) + own * v) / (both_sides(torch.ones_like(v)) + own)).to(dtype)


def make_tasks(shape: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """What is timed, after checking that all forms agree."""
    import torch
    from lalic.kernels import reference

    from lalic.ops import biwkv

    B, T, C = shape
    generator = torch.Generator().manual_seed(0)
    w, u = (torch.randn(C, generator=generator) / T for _ in range(2))
    k, v, gy, target = (torch.randn(shape, generator=generator) for _ in range(4))
    inputs = [x.clone().requires_grad_() for x in (w, u, k, v)]

    def differentiate(form: Callable[..., Any]) -> tuple[Any, ...]:
        y = form(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, gy)

    tolerances = {"y": 1e-5, "gw": 2e-3, "gu": 2e-3, "gk": 1e-3, "gv": 1e-3}
    results = differentiate(biwkv), differentiate(cumsum_form)
    for (name, tolerance), got, want in zip(tolerances.items(), *results, strict=True):
        error = ((got - want).abs().max() / want.square().mean().sqrt()).item()
        if not error <= tolerance:
            raise SystemExit(f"error: {name} is off by {error:.1e} of its rms; no times of wrong results")

    def forward() -> Any:
        with torch.no_grad():
            return biwkv(w, u, k, v)

    _, states = torch.ops.lalic.biwkv(w, u, k, v)
    return {
        "copy": lambda: target.copy_(v),
        "forward": forward,
        "backward": lambda: torch.ops.lalic.biwkv_backward(gy, w, u, k, v, states),
        "forward + backward": lambda: differentiate(biwkv),
        "chunked forward": lambda: reference.forward(w, u, k, v),
        "chunked backward": lambda: reference.backward(gy, w, u, k, v),
        "cumsum forward + backward": lambda: differentiate(cumsum_form),
    }


def measure(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Times in milliseconds, and the ratios beside what is demanded of them."""
    times = {
        name: {"min_ms": 1e3 * min(runs), "median_ms": 1e3 * statistics.median(runs)} for name, runs in seconds.items()
    }
    ratios = {}
    for name, (top, bottom, demanded, more_is_better) in RATIOS.items():
        of_minima = min(seconds[top]) / min(seconds[bottom])
        of_rounds = statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True))
        met = of_minima >= demanded if more_is_better else of_minima <= demanded
        ratios[name] = {
            "of_minima": of_minima,
            "median_of_rounds": of_rounds,
            "demanded": f"{'>=' if more_is_better else '<='} {demanded:g}",
            "met": met,
        }
    return {"times": times, "ratios": ratios}


def run_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on the CPU and print the table."""
    import torch

    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or 40
    result = {
        "shape": dict(zip("BTC", arguments.shape, strict=True)),
        "dtype": "float32",
        "rounds": rounds,
        "environment": describe(arguments.threads),
        **summarise(measure(make_tasks(tuple(arguments.shape)), rounds)),
    }
    where = result["environment"]
    print(f"{where['cpu']}, {where['threads']} threads, float32, B T C = {arguments.shape}, {where['backend']} kernel")
    for name, row in result["times"].items():
        print(f"{name:28} {row['min_ms']:9.2f} ms fastest {row['median_ms']:9.2f} ms median")
    for name, row in result["ratios"].items():
        demand = f"demanded {row['demanded']}" + ("" if row["met"] else ", MISSED")
        print(f"{name:28} {row['of_minima']:8.1f}x  {row['median_of_rounds']:8.1f}x median   {demand}")
    return result


def run_cuda(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on the GPU and print the table."""
    from benchmarks import biwkv_cuda

    rounds = arguments.rounds or 20
    environment = describe(arguments.threads, "cuda")
    if environment["backend"] != "cuda":
        raise SystemExit("error: the CUDA kernel is not available (see `lalic kernels`); no times of something else")
    result = {
        "rounds": rounds,
        "environment": environment,
        **biwkv_cuda.measure(arguments.batch, rounds, arguments.published),
    }
    print(f"{environment['device']}, bfloat16, B = {arguments.batch}")
    biwkv_cuda.print_table(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it where asked; 1 when a demand is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/biwkv.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[2, 16384, 96], metavar=("B", "T", "C"), help="on the CPU"
    )
    parser.add_argument("--batch", type=int, default=8, help="on the GPU")
    parser.add_argument("--published", type=Path, help="on the GPU: a checkout of the published code, to compare with")
    parser.add_argument("--rounds", type=int, help="40 on the CPU, 20 on the GPU")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)

    result = run_cpu(arguments) if arguments.device == "cpu" else run_cuda(arguments)
    command = " ".join(["python benchmarks/biwkv.py", *(sys.argv[1:] if argv is None else argv)])
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, {"command": command, **result})
    return 0 if all(row["met"] for row in result["ratios"].values()) else 1


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
