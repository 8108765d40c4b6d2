"""Building the CUDA library: with this machine's nvcc where there is one, and every way in which that can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lalic.kernels import backend, builder, cli, cuda_builder

from lalic.errors import LalicError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the caller's, and a cache of its own."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "LALIC_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIC_BUILD_DIR", str(tmp_path / "cache"))


def fake_toolkit(folder: Path, release: str, generations: str = "80 90 100") -> Path:
    """A toolkit whose nvcc tells its version and generations and compiles nothing."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime_api.h").touch()
    names = "\\n".join(f"compute_{g}" for g in generations.split())
    script = f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--list-gpu-arch) printf '{names}\\n' ;;
*) echo "error: this compiler compiles nothing"; exit 1 ;;
esac
"""
    (folder / "bin" / "nvcc").write_text(script)
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_library_is_built_and_loads(tmp_path: Path) -> None:
    """The whole of it, for all generations, as on a login node. Running it needs a GPU (test_biwkv_gpu.py)."""
    try:
        cuda_builder.nvcc()
        builder.compiler()
    except LalicError as error:
        pytest.skip(str(error))
    code = """
import torch
from lalic.kernels import backend, cuda_builder
path = cuda_builder.build_cuda()
torch.ops.load_library(str(path))
assert torch.ops.lalic_cuda.tile_tokens() == backend.CUDA_TILE
k = torch.zeros(1, 8, 4)
try:
    torch.ops.lalic_cuda.biwkv(k[0, 0], k[0, 0], k, k, k)
except NotImplementedError as error:
    assert "CPU" in str(error)
else:
    raise AssertionError("a CUDA kernel took CPU tensors")
print(path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = Path(done.stdout.strip())
    assert library.exists() and library == cuda_builder.library_path()
    text = library.read_bytes()
    for generation in ("sm_80", "sm_90", "sm_100"):
        assert generation.encode() in text


def test_no_toolkit(monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(builder.BuildError, match=r"no CUDA compiler: install the CUDA toolkit 13.0 \(nvcc\)"):
        cuda_builder.build_cuda()


def test_toolkit_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "old", "12.4")))
    with pytest.raises(builder.BuildError, match=r"nvcc is of CUDA 12.4, but this PyTorch is built for CUDA 13.0"):
        cuda_builder.build_cuda()


def test_home_without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(builder.BuildError, match="bin/nvcc cannot be run; set CUDA_HOME"):
        cuda_builder.nvcc()


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(builder.BuildError, match="built without CUDA"):
        cuda_builder.nvcc()


def test_failing_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit", "13.0")))
    with pytest.raises(builder.BuildError, match=r"the cuda kernel's compiler failed: .*error") as caught:
        cuda_builder.build_cuda()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/*.so")) and not list((tmp_path / "cache").glob(".build-*"))


def test_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(listed: str) -> list[str]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        return cuda_builder.generation_flags(cuda_builder._chosen_generations())

    assert chosen("8.0") == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
    assert chosen("9.0+PTX;8.6 8.0, 10.0a")[-2:] == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(builder.BuildError, match=r"Hopper is not a number like 9.0 or 9.0\+PTX"):
        chosen("Hopper")


def test_generations_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6)][i])
    assert cuda_builder._chosen_generations() == {(8, 6), (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_builder._chosen_generations() == cuda_builder.SUPPORTED


def test_toolkit_that_does_not_know_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit", "13.0", "80 90")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    with pytest.raises(builder.BuildError, match=r"knows none of the GPU generations 12.0"):
        cuda_builder.build_cuda()


def test_library_built_elsewhere_is_found_without_toolkit(monkeypatch: pytest.MonkeyPatch, cuda_torch: None) -> None:
    for_all = cuda_builder.recipe(cuda_builder.SUPPORTED).path()
    for_all.parent.mkdir(parents=True)
    for_all.touch()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(cuda_builder, "_chosen_generations", lambda: frozenset({(9, 0)}))
    assert cuda_builder.build_cuda() == for_all


def test_cuda_backend_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LALIC_BACKEND", "cuda")
    backend._choose.cache_clear()
    try:
        with pytest.raises(LalicError, match="LALIC_BACKEND=cuda, but this machine has no CUDA device; use auto"):
            backend.for_device(torch.device("cpu"))
    finally:
        backend._choose.cache_clear()


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_without_toolkit_cuda_tensors_take_the_portable_form(
    setting: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cuda_torch: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("LALIC_BACKEND", setting)
    backend._choose.cache_clear()
    backend.load_cuda.cache_clear()
    try:
        if setting == "cuda":
            with pytest.raises(LalicError, match="but the cuda kernel is not available: no CUDA compiler"):
                backend.for_device(torch.device("cuda", 0))
        else:
            assert backend.for_device(torch.device("cuda", 0)) is backend.TORCH
            assert "the PyTorch form, over ten times slower than the cuda kernel, because: no CUDA comp" in caplog.text
    finally:
        backend._choose.cache_clear()


def test_command_tells_of_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cuda_torch: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "old", "12.4")))
    assert cli.main([]) is None
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda"))
    assert "no CUDA device here" in line and "is of CUDA 12.4" in line
