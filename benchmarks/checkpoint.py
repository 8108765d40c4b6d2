"""What a checkpoint costs a training run: how long the step stands still, and how much the steps behind it slow down.

    python benchmarks/checkpoint.py [--model full] [--device cpu|cuda] [--batch 8] [--crop 256] [--ema 0.999]
        [--folder DISK] [--output FILE.json]

Variants, all of the same run (model, Adam, quantiles' Adam, random states, with --ema the averaged weights):

    asynchronous    ours: the step stands still for a copy to host memory; a thread writes, sums, syncs, reads back
    synchronous     ours, waited for
    torch.save      model and optimisers in one file, without sync: what most training programs do
    save_state      accelerate's `Accelerator.save_state`, which knows of the model and the main optimiser

In every round each variant saves once, between steps. Time lost is what the step stood still, and for `asynchronous`
also how much longer the steps took while the thread wrote than those of the round without it. The share is that of a
run with a checkpoint every `checkpoint.every` steps of the config. Before the first round a checkpoint written behind
running steps is read and compared with the state that was to be saved. The first save is reported apart: it is the one
that gets the memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout
from benchmarks.stepping import MODELS, make_images, new_model, read_model_config, start, wait_for  # noqa: E402

VARIANTS = ("asynchronous", "synchronous", "torch.save", "save_state")


class Run:
    """A model in training that can be saved in every way."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        from lalic.training.step import TrainStep
        from lalic.training.writer import CheckpointWriter

        settings = [f"train.batch_size={arguments.batch}", f"train.cpu_threads={arguments.threads}"]
        settings += [f"train.precision={arguments.precision}", f"train.ema={arguments.ema or 'null'}"]
        self.config = read_model_config(arguments.model, *settings)
        self.accelerator = start(self.config, arguments.device)
        self.stepper = TrainStep(self.accelerator, new_model(self.config), self.config.train, self.config.loss, seed=0)
        # The engine steps its optimiser itself; save_state writes what accelerate was told of.
        self.accelerator.prepare_optimizer(self.stepper.engine.optimizer)
        self.device, self.folder, self.done = arguments.device, folder, 0
        self.images = make_images(arguments.batch, arguments.crop, pinned=arguments.device == "cuda")
        self.writer = CheckpointWriter(folder)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.stepper([{"x": self.images, "bad": 0}], step=self.done, lr=1e-4)
        wait_for(self.device)
        self.done += 1
        return time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint, as the training program has them; nothing is copied yet."""
        from lalic.training.checkpoint import AVERAGED
        from lalic.training.environment import random_state

        average = self.stepper.average
        return {
            "model.pt": self.stepper.bare.state_dict(),
            "optimizer.pt": self.stepper.state_dict(),
            "rng.pt": {0: random_state(self.accelerator.device)},
            **({AVERAGED: average.model.state_dict()} if average else {}),
        }

    def begin(self) -> None:
        """Copy the state and leave the rest to the thread."""
        began = time.perf_counter()
        self.writer.start(
            self.done, tensors=self.state(), texts={}, meta={"step": self.done}, prune=forget, began=began
        )

    def torch_save(self) -> None:
        import torch

        torch.save(self.state(), self.folder / "checkpoint.pt")

    def save_state(self) -> None:
        self.accelerator.save_state(str(self.folder / "accelerate"))


def forget(run: Path, written: int) -> None:
    """Retention is not measured."""


def clean(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check(run: Run) -> float:
    """A checkpoint written while steps are taken holds what was to be saved; how long the step stood still."""
    import torch

    from lalic.training import checkpoint

    expected = flat({name: value for name, value in run.state().items() if name != "rng.pt"})
    expected = {name: tensor.detach().clone() for name, tensor in expected.items()}
    run.begin()
    run.step()
    written = run.writer.wait()
    assert written is not None and written.good, written
    path = checkpoint.folder_of(run.folder, written.step)
    found = flat({name: checkpoint.load_tensors(path, name) for name in run.state() if name != "rng.pt"})
    moved = flat({"model.pt": run.stepper.bare.state_dict()})
    same = all(torch.equal(found[name], tensor.cpu()) for name, tensor in expected.items())
    if not same or found.keys() != expected.keys():
        raise SystemExit("error: the checkpoint is not the state that was to be saved")
    if all(torch.equal(found[name], tensor.cpu()) for name, tensor in moved.items()):
        raise SystemExit("error: the step behind the checkpoint changed nothing, so nothing was tested")
    clean(run.folder)
    return written.stopped


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The tensors of a nest by their place."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name: value} if value.numel() else {}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{name}/{key}")
    return found


def save_behind(run: Run, steady: float) -> dict[str, float]:
    """One asynchronous save, with steps until it is written."""
    run.begin()
    seconds = []
    while run.writer.writing:
        seconds.append(run.step())
    written = run.writer.wait()
    assert written is not None and written.good and written.seconds is not None, written
    slower = max(0.0, sum(seconds) - steady * len(seconds))
    return {
        "stopped_s": written.stopped,
        "write_s": written.seconds,
        "steps_behind": len(seconds),
        "slower_s": slower,
        "lost_s": written.stopped + slower,
        "bytes": written.bytes,
    }


def save_and_wait(run: Run, save: Callable[[], Any]) -> dict[str, float]:
    started = time.perf_counter()
    save()
    seconds = time.perf_counter() - started
    return {"stopped_s": seconds, "lost_s": seconds, "bytes": size_of(run.folder)}


def measure(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    def waited() -> None:
        run.begin()
        run.writer.wait()

    blocking = {"synchronous": waited, "torch.save": run.torch_save, "save_state": run.save_state}
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    steps: list[float] = []
    for _ in range(arguments.rounds):
        alone = [run.step() for _ in range(arguments.steps)]
        steps += alone
        for variant in VARIANTS:
            run.step()
            if variant in blocking:
                rounds[variant].append(save_and_wait(run, blocking[variant]))
            else:
                rounds[variant].append(save_behind(run, statistics.median(alone)))
            clean(run.folder)
    step = statistics.median(steps)
    rows = {variant: summary(turns, step, run.config.checkpoint.every) for variant, turns in rounds.items()}
    return {"step_s": step, "every": run.config.checkpoint.every, "rows": rows}


def summary(turns: list[dict[str, float]], step: float, every: int) -> dict[str, float]:
    """Medians over the rounds; losses also in steps and as a share of a run."""
    row = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return {**row, "lost_steps": row["lost_s"] / step, "share": row["lost_s"] / (row["lost_s"] + every * step)}


def print_table(result: dict[str, Any]) -> None:
    print(f"\na step takes {result['step_s']:.3f} s; a checkpoint every {result['every']} steps")
    print(f"{'':<14} {'stands still':>12} {'lost':>9} {'in steps':>9} {'share':>9} {'MB':>7}")
    for name, row in result["rows"].items():
        print(
            f"{name:<14} {row['stopped_s']:>10.3f} s {row['lost_s']:>7.2f} s {row['lost_steps']:>9.2f} "
            f"{100 * row['share']:>7.3f} % {row['bytes'] / 1e6:>7.0f}"
        )
    ours = result["rows"]["asynchronous"]
    print(
        f"written in {ours['write_s']:.2f} s behind {ours['steps_behind']:.0f} steps; the first save stood still for "
        f"{result['first_stopped_s']:.2f} s; {result['host_bytes'] / 1e6:.0f} MB of host memory"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on the CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--ema", type=float, help="with an average of this decay (default: without)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round that no write is behind (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="write the figures and the environment as JSON")
    arguments = parser.parse_args(argv)
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    return arguments


def main() -> None:
    arguments = parse()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    # accelerate lists every tensor that has two names.
    logging.disable(logging.WARNING)
    environment = describe(arguments.threads, arguments.device)
    names = ("model", "device", "precision", "batch", "crop", "ema", "rounds", "steps", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    print(", ".join(f"{k} {v}" for k, v in settings.items() if v is not None), f"on {environment['device']}")
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = Run(arguments, Path(folder))
        for _ in range(2):
            run.step()
        first = check(run)
        result = {**measure(run, arguments), "first_stopped_s": first, "host_bytes": run.writer.host_bytes}
    print_table(result)
    if arguments.output:
        from lalic.files import write_json

        command = " ".join(["python benchmarks/checkpoint.py", *sys.argv[1:]])
        write_json(arguments.output, {"command": command, "settings": settings, **result, "environment": environment})


if __name__ == "__main__":
    main()
