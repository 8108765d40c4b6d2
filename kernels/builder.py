"""Compile a kernel library with ninja, once per machine, into a cache that many processes may share.

A library is built in a temporary folder and renamed into place, so it is whole or absent. Processes that want
the same library wait for the first one on a file lock that the system releases when its holder dies: a killed
build leaves nothing that could block the next one (torch.utils.cpp_extension waits forever for a file that a
killed build leaves behind). The folder's name is a hash of all that the machine code depends on, the CPU
included, because code for -march=native must not be taken from a shared home folder by another CPU.

Here is the library for CPUs; cuda_builder.py has the one for GPUs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from lalic.errors import LalicError
from lalic.files import cache_folder, fsync_folder

log = logging.getLogger("lalic.kernels")

SOURCE_FOLDER = Path(__file__).parent
CPU_SOURCES = ("biwkv_cpu.cpp",)
HEADERS = ("biwkv_check.h", "biwkv_layout.h", "biwkv_scan.h", "biwkv_strip.h", "biwkv_view.h", "biwkv_wide.h", "simd.h")
LIBRARY = "lalic_cpu.so"

# No -ffast-math: NaN, infinity and the order of sums stay as written. The first two flags only drop errno and
# floating-point traps, which nobody reads; contraction makes fused multiply-adds.
_FLAGS = "-fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
_PORTABLE_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden"
# A build folder that nobody has touched for so long belongs to a build that was killed.
_STALE_SECONDS = 3600


class BuildError(LalicError):
    """The kernel cannot be compiled on this machine; the text says why and what to do."""


class Recipe(NamedTuple):
    """How one library is compiled."""

    name: str
    """Of the kernel, for messages and for the folder in the cache."""

    library: str
    """File name."""

    sources: Sequence[str]
    """File names in SOURCE_FOLDER of all that the library is made from, headers included."""

    depends_on: Sequence[str]
    """Everything else that the machine code depends on: flags, compilers, the machine."""

    ninja_file: Callable[[], str]
    """The text of its build.ninja; may raise BuildError."""

    def path(self) -> Path:
        """Where the library is, or will be."""
        digest = hashlib.sha256()
        for part in (torch.__version__, sys.version, *self.depends_on):
            digest.update(part.encode() + b"\0")
        for name in self.sources:
            digest.update((SOURCE_FOLDER / name).read_bytes() + b"\0")
        python = f"py{sys.version_info.major}{sys.version_info.minor}"
        folder = f"lalic-{self.name}-torch{torch.__version__}-{python}-{platform.machine()}-{digest.hexdigest()[:16]}"
        return _cache_folder() / folder / self.library


def build(recipe: Recipe) -> Path:
    """Return the path of the compiled library, compiling it first if it is not there yet.

    Raises BuildError when there is no compiler or ninja, when the compiler fails, or when the cache folder
    cannot be written.
    """
    path = recipe.path()
    if path.exists():
        return path
    text, program = recipe.ninja_file(), ninja()
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent.with_name(f"{path.parent.name}.lock"), recipe.name):
            if not path.exists():
                _compile(recipe, program, text, path)
    except OSError as error:
        raise BuildError(
            f"the kernel cache {path.parent.parent} cannot be used ({error.strerror or error}); "
            "set LALIC_BUILD_DIR to a folder you can write to"
        ) from error
    return path


def cpu_recipe() -> Recipe:
    """The library for the CPU of this machine."""
    return Recipe("cpu", LIBRARY, (*CPU_SOURCES, *HEADERS), (flags(), _cpu_identity()), _cpu_ninja_file)


def build_cpu() -> Path:
    """`build` the library for the CPU of this machine."""
    return build(cpu_recipe())


def library_path() -> Path:
    """Where the CPU library for this torch, Python, CPU, these flags and these sources is, or will be."""
    return cpu_recipe().path()


def compiler() -> str:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++ on the PATH."""
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    for command in candidates:
        if shutil.which(shlex.split(command)[0]):
            return command
    if chosen:
        raise BuildError(f"no C++ compiler: CXX={chosen} cannot be run; set CXX to one that can")
    raise BuildError("no C++ compiler: install g++ or clang++, or set CXX")


