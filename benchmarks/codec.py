"""Encoding and decoding one picture, beside the network alone and beside CompressAI's own coding of the same model.

    python benchmarks/codec.py [--model full|medium|small|demo] [--image PHOTO.png | --size 768 512] [--device cpu|cuda]
                               [--baseline compressai] [--published DIR] [--output FILE.json]

    encode, decode      lalic.codec: from the picture's tensor to strings with their checks, and back
    network             the layers that they call, with the inputs that they get, and nothing else: g_a, h_a, h_s and
                        the context and parameter networks; h_s, context and parameters, and g_s
    compressai          `--baseline compressai`: CompressAI's compress and decompress on the same model, no checks
    published           `--published DIR`, a checkout of the published code, on a GPU: its model with these weights

The entropy path is computed in float32, as CompressAI does; decode_matrix.py tells what float64 costs.
Weights are random, with a spread of the latents over the channels that gives a usual rate. Before anything is timed,
the decoded picture must be the one the encoder's latents give, and the strings those of CompressAI. Every round runs
everything once, so that what else the machine does falls on all alike; a ratio is the median of the rounds' ratios,
and beside it the ratio of the fastest runs, which a busy machine disturbs least.
Stages are timed in runs of their own, since their clocks cost something.
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
from benchmarks.stepping import MODELS  # noqa: E402
from lalic.errors import LalicError, run_main  # noqa: E402

LIMIT = 1.25
"""Encoding and decoding may take so many times the network's time, for the full model on a CPU."""

Task = Callable[[], Any]


def make_picture(image: Path | None, size: tuple[int, int]) -> Any:
    """x (1, 3, H, W) in [0, 1]: a photograph, or smooth colours of `size` (width, height) with some grain."""
    import torch

    from lalic.data.images import read_rgb
    from lalic.metrics import to_tensor

    if image:
        return to_tensor(read_rgb(image))
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size[::-1], mode="bicubic")
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def make_model(name: str, x: Any) -> Any:
    """A random model of that config whose latents of x have the statistics of a trained one, ready to code.

    Standard deviations fall from 8 in the first channels of y to nothing in the last, and the parameters predict
    them as a trained entropy model does: most strings are short, some symbols are large.
    """
    import torch

    from lalic.codec.coder import pad
    from lalic.config import read_config
    from lalic.model import LALIC

    torch.manual_seed(0)
    model = LALIC(**read_config(ROOT / "configs" / MODELS[name], []).model.arguments()).eval()
    with torch.no_grad():
        y = model.g_a(pad(x))
        wanted = 8 * torch.exp(-16.0 * torch.arange(y.shape[1]) / y.shape[1])
        gain = wanted / y.std(dim=(0, 2, 3)).clamp_min(1e-6)
        model.g_a[-1].weight.mul_(gain.view(-1, 1, 1, 1))
        model.g_a[-1].bias.mul_(gain)
        means = model.g_a(pad(x)).mean(dim=(0, 2, 3))
        start = 0
        for group, channels in zip(model.latent_codec.y.latent_codec.values(), model.config["groups"], strict=True):
            own = slice(start, start + channels)
            last = group.entropy_parameters[-1]
            last.mix.weight.mul_(0.05)
            last.value.weight.mul_(0.05)
            last.mix.bias.copy_(torch.cat([wanted[own], means[own]]))
            start += channels
    model.update()
    return model


def make_tasks(model: Any, x: Any, baseline: str | None, published: Path | None) -> tuple[dict[str, Task], Any]:
    """What is timed, after checking that all sides agree; and the coded picture."""
    import torch

    from benchmarks.codec_stages import network_alone
    from lalic.codec.bitstream import FLOAT32
    from lalic.codec.coder import cut, decode, encode, pad

    coded = encode(model, x, FLOAT32)
    decoded = decode(model, coded)
    with torch.no_grad():
        y_hat = model.messages(pad(x))[2]
        expected = cut(model.g_s(y_hat).clamp(0, 1), *x.shape[-2:])
    if not (decoded - expected).abs().max().item() <= (1e-5 if x.is_cuda else 0):
        raise LalicError("the decoded picture is not the encoder's; no times of wrong results")
    tasks: dict[str, Task] = {"encode": lambda: encode(model, x, FLOAT32), "decode": lambda: decode(model, coded)}
    tasks |= {f"network of {name}": network_alone(model, task) for name, task in list(tasks.items())}
    if baseline:
        from benchmarks.codec_baselines import compressai_tasks

        tasks |= compressai_tasks(model, pad(x), coded, decoded)
    if published:
        from benchmarks.codec_baselines import published_tasks

        tasks |= published_tasks(published, model, pad(x), decoded)
    return tasks, coded


