"""BiWKV on a GPU, behind `python benchmarks/biwkv.py --device cuda`: the 44 calls of one training step of LALIC.

Ours in bfloat16 with float32 w and u, as in training, beside

    floor       the time that reading and writing the tensors once takes at the rate at which this GPU copies a large
                tensor (3.0 TB/s on an H100): 6 bytes per element forward (k, v, y), 10 backward (k, v, gy, gk, gv)
    published   with --published CHECKOUT: the published CUDA kernel, with the casts to float32 and back that its code
                makes around it

Calls are queued behind a kernel that only waits, so that the GPU never waits for Python, and go over several sets of
inputs in turn, so that a call does not find its own inputs in the cache. Times are medians over interleaved rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lalic.ops  # noqa: F401 -- registers the operators

# (calls, T, C) of one training step at crop 256: g_a and g_s, h_a and h_s, the channel contexts.
CALLS = ((4, 16384, 96), (8, 4096, 144), (12, 1024, 256), (12, 64, 256), (8, 256, 320))
COPIED = 1 << 30  # elements of the copy that measures the rate, far more than the cache holds
FLOOR_BYTES = {"forward": 6, "backward": 10}
LONG = 4096  # tokens from which on a call is held against the floor
INPUT_SETS = 4
DEMANDS = {"forward": 2.0, "backward": 2.2}

Task = Callable[[int], Any]


def inputs_of(B: int, T: int, C: int, seed: int) -> tuple[Tensor, ...]:
    """w, u, k, v, gy as a training step has them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    return normal(C) / T, normal(C) / T, *(normal(B, T, C).bfloat16() for _ in range(3))


def our_tasks(sets: list[tuple[Tensor, ...]]) -> dict[str, Task]:
    """Forward and backward, after a look at their accuracy."""
    from lalic.kernels import reference

    operator, backward = torch.ops.lalic.biwkv, torch.ops.lalic.biwkv_backward
    w, u, k, v, gy = sets[0]
    y, states = operator(w, u, k, v)
    got = y, *backward(gy, w, u, k, v, states)
    wide = [x.double() for x in (w, u, k[:1], v[:1], gy[:1])]
    want = reference.running_forward(*wide[:4]), *reference.running_backward(wide[4], *wide[:4])
    for name, a, b in (("y", got[0], want[0]), ("gk", got[3], want[3]), ("gv", got[4], want[4])):
        error = ((a[:1].double() - b).norm() / b.norm()).item()
        if not error < 1e-2:  # the rounding to bfloat16 alone is 2e-3
            raise SystemExit(f"error: {name} is off by {error:.1e} of its norm; no times of wrong results")
    kept = [operator(*one[:4])[1] for one in sets]

    def run_forward(i: int) -> Any:
        return operator(*sets[i][:4])

    def run_backward(i: int) -> Any:
        w, u, k, v, gy = sets[i]
        return backward(gy, w, u, k, v, kept[i])

    return {"forward": run_forward, "backward": run_backward}


def published_tasks(operator: Any, sets: list[tuple[Tensor, ...]]) -> dict[str, Task]:
    """The published kernel between the casts of the published code."""

    def run_forward(i: int) -> Any:
        w, u, k, v, _ = sets[i]
        return operator.forward(w, u, k.float(), v.float()).bfloat16()

    def run_backward(i: int) -> Any:
        w, u, k, v, gy = sets[i]
        gw, gu, gk, gv = operator.backward(w, u, k.float(), v.float(), gy.float())
        return gw, gu, gk.bfloat16(), gv.bfloat16()

    y = run_forward(0).float()
    if not (y.isfinite().all() and y.abs().max() > 0):
        raise SystemExit("error: the published kernel gives nothing on this GPU; no times of wrong results")
    return {"published forward": run_forward, "published backward": run_backward}


def seconds_of(task: Task, repeats: int) -> float:
    """Seconds of one call, on the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # about 50 ms, in which the calls are queued
    start.record()
    for i in range(repeats):
        task(i % INPUT_SETS)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def copy_rate() -> float:
    """Bytes read and written per second by a copy of a large tensor, the fastest of some."""
    x = torch.empty(COPIED, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(seconds_of(lambda _: y.copy_(x), 3) for _ in range(5))


def measure(B: int, rounds: int, published: Path | None) -> dict[str, Any]:
    """Times of every size and of all 44 calls, and their ratios."""
    operator = None
    if published is not None:
        from benchmarks.published import load_operator

        operator = load_operator(published)
    rate = copy_rate()
    torch.cuda.empty_cache()
    rows = [measure_size(B, T, C, calls, rounds, operator, rate) for calls, T, C in CALLS]
    totals = {
        name: sum(row["calls"] * row["microseconds"][name] for row in rows) / 1e3 for name in rows[0]["microseconds"]
    }
    totals |= {
        f"floor {way}": sum(r["calls"] * r["floor_microseconds"][way] for r in rows) / 1e3 for way in FLOOR_BYTES
    }
    ratios = {}
    for row in rows:
        for way, demanded in DEMANDS.items():
            if row["T"] >= LONG:
                value = row["microseconds"][way] / row["floor_microseconds"][way]
                ratios[f"{way} / floor, T {row['T']}"] = {
                    "value": value,
                    "demanded": f"<= {demanded:g}",
                    "met": value <= demanded,
                }
    if operator is not None:
        ours, theirs = (sum(totals[f"{x}{way}"] for way in FLOOR_BYTES) for x in ("", "published "))
        ratios["all calls vs published"] = {
            "value": theirs / ours,
            "demanded": ">= 10",
            "met": theirs / ours >= 10,
        }
    return {
        "batch": B,
        "dtype": "bfloat16",
        "copy_bytes_per_second": rate,
        "sizes": rows,
        "milliseconds_of_44_calls": totals,
        "ratios": ratios,
    }


def measure_size(B: int, T: int, C: int, calls: int, rounds: int, operator: Any, rate: float) -> dict[str, Any]:
    """Times of one size."""
    sets = [inputs_of(B, T, C, seed) for seed in range(INPUT_SETS)]
    tasks = our_tasks(sets) | (published_tasks(operator, sets) if operator is not None else {})
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            spent = seconds_of(task, 4 if name.startswith("published") and T >= LONG else 20)
            if number:
                seconds[name].append(spent)
    return {
        "calls": calls,
        "T": T,
        "C": C,
        "microseconds": {name: 1e6 * statistics.median(runs) for name, runs in seconds.items()},
        "floor_microseconds": {way: 1e6 * per_element * B * T * C / rate for way, per_element in FLOOR_BYTES.items()},
    }


def print_table(result: dict[str, Any]) -> None:
    """One line per size, the sum of all calls, and the ratios with what is demanded of them."""
    print(f"floor at {result['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    names = list(result["milliseconds_of_44_calls"])
    print(f"{'calls':>5} {'T':>6} {'C':>4} " + " ".join(f"{name:>18}" for name in names))
    for row in result["sizes"]:
        times = row["microseconds"] | {f"floor {way}": t for way, t in row["floor_microseconds"].items()}
        cells = " ".join(f"{times[name]:15.1f} us" for name in names)
        print(f"{row['calls']:>5} {row['T']:>6} {row['C']:>4} {cells}")
    print(f"{'all calls':>17} " + " ".join(f"{t:15.3f} ms" for t in result["milliseconds_of_44_calls"].values()))
    for name, ratio in result["ratios"].items():
        print(f"{name:28} {ratio['value']:8.2f}x   demanded {ratio['demanded']}{'' if ratio['met'] else ', MISSED'}")
