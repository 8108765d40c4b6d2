"""Files that a killed compiler left half written in torch's cache do not end the next run.

This file is also the program that the slow test starts: `python tests/test_compile_cache.py ours` compiles as a run
does before its first step, `... torch` as torch does by itself.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lalic.training.compile_cache import remove_half_written, remove_precompiled_headers


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A shared library, as the compiler writes it."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.cpp").write_text("#include <vector>\nint size(const std::vector<int>& v) { return v.size(); }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", folder / "a.so", folder / "a.cpp"], check=True)
    return (folder / "a.so").read_bytes()


def put(cache: Path, name: str, content: bytes) -> Path:
    path = cache / name[1:3] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_half_written_files_are_removed(library: bytes, tmp_path: Path) -> None:
    whole = put(tmp_path, "cwhole.main.so", library)
    sources = put(tmp_path, "csource.main.cpp", b"")
    lengths = [0, 3, 63, 64, len(library) // 2, len(library) - 1]
    halves = [put(tmp_path, f"chalf{n}.main.so", library[:n]) for n in lengths]
    # A linker that was killed before it came to the header.
    halves += [put(tmp_path, "cheadless.main.o", bytes(64) + library[64:])]
    assert sorted(remove_half_written(tmp_path)) == sorted(halves)
    assert whole.exists() and sources.exists() and not any(path.exists() for path in halves)


def test_files_that_are_being_compiled_stay(library: bytes, tmp_path: Path) -> None:
    held, free = (put(tmp_path, f"c{name}.main.so", library[:100]) for name in ("held", "free"))
    (tmp_path / "locks").mkdir()
    for name in ("held", "free"):
        (tmp_path / "locks" / f"c{name}.lock").touch()
    with open(tmp_path / "locks" / "cheld.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remove_half_written(tmp_path) == [free]
    assert remove_half_written(tmp_path) == [held]


def test_no_cache_yet(tmp_path: Path) -> None:
    assert remove_half_written(tmp_path / "none") == [] == remove_precompiled_headers(tmp_path / "none")


def compile_once(temporary: Path, how: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"TMPDIR": str(temporary), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, __file__, how], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["libraries", "headers"])
def test_a_run_compiles_after_one_that_was_killed(broken: str, tmp_path: Path) -> None:
    first = compile_once(tmp_path, "ours")
    assert first.returncode == 0, first.stderr
    (cache,) = tmp_path.glob("torchinductor_*")
    libraries = [*cache.glob("*/*.so")]
    headers = [*cache.glob("precompiled_headers/*.gch")]
    if broken == "headers" and not headers:
        pytest.skip("this torch precompiles no headers")
    for path in libraries if broken == "libraries" else headers:
        # Of a library the second half are symbols, which loading does without.
        os.truncate(path, 100 if broken == "libraries" else path.stat().st_size // 2)
    for path in libraries if broken == "headers" else []:
        path.unlink()
    control = compile_once(tmp_path, "torch")
    assert control.returncode == 1, "torch heals its cache itself: lalic/training/compile_cache.py may go"
    second = compile_once(tmp_path, "ours")
    assert second.returncode == 0, second.stderr


def be_program(how: str) -> None:
    from lalic.config import TrainSection
    from lalic.training import compiling
    from lalic.training.distributed import start_processes

    accelerator = start_processes(TrainSection(cpu_threads=1))
    if how == "ours":
        compiling.BlockCompiler(accelerator)
    else:
        compiling._compile_smallest_case(accelerator.device, 16)


if __name__ == "__main__":
    be_program(sys.argv[1])
