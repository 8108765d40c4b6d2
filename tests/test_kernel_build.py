"""Building the C++ kernel: one library per machine, whole or absent, whoever builds and whoever is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lalic.kernels import backend, builder, cli, cuda_builder

from lalic.data import jpeg_cut
from lalic.errors import LalicError

# A source that compiles in a second, so that these tests are about the builder.
TINY = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from lalic.kernels import builder
builder.SOURCE_FOLDER = Path(sys.argv[1])
builder.CPU_SOURCES, builder.HEADERS = ("tiny.cpp",), ()
"""

USE = """
import logging
logging.basicConfig(level=logging.INFO)
import torch
from lalic.kernels import reference
from lalic.ops import biwkv
inputs = torch.randn(5), torch.randn(5), torch.randn(2, 9, 5), torch.randn(2, 9, 5)
for _ in range(2):
    torch.testing.assert_close(biwkv(*inputs), reference.definition(*inputs))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "a source folder"
    folder.mkdir()
    source = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'
    (folder / "tiny.cpp").write_text(f"#include <torch/version.h>\n{source}\n")
    return folder


def slow_compiler(folder: Path, seconds: float) -> str:
    """A compiler that takes its time, so that builds overlap; every call leaves a line in calls.txt, with its pid."""
    script = folder / "slow-c++"
    script.write_text(
        f'#!/bin/sh\necho "$$ $@" >> "{folder}/calls.txt"\n'
        f'sleep {seconds} & waited=$!\ntrap "kill $waited; exit 1" TERM\nwait $waited\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    return f"'{script}'"


def start(code: str, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """Run Python code in a session of its own, so that a test can end it with all its children."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, all output)"""
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def require_compiler() -> None:
    try:
        builder.compiler()
        builder.ninja()
    except LalicError as error:
        pytest.skip(str(error))


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"*/{builder.LIBRARY}"))


def test_four_processes_compile_once(tmp_path: Path, sources: Path) -> None:
    require_compiler()
    cache = tmp_path / "a cache"
    code = TINY + "import ctypes; assert ctypes.CDLL(str(builder.build_cpu())).answer() == 42"
    environment = {"LALIC_BUILD_DIR": cache, "CXX": slow_compiler(tmp_path, 1)}
    for status, output in map(finish, [start(code, sources, **environment) for _ in range(4)]):
        assert status == 0, output
    assert len(libraries(cache)) == 1
    compiled = [line for line in (tmp_path / "calls.txt").read_text().splitlines() if " -c " in line]
    assert len(compiled) == 1
    assert not list(cache.glob(".build-*"))


def test_build_goes_on_after_one_that_was_killed(tmp_path: Path, sources: Path) -> None:
    require_compiler()
    cache = tmp_path / "cache"
    code = TINY + "builder.build_cpu()"
    killed = start(code, sources, LALIC_BUILD_DIR=cache, CXX=slow_compiler(tmp_path, 300))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "calls.txt").exists():
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        waiting = start(code, sources, LALIC_BUILD_DIR=cache)
        os.kill(killed.pid, signal.SIGKILL)  # Python alone: ninja and the compiler live on, as after the real thing
        status, output = finish(waiting)
        assert status == 0, output
        assert len(libraries(cache)) == 1
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        # Ninja puts a compiler in a process group of its own.
        for call in (tmp_path / "calls.txt").read_text().splitlines():
            os.kill(int(call.split()[0]), signal.SIGTERM)
        killed.communicate()


def test_stale_build_folders_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".build-old", tmp_path / ".build-new"
    for folder in (old, new):
        folder.mkdir()
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    builder._remove_stale(tmp_path)
    assert not old.exists() and new.exists()


