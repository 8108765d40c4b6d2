"""Peak memory and time of encoding and decoding pictures of several sizes, whole and in strips.

    python benchmarks/codec_memory.py [--model full|medium|small|demo] [--size W H ...] [--ways default whole]
                                      [--threads 2] [--device cpu|cuda] [--limit-gib 16] [--output FILE.json]

    default   as the codec does it: strips (lalic/model/strips.py) where a tensor would be larger than a limit
    whole     every layer on the whole picture at once

Each case runs in a process of its own, whose address space is limited, from an 8-bit picture to its strings and back.
Peak is all of the process's resident memory, Python, torch and the weights included, with the allocator as it is by
itself; seconds are the clock's, and the processors', which a busy machine changes less. With `--device cuda` the peak
is that of PyTorch's CUDA allocator, and nothing is limited. The weights are random, with
latents of a usual rate, the same for all sizes. Where a size is measured both ways, the second is compared with the
first: the latents y that g_a makes of the picture, and the picture that g_s makes of the first one's y_hat.
With --output, cases that the file holds already are kept, and replaced where they are measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.codec import MODELS, make_model, make_picture  # noqa: E402 -- found from the checkout
from benchmarks.machine import describe  # noqa: E402
from lalic.errors import LalicError, run_main  # noqa: E402

SIZES = [(768, 512), (1920, 1080), (3840, 2160), (8192, 8192)]
WAYS = ("default", "whole")
CALIBRATION = (768, 512)
"""Size of the picture whose latents the random weights are scaled for."""


def measure(model_name: str, size: tuple[int, int], way: str, folder: Path | None, device: str) -> dict[str, Any]:
    """Encode and decode once in this process; what comes out is left in `folder`, or compared with what is there."""
    import numpy as np
    import torch

    from lalic.codec.coder import decode_image, encode_image
    from lalic.memory import PeakMemory
    from lalic.metrics import psnr, to_rgb8
    from lalic.model import strips

    if way == "whole":
        strips.WHOLE_BYTES = 1 << 60
    model = make_model(model_name, make_picture(None, CALIBRATION)).to(device)
    rgb = to_rgb8(make_picture(None, size))
    kept: dict[str, Any] = {}
    if folder:
        model.g_a.register_forward_hook(lambda _layer, _inputs, y: kept.update(y=y.cpu().numpy().copy()))
        model.g_s.register_forward_hook(
            lambda _layer, inputs, x_hat: kept.update(y_hat=inputs[0].cpu().numpy().copy(), x_hat=x_hat.cpu().numpy())
        )
    row: dict[str, Any] = {"model": model_name, "device": device, "width": size[0], "height": size[1], "way": way}

    def timed(name: str, task: Any) -> Any:
        peak, started, worked = PeakMemory(torch.device(device)), time.perf_counter(), time.process_time()
        result = task()
        row[f"{name}_s"], row[f"{name}_cpu_s"] = time.perf_counter() - started, time.process_time() - worked
        row[f"{name}_peak_mib"] = peak.bytes() / 2**20
        print(json.dumps(row), file=sys.stderr, flush=True)
        return result

    coded = timed("encode", lambda: encode_image(model, rgb))
    y = kept.pop("y", None)
    decoded = timed("decode", lambda: decode_image(model, coded))
    row |= {"bpp": 8 * coded.num_bytes / (size[0] * size[1])}
    row["arithmetic"] = getattr(coded, "arithmetic", "float32")
    if max(size) < 8192:  # PSNR in float64 takes more memory than the codec
        row["psnr"] = psnr(rgb, decoded)
    if folder is None:
        return row
    files = {name: folder / f"{name}.npy" for name in ("y", "y_hat", "x_hat")}
    if not files["y"].exists():
        for name, values in {"y": y, "y_hat": kept["y_hat"], "x_hat": kept["x_hat"]}.items():
            np.save(files[name], values)
        return row
    first = {name: torch.from_numpy(np.load(path)) for name, path in files.items()}
    with torch.no_grad():
        x_hat = model.g_s(first["y_hat"].to(device)).clamp_(0, 1).cpu()
    row["y_largest_difference"] = (torch.from_numpy(y) - first["y"]).abs().max().item()
    row["y_rms"] = first["y"].square().mean().sqrt().item()
    row["x_hat_largest_difference"] = (x_hat - first["x_hat"].clamp(0, 1)).abs().max().item()
    return row


def run_cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every size and way in a fresh process, printed as it comes."""
    rows = []
    for size in arguments.size or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for way in arguments.ways:
                case = ["--case", arguments.model, *map(str, size), way, folder if len(arguments.ways) > 1 else ""]
                options = ["--threads", str(arguments.threads), "--device", arguments.device]
                command = [sys.executable, __file__, *options, *case]

                def limit() -> None:
                    if arguments.device == "cuda":
                        return
                    most = int(arguments.limit_gib * 2**30)
                    resource.setrlimit(resource.RLIMIT_AS, (most, most))

                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=limit)
                if done.returncode:
                    row = {"model": arguments.model, "width": size[0], "height": size[1], "way": way}
                    row["error"] = f"needs more than {arguments.limit_gib:g} GiB, or failed"
                else:
                    row = json.loads(done.stdout.splitlines()[-1])
                row["load_average"] = os.getloadavg()[0]
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, of each case the newest, in order of model, size and way."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (list(MODELS).index(row["model"]), row["width"] * row["height"], row["way"])

    return [row for _, row in sorted({key(row): row for row in (*old, *new)}.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line of JSON for each case; write them where asked."""
    parser = argparse.ArgumentParser(prog="benchmarks/codec_memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("W", "H"), help="default: four sizes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-gib", type=float, default=16, help="address space of each process (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min([arguments.threads, *(side for size in arguments.size or SIZES for side in size)]) < 1:
        parser.error("--threads and --size must be positive")

    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.case:
        model, width, height, way, folder = arguments.case
        place = Path(folder) if folder else None
        print(json.dumps(measure(model, (int(width), int(height)), way, place, arguments.device)))
        return 0
    rows = run_cases(arguments)
    if arguments.output:
        from lalic.files import write_json

        old = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
        result = {
            "command": " ".join(["python benchmarks/codec_memory.py", *(sys.argv[1:] if argv is None else argv)]),
            "environment": describe(arguments.threads, arguments.device),
            "rows": merge(old, rows),
        }
        write_json(arguments.output, result)
    if any("error" in row for row in rows):
        raise LalicError("a case failed; its error is above")
    return 0


if __name__ == "__main__":
    run_main(main)
