"""How the CUDA kernel is compiled: nvcc for the kernels, the C++ compiler for the operator around them.

    TORCH_CUDA_ARCH_LIST   the GPU generations to compile for, as for PyTorch's own extensions ("8.0 9.0+PTX"); unset:
                           those of the GPUs of this machine, and without any (a login node) SUPPORTED
    CUDA_HOME, CUDA_PATH   the CUDA toolkit; unset: that of the nvcc on the PATH, or /usr/local/cuda

Code for the newest generation goes in as PTX too, from which the driver makes code for later ones. A library that
was built ahead of time in a shared cache is found on machines that have no toolkit.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from . import builder
from .builder import SOURCE_FOLDER, BuildError, Recipe, escape

LIBRARY = "lalic_cuda.so"
OPERATOR, KERNELS = "biwkv_cuda.cpp", "biwkv_cuda.cu"
HEADERS = (
    "biwkv_block.cuh",
    "biwkv_check.h",
    "biwkv_cuda.h",
    "biwkv_kernels.cuh",
    "biwkv_launch.cuh",
    "biwkv_run.cuh",
    "biwkv_scan.h",
    "biwkv_view.h",
)
SUPPORTED = frozenset({(8, 0), (9, 0), (10, 0)})
"""Generations compiled for when nobody says: A100, H100 and H200, B100 and B200."""

# Numbers below 2^-126 count as zero: a weight that small carries none, and the special function unit is then one
# instruction instead of four.
NVCC_FLAGS = "-std=c++17 -O3 -ftz=true"


Generations = frozenset[tuple[int, int]]


def build_cuda() -> Path:
    """`build` the CUDA library for this machine, or find one that was. Raises BuildError where that is not possible."""
    path = library_path()
    return path if path.exists() else builder.build(recipe(_chosen_generations()))


def library_path() -> Path:
    """Where the CUDA library for this torch, Python, these GPUs and sources is, or will be."""
    path = recipe(_chosen_generations()).path()
    if not path.exists() and not os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        # Built on a machine without a GPU, for all generations.
        for_all = recipe(SUPPORTED).path()
        return for_all if for_all.exists() else path
    return path


def recipe(generations: Generations) -> Recipe:
    """The CUDA library for these generations of GPUs."""
    depends_on = (builder.portable_flags(), NVCC_FLAGS, *generation_flags(generations))
    sources = (OPERATOR, KERNELS, *HEADERS)
    return Recipe("cuda", LIBRARY, sources, depends_on, lambda: _ninja_file(generations))


def nvcc() -> str:
    """The CUDA compiler. BuildError when there is none, or one of another major version than PyTorch's CUDA."""
    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError(f"this PyTorch ({torch.__version__}) is built without CUDA; install a CUDA build of it")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        program: str | None = str(Path(home) / "bin" / "nvcc")
        if not os.access(str(program), os.X_OK):
            raise BuildError(f"no CUDA compiler: {program} cannot be run; set CUDA_HOME to a CUDA toolkit")
    else:
        program = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if program is None:
        raise BuildError(f"no CUDA compiler: install the CUDA toolkit {wanted} (nvcc), or set CUDA_HOME to it")
    found = release(program)
    if found[0] != int(wanted.split(".")[0]):
        raise BuildError(
            f"{program} is of CUDA {found[0]}.{found[1]}, but this PyTorch is built for CUDA {wanted}: install that "
            "toolkit, or set CUDA_HOME to it"
        )
    return program


def toolkit() -> Path:
    """The folder with include/ and lib64/ that belongs to `nvcc()`."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), Path(nvcc()).resolve().parent.parent]
    for folder in (*candidates, "/usr/local/cuda"):
        if folder and (Path(folder) / "include" / "cuda_runtime_api.h").exists():
            return Path(folder)
    raise BuildError(f"the CUDA toolkit of {nvcc()} has no headers (cuda_runtime_api.h): set CUDA_HOME to a whole one")


def generation_flags(generations: Generations) -> list[str]:
    """nvcc's -gencode flags: code for each generation, and PTX of the newest."""
    newest = max(generations)
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in map(_name, sorted(generations))]
    return [*flags, f"-gencode=arch=compute_{_name(newest)},code=compute_{_name(newest)}"]


def _chosen_generations() -> Generations:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not listed:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return frozenset(torch.cuda.get_device_capability(i) for i in range(count)) or SUPPORTED
    found = set()
    for item in re.split(r"[\s;,]+", listed):
        match = re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", item)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed}: {item} is not a number like 9.0 or 9.0+PTX")
        found.add((int(match[1]), int(match[2])))
    return frozenset(found)


def _name(generation: tuple[int, int]) -> str:
    return f"{generation[0]}{generation[1]}"


@functools.cache
def _known_generations(program: str) -> frozenset[str]:
    return frozenset(re.findall(r"compute_(\d+)", _run(program, "--list-gpu-arch")))


@functools.cache
def _version_text(program: str) -> str:
    return _run(program, "--version")


def release(program: str) -> tuple[int, int]:
    """(major, minor) of an nvcc."""
    match = re.search(r"release (\d+)\.(\d+)", _version_text(program))
    if match is None:
        raise BuildError(f"{program} does not tell its version: set CUDA_HOME to a CUDA toolkit")
    return int(match[1]), int(match[2])


def _run(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{program} cannot be run ({error}): set CUDA_HOME to a CUDA toolkit") from error
    return done.stdout + done.stderr


def _ninja_file(generations: Generations) -> str:
    folder = toolkit()
    known = _known_generations(nvcc())
    if not any(_name(g) in known for g in generations):
        wanted = ", ".join(f"{major}.{minor}" for major, minor in sorted(generations))
        raise BuildError(f"{nvcc()} knows none of the GPU generations {wanted}: install a toolkit that fits them")
    generations = frozenset(g for g in generations if _name(g) in known)
    library_folders = [builder.torch_folder() / "lib", folder / "lib64", folder / "lib"]
    search = " ".join(f"-L{shlex.quote(str(path))}" for path in library_folders)
    host = shlex.quote(shlex.split(builder.compiler())[0])
    lines = [
        *builder.cxx_rule(builder.portable_flags(), folder / "include"),
        f"nvcc = {escape(shlex.quote(nvcc()))}",
        f"nvccflags = {NVCC_FLAGS} {' '.join(generation_flags(generations))} --threads 0 -Xcompiler -fPIC",
        f"hostflags = -ccbin {escape(host)}",
        "rule compile_kernels\n  command = $nvcc $nvccflags $hostflags -c $in -o $out",
        f"ldflags = -shared {escape(search)} -lc10 -ltorch_cpu -lc10_cuda -lcudart",
        "rule link\n  command = $cxx $in $ldflags -o $out",
        f"build operator.o: compile {escape(str(SOURCE_FOLDER / OPERATOR), path=True)}",
        f"build kernels.o: compile_kernels {escape(str(SOURCE_FOLDER / KERNELS), path=True)}",
        f"build {LIBRARY}: link operator.o kernels.o",
    ]
    return "\n".join(lines) + "\n"
