"""Adam beside Muon: the loss on held-out photographs over steps and over time, four learning rates each.

    python benchmarks/optimizers.py bsds500 --work runs/optimizers [--staged] [--output FILE.json] [--picture FILE.png]

One rate (q4), new weights, float32, a constant learning rate after a short warm-up, averaged weights (short_runs.py).
Every learning rate is trained with every seed; a seed sets weights, order, crops and noise, the same for both
optimisers. `--staged` is the plan for small machines, with the first seed: Adam's rates for a sixth of its steps, the
better half of them to the end; Muon's rates for a twelfth of Adam's steps, the better half for a sixth, the best one to
the end. The best one of each is then trained with the other seeds.

The question, seed by seed: after which part of Adam's time has Muon the least loss that any of Adam's runs with that
seed has on its way? Time is told
in two ways: processor seconds of the runs, each on one thread, and wall-clock time on two cores, which is steps times
the duration of a step as both optimisers take them in turns in one process of two threads (median of the turns'
ratios). Ends with 1 when the
median over the seeds is above `--limit` of the wall-clock time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout
from benchmarks.short_runs import Recipe, Setup, add_arguments, setup_of, train  # noqa: E402
from lalic.errors import LalicError, run_main  # noqa: E402
from lalic.files import write_json  # noqa: E402

Points = list[dict[str, Any]]
Runs = dict[str, dict[float, dict[int, Points]]]
"""{optimiser: {learning rate: {seed: points}}}."""

OPTIMIZERS = ("adam", "muon")


def loss_of(points: Points, quality: int) -> float:
    """On the held-out photographs at the last point; infinite when it is no number."""
    loss = points[-1]["heldout"][str(quality)]["loss"]
    return float(loss) if loss == loss else float("inf")


def run_all(
    setup: Setup, arguments: argparse.Namespace, optimizer: str, goals: Mapping[int, float] | None = None
) -> tuple[float, dict[float, dict[int, Points]]]:
    """All runs of one optimiser, as planned, and its best learning rate.

    `goals`: of each seed a loss at which runs with the best rate of the staged plan end.
    """
    rates, seeds, quality = getattr(arguments, f"{optimizer}_rates"), arguments.seeds, arguments.quality
    steps = getattr(arguments, f"{optimizer}_steps")
    found: dict[float, dict[int, Points]] = {rate: {} for rate in rates}

    def run(rate: float, seed: int, until: int, goal: float = -1.0) -> None:
        recipe = Recipe(optimizer, rate, quality, seed)
        found[rate][seed] = train(setup, recipe, until, lambda point: loss_of([point], quality) <= goal)

    if not arguments.staged:
        for rate in rates:
            for seed in seeds:
                run(rate, seed, steps)
        return best_rate(found, quality), found
    going = list(rates)
    for until in screening(optimizer, arguments):
        for rate in going:
            run(rate, seeds[0], until)
        going.sort(key=lambda rate: loss_of(found[rate][seeds[0]], quality))
        going = going[: -(-len(going) // 2)]
    for seed in seeds:
        run(going[0], seed, steps, (goals or {}).get(seed, -1.0))
    return going[0], found


def screening(optimizer: str, arguments: argparse.Namespace) -> list[int]:
    """Steps at which the worse half of the learning rates is left behind.

    The last two of Adam's go to the end: one that is good at first may be too high later.
    """
    first = arguments.adam_steps // (6 if optimizer == "adam" else 12)
    steps = getattr(arguments, f"{optimizer}_steps")
    halvings = max(1, (len(getattr(arguments, f"{optimizer}_rates")) - 1).bit_length())
    found = [min(first * 2**i, steps) for i in range(halvings)]
    return [*found[:-1], steps] if optimizer == "adam" else found


def best_rate(runs: Mapping[float, Mapping[int, Points]], quality: int) -> float:
    """The learning rate with the least median loss at the end."""
    return min(runs, key=lambda rate: statistics.median(loss_of(points, quality) for points in runs[rate].values()))


def goals_of(runs: Mapping[float, Mapping[int, Points]], quality: int) -> dict[int, float]:
    """Of each seed the least loss that a run has at any of its points."""
    seeds: dict[int, list[dict[str, Any]]] = {}
    for of_rate in runs.values():
        for seed, points in of_rate.items():
            seeds.setdefault(seed, []).extend(points)
    return {seed: min(loss_of([point], quality) for point in points) for seed, points in seeds.items()}


def reach(adam: Points, muon: Points, goal: float, quality: int) -> dict[str, Any]:
    """Where Muon first has the loss `goal`: the first point at or below it; None for never. Shares are of `adam`."""
    reached = next((p for p in muon if p["heldout"][str(quality)]["loss"] <= goal), None)
    row: dict[str, Any] = {
        "loss": goal,
        "adam_end": loss_of(adam, quality),
        "adam_steps": adam[-1]["step"],
        "adam_seconds": adam[-1]["seconds"],
    }
    if reached is None:
        return {**row, "steps": None, "seconds": None, "of_steps": None, "of_seconds": None}
    return {
        **row,
        "steps": reached["step"],
        "seconds": reached["seconds"],
        "of_steps": reached["step"] / row["adam_steps"],
        "of_seconds": reached["seconds"] / row["adam_seconds"],
    }


def compare(runs: Runs, rates: Mapping[str, float], speed: Mapping[str, Any], quality: int) -> dict[str, Any]:
    """Muon's best learning rate against Adam's, seed by seed, and the medians over the seeds."""
    adam, muon = (runs[optimizer][rates[optimizer]] for optimizer in OPTIMIZERS)
    goals, ratio = goals_of(runs["adam"], quality), speed["muon"]["ratio"]
    seeds = {}
    for seed in adam:
        row = reach(adam[seed], muon[seed], goals[seed], quality)
        row["of_wall_clock"] = None if row["of_steps"] is None else row["of_steps"] * ratio
        seeds[str(seed)] = row
    shares = ("of_steps", "of_seconds", "of_wall_clock")
    # A seed that never gets there is worse than any that does.
    medians = {n: statistics.median(float("inf") if r[n] is None else r[n] for r in seeds.values()) for n in shares}
    return {
        "rates": dict(rates),
        "seeds": seeds,
        "median": {n: v if v < float("inf") else None for n, v in medians.items()},
    }


def measure_speed(
    setup: Setup, recipes: Mapping[str, Recipe], threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Of a step of every optimiser, which take turns in a process of their own: median and least milliseconds, and the
    median of the turns' ratios to the first optimiser."""
    return _apart(_speed, replace(setup, threads=threads), dict(recipes), rounds)


