"""One Bi-RWKV block beside its published formulation: time, peak memory and bytes kept, in one interleaved run.

    python benchmarks/block.py [--device cpu|cuda] [--threads 2] [--case B C H W ...] [--rounds 20] [--output FILE.json]

Variants, all with the same weights, input, gradient and BiWKV operator:

    plain     the published formulation (benchmarks/plain.py)
    ours      BiRWKVBlock
    ours+ckpt the same with gradient checkpointing, where gradients are asked for

each in float32 and under bfloat16 autocast, forward alone in evaluation mode and forward + backward. Every round
runs each of them once, so that what else the machine does falls on all alike. Ratios are given twice: of the fastest
runs, which a busy machine disturbs least (this one is demanded), and the median over the rounds. Before anything is
timed, both sides must agree in float64 to 1e-12 and in float32; bfloat16 must be as near to float64 as plain is.
`kept` is what autograd holds between the passes, without the parameters; `peak` is the most that one forward +
backward takes, which checkpointing lowers only where there is more than one block; `ops` are operations on whole
tensors.
"""

from __future__ import annotations

import argparse
import copy
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

# (B, C, H, W): plain / ours in float32, forward + backward, that is demanded on a CPU
DEMANDED = {(1, 96, 128, 128): 1.3, (2, 256, 32, 32): 1.15}
PRECISIONS = ("float32", "bfloat16")
MODES = ("eval forward", "forward + backward")
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-3


def make_blocks(shape: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """The variants' modules, with random weights, all alike."""
    import torch

    from benchmarks.plain import use_plain_formulation
    from lalic.model.blocks import BiRWKVBlock

    torch.manual_seed(0)
    ours = BiRWKVBlock(shape[1]).to(device)
    with torch.no_grad():
        for gamma in (ours.gamma1, ours.gamma2):
            gamma.add_(0.3 * torch.randn_like(gamma))
    checkpointed, plain = copy.deepcopy(ours), copy.deepcopy(ours)
    checkpointed.gradient_checkpointing = True
    use_plain_formulation(plain)
    return {"plain": plain, "ours": ours, "ours+ckpt": checkpointed}


def differentiate(block: Any, x: Any, gradient: Any, precision: str = "float32") -> list[Any]:
    """Output, gradient of x, gradients of the parameters."""
    import torch

    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], gradient.to(y.dtype))]


def check(blocks: dict[str, Any], x: Any, gradient: Any) -> dict[str, float]:
    """The errors of every variant, relative to the norm of each quantity; SystemExit where one is too large."""

    def worst(values: list[Any], truth: list[Any]) -> float:
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(values, truth, strict=True))

    wide = {name: copy.deepcopy(block).double() for name, block in blocks.items()}
    truth = differentiate(wide["plain"], x.double(), gradient.double())
    of_plain = worst(differentiate(blocks["plain"], x, gradient, "bfloat16"), truth)
    errors = {"plain bfloat16": of_plain}
    for name in ("ours", "ours+ckpt"):
        errors[f"{name} float64"] = worst(differentiate(wide[name], x.double(), gradient.double()), truth)
        errors[f"{name} float32"] = worst(differentiate(blocks[name], x, gradient), truth)
        errors[f"{name} bfloat16"] = worst(differentiate(blocks[name], x, gradient, "bfloat16"), truth)
        for precision, limit in zip(
            ("float64", *PRECISIONS), (FLOAT64_TOLERANCE, FLOAT32_TOLERANCE, 1.5 * of_plain), strict=True
        ):
            if not errors[f"{name} {precision}"] <= limit:
                raise SystemExit(
                    f"error: {name} in {precision} is off by {errors[f'{name} {precision}']:.1e}; "
                    "no times of wrong results"
                )
    return errors


def make_tasks(blocks: dict[str, Any], x: Any, gradient: Any, precision: str) -> dict[tuple[str, str], Callable]:
    """(mode, variant) -> what is timed."""
    import torch

    def evaluate(block: Any) -> None:
        block.eval()
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            block(x)

    def train(block: Any) -> None:
        block.train()
        differentiate(block, x, gradient, precision)

    tasks: dict[tuple[str, str], Callable] = {}
    for mode, run in zip(MODES, (evaluate, train), strict=True):
        for name, block in blocks.items():
            if mode != "eval forward" or name != "ours+ckpt":
                tasks[mode, name] = lambda run=run, block=block: run(block)
    return tasks


