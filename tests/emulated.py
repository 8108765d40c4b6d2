"""The CUDA kernels of BiWKV on the CPU: compiled for the host, their threads emulated (emulated_cuda/emulator.h)."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from lalic.kernels import builder
from torch import Tensor

FOLDER = Path(__file__).parent / "emulated_cuda"
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}

# A failed assumption ends the program: out of bounds, uninitialised by way of NaN, undefined behaviour.
_FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cuda_headers() -> Path:
    """The folder of CUDA's headers, beside nvcc; skips the test where there is none."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    roots = [Path(nvcc).resolve().parent.parent, *sorted(Path("/usr/local").glob("cuda*"))]
    for root in roots:
        if (root / "include" / "cuda_bf16.h").exists():
            return root / "include"
    pytest.skip("no CUDA toolkit here, and so no headers of its number types")


def build(kernels: Path, place: Path) -> Path:
    """Compile the emulation of the kernels in a folder to `place`."""
    command = [builder.compiler(), *_FLAGS, "-I", str(kernels), "-isystem", str(cuda_headers())]
    done = subprocess.run([*command, "-o", str(place), str(FOLDER / "run.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@functools.cache
def program() -> Path:
    """The compiled emulation, once for these sources on this machine."""
    sources = [FOLDER / "run.cpp", FOLDER / "emulator.h", *sorted(builder.SOURCE_FOLDER.glob("*.*h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"lalic-emulated-{digest}" / "run"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        build(builder.SOURCE_FOLDER, place.with_name(f"run-{os.getpid()}")).rename(place)
    return place


def run(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor, order: str = "shuffled", executable: Path | None = None
) -> tuple[Tensor, ...]:
    """(y, gw, gu, gk, gv) of the CUDA kernels; k, v and gy with one layout, which the kernels get as it is.

    Raises CalledProcessError when the kernels do what a GPU, or the sanitizer, does not allow.
    """
    scalar = torch.float64 if k.dtype == torch.float64 else torch.float32
    strides = k.stride()
    assert v.stride() == gy.stride() == strides
    room = sum((n - 1) * s for n, s in zip(k.shape, strides, strict=True)) + 1
    arrays = [w.to(scalar), u.to(scalar), *(torch.as_strided(x, (room,), (1,)) for x in (k, v, gy))]
    B, T, C = k.shape
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "in", Path(folder) / "out"
        given.write_bytes(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in arrays))
        layout = ",".join(map(str, strides))
        command = [executable or program(), TYPES[k.dtype], B, T, C, ORDERS[order], layout, given, got]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr)
            done.check_returncode()
        raw = bytearray(got.read_bytes())
    results, offset = [], 0
    for shape, dtype in [((B, T, C), k.dtype), ((C,), scalar), ((C,), scalar), *[((B, T, C), k.dtype)] * 2]:
        count = torch.Size(shape).numel()
        results.append(torch.frombuffer(raw, dtype=dtype, count=count, offset=offset).view(shape).clone())
        offset += count * dtype.itemsize
    assert offset == len(raw)
    return tuple(results)
