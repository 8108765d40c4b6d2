"""BiWKV on a CUDA device: against float64, in every dtype, for every size that pictures have. `pytest -m gpu`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from lalic.kernels import backend
from test_biwkv import (
    NAMES,
    Case,
    assert_float32_accuracy,
    by_autograd,
    random_case,
    run_cpp,
    run_definition,
    run_running,
)

from lalic.ops import biwkv

pytestmark = pytest.mark.gpu

TRAINING_SIZES = [(8, 16384, 96), (8, 4096, 144), (8, 1024, 256), (8, 64, 256), (8, 256, 320)]


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert backend.for_device(torch.device("cuda", 0)).name == "cuda"


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(y, gw, gu, gk, gv) on the CPU; w and u in float32 for half precision."""
    scalar = backend.scalar_dtype(dtype)
    moved = Case(case.w.to("cuda", scalar), case.u.to("cuda", scalar), *(x.to("cuda", dtype) for x in case[2:]))
    return tuple(x.cpu() for x in by_autograd(biwkv, moved))


def by_float64(case: Case) -> tuple[torch.Tensor, ...]:
    """The C++ kernel in float64, which golden values and the definition check; quick enough for a million tokens."""
    return run_cpp(Case(*(x.double() for x in case)))


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 7, 3), (3, 36, 5), (2, 65, 33), (1, 193, 96), (2, 1000, 40)], ids=str)
def test_float64(shape: tuple[int, int, int]) -> None:
    case = random_case(*shape, seed=1)
    for name, a, b in zip(NAMES, on_gpu(case, torch.float64), run_definition(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("shape", [*TRAINING_SIZES, (2, 65536, 96), (2, 4097, 3)], ids=str)
def test_float32(shape: tuple[int, int, int]) -> None:
    case = random_case(*shape, seed=2).to(torch.float32)
    assert_float32_accuracy(on_gpu(case, torch.float32), by_float64(case))


def test_float32_of_a_million_tokens() -> None:
    """The largest error over 10^8 numbers, against their rms: the CPU kernel's in float32 is 7e-3 there."""
    case = random_case(1, 1024 * 1024, 96, seed=2).to(torch.float32)
    tolerances = (1e-4, 2e-3, 2e-3, 1e-2, 1e-2)
    for name, tolerance, a, b in zip(NAMES, tolerances, on_gpu(case, torch.float32), by_float64(case), strict=True):
        error = (a.double() - b).abs().max() / b.square().mean().sqrt()
        assert a.dtype == torch.float32 and error.item() <= tolerance, (name, error.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*TRAINING_SIZES, (1, 77, 5)], ids=str)
def test_half_precision(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """As float32 inside: rounded results lie within half a unit of the last place, and its float32 error."""
    case = random_case(*shape, seed=3)
    case = Case(case.w.float(), case.u.float(), *(x.to(dtype) for x in case[2:]))
    unit = torch.finfo(dtype).eps
    for name, a, b in zip(NAMES, on_gpu(case, dtype), by_float64(case), strict=True):
        rms = b.square().mean().sqrt().item()
        torch.testing.assert_close(a.double(), b, rtol=unit if a.dtype == dtype else 1e-3, atol=2e-3 * rms, msg=name)


@pytest.mark.parametrize("decay", [-85.0, -20.0, 100.0, 8192.0])
@pytest.mark.parametrize("T", [129, 4096])
def test_large_decay(T: int, decay: float) -> None:
    case = random_case(1, T, 16, seed=4)
    case = case._replace(w=(torch.linspace(0.2, 1.0, 16) * decay / T).double()).to(torch.float32)
    assert_float32_accuracy(on_gpu(case, torch.float32), run_running(case.to(torch.float64)), 3e-4)


@pytest.mark.parametrize("height", [30.0, 2000.0])
def test_dominant_token(height: float) -> None:
    case = random_case(2, 193, 17, seed=5)
    case.k[:, 70] += height
    case = case._replace(w=torch.linspace(-1.0, 40.0, 17).double()).to(torch.float32)
    slack = (1e-6 + height * 2**-24) * (case.gy * case.v).abs().sum().item() / 17
    assert_float32_accuracy(on_gpu(case, torch.float32), run_definition(case.to(torch.float64)), slack)


def test_two_runs_give_the_same_bits() -> None:
    case = random_case(8, 4096, 144, seed=6)
    first = on_gpu(case, torch.bfloat16)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_gpu(case, torch.bfloat16), strict=True))


