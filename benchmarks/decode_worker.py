"""One process of decode_matrix.py: encodes files, decodes them, or measures what one arithmetic costs.

python benchmarks/decode_worker.py '{"task": "encode" | "decode" | "cost", "folder": ..., ...}'

The parent sets what must be set before torch starts (LALIC_BACKEND, instruction sets). The last line is the result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 -- found from the checkout
import torch  # noqa: E402

from benchmarks.codec import make_picture  # noqa: E402
from benchmarks.machine import begin_peak, memory_bytes  # noqa: E402
from lalic.codec import bitstream, coder  # noqa: E402
from lalic.errors import LalicError  # noqa: E402
from lalic.model import fingerprint, load_weights  # noqa: E402
from lalic.model.exact import Exact  # noqa: E402

ARITHMETICS = (bitstream.FLOAT64, bitstream.FLOAT32)
QUALITIES = (1, 4.3, 6)
"""That weights of several rates code every picture with."""


def configure(device: str, threads: int, onednn: bool, precision: str) -> None:
    """This process's way of computing."""
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn  # type: ignore[assignment] -- a property of the module's own class
    torch.set_float32_matmul_precision(precision)
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != "highest"


@contextmanager
def raw_parameters() -> Iterator[list[np.ndarray[Any, Any]]]:
    """All scales and means of the float64 arithmetic, before anything is decided."""
    seen: list[np.ndarray[Any, Any]] = []
    original = Exact.decide

    def decide(self: Exact, model: Any, scales: Any, means: Any) -> Any:
        seen.extend(t.detach().cpu().flatten().numpy().copy() for t in (scales, means))
        return original(self, model, scales, means)

    Exact.decide = decide  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Exact.decide = original  # type: ignore[method-assign]


def digest_of(latents: Any) -> str:
    """SHA-256 of y_hat as float64 numbers: those of float32 are among them."""
    return hashlib.sha256(latents.double().contiguous().cpu().numpy().tobytes()).hexdigest()


def encode(folder: Path, images: list[str], device: str) -> dict[str, Any]:
    """Write the files of every picture in both arithmetics; bytes, exceptions, and what latents they hold."""
    model = load_weights(folder / "model.safetensors").to(device)
    model.update()
    files = {}
    for image in images:
        x = make_picture(Path(image), (0, 0)).to(device)
        for arithmetic, quality in itertools.product(ARITHMETICS, (None,) if model.rates is None else QUALITIES):
            coded = coder.encode(model, x, arithmetic, quality=quality)
            data = bitstream.pack(coded, fingerprint(model), 0, torch.get_num_threads())
            at = "" if quality is None else f".q{quality:g}"
            name = f"{Path(image).stem}{at}.{arithmetic}.lalic"
            (folder / name).write_bytes(data)
            with raw_parameters() as seen:
                latents = coder.decode_latents(model, coded)
            np.save(folder / f"{name}.npy", _compared(latents, seen))
            strings = sum(map(len, coded.strings))
            files[name] = {
                "sha256": digest_of(latents),
                "bytes": len(data),
                "strings": strings,
                "exceptions": len(coded.exceptions),
                "bpp": 8 * len(data) / (coded.width * coded.height),
            }
    return files


def decode(folder: Path, device: str) -> dict[str, Any]:
    """What becomes of every file of the folder in this process, and how far scales and means are off."""
    model = load_weights(folder / "model.safetensors").to(device)
    model.update()
    wanted = json.loads((folder / "files.json").read_text())
    files: dict[str, Any] = {}
    for name in wanted:
        parsed = bitstream.parse((folder / name).read_bytes(), name)
        with raw_parameters() as seen:
            try:
                latents = coder.decode_latents(model, parsed.image)
            except LalicError as error:
                files[name] = {"outcome": "refused", "error": str(error)}
                continue
        equal = digest_of(latents) == wanted[name]["sha256"]
        files[name] = {"outcome": "equal" if equal else "other latents"}
        reference = folder / f"{name}.npy"
        if reference.exists():
            expected = np.load(reference)
            off = np.abs(_compared(latents, seen) - expected) / np.maximum(1, np.abs(expected))
            files[name]["largest_difference"] = float(off.max())
    return files


def _compared(latents: Any, raw: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """What is looked at for differences: the undecided parameters, or the latents of float32, which has no such."""
    return np.concatenate(raw) if raw else latents.cpu().flatten().numpy()


def cost(folder: Path, image: str, device: str, arithmetic: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of encode and decode, wall and CPU, and by how much the process grew at its peak, in MB."""
    model = load_weights(folder / "model.safetensors").to(device)
    model.update()
    x = make_picture(Path(image), (0, 0)).to(device)
    before = begin_peak()  # without what loading the weights left
    walls: dict[str, list[float]] = {"encode": [], "decode": []}
    cpus: dict[str, list[float]] = {"encode": [], "decode": []}
    quality = None if model.rates is None else QUALITIES[1]
    coded = coder.encode(model, x, arithmetic, quality=quality)
    tasks = {
        "encode": lambda: coder.encode(model, x, arithmetic, quality=quality),
        "decode": lambda: coder.decode(model, coded).sum().item(),
    }
    for number in range(rounds + 1):
        for name, task in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            if number:
                walls[name].append(1e3 * (time.perf_counter() - wall))
                cpus[name].append(1e3 * (time.process_time() - cpu))
    result: dict[str, Any] = {"peak_mb": (memory_bytes("VmHWM") - before) / 1e6}
    for name in walls:
        result |= {f"{name}_ms": walls[name], f"{name}_cpu_ms": cpus[name]}
        result |= {f"{name}_ms_median": statistics.median(walls[name])}
        result |= {f"{name}_cpu_ms_median": statistics.median(cpus[name])}
    return result


def main() -> None:
    """Do the task of the JSON argument; its result is the last line."""
    order = json.loads(sys.argv[1])
    configure(order["device"], order["threads"], order["onednn"], order["precision"])
    result = {}
    for name in order["folders"]:
        folder = Path(name)
        if order["task"] == "encode":
            result[folder.name] = encode(folder, order["images"], order["device"])
        elif order["task"] == "decode":
            result[folder.name] = decode(folder, order["device"])
        else:
            arguments = order["images"][0], order["device"], order["arithmetic"], order["rounds"]
            result[folder.name] = cost(folder, *arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
