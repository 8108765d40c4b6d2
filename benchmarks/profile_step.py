"""Where one training step's time goes: a table of operators, and their groups, from torch.profiler.

    python benchmarks/profile_step.py [--model full|medium|small|demo] [--crop 256] [--batch 2] [--precision bf16]
        [--optimizer muon] [--compile] [--checkpointing] [--device cuda] [--output FILE.json [--label before]]
        [--trace TRACE.json]

On the CPU times are self times of operators; on CUDA those of the kernels that an operator started. An operator
belongs to the entropy model or the optimiser when it runs inside of it, forward or backward; otherwise its name
decides. The profiler itself costs some microseconds per operator, so compare shares, and steps per second from
train_step.py. `--output` adds the table to what the file holds under other labels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout
from benchmarks.stepping import (  # noqa: E402
    MODELS,
    make_images,
    new_model,
    read_model_config,
    start,
    wait_for,
)

ENTROPY, OPTIMISER = "entropy model", "optimiser"
GROUPS = (
    ("BiWKV", r"biwkv"),
    ("compiled blocks", r"CompiledFxGraph|Torch-Compiled|CompiledFunction|^triton_|Dynamo|AOTDispatcher"),
    (OPTIMISER, r"_foreach|_fused_adam|linalg_vector_norm"),
    ("convolutions", r"conv|depthwise_kernel"),
    ("matmul", r"mm$|mm_|linear|matmul"),
    ("layer norm", r"layer_norm"),
    (
        "copies and casts",
        r"::(to|_to_copy|copy_|clone|contiguous|cat|fill_|zero_|zeros|zeros_like|empty\w*|new_\w+|slice_backward"
        r"|select_backward|constant_pad_nd|detach\w*|resolve_\w+|lift_fresh|stack|chunk|split\w*|resize_)$"
        r"|CopyBackwards|CopySlices|SliceBackward|Memcpy|Memset",
    ),
    (
        "elementwise and reductions",
        r"::(add|sub|rsub|mul|div|neg|sigmoid|relu|square|pow|sum|mean|abs|sgn|sign|exp|log|log2|erfc|tanh|softplus"
        r"|where|round|maximum|minimum|max|clamp\w*|ge|gt|lt|le|eq|threshold|reciprocal|bitwise_\w+|isfinite|uniform"
        r"|logical_\w+|sigmoid_backward|threshold_backward|tanh_backward|softplus_backward)_?$"
        r"|AccumulateGrad",
    ),
    (
        "views and autograd",
        r"::(as_strided|view|_unsafe_view|permute|transpose|t|reshape|expand\w*|slice|select|unsqueeze|squeeze|alias"
        r"|narrow|flatten|unfold|result_type|is_nonzero|item|_local_scalar_dense)_?$|^autograd::|Backward\d*$"
        r"|^_(NormedDepthwise|GatedLinear|SquaredReluMLP|Halves|Whole)$",  # what Python adds to them
    ),
)
"""Names that decide, first to last."""


def group_of(name: str) -> str:
    """The group of an operator that runs in no marked region."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


@contextmanager
def marked_regions(model: Any) -> Iterator[None]:
    """Mark in the profile what runs in the entropy models and in the loss."""
    from torch.profiler import record_function

    from lalic.training import step

    open_regions: list[Any] = []

    def enter(*_: Any) -> None:
        open_regions.append(record_function(ENTROPY).__enter__())

    def leave(*_: Any) -> None:
        open_regions.pop().__exit__(None, None, None)

    handles = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("entropy_bottleneck", "gaussian_conditional"):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    loss = step.rate_distortion

    def marked_loss(*arguments: Any) -> Any:
        with record_function(ENTROPY):
            return loss(*arguments)

    step.rate_distortion = marked_loss
    try:
        yield
    finally:
        step.rate_distortion = loss
        for handle in handles:
            handle.remove()