def measure_memory(setup: Setup, recipe: Recipe) -> dict[str, float]:
    """Of a process that trains alone for five steps: peak of its resident memory, size of the optimiser's state."""
    return _apart(_memory, setup, recipe)


def _apart(function: Any, *arguments: Any) -> Any:
    """The function's result, computed in a fresh process."""
    # Threads that spin while they wait for a core take it from the one they wait for.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _stepper(setup: Setup, recipe: Recipe) -> Any:
    """One step of the recipe on the same images each time."""
    import torch

    from benchmarks.stepping import make_images, start
    from lalic.training.inputs import new_model
    from lalic.training.step import TrainStep

    config = setup.run_config(recipe)
    accelerator = start(config, "cpu")
    torch.manual_seed(0)
    stepper = TrainStep(accelerator, new_model(config), config.train, config.loss, seed=0)
    images = make_images(setup.batch, setup.crop)

    def step(number: int) -> Any:
        stepper([{"x": images}], step=number, lr=recipe.lr)
        return stepper

    return step


def _speed(setup: Setup, recipes: Mapping[str, Recipe], rounds: int) -> dict[str, dict[str, float]]:
    steps = {name: _stepper(setup, recipe) for name, recipe in recipes.items()}
    times: dict[str, list[float]] = {name: [] for name in recipes}
    for number in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            times[name].append(time.perf_counter() - started)
    base, *_ = times
    return {
        name: {
            # The first two turns allocate.
            "ms": 1e3 * statistics.median(row[2:]),
            "fastest_ms": 1e3 * min(row[2:]),
            "ratio": statistics.median(a / b for a, b in zip(row[2:], times[base][2:], strict=True)),
        }
        for name, row in times.items()
    }


def _memory(setup: Setup, recipe: Recipe) -> dict[str, float]:
    import torch

    from lalic.memory import PeakMemory

    step = _stepper(setup, recipe)
    peak = PeakMemory(torch.device("cpu"))
    for number in range(5):
        stepper = step(number)
    return {"peak_mib": peak.bytes() / 2**20, "state_mib": _bytes(stepper.state_dict()["main"]) / 2**20}