def test_failing_compiler_is_an_error_with_its_reason(tmp_path: Path, sources: Path, monkeypatch) -> None:
    require_compiler()
    (sources / "tiny.cpp").write_text("int x = forgotten;\n")
    monkeypatch.setattr(builder, "SOURCE_FOLDER", sources)
    monkeypatch.setattr(builder, "CPU_SOURCES", ("tiny.cpp",))
    monkeypatch.setattr(builder, "HEADERS", ())
    monkeypatch.setenv("LALIC_BUILD_DIR", str(tmp_path / "cache"))
    with pytest.raises(builder.BuildError, match=r"compiler failed: .*error.*forgotten") as caught:
        builder.build_cpu()
    assert "\n" not in str(caught.value)
    assert not libraries(tmp_path / "cache") and not list((tmp_path / "cache").glob(".build-*"))


def test_deleted_library_is_built_again(tmp_path: Path, sources: Path, monkeypatch) -> None:
    require_compiler()
    monkeypatch.setattr(builder, "SOURCE_FOLDER", sources)
    monkeypatch.setattr(builder, "CPU_SOURCES", ("tiny.cpp",))
    monkeypatch.setattr(builder, "HEADERS", ())
    monkeypatch.setenv("LALIC_BUILD_DIR", str(tmp_path / "cache"))
    library = builder.build_cpu()
    library.unlink()
    assert builder.build_cpu() == library and library.exists()


def test_missing_tools_are_named(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(builder.BuildError, match=r"no C\+\+ compiler: install g\+\+"):
        builder.compiler()
    monkeypatch.setenv("CXX", "nonesuch -O1")
    with pytest.raises(builder.BuildError, match="CXX=nonesuch -O1 cannot be run"):
        builder.compiler()
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(builder.BuildError, match="no ninja: pip install ninja"):
        builder.ninja()


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    require_compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LALIC_BUILD_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(builder.BuildError, match="set LALIC_BUILD_DIR"):
        builder.build_cpu()


def test_library_belongs_to_one_cpu_torch_and_source(tmp_path: Path, sources: Path, monkeypatch) -> None:
    monkeypatch.setenv("LALIC_BUILD_DIR", str(tmp_path))
    paths = {builder.library_path()}
    assert paths == {builder.library_path()}
    for name, value in [("_cpu_identity", lambda: "another CPU"), ("flags", lambda: "-O0")]:
        with monkeypatch.context() as change:
            change.setattr(builder, name, value)
            paths.add(builder.library_path())
    with monkeypatch.context() as change:
        change.setattr(builder.torch, "__version__", "0.0")
        paths.add(builder.library_path())
    copy = tmp_path / "changed"
    shutil.copytree(builder.SOURCE_FOLDER, copy)
    (copy / builder.HEADERS[0]).write_text("// changed\n")
    monkeypatch.setattr(builder, "SOURCE_FOLDER", copy)
    paths.add(builder.library_path())
    assert len(paths) == 5
    assert all(tmp_path in path.parents for path in paths)


def test_every_source_is_in_the_cache_key() -> None:
    """A header that is not hashed would leave old libraries in use."""
    files = {path.name for path in builder.SOURCE_FOLDER.iterdir() if path.suffix in (".cpp", ".h", ".cu", ".cuh")}
    cpu, cuda = builder.cpu_recipe().sources, cuda_builder.recipe(cuda_builder.SUPPORTED).sources
    jpeg = jpeg_cut.recipe().sources
    assert files == {*cpu, *cuda, *jpeg}
    for sources in (cpu, cuda, jpeg):
        text = "".join((builder.SOURCE_FOLDER / name).read_text() for name in sources)
        assert {*re.findall(r'#include "(\w+\.\w+)"', text)} <= {*sources}


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "/nonexistent/c++"}, {"CXX": "false"}, {"PATH": "/nonexistent"}],
    ids=["CXX cannot be run", "compiler fails", "nothing on the PATH"],
)
def test_without_compiler_the_torch_form_runs_and_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    settings = {"LALIC_BUILD_DIR": tmp_path, "LALIC_BACKEND": "auto", "CXX": "", **environment}
    status, output = finish(start(USE, **settings))
    assert status == 0, output
    warnings = [line for line in output.splitlines() if line.startswith("WARNING:lalic.kernels")]
    assert len(warnings) == 1
    assert "the PyTorch form" in warnings[0] and "compiler" in warnings[0]