def test_strided_inputs_and_other_streams() -> None:
    case = random_case(2, 300, 48, seed=7)
    wide = torch.cat([case.k, case.v, case.gy], dim=2).cuda()
    w, u = case.w.cuda(), case.u.cuda()
    want = [x.cuda() for x in run_definition(case)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = by_autograd(biwkv, Case(w, u, wide[..., :48], wide[..., 48:96], wide[..., 96:]))
        first = by_autograd(
            biwkv,
            Case(
                w,
                u,
                *(
                    x.transpose(1, 2).contiguous().transpose(1, 2)
                    for x in (wide[..., :48], wide[..., 48:96], wide[..., 96:])
                ),
            ),
        )
    torch.cuda.current_stream().wait_stream(stream)
    for a, b, c in zip(got, first, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)
        assert torch.equal(a, b)


def test_offsets_of_64_bits() -> None:
    """The second sample lies more than 2^31 elements behind the first."""
    case = random_case(2, 70, 4, seed=8)
    room = torch.empty((1 << 31) + 64 * 1024, dtype=torch.bfloat16, device="cuda")
    k = room.as_strided((2, 70, 4), (1 << 31, 4, 1))
    k.copy_(case.k)
    inputs = [case.w.float().cuda(), case.u.float().cuda(), k, case.v.bfloat16().cuda()]
    assert torch.equal(biwkv(*inputs), biwkv(*inputs[:2], k.contiguous(), inputs[3]))


def test_more_than_2_31_elements() -> None:
    B, T, C = 1, 1 << 22, 516
    k = torch.zeros(1, 1, C, dtype=torch.bfloat16, device="cuda").expand(B, T, C)
    v = torch.ones(1, 1, C, dtype=torch.bfloat16, device="cuda").expand(B, T, C)
    zero = torch.zeros(C, device="cuda")
    y = biwkv(zero, zero, k, v)
    assert y.numel() > 1 << 31
    assert y[0, -1].eq(1).all() and y[0, 0].eq(1).all() and y[0, T // 2].eq(1).all()


def test_no_step_waits_for_the_device() -> None:
    w, u, k, v, gy = (x.cuda() for x in random_case(2, 300, 48, seed=9).to(torch.float32))
    inputs = [x.requires_grad_() for x in (w, u, k, v)]
    biwkv(*inputs).backward(gy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        biwkv(*inputs).backward(gy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_and_compile() -> None:
    w, u, k, v = (x.cuda().requires_grad_() for x in random_case(2, 200, 16, seed=10).to(torch.float32)[:4])

    def mix(w, u, k, v):
        return torch.sigmoid(v) * biwkv(w, u, k.bfloat16(), v)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        eager = mix(w, u, k, v)
        compiled = torch.compile(mix, fullgraph=True)(w, u, k, v)
    torch.testing.assert_close(eager, compiled, rtol=1e-2, atol=1e-2)


def test_no_memory_is_a_clear_error() -> None:
    k = torch.zeros(1, 1, 1, device="cuda").expand(64, 1 << 20, 4096)
    with pytest.raises(torch.OutOfMemoryError):
        biwkv(torch.zeros(4096, device="cuda"), torch.zeros(4096, device="cuda"), k, k)


def test_failed_launch_raises() -> None:
    """A library without code for this GPU: an error, and not zeros."""
    code = """
import torch
from lalic.kernels import cuda_builder
cuda_builder._chosen_generations = lambda: frozenset({(12, 0)})
torch.ops.load_library(str(cuda_builder.build_cuda()))
x = torch.zeros(1, 8, 4, device="cuda")
try:
    torch.ops.lalic_cuda.biwkv(x[0, 0], x[0, 0], x, x, torch.empty(1, 1, 2, 3, 4, device="cuda"))
except RuntimeError as error:
    assert "no kernel image" in str(error) or "PTX" in str(error), error
else:
    raise AssertionError("no error")
"""
    if torch.cuda.get_device_capability()[0] >= 12:
        pytest.skip("this GPU can run what was built for the newest generation")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compute_sanitizer() -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer")
    code = """
import torch
from lalic.ops import biwkv
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for B, T, C in ((2, 65, 33), (1, 300, 7), (1, 3, 40)):
        scalar = torch.float64 if dtype == torch.float64 else torch.float32
        w, u = (torch.randn(C, device="cuda", dtype=scalar, requires_grad=True) for _ in range(2))
        k, v = (torch.randn(B, T, C, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        biwkv(w / T, u / T, k, v).sum().backward()
torch.cuda.synchronize()
"""
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{check}: {done.stdout[-2000:]}"