def _bytes(state: Any) -> int:
    """Of all tensors in a nested state."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, parts))


def draw(path: Path, runs: Runs, compared: Mapping[str, Any], quality: int) -> None:
    """Loss over steps, and over processor seconds: the chosen rates with all seeds in colour, the others pale."""
    from lalic.drawing import COLOURS, figure, quiet_axes

    with figure(path, 7.2, 3.2) as drawn:
        panels = drawn.subplots(1, 2, sharey=True)
        for optimizer, colour in zip(OPTIMIZERS, (COLOURS[1], COLOURS[0]), strict=True):
            for rate, seeds in runs[optimizer].items():
                chosen = rate == compared["rates"][optimizer]
                for n, points in enumerate(seeds.values()):
                    losses = [p["heldout"][str(quality)]["loss"] for p in points]
                    label = f"{optimizer.capitalize()}, {rate:g}" if chosen and not n else None
                    look = {"color": colour, "linewidth": 1.2 if chosen else 0.7, "alpha": 1 if chosen else 0.35}
                    for axes, key in zip(panels, ("step", "seconds"), strict=True):
                        axes.plot([p[key] for p in points], losses, label=label, **look)
        for axes, title in zip(panels, ("steps of 8 crops", "processor seconds, one thread"), strict=True):
            axes.set_xlabel(title)
            axes.set_yscale("log")
            axes.set_ylim(top=8)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            quiet_axes(axes)
        panels[0].set_ylabel(f"loss at q{quality} on held-out photographs")
        panels[0].legend(frameon=False)


def report(result: Mapping[str, Any]) -> str:
    """The figures in lines."""
    compared, speed, memory = result["compared"], result["speed"], result["memory"]
    lines = []
    for name in OPTIMIZERS:
        lines.append(
            f"{name} at {compared['rates'][name]:g}: {speed[name]['ms']:.0f} ms a step on "
            f"{result['speed_threads']} threads, peak {memory[name]['peak_mib']:.0f} MiB, of the optimiser's state "
            f"{memory[name]['state_mib']:.1f} MiB"
        )
    for seed, row in compared["seeds"].items():
        begin = f"seed {seed}: Adam within {row['adam_steps']} steps: loss {row['loss']:.3f}; Muon"
        lines.append(
            f"{begin} never has it"
            if row["steps"] is None
            else f"{begin} has it after {row['steps']} steps ({row['of_steps']:.1%}), {row['of_seconds']:.1%} of the "
            f"processor time, {row['of_wall_clock']:.1%} of the wall-clock time on {result['speed_threads']} cores"
        )
    shares = (f"{n.replace('_', ' ')} {'never' if v is None else f'{v:.1%}'}" for n, v in compared["median"].items())
    return "\n".join([*lines, f"median: {', '.join(shares)}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, print the figures, write them; 1 when the limit is missed."""
    arguments = _parser().parse_args(argv)
    if min(arguments.adam_steps, arguments.muon_steps, arguments.rounds) < 1:
        raise LalicError("--adam-steps, --muon-steps and --rounds must be at least 1")
    if arguments.stop and not arguments.staged:
        raise LalicError("--stop goes with --staged: the grid compares the ends of its runs")
    setup = setup_of(arguments)
    runs: Runs = {}
    rates: dict[str, float] = {}
    for optimizer in arguments.optimizers:
        goals = None
        if arguments.stop and "adam" in runs:
            goals = goals_of(runs["adam"], arguments.quality)
        rates[optimizer], runs[optimizer] = run_all(setup, arguments, optimizer, goals)
    if len(runs) < len(OPTIMIZERS):
        return 0
    best = {name: Recipe(name, rates[name], arguments.quality, 0) for name in OPTIMIZERS}
    speed = measure_speed(setup, best, arguments.speed_threads, arguments.rounds)
    compared = compare(runs, rates, speed, arguments.quality)
    words = sys.argv[1:] if argv is None else argv
    result = {
        "command": " ".join(["python benchmarks/optimizers.py", *words]),
        "environment": describe(setup.threads),
        "settings": {**setup.facts(), "quality": arguments.quality, "staged": arguments.staged},
        "clock": "processor time of one process of one thread: data and step, without measuring",
        "limit": arguments.limit,
        "compared": compared,
        "speed": speed,
        "speed_threads": arguments.speed_threads,
        "memory": {name: measure_memory(setup, recipe) for name, recipe in best.items()},
        "runs": {o: {f"{r:g}": {str(s): p for s, p in ss.items()} for r, ss in rs.items()} for o, rs in runs.items()},
    }
    print(report(result))
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.picture:
        draw(arguments.picture, runs, compared, arguments.quality)
    share = compared["median"]["of_wall_clock"]
    if share is None or share > arguments.limit:
        print(f"error: Muon takes more than {arguments.limit:.0%} of Adam's wall-clock time", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/optimizers.py", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--adam-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], metavar="LR")
    parser.add_argument("--muon-rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2], metavar="LR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--adam-steps", type=int, default=3000, help="in which Adam has the loss that Muon is to reach (%(default)s)"
    )
    parser.add_argument("--muon-steps", type=int, default=1200, help="at most (%(default)s)")
    parser.add_argument(
        "--stop", action="store_true", help="with --staged: end Muon's runs at the loss that they are to reach"
    )
    parser.add_argument("--staged", action="store_true", help="the plan for small machines (above)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="train these alone")
    parser.add_argument("--speed-threads", type=int, default=2, help="of the process that times steps (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns in which steps are timed (%(default)s)")
    parser.add_argument("--limit", type=float, default=0.35, help="most of Adam's wall-clock time (%(default)s)")
    return parser


if __name__ == "__main__":
    run_main(main)