def ninja() -> str:
    """The ninja program: on the PATH, or of the Python package, which a virtual environment may hide."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja as package

        found = shutil.which("ninja", path=package.BIN_DIR)
    if found is None:
        raise BuildError("no ninja: pip install ninja")
    return found


def flags() -> str:
    """The C++ compiler's flags; -march=native is spelt -mcpu=native on ARM."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return f"{portable_flags()} {_FLAGS} {native}"


def portable_flags() -> str:
    """Those of them that any source with PyTorch's headers needs, whatever the CPU."""
    return f"{_PORTABLE_FLAGS} -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"


def _cache_folder() -> Path:
    chosen = os.environ.get("LALIC_BUILD_DIR") or os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return cache_folder()


def _cpu_identity() -> str:
    """What decides the code that -march=native gives: model and instruction sets of the first CPU."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # Not the lines that change from one moment or core to the next (MHz, core id, BogoMIPS).
    stable = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0].split(":")[0].strip() in stable)


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` that ends with the process."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is compiling the %s kernel; waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Then several may compile; each publishes a whole library.
            log.warning("no file lock on %s (%s); compiling without one", path.parent, error.strerror)
        yield


def _compile(recipe: Recipe, program: str, text: str, path: Path) -> None:
    """Compile into a temporary folder beside the final one, and rename it into place."""
    folder = path.parent
    _remove_stale(folder.parent)
    log.info("compiling the %s kernel (once for this machine, about a minute) into %s", recipe.name, folder)
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    try:
        (temporary / "build.ninja").write_text(text)
        done = subprocess.run([program, "-C", str(temporary)], capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"the {recipe.name} kernel's compiler failed: {_first_error(done.stdout + done.stderr)}")
        with open(temporary / recipe.library, "rb") as library:
            os.fsync(library.fileno())
        # Every user of the cache may read it; mkdtemp is for the owner alone.
        temporary.chmod(0o755)
        if folder.exists() and not path.exists():
            shutil.rmtree(folder)  # somebody deleted the library but not its folder
        try:
            os.rename(temporary, folder)
        except OSError:
            if not path.exists():  # without a lock another process may have been first: then its library serves
                raise
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("compiled the %s kernel in %.0f s", recipe.name, time.monotonic() - started)


def _cpu_ninja_file() -> str:
    lines = [
        *cxx_rule(flags()),
        f"ldflags = -shared -fopenmp {escape('-L' + shlex.quote(str(torch_folder() / 'lib')))} -lc10 -ltorch_cpu",
        "rule link\n  command = $cxx $in $ldflags -o $out",
    ]
    objects = [Path(source).with_suffix(".o").name for source in CPU_SOURCES]
    for source, compiled in zip(CPU_SOURCES, objects, strict=True):
        lines.append(f"build {compiled}: compile {escape(str(SOURCE_FOLDER / source), path=True)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cxx_rule(flags: str, *more_includes: Path) -> list[str]:
    """Lines of a build.ninja: the rule `compile` for C++ sources that include PyTorch's headers."""
    includes = [torch_folder() / "include", torch_folder() / "include/torch/csrc/api/include", *more_includes]
    return [
        f"cxx = {escape(compiler())}",
        f"cxxflags = {flags} " + " ".join(escape(f"-isystem{shlex.quote(str(path))}") for path in includes),
        "rule compile\n  command = $cxx $cxxflags -c $in -o $out",
    ]


def torch_folder() -> Path:
    """Where PyTorch is installed."""
    return Path(torch.__file__).parent


def escape(text: str, path: bool = False) -> str:
    """`text` as a build.ninja has it; a path in a build line also hides its spaces and colons."""
    text = text.replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if path else text


def _first_error(output: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".build-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue
