"""The CUDA kernels of BiWKV, run on the CPU thread by thread (tests/emulated_cuda). test_biwkv.py compares them with
the definition on every kind of input; here is what belongs to their way of working."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from lalic.kernels import backend, builder
from test_biwkv import NAMES, Case, assert_float32_accuracy, random_case, run_definition, truth


def same_bits(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule(dtype: torch.dtype) -> None:
    case = random_case(2, 460, 40, seed=1).to(dtype)
    once = emulated.run(*case, order="ascending")
    for order in ("descending", "shuffled"):
        assert same_bits(once, emulated.run(*case, order=order)), order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [5, 64, 200])
def test_half_precision_is_float32_inside(T: int, dtype: torch.dtype) -> None:
    case = random_case(2, T, 33, seed=T)
    rounded = Case(case.w, case.u, *(x.to(dtype) for x in case[2:]))
    got = emulated.run(*rounded)
    want = emulated.run(*(x.float() for x in rounded))
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
    assert_float32_accuracy(want, truth(Case(*(x.double() for x in rounded))))


@pytest.mark.parametrize("T", [8, 9, 63, 64, 65, 128, 192, 193, 391])
def test_sizes_around_runs_tiles_and_slabs(T: int) -> None:
    """Runs have 8 tokens, tiles 64, and the emulation's slabs 3 tiles."""
    case = random_case(1, T, 3, seed=T)
    for name, a, b in zip(NAMES, emulated.run(*case), run_definition(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_long_sequence_does_not_drift() -> None:
    case = random_case(1, 16384, 8, seed=2)
    single = Case(*(x.float() for x in case))
    assert_float32_accuracy(emulated.run(*single), truth(Case(*(x.double() for x in single))))


def test_python_knows_the_tile() -> None:
    text = (builder.SOURCE_FOLDER / "biwkv_launch.cuh").read_text()
    rows, tokens = map(int, re.search(r"using TileOf = Tile<T, (\d+), (\d+)>", text).groups())
    assert backend.CUDA_TILE == rows * tokens
    k = torch.empty(2, 130, 5, dtype=torch.bfloat16, device="meta")
    assert backend.new_states(k).numel() == 0
    with torch._subclasses.FakeTensorMode():
        states = backend.new_states(torch.empty(2, 130, 5, dtype=torch.bfloat16, device="cuda"))
    assert states.shape == (2, 3, 2, 3, 5) and states.dtype == torch.float32


@pytest.mark.slow
def test_the_emulation_notices_a_missing_barrier(tmp_path: Path) -> None:
    """Every __syncthreads() of the kernels is needed, and without it some order of the threads gives other numbers."""
    kernels = (builder.SOURCE_FOLDER / "biwkv_kernels.cuh").read_text()
    barriers = [match.start() for match in re.finditer(r"__syncthreads\(\);", kernels)]
    assert len(barriers) >= 5
    for path in builder.SOURCE_FOLDER.glob("*.*h"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    case = random_case(2, 200, 5, seed=3)
    want = run_definition(case)
    for place in barriers:
        changed = kernels[:place] + kernels[place:].replace("__syncthreads();", "", 1)
        (tmp_path / "biwkv_kernels.cuh").write_text(changed)
        program = emulated.build(tmp_path, tmp_path / "run")
        wrong = False
        for order in emulated.ORDERS:
            try:
                got = emulated.run(*case, order=order, executable=program)
            except subprocess.CalledProcessError:
                wrong = True
                continue
            wrong |= not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, want, strict=True))
        assert wrong, f"nothing changed without the barrier in line {kernels[:place].count(chr(10)) + 1}"