def measure(tasks: dict[Any, Callable], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of every task in every round, after two rounds that are not counted."""
    import torch

    seconds: dict[Any, list[float]] = {name: [] for name in tasks}
    for round_number in range(rounds + 2):
        for name, task in tasks.items():
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                task()
                end.record()
                end.synchronize()
                taken = begin.elapsed_time(end) / 1e3
            else:
                started = time.perf_counter()
                task()
                taken = time.perf_counter() - started
            if round_number >= 2:
                seconds[name].append(taken)
    return seconds


def count(block: Any, x: Any, gradient: Any, precision: str) -> dict[str, float]:
    """Memory and operations of one forward + backward; `tensors` are of B * T * C elements in float32."""
    import torch

    from benchmarks.tensors import WholeTensorOperations, peak_bytes, saved_bytes

    block.train()
    leaf = x.detach().requires_grad_()

    def forward() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return block(leaf)

    with WholeTensorOperations(x.numel()) as operations:
        differentiate(block, x, gradient, precision)
    saved = saved_bytes(forward, list(block.parameters()))
    peak = peak_bytes(lambda: differentiate(block, x, gradient, precision), x.device)
    return {
        "saved_mib": saved / 2**20,
        "saved_tensors": saved / (4 * x.numel()),
        "peak_mib": peak / 2**20,
        "peak_tensors": peak / (4 * x.numel()),
        "operations": operations.counts.total(),
    }


def run_case(shape: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """Everything about one size."""
    import torch

    blocks = make_blocks(shape, device)
    generator = torch.Generator().manual_seed(1)
    x, gradient = (
        torch.randn(shape, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    rows, errors = [], check(blocks, x, gradient)
    for precision in PRECISIONS:
        # The layout that a side keeps between its blocks.
        inputs = {n: (x.contiguous(), gradient.contiguous()) if n == "plain" else (x, gradient) for n in blocks}
        tasks: dict[tuple[str, str], Callable] = {}
        for name, block in blocks.items():
            tasks.update(make_tasks({name: block}, *inputs[name], precision))
        seconds = measure(tasks, rounds, device)
        counts = {name: count(block, *inputs[name], precision) for name, block in blocks.items()}
        for (mode, name), runs in sorted(seconds.items(), key=lambda item: MODES.index(item[0][0])):
            base = seconds[mode, "plain"]
            row = {
                "precision": precision,
                "mode": mode,
                "variant": name,
                "min_ms": 1e3 * min(runs),
                "median_ms": 1e3 * statistics.median(runs),
                "speed_up_of_minima": min(base) / min(runs),
                "speed_up_median": statistics.median(a / b for a, b in zip(base, runs, strict=True)),
            }
            rows.append(row | (counts[name] if mode == "forward + backward" else {}))
    return {"shape": dict(zip("BCHW", shape, strict=True)), "errors": errors, "rows": rows}


def judge(case: dict[str, Any], device: str) -> dict[str, Any] | None:
    """What was demanded of this size, and whether it was met."""
    demanded = DEMANDED.get(tuple(case["shape"].values()))
    if demanded is None or device != "cpu":
        return None
    wanted = ("float32", "forward + backward", "ours")
    (row,) = (r for r in case["rows"] if (r["precision"], r["mode"], r["variant"]) == wanted)
    reached = row["speed_up_of_minima"]
    return {"speed_up": reached, "demanded": f">= {demanded:g}", "met": reached >= demanded}


def print_case(case: dict[str, Any]) -> None:
    print(" ".join(f"{k}={v}" for k, v in case["shape"].items()))
    print("  " + ", ".join(f"{name} off by {error:.1e}" for name, error in case["errors"].items()))
    print(f"  {'':40} {'fastest':>9} {'median':>9} {'speed-up':>9} {'median':>8} {'kept':>9} {'peak':>9} {'ops':>4}")
    for r in case["rows"]:
        line = f"  {r['precision']:9} {r['mode']:19} {r['variant']:10} {r['min_ms']:6.1f} ms {r['median_ms']:6.1f} ms"
        line += f" {r['speed_up_of_minima']:8.2f}x {r['speed_up_median']:7.2f}x"
        if "saved_mib" in r:
            line += f" {r['saved_mib']:5.1f} MiB {r['peak_mib']:5.1f} MiB {r['operations']:4}"
        print(line)
    if case["demand"]:
        d = case["demand"]
        print(f"  forward + backward {d['speed_up']:.2f}x, demanded {d['demanded']}{'' if d['met'] else ', MISSED'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write them where asked; 1 when a demand is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/block.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", type=int, nargs=4, action="append", metavar=("B", "C", "H", "W"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(arguments.threads)
    environment = describe(arguments.threads, arguments.device)
    print(f"{environment['device']}, {environment['cpu']}, {arguments.threads} threads, torch {torch.__version__}")
    cases = []
    for shape in arguments.case or list(DEMANDED):
        case = run_case(tuple(shape), arguments.rounds, arguments.device)
        case["demand"] = judge(case, arguments.device)
        print_case(case)
        cases.append(case)
    if arguments.output:
        from lalic.files import write_json

        command = " ".join(["python benchmarks/block.py", *(sys.argv[1:] if argv is None else argv)])
        report = {"command": command, "rounds": arguments.rounds, "environment": environment, "cases": cases}
        write_json(arguments.output, report)
    return 0 if all(case["demand"] is None or case["demand"]["met"] for case in cases) else 1


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
