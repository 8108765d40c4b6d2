"""Files of one process decoded in others that compute differently: which latents come out, and what that costs.

    python benchmarks/decode_matrix.py [--model medium stress full BUNDLE ...] [--images PHOTO.png ...]
                                       [--device cpu|cuda] [--few] [--rounds N] [--output FILE.json]
    python benchmarks/decode_matrix.py --write FOLDER ...          encode only, keep the files
    python benchmarks/decode_matrix.py --read FOLDER ...           decode only: on another machine, on another device

One fresh process encodes every picture in both arithmetics with two threads, oneDNN, the C++ BiWKV and float32's
default precision. Fresh processes decode them over threads x oneDNN x BiWKV backend x precision of float32 matrix
products, and with the instruction sets of older processors. Of every decoded file: are the latents those of the
encoder, bit by bit? With float32 arithmetic as the control: how many are refused, and how many come out as other
latents, which have the same symbols and tables, but means with float32's noise.

Models: `medium` and `full` are random with the statistics of trained ones (codec.py), others are bundles. `NAME*2` has
all matrices of its entropy path doubled, which takes a trained one's parameters from ten to thousands and its rounding
from 1e-15 to 1e-12; `stress` is `medium*2`. `NAME+rates` has gains for the six rungs of the ladder; it, and a bundle of
several rates, writes files of three qualities. The *largest difference* between encoder and decoder is that of a scale
or mean before any decision, or with float32 that of a latent, in units of the value where that is above 1, as the
tolerance of lalic/model/exact.py: it must be much smaller. Times and memory are measured apart, `--rounds N`, since
they want a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout
from lalic.errors import LalicError, run_main  # noqa: E402

BASE = {"processor": "as it is", "threads": 2, "onednn": True, "backend": "cpp", "precision": "highest"}
OLDER = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4.2": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
STRESS = 2.0


def configurations(device: str, few: bool = False) -> list[dict[str, Any]]:
    """All ways of decoding that this device has, or a `few` that differ from the encoder's in one point each."""
    if device == "cuda":
        grid = itertools.product(("cuda", "torch"), ("highest", "high"))
        return [{**BASE, "threads": 1, "backend": backend, "precision": precision} for backend, precision in grid]
    keys = ("threads", "onednn", "backend", "precision")
    grid = itertools.product((2, 1), (True, False), ("cpp", "torch"), ("highest", "medium"))
    everywhere = [{**BASE, **dict(zip(keys, values, strict=True))} for values in grid]
    if few:
        everywhere = [c for c in everywhere if sum(c[key] != BASE[key] for key in keys) <= 1]
    return [*everywhere, *({**BASE, "processor": name} for name in OLDER)]