def test_cpp_is_an_error_without_compiler(tmp_path: Path) -> None:
    settings = {"LALIC_BUILD_DIR": tmp_path, "LALIC_BACKEND": "cpp", "CXX": "/nonexistent/c++"}
    status, output = finish(start(USE, **settings))
    assert status != 0
    assert "LalicError: LALIC_BACKEND=cpp, but the cpp kernel is not available: no C++ compiler" in output


def test_backend_is_the_chosen_one_and_logged_once(tmp_path: Path) -> None:
    status, output = finish(start(USE, LALIC_BACKEND="torch", LALIC_BUILD_DIR=tmp_path))
    assert status == 0, output
    assert output.count("lalic.kernels") == 1 and "the PyTorch form (LALIC_BACKEND=torch)" in output
    assert not list(tmp_path.iterdir())


def test_unknown_backend(monkeypatch) -> None:
    monkeypatch.setenv("LALIC_BACKEND", "fortran")
    with pytest.raises(LalicError, match="LALIC_BACKEND=fortran is not a backend; use one of auto, cpp, cuda, torch"):
        backend.chosen()


def test_importing_the_operator_compiles_nothing(tmp_path: Path) -> None:
    status, output = finish(start("import lalic.ops", LALIC_BUILD_DIR=tmp_path))
    assert status == 0, output
    assert not list(tmp_path.iterdir())


def test_command_prints_the_backends(capsys, monkeypatch) -> None:
    monkeypatch.delenv("LALIC_BACKEND", raising=False)
    assert cli.main([]) is None
    lines = capsys.readouterr().out.splitlines()
    assert {"cpp", "torch", "cuda"} <= {line.split()[0] for line in lines if line}
    assert any(line.startswith("cuda") and (cli.NO_GPU in line or "compiled for" in line) for line in lines)
    assert any(line.startswith("cache") and str(builder.library_path()) in line for line in lines)


@pytest.mark.slow
def test_real_kernel_is_built_by_four_processes_at_once(tmp_path: Path) -> None:
    require_compiler()
    code = USE + "from lalic.kernels import backend\nassert backend.for_device(torch.device('cpu')).name == 'cpp'"
    for status, output in map(finish, [start(code, LALIC_BUILD_DIR=tmp_path) for _ in range(4)]):
        assert status == 0, output
    assert len(libraries(tmp_path)) == 1


CUDA_SOURCE = """
#include "biwkv_scan.h"
template <class S>
__global__ void all_of_it(S* x) {
  using namespace lalic;
  State<S> state = empty_state<S>();
  push(state, x[0], x[1], x[2], x[3]);
  const Sums<S> left = in_units_of(join(state, state), x[4]);
  Sums<S> right = left;
  push(right, x[5], x[6], x[7]);
  const Output<S> out = output(left, right, x[8], x[9]);
  const TokenGradient<S> g = token_gradient(x[0], x[1], out.y, left, left, right);
  x[0] = g.gk + g.gv + g.gu + pairs(left, right) + out.D;
}
template __global__ void all_of_it<float>(float*);
template __global__ void all_of_it<double>(double*);
"""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_scan_header_compiles_for_cuda(tmp_path: Path, architecture: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    (tmp_path / "scan.cu").write_text(CUDA_SOURCE)
    command = [nvcc, "-std=c++17", f"-arch={architecture}", "-cubin", "-Werror", "all-warnings"]
    command += ["-I", str(builder.SOURCE_FOLDER), "-o", str(tmp_path / "scan.cubin"), str(tmp_path / "scan.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