def measure(tasks: dict[str, Task], rounds: int, wait: Task) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            wait()
            started = time.perf_counter()
            task()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Times in milliseconds; each ratio as the median over the rounds, and as that of the fastest runs."""
    pairs = {f"{name} / network": (name, f"network of {name}") for name in ("encode", "decode")}
    for other in ("compressai", "published"):
        if f"{other} encode" in seconds:
            pairs |= {f"{other} {name} / {name}": (f"{other} {name}", name) for name in ("encode", "decode")}
    ratios = {
        name: {
            "median_of_rounds": statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)),
            "of_minima": min(seconds[top]) / min(seconds[bottom]),
        }
        for name, (top, bottom) in pairs.items()
    }
    times = {n: {"median_ms": 1e3 * statistics.median(s), "min_ms": 1e3 * min(s)} for n, s in seconds.items()}
    return {"times": times, "ratios": ratios}


def stage_table(model: Any, tasks: dict[str, Task], rounds: int, wait: Task) -> dict[str, dict[str, float]]:
    """Median milliseconds by stage, of our coding and of CompressAI's where it is there."""
    from compressai.entropy_models import EntropyModel

    from benchmarks.codec_stages import time_stages
    from lalic.model.coding import Tables

    table = {}
    for name in ("encode", "decode", "compressai encode", "compressai decode"):
        if name in tasks:
            coder = (EntropyModel, ("compress", "decompress")) if " " in name else (Tables, ("encode", "decode"))
            runs = [time_stages(model, tasks[name], *coder, wait) for _ in range(rounds)]
            table[name] = {stage: 1e3 * statistics.median(r[stage] for r in runs) for stage in runs[0]}
    return table


def print_report(result: dict[str, Any]) -> None:
    where = result["environment"]
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    print(f"{device}, {where['threads']} threads, {result['model']} model, {result['picture']}")
    print(f"{result['bpp']:.3f} bpp, {result['rounds']} rounds")
    for name, row in result["times"].items():
        print(f"{name:28} {row['median_ms']:10.1f} ms median {row['min_ms']:10.1f} ms fastest")
    for name, ratio in result["ratios"].items():
        median, demanded = ratio["median_of_rounds"], result["demanded"].get(name)
        demand = f"   demanded <= {demanded:g}{', MISSED' if median > demanded else ''}" if demanded else ""
        print(f"{name:28} {median:9.3f}x median {ratio['of_minima']:9.3f}x of the fastest{demand}")
    columns = list(result["stages_ms"])
    print(f"\n{'ms by stage':22}" + "".join(f"{c:>20}" for c in columns))
    for stage in result["stages_ms"][columns[0]]:
        print(f"{stage:22}" + "".join(f"{result['stages_ms'][c][stage]:20.1f}" for c in columns))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write them where asked; 1 when a demand is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/codec.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--image", type=Path, help="a photograph; otherwise a synthetic picture")
    parser.add_argument("--size", type=int, nargs=2, default=[768, 512], metavar=("W", "H"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--baseline", choices=("compressai",))
    parser.add_argument("--published", type=Path, metavar="DIR", help="checkout of the published code (needs CUDA)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.threads, *arguments.size) < 1:
        parser.error("--rounds, --threads and --size must be positive")

    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise LalicError("--device cuda, but torch sees no CUDA device")
    if arguments.published and arguments.device != "cuda":
        raise LalicError("--published needs --device cuda: the published operator runs nowhere else")
    torch.set_num_threads(arguments.threads)
    x = make_picture(arguments.image, tuple(arguments.size))
    model = make_model(arguments.model, x).to(arguments.device)
    tasks, coded = make_tasks(model, x.to(arguments.device), arguments.baseline, arguments.published)
    on_gpu = arguments.device == "cuda"
    wait: Task = torch.cuda.synchronize if on_gpu else lambda: None
    environment = describe(arguments.threads, arguments.device)
    result = {
        "command": " ".join(["python benchmarks/codec.py", *(sys.argv[1:] if argv is None else argv)]),
        "model": arguments.model,
        "picture": f"{arguments.image.name if arguments.image else 'synthetic'} {coded.width}x{coded.height}",
        "bpp": 8 * coded.num_bytes / (coded.width * coded.height),
        "rounds": arguments.rounds,
        "environment": environment,
        **summarise(measure(tasks, arguments.rounds, wait)),
        "stages_ms": stage_table(model, tasks, max(1, arguments.rounds // 2), wait),
    }
    demanded = ["encode / network", "decode / network"] if arguments.model == "full" and not on_gpu else []
    result["demanded"] = dict.fromkeys(demanded, LIMIT)
    print_report(result)
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return 1 if any(result["ratios"][name]["median_of_rounds"] > LIMIT for name in demanded) else 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    run_main(main)
