"""BiWKV: every form against the golden file and against the definition in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import emulated
import numpy as np
import pytest
import torch
from lalic.kernels import backend, chunked, reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lalic.errors import LalicError
from lalic.ops import biwkv

GOLDEN_CASES = ("small", "one_token", "odd", "hard_decay", "large_k")
NAMES = ("y", "gw", "gu", "gk", "gv")


class Case(NamedTuple):
    """Inputs of the operator and the gradient of its output."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    gy: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self))


Run = Callable[[Case], tuple[Tensor, ...]]  # -> y, gw, gu, gk, gv


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_case(B: int, T: int, C: int, seed: int = 0, decay: float = 1.0, spread: float = 1.0) -> Case:
    """Inputs in float64 that float32 holds exactly; w and u are divided by T as in the model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    w, u = (decay * normal(C) / T).float().double(), (normal(C) / T).float().double()
    return Case(w, u, (spread * normal(B, T, C)).float().double(), normal(B, T, C), normal(B, T, C))


def by_autograd(forward: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in case[:4]]
    y = forward(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, case.gy))


def run_definition(case: Case) -> tuple[Tensor, ...]:
    return by_autograd(reference.definition, case)


def run_chunked(case: Case) -> tuple[Tensor, ...]:
    return (chunked.fixed_forward(*case[:4]), *chunked.fixed_backward(case.gy, *case[:4]))


def run_running(case: Case) -> tuple[Tensor, ...]:
    return (reference.running_forward(*case[:4]), *reference.running_backward(case.gy, *case[:4]))


def run_torch(case: Case) -> tuple[Tensor, ...]:
    return (reference.forward(*case[:4]), *reference.backward(case.gy, *case[:4]))


def run_cpp(case: Case) -> tuple[Tensor, ...]:
    try:
        backend.load_cpp()
    except LalicError as error:
        pytest.skip(f"no C++ kernel here: {error}")
    operators = torch.ops.lalic_cpu
    return (operators.biwkv(*case[:4]), *operators.biwkv_backward(case.gy, *case[:4]))


def run_emulated(case: Case) -> tuple[Tensor, ...]:
    return emulated.run(*case)


FORMS = {
    "definition": run_definition,
    "chunked": run_chunked,
    "running": run_running,
    "cpp": run_cpp,
    "emulated CUDA": run_emulated,
}
FAST_FORMS = {"torch": run_torch, "cpp": run_cpp, "emulated CUDA": run_emulated}


def truth(case: Case) -> tuple[Tensor, ...]:
    """The definition in float64; for long sequences the running-maximum form, which golden cases check."""
    B, T, C = case.k.shape
    return run_definition(case) if B * T * T * C < 2e7 else run_running(case)


def assert_float32_accuracy(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dominant: float = 0.0) -> None:
    """Errors relative to the rms of each quantity, and `dominant` absolute."""
    for name, tolerance, a, b in zip(NAMES, (1e-5, 2e-3, 2e-3, 1e-3, 1e-3), got, want, strict=True):
        assert a.dtype == torch.float32, name
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance * b.square().mean().sqrt().item() + dominant + 1e-7, (name, error)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_float64(reference_dir, name: str, form: str) -> None:
    golden = np.load(reference_dir / "biwkv_golden.npz")
    case = Case(*(torch.from_numpy(golden[f"{name}.{x}"]) for x in Case._fields))
    for x, value in zip(NAMES, FORMS[form](case), strict=True):
        want = torch.from_numpy(golden[f"{name}.{x}"])
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10, msg=lambda m, x=x: f"{x}: {m}")


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("C", [1, 3, 16, 48, 96, 144])
@pytest.mark.parametrize("T", [1, 2, 31, 193, 257])
def test_awkward_sizes(T: int, C: int, form: str) -> None:
    case = random_case(2, T, C, seed=T * C)
    want = truth(case)
    for value, expected in zip(FAST_FORMS[form](case), want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    # With one or two tokens gw and gu are sums that all but cancel: allow for the terms' rounding.
    slack = 1e-6 * (case.gy * case.v).abs().sum().item() / C if T < 3 else 0.0
    assert_float32_accuracy(FAST_FORMS[form](case.to(torch.float32)), want, slack)


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("C", [3, 96])
def test_long_sequence(C: int, form: str) -> None:
    case = random_case(1, 4096, C, seed=C)
    assert_float32_accuracy(FAST_FORMS[form](case.to(torch.float32)), truth(case))


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("decay", [-2000.0, -85.0, -20.0, 100.0, 8192.0, 1e6])
@pytest.mark.parametrize("T", [129, 330])
def test_large_decay(T: int, decay: float, form: str) -> None:
    case = random_case(1, T, 16, seed=3)
    case = case._replace(w=torch.linspace(0.2, 1.0, 16).double() * decay / T)
    want = run_definition(case)
    for name, value, expected in zip(NAMES, FAST_FORMS[form](case), want, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10 * max(scale, 1.0), msg=name)
    single = FAST_FORMS[form](case.to(torch.float32))
    assert_float32_accuracy(single, run_definition(case.to(torch.float32).to(torch.float64)), 3e-4)


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("height", [30.0, 200.0, 2000.0])
@pytest.mark.parametrize("where", [0, 70, 192])
def test_dominant_token(where: int, height: float, form: str) -> None:
    """One token outweighs all others; under the decays, far from it the others matter again."""
    case = random_case(2, 193, 17, seed=5)
    case.k[:, where] += height
    case = case._replace(w=torch.linspace(-1.0, 40.0, 17).double())
    want = run_definition(case)
    for name, value, expected in zip(NAMES, FAST_FORMS[form](case), want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)
    rounded = case.to(torch.float32)
    # float32 holds exponents of this height to height * 2^-24.
    slack = (1e-6 + height * 2**-24) * (case.gy * case.v).abs().sum().item() / 17
    assert_float32_accuracy(FAST_FORMS[form](rounded), run_definition(rounded.to(torch.float64)), slack)


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_bonus(dtype: torch.dtype, form: str) -> None:
    case = random_case(1, 66, 5, seed=6)
    case = case._replace(u=torch.tensor([-500.0, -40.0, 0.0, 60.0, 500.0]).double())
    for name, value, expected in zip(NAMES, FAST_FORMS[form](case.to(dtype)), run_definition(case), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_padding_with_minus_infinity_has_no_weight(form: str) -> None:
    case = random_case(1, 150, 3, seed=7)
    masked = case._replace(k=case.k.clone())
    masked.k[:, 100:] = -float("inf")
    masked.gy[:, 100:] = 0
    short = Case(case.w, case.u, case.k[:, :100], case.v[:, :100], masked.gy[:, :100])
    for name, value, expected in zip(NAMES, FAST_FORMS[form](masked), run_definition(short), strict=True):
        value = value[:, :100] if value.dim() == 3 else value
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_stays_in_its_channel(where: str, form: str) -> None:
    case = random_case(2, 100, 20, seed=8).to(torch.float32)
    getattr(case, where)[0, 50, 3] = float("nan")
    y = FAST_FORMS[form](case)[0]
    assert y[0, :, 3].isnan().all()
    y[0, :, 3] = 0
    assert y.isfinite().all()


STRIDED = {
    "part of a wider row": lambda x: torch.cat([x, x + 1, x], dim=2)[..., x.shape[2] : 2 * x.shape[2]] - 1,
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("C", [16, 37])
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_inputs(layout: str, C: int, form: str) -> None:
    case = random_case(2, 130, C, seed=9)
    if layout == "part of a wider row":
        whole = torch.cat([case.v, case.k, case.gy], dim=2)
        strided = case._replace(v=whole[..., :C], k=whole[..., C : 2 * C], gy=whole[..., 2 * C :])
    else:
        strided = case._replace(**{x: STRIDED[layout](getattr(case, x)) for x in ("k", "v", "gy")})
    assert not strided.k.is_contiguous()
    for a, b in zip(FAST_FORMS[form](strided), FAST_FORMS[form](case), strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)


def test_expanded_gradient() -> None:
    case = random_case(2, 70, 16, seed=10)
    ones = torch.ones_like(case.v)
    expanded = case._replace(gy=ones[:1, :1, :1].expand_as(ones))
    for a, b in zip(run_cpp(expanded), run_cpp(case._replace(gy=ones)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 1000, 40), (1, 700, 16), (3, 64, 33), (1, 5000, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, int, int], two_threads: None) -> None:
    case = random_case(*shape, seed=11).to(torch.float32)
    torch.set_num_threads(1)
    once = run_cpp(case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(once, run_cpp(case), strict=True)), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_results_have_the_same_bits(dtype: torch.dtype) -> None:
    """Results above 8 MiB are written past the caches; one sample of them is below."""
    case = random_case(2, 8256 if dtype == torch.float32 else 4128, 128, seed=18).to(dtype)
    assert case.v.nbytes > 8 << 20 > case.v[:1].nbytes
    whole = run_cpp(case)
    for b in range(2):
        one = run_cpp(Case(case.w, case.u, *(x[b : b + 1] for x in case[2:])))
        for i in (0, 3, 4):
            assert torch.equal(whole[i][b : b + 1], one[i]), NAMES[i]


def operator_inputs(dtype: torch.dtype = torch.float64, T: int = 7, C: int = 5) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in random_case(2, T, C, seed=12)[:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares uninitialised memory, too
    inputs = operator_inputs(dtype)
    torch.library.opcheck(torch.ops.lalic.biwkv.default, inputs)
    gy = torch.randn(2, 7, 5).to(dtype)
    states = backend.new_states(inputs[2].detach())
    torch.library.opcheck(torch.ops.lalic.biwkv_backward.default, [gy, *(x.detach() for x in inputs), states])


@pytest.mark.parametrize("T", [1, 2, 9])
def test_gradcheck(T: int) -> None:
    assert torch.autograd.gradcheck(biwkv, operator_inputs(T=T))


def test_operator_is_the_definition() -> None:
    case = random_case(2, 33, 6, seed=13)
    for a, b in zip(by_autograd(biwkv, case), run_definition(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def mix(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(v) * biwkv(w, u, k * 2, v.tanh())


def test_compile_full_graph() -> None:
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for T in (40, 41):  # the second length makes it dynamic
        case = random_case(2, T, 6, seed=14)
        for a, b in zip(by_autograd(compiled, case), by_autograd(mix, case), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_inductor() -> None:
    case = random_case(2, 40, 6, seed=14).to(torch.float32)
    compiled = torch.compile(mix, fullgraph=True)
    for a, b in zip(by_autograd(compiled, case), by_autograd(mix, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing() -> None:
    case = random_case(2, 40, 6, seed=15)

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(mix, *inputs, use_reentrant=False)

    for a, b in zip(by_autograd(checkpointed, case), by_autograd(mix, case), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_float32() -> None:
    case = random_case(2, 200, 16, seed=16).to(torch.float32)
    linear = torch.nn.Linear(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k, v = linear(case.k), linear(case.v)
        w, u = case.w.clone().requires_grad_(), case.u.clone().requires_grad_()
        y = biwkv(w, u, k, v)
    assert y.dtype == k.dtype == torch.bfloat16
    y.float().backward(case.gy)
    assert w.grad is not None and w.grad.dtype == torch.float32
    exact = reference.definition(case.w.double(), case.u.double(), k.double(), v.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_autocast_takes_the_wider_dtype() -> None:
    """k and v of two dtypes under autocast, w and u in half: k and v meet in float32, w and u are not rounded again."""
    case = random_case(2, 50, 16, seed=19).to(torch.float32)
    k, w = case.k.bfloat16(), case.w.bfloat16()
    with pytest.raises(TypeError, match=r"k is torch\.bfloat16 but v is torch\.float32"):
        biwkv(case.w, case.u, k, case.v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = biwkv(case.w, case.u, k, case.v)
        half = biwkv(w, case.u, k, case.v.bfloat16())
        double = biwkv(*(x.double() for x in case[:4]))
    assert torch.equal(mixed, biwkv(case.w, case.u, k.float(), case.v))
    assert torch.equal(half, biwkv(w.float(), case.u, k.float(), case.v.bfloat16().float()).bfloat16())
    assert double.dtype == torch.float64


def test_autocast_under_compile() -> None:
    case = random_case(2, 50, 16, seed=20).to(torch.float32)

    def mixed(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return biwkv(w, u, k.bfloat16(), v)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
        for a, b in zip(by_autograd(compiled, case), by_autograd(mixed, case), strict=True):
            assert torch.equal(a, b)


def test_offsets_of_64_bits(tmp_path: Path) -> None:
    """The second sample lies more than 2^31 elements behind the first, in a file with a hole between them."""
    case = random_case(2, 70, 16, seed=21).to(torch.float32)
    size = ((1 << 31) + 2000) * 4
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(size)
    room = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), shared=True, nbytes=size)
    far = torch.tensor([], dtype=torch.float32).set_(room, 0, (2, 70, 16), (1 << 31, 16, 1))
    far.copy_(case.k)
    for a, b in zip(run_cpp(case._replace(k=far)), run_cpp(case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 w", "half w"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    case = random_case(2, 150, 16, seed=17).to(dtype)
    case = case._replace(w=case.w.to(parameters or dtype), u=case.u.to(parameters or dtype))
    got = by_autograd(biwkv, case)
    want = by_autograd(biwkv, case.to(torch.float32))
    for name, a, b, x in zip(NAMES, got, want, (case.v, *case[:4]), strict=True):
        assert a.dtype == x.dtype, name
        assert torch.equal(a, b.to(a.dtype)), name


def test_empty_batch() -> None:
    inputs = [torch.randn(3), torch.randn(3), torch.randn(0, 4, 3), torch.randn(0, 4, 3)]
    y, gw, gu, gk, gv = by_autograd(biwkv, Case(*inputs, torch.randn(0, 4, 3)))
    assert y.shape == gk.shape == gv.shape == (0, 4, 3)
    assert torch.equal(gw, torch.zeros(3)) and torch.equal(gu, torch.zeros(3))


def test_second_derivative_is_refused() -> None:
    inputs = operator_inputs()
    (gk,) = torch.autograd.grad(biwkv(*inputs).square().sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"biwkv_backward.* no autograd formula"):
        gk.sum().backward()


BAD_INPUTS = {
    "k of two dimensions": ({"k": torch.zeros(5, 3), "v": torch.zeros(5, 3)}, ValueError, r"must both be \(B, T, C\)"),
    "other v": ({"v": torch.zeros(2, 4, 3)}, ValueError, r"must both be \(B, T, C\)"),
    "no token": ({"k": torch.zeros(2, 0, 3), "v": torch.zeros(2, 0, 3)}, ValueError, "at least one token"),
    "short w": ({"w": torch.zeros(2)}, ValueError, r"w must be \(C,\) = \(3,\)"),
    "w of two dimensions": ({"w": torch.zeros(1, 3)}, ValueError, r"w must be \(C,\) = \(3,\)"),
    "long u": ({"u": torch.zeros(4)}, ValueError, r"u must be \(C,\) = \(3,\)"),
    "double w": ({"w": torch.zeros(3).double()}, TypeError, "w is torch.float64 but k is torch.float32"),
    "half v": ({"v": torch.zeros(2, 5, 3).half()}, TypeError, "k is torch.float32 but v is torch.float16"),
    "integers": (
        dict(zip("wukv", (torch.zeros(3), torch.zeros(3), torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)), strict=True)),
        TypeError,
        "k must be float32",
    ),
    "a list": ({"w": [0.0, 0.0, 0.0]}, TypeError, "w must be a tensor, not list"),
    "other device": ({"w": torch.zeros(3, device="meta")}, ValueError, "w is on meta but k is on cpu"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD_INPUTS[name]
    inputs = {"w": torch.zeros(3), "u": torch.zeros(3), "k": torch.zeros(2, 5, 3), "v": torch.zeros(2, 5, 3)} | changes
    if name == "integers":
        inputs = {x: value.int() for x, value in inputs.items()}
    with pytest.raises(error, match=message) as caught:
        biwkv(**inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w", "u"])
def test_decay_that_is_not_finite(name: str, value: float) -> None:
    inputs = {"w": torch.zeros(3), "u": torch.zeros(3), "k": torch.zeros(2, 5, 3), "v": torch.zeros(2, 5, 3)}
    inputs[name][1] = value
    with pytest.raises(LalicError, match=f"biwkv: {name} holds NaN or infinity") as caught:
        biwkv(**inputs)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_checking_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.zeros(3), torch.zeros(3), torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)]
    inputs[3][0, 2, 1] = float("nan")
    assert biwkv(*inputs)[0, :, 1].isnan().all()
    monkeypatch.setenv("LALIC_CHECK", "1")
    with pytest.raises(LalicError, match="biwkv: v holds NaN or infinity"):
        biwkv(*inputs)
    # A sum that overflows is not an input that does.
    assert biwkv(torch.full((3,), 3e38), *inputs[1:3], torch.zeros(2, 5, 3)).isfinite().all()


def test_bad_gradient() -> None:
    w, u, k, v = (x.detach() for x in operator_inputs())
    with pytest.raises(ValueError, match="gy must be like v"):
        torch.ops.lalic.biwkv_backward(v[:1], w, u, k, v, backend.new_states(k))


def test_kernel_checks_its_arguments() -> None:
    run_cpp(random_case(1, 2, 3))  # skips where there is no kernel
    w, u, k, v = (x.detach() for x in operator_inputs())
    operators = torch.ops.lalic_cpu
    for bad in [(w[:2], u, k, v), (w, u, k, v[:1]), (w.float(), u, k, v), (w, u, k[:, :0], v[:, :0])]:
        with pytest.raises(RuntimeError, match="biwkv: "):
            operators.biwkv(*bad)
    with pytest.raises(RuntimeError, match="gy must be like v"):
        operators.biwkv_backward(v[:1], w, u, k, v)
    with pytest.raises(RuntimeError, match="float32 and float64"):
        operators.biwkv(w.half(), u.half(), k.half(), v.half())