def make_models(names: Sequence[str], image: Path, folder: Path) -> list[Path]:
    """A folder with `model.safetensors` for every model."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.codec import MODELS, make_model, make_picture
    from lalic.model import load_weights, published_state_dict

    made = []
    for name in names:
        name, _, factor = (f"medium*{STRESS}" if name == "stress" else name).partition("*")
        base = name.removesuffix("+rates")
        model = make_model(base, make_picture(image, (0, 0))) if base in MODELS else load_weights(name)
        if base in MODELS and base != name:
            model = with_rates(model)
        if factor:
            codec = model.latent_codec
            with torch.no_grad():
                for parameter in (*codec.hyper.h_s.parameters(), *codec.y.parameters()):
                    if parameter.ndim > 1:
                        parameter.mul_(float(factor))
        target = folder / (Path(name).name + (f" x {float(factor):g}" if factor else ""))
        target.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().clone().contiguous() for key, value in published_state_dict(model).items()}
        save_file(state, target / "model.safetensors")
        made.append(target)
    return made


def with_rates(model: Any) -> Any:
    """The model of one rate with gains for the six rungs of the ladder, as they are before training."""
    from lalic.ladder import MSE
    from lalic.model import LALIC

    several = LALIC(**model.config, rungs=tuple(MSE)).eval()
    several.load_state_dict(model.state_dict(), strict=False)
    assert several.rates is not None
    several.rates.initialise(list(MSE.values()))
    return several


def work(configuration: dict[str, Any], device: str, **order: Any) -> dict[str, Any]:
    """The result of a fresh process of decode_worker.py."""
    environment = os.environ | MALLOC | OLDER.get(configuration["processor"], {})
    environment |= {"LALIC_BACKEND": configuration["backend"], "OMP_WAIT_POLICY": "PASSIVE"}
    settings = {key: configuration[key] for key in ("threads", "onednn", "precision")}
    order = {"device": device, **settings, **order, "folders": [str(f) for f in order["folders"]]}
    command = [sys.executable, str(ROOT / "benchmarks" / "decode_worker.py"), json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LalicError(f"{configuration} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(folders: Sequence[Path], images: Sequence[Path], device: str) -> None:
    """Encode in one process; `files.json` in every folder tells what must come out."""
    from lalic.files import write_json

    base = BASE if device == "cpu" else configurations(device)[0]
    made = work(base, device, task="encode", folders=folders, images=[str(i.resolve()) for i in images])
    for folder in folders:
        write_json(folder / "files.json", made[folder.name])


def read(folders: Sequence[Path], device: str, few: bool) -> list[dict[str, Any]]:
    """One row for every configuration: outcomes of the files of each arithmetic, over all models."""
    rows = []
    for configuration in configurations(device, few):
        results = work(configuration, device, task="decode", folders=folders)
        row: dict[str, Any] = {**configuration, "models": {}}
        for model, files in results.items():
            row["models"][model] = {
                arithmetic: dict(Counter(f["outcome"] for name, f in files.items() if f".{arithmetic}." in name))
                for arithmetic in ("float64", "float32")
            }
            row["models"][model]["largest_difference"] = {
                a: max((f.get("largest_difference", 0.0) for name, f in files.items() if f".{a}." in name), default=0.0)
                for a in ("float64", "float32")
            }
            row["models"][model]["errors"] = sorted({f["error"] for f in files.values() if "error" in f})
        rows.append(row)
        print_row(row)
    return rows


def rates(folder: Path) -> dict[str, Any]:
    """Bytes of all pictures in both arithmetics, and what the float64 ones cost more, exceptions included."""
    files = json.loads((folder / "files.json").read_text())
    total = {
        key: {a: sum(f[key] for name, f in files.items() if f".{a}." in name) for a in ("float64", "float32")}
        for key in ("bytes", "strings", "exceptions")
    }
    pairs = [(f["bytes"], files[n.replace("float64", "float32")]["bytes"]) for n, f in files.items() if "float64" in n]
    return {
        "images": len(pairs),
        "bpp": sum(f["bpp"] for name, f in files.items() if "float64" in name) / len(pairs),
        **total,
        "more_percent": 100 * (total["bytes"]["float64"] / total["bytes"]["float32"] - 1),
        "more_percent_worst": max(100 * (a / b - 1) for a, b in pairs),
    }


def costs(folders: Sequence[Path], image: Path, device: str, rounds: int) -> dict[str, Any]:
    """Times and memory by model and arithmetic; a process of its own for each, so that peaks are its own."""
    base = BASE if device == "cpu" else configurations(device)[0]
    found: dict[str, Any] = {folder.name: {} for folder in folders}
    for folder in folders:
        for arithmetic in ("float32", "float64"):
            order = {"task": "cost", "arithmetic": arithmetic, "rounds": rounds, "images": [str(image.resolve())]}
            found[folder.name][arithmetic] = work(base, device, folders=[folder], **order)[folder.name]
    return found


def print_row(row: dict[str, Any]) -> None:
    name = ", ".join(f"{key} {value}" for key, value in row.items() if key != "models")
    print(name)
    for model, found in row["models"].items():
        print(f"    {model}: float64 {found['float64']}, float32 {found['float32']}, {found['largest_difference']}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the matrix, write it where asked; 1 when a float64 file did not decode to the encoder's latents."""
    parser = argparse.ArgumentParser(prog="benchmarks/decode_matrix.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["medium", "stress"], help="names of configs, stress, or bundles")
    parser.add_argument("--images", nargs="+", type=Path, help="photographs to encode")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--few", action="store_true", help="differ from the encoder in one point at a time")
    parser.add_argument("--rounds", type=int, help="measure times and memory instead of the matrix, over N rounds")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="encode into this folder and end")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="decode what --write left there")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if not arguments.read and not arguments.images:
        parser.error("--images are needed, unless files are --read")

    from lalic.files import write_json
    from lalic.model.exact import STEP, TOLERANCE

    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.read or arguments.write or Path(scratch)
        if arguments.read:
            folders = sorted(f.parent for f in place.glob("*/files.json"))
            if not folders:
                raise LalicError(f"{place} holds no files of --write")
        else:
            folders = make_models(arguments.model, arguments.images[0], place)
            write(folders, arguments.images, arguments.device)
        if arguments.write:
            print(f"{place}: {', '.join(f.name for f in folders)}")
            return 0
        timed = {}
        if arguments.images and arguments.rounds:
            timed = costs(folders, arguments.images[0], arguments.device, arguments.rounds)
        result = {
            "command": " ".join(["python benchmarks/decode_matrix.py", *(sys.argv[1:] if argv is None else argv)]),
            "environment": describe(2, arguments.device) | {"malloc": MALLOC},
            "tolerance": TOLERANCE,
            "step": STEP,
            "images": [image.name for image in arguments.images or []],
            "encoded_on": "another machine" if arguments.read else arguments.device,
            "rates": {folder.name: rates(folder) for folder in folders},
            "costs": timed,
            "matrix": [] if arguments.rounds else read(folders, arguments.device, arguments.few),
        }
    if arguments.output:
        write_json(arguments.output, result)
    wrong = [row for row in result["matrix"] for m in row["models"].values() if set(m["float64"]) != {"equal"}]
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