def attribute(events: Sequence[Any], device: str) -> dict[tuple[str, str], list[float]]:
    """{(group, operator): [self milliseconds, calls]}. Backward operators go where their forward ones ran."""

    def region_above(event: Any) -> str | None:
        while event is not None:
            if event.name == ENTROPY:
                return ENTROPY
            if event.name.startswith("Optimizer.step"):
                return OPTIMISER
            event = event.cpu_parent
        return None

    forward = {e.sequence_nr for e in events if e.sequence_nr >= 0 and region_above(e) == ENTROPY}

    def region_of(event: Any) -> str | None:
        above = event
        while above is not None:
            if above.name.startswith("autograd::engine::evaluate_function"):
                return ENTROPY if above.sequence_nr in forward else None
            above = above.cpu_parent
        return region_above(event)

    table: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type.name != "CPU":
            continue  # kernels are counted with the operator that started them
        micros = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        entry = table[region_of(event) or group_of(event.name), event.name]
        entry[0] += micros / 1e3
        entry[1] += 1
    return table


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile `arguments.steps` steps after as many that are not looked at."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from lalic.training.step import TrainStep

    settings = [f"train.batch_size={arguments.batch}", f"train.precision={arguments.precision}"]
    settings += [f"train.gradient_checkpointing={arguments.checkpointing}", f"train.cpu_threads={arguments.threads}"]
    settings += [f"train.optimizer={arguments.optimizer}", *(["train.compile=true"] if arguments.compile else [])]
    config = read_model_config(arguments.model, *settings)
    accelerator = start(config, arguments.device)
    model = new_model(config)
    images = make_images(arguments.batch, arguments.crop, pinned=arguments.device == "cuda")
    stepper = TrainStep(accelerator, model, config.train, config.loss, seed=0)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if arguments.device == "cuda" else [])

    def steps(first: int) -> float:
        started = time.perf_counter()
        for number in range(first, first + arguments.steps):
            stepper([{"x": images, "bad": 0}], step=number, lr=1e-4)
        wait_for(arguments.device)
        return (time.perf_counter() - started) / arguments.steps

    steps(0)
    seconds = steps(arguments.steps)
    with marked_regions(model), torch_profile(activities=activities) as profiler:
        steps(2 * arguments.steps)
    if arguments.trace:
        profiler.export_chrome_trace(str(arguments.trace))
    table = attribute(profiler.events(), arguments.device)
    total = sum(milliseconds for milliseconds, _ in table.values())
    groups: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for (group, _), (milliseconds, count) in table.items():
        groups[group] += milliseconds
        calls[group] += int(count)
    rows = sorted(table.items(), key=lambda item: -item[1][0])[: arguments.top]
    n = arguments.steps
    return {
        "step_ms_without_profiler": 1e3 * seconds,
        "operators_ms": total / n,
        "operator_calls": sum(calls.values()) / n,
        "groups": {
            g: {"ms": ms / n, "share": ms / total, "calls": calls[g] / n}
            for g, ms in sorted(groups.items(), key=lambda item: -item[1])
        },
        "operators": [
            {"operator": name, "group": group, "ms": ms / n, "share": ms / total, "calls": count / n}
            for (group, name), (ms, count) in rows
        ],
        "environment": describe(arguments.threads, arguments.device),
    }


def revision() -> str:
    """`git describe` of this checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def print_table(result: dict[str, Any]) -> None:
    """The groups and the top operators, per step."""
    print(f"step {result['step_ms_without_profiler']:.1f} ms; operators {result['operators_ms']:.1f} ms per step")
    print(f"{'group':<28} {'self ms':>9} {'share':>7} {'calls':>7}")
    for name, row in result["groups"].items():
        print(f"{name:<28} {row['ms']:>9.2f} {100 * row['share']:>6.1f}% {row['calls']:>7.0f}")
    print(f"\n{'operator':<52} {'group':<28} {'self ms':>9} {'share':>7} {'calls':>7}")
    for row in result["operators"]:
        name = row["operator"][:52]
        print(f"{name:<52} {row['group']:<28} {row['ms']:>9.2f} {100 * row['share']:>6.1f}% {row['calls']:>7.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="medium", help="which config's model (%(default)s)")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="adam")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=3, help="steps that are profiled (%(default)s)")
    parser.add_argument("--top", type=int, default=25, help="operators in the table (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to put the table into")
    parser.add_argument("--label", default="step", help="name of this table in the file (%(default)s)")
    parser.add_argument("--trace", type=Path, help="write a trace for chrome://tracing")
    arguments = parser.parse_args(argv)
    result = {
        "command": " ".join(["python benchmarks/profile_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "revision": revision(),
        **profile(arguments),
    }
    print(f"{arguments.model} model, crop {arguments.crop}, batch {arguments.batch}, {arguments.precision}", end="")
    print(f", {result['environment']['device']}, {arguments.threads} threads, revision {result['revision']}")
    print_table(result)
    if arguments.output:
        from lalic.files import write_json

        written = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        write_json(arguments.output, {**written, arguments.label: result})
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
