"""The Bi-RWKV block against its plain formulation: numbers, precision, memory, layouts, compilation."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from checkout_root import ROOT
from torch import nn

from lalic.model.blocks import BiRWKVBlock, EntropyParametersBlock
from lalic.model.depthwise import depthwise_conv, depthwise_gradients, kernel_gradient_by_strips
from lalic.model.functions import gated_linear, normed_depthwise, squared_relu_mlp

sys.path.insert(0, str(ROOT))

from benchmarks.plain import use_plain_formulation
from benchmarks.tensors import WholeTensorOperations, copies, saved_bytes


def make_block(dim: int, hidden_rate: int = 4) -> BiRWKVBlock:
    """A block in training mode whose gammas and norms are not the identity that they start as."""
    torch.manual_seed(dim)
    block = BiRWKVBlock(dim, hidden_rate).train()
    with torch.no_grad():
        for p in (block.gamma1, block.gamma2, *block.ln1.parameters(), *block.ln2.parameters()):
            p.add_(0.3 * torch.randn_like(p))
    return block


def plain(block: BiRWKVBlock) -> BiRWKVBlock:
    """The same weights, computed as the published code does."""
    other = copy.deepcopy(block)
    use_plain_formulation(other)
    return other


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random (B, C, H, W), channels-last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, dtype=dtype, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def differentiate(module: nn.Module, x: torch.Tensor, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Output and every gradient of one fixed weighting of the output."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = module(x)
    weighting = torch.randn(y.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], weighting.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *names], gradients, strict=True))}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "batch, dim, hidden_rate, height, width",
    [(2, 6, 4, 7, 5), (1, 16, 8, 1, 9), (3, 5, 4, 12, 1), (1, 3, 2, 2, 2), (1, 1, 4, 1, 1)],
)
def test_equals_the_plain_formulation_in_float64(batch, dim, hidden_rate, height, width, checkpointing):
    block = make_block(dim, hidden_rate).double()
    want = differentiate(plain(block), image(batch, dim, height, width, dtype=torch.float64))
    block.gradient_checkpointing = checkpointing
    got = differentiate(block, image(batch, dim, height, width, dtype=torch.float64))
    assert got.keys() == want.keys()
    for name, value in got.items():
        error = (value - want[name]).abs().max().item()
        assert error <= 1e-12 * max(want[name].abs().max().item(), 1.0), (name, error)


def test_float32_is_as_exact_as_the_plain_formulation():
    block, x = make_block(48), image(2, 48, 40, 52)  # two strips of rows in an image
    truth = differentiate(plain(block).double(), x.double())
    got, other = differentiate(block, x), differentiate(plain(block), x)
    for name, value in truth.items():
        assert relative_error(got[name], value) < 2 * relative_error(other[name], value) + 1e-6, name


def test_bfloat16_autocast_is_as_exact_as_the_plain_formulation():
    block, x = make_block(48), image(2, 48, 40, 52)
    truth = differentiate(plain(block).double(), x.double())
    got, other = differentiate(block, x, bf16=True), differentiate(plain(block), x, bf16=True)
    for name, value in truth.items():
        assert got[name].dtype == torch.float32, name
        assert relative_error(got[name], value) < 1.2 * relative_error(other[name], value) + 2e-3, name


def test_entropy_parameters_block_equals_its_definition():
    torch.manual_seed(0)
    block = EntropyParametersBlock(5, 4).double()
    x = image(2, 5, 3, 4, dtype=torch.float64)
    got = differentiate(block, x)

    def defined(self: EntropyParametersBlock, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(x)
        n = self.norm(mixed.permute(0, 2, 3, 1))
        gated = self.receptance(n).sigmoid() * self.value(self.key(n).relu() ** 2)
        return mixed + gated.permute(0, 3, 1, 2)

    block.forward = defined.__get__(block)
    for name, value in differentiate(block, x).items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


FUNCTIONS = {
    "normed_depthwise": (
        lambda x, w, b, k: normed_depthwise(x, w, b, 1e-5, k),
        lambda x, w, b, k: F.conv2d(
            F.layer_norm(x, w.shape, w, b, 1e-5).permute(0, 3, 1, 2), k, padding=2, groups=len(w)
        ).permute(0, 2, 3, 1),
        [(2, 4, 3, 6), (6,), (6,), (6, 1, 5, 5)],
    ),
    "gated_linear": (
        gated_linear,
        lambda r, x, w: F.linear(r.sigmoid() * x, w),
        [(2, 3, 4), (2, 3, 4), (5, 4)],
    ),
    "squared_relu_mlp": (
        squared_relu_mlp,
        lambda x, k, v: F.linear(F.linear(x, k).relu() ** 2, v),
        [(2, 3, 4), (7, 4), (5, 7)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_equals_autograd_and_its_numeric_gradient(name):
    function, definition, shapes = FUNCTIONS[name]
    inputs = _leaves(*shapes)
    y, want = function(*inputs), definition(*inputs)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(y.shape, dtype=y.dtype)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_differentiable_once(name):
    function, _, shapes = FUNCTIONS[name]
    inputs = _leaves(*shapes)
    (g,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def _kernel_gradient(gradient: torch.Tensor, x: torch.Tensor, size: int) -> torch.Tensor:
    """The definition: sums over all tokens of the gradient times the shifted input."""
    B, H, W, C = x.shape
    margin = size // 2
    padded = F.pad(x, (0, 0, margin, margin, margin, margin))
    sums = [(padded[:, i : i + H, j : j + W] * gradient).sum((0, 1, 2)) for i in range(size) for j in range(size)]
    return torch.stack(sums, dim=1).view(C, 1, size, size)


@pytest.mark.parametrize("strip_tokens", [1, 6, 13, 10**6])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 4), (3, 2, 9, 1)], ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_kernel_gradient_by_strips(shape, strip_tokens, size):
    x, gradient = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    got = kernel_gradient_by_strips(gradient, x, size, strip_tokens)
    torch.testing.assert_close(got, _kernel_gradient(gradient, x, size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_depthwise_gradients_in_low_precision(dtype, tolerance):
    torch.manual_seed(0)
    x, gradient = (torch.randn(2, 70, 64, 24).to(dtype) for _ in range(2))
    kernel = torch.randn(24, 1, 5, 5).to(dtype)
    gx, gk = depthwise_gradients(gradient, x, kernel)
    assert gx.dtype == dtype and gk.dtype == torch.float32
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(depthwise_conv(wide, kernel.double()), wide, gradient.double())
    assert relative_error(gx, want) < tolerance
    assert relative_error(gk, _kernel_gradient(gradient.double(), x.double(), 5)) < tolerance


def test_depthwise_kernel_gradient_is_a_well_formed_operator():
    x, gradient = (torch.randn(1, 4, 3, 2) for _ in range(2))
    torch.library.opcheck(torch.ops.lalic.depthwise_kernel_gradient.default, (gradient, x, 5))


def test_two_runs_give_the_same_bits():
    block, x = make_block(32), image(2, 32, 48, 64)
    for bf16 in (False, True):
        first, second = differentiate(block, x, bf16), differentiate(block, x, bf16)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_gives_the_same_bits():
    block, x = make_block(16), image(1, 16, 24, 20)
    for bf16 in (False, True):
        block.gradient_checkpointing = False
        kept = differentiate(block, x, bf16)
        block.gradient_checkpointing = True
        again = differentiate(block, x, bf16)
        assert all(torch.equal(kept[name], again[name]) for name in kept)


def _step(block: BiRWKVBlock, x: torch.Tensor) -> None:
    block(x).sum().backward()


def test_no_whole_tensor_is_copied():
    """Neither by a block nor inside its operators, forward and backward; the plain formulation is the control."""
    block = make_block(8)
    x = image(1, 8, 64, 64).requires_grad_()
    _step(block, x)
    assert copies(lambda: _step(block, x), x.numel()) == {}
    rearranging = plain(block)
    y = x.detach().contiguous().requires_grad_()
    _step(rearranging, y)
    assert copies(lambda: _step(rearranging, y), x.numel()).total() > 10


def test_saved_tensors_and_operations():
    """In tensors of B * T * C elements, fourteen are kept instead of twenty-nine, and no operation comes unnoticed."""
    block = make_block(64)
    x = image(1, 64, 64, 64).requires_grad_()
    parameters = list(block.parameters())
    whole = 4 * x.numel()
    assert saved_bytes(lambda: block(x), parameters) < 14.5 * whole
    assert saved_bytes(lambda: plain(block)(x), parameters) > 28 * whole
    _step(block, x)
    with WholeTensorOperations(x.numel()) as operations:
        _step(block, x)
    assert operations.counts.total() <= 49, operations.counts


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend, bf16, checkpointing):
    torch.compiler.reset()
    block, x = make_block(16), image(1, 16, 12, 20)
    want = differentiate(block, x, bf16)
    block.gradient_checkpointing = checkpointing
    compiled = copy.deepcopy(block)
    compiled.forward = torch.compile(compiled.forward, backend=backend, fullgraph=True)
    got = differentiate(compiled, x, bf16)
    for name, value in want.items():
        # inductor keeps float32 between operations where eager rounds to bfloat16
        assert relative_error(got[name], value.double()) < (3e-2 if bf16 else 1e-5), name


def test_parameters_can_be_frozen():
    """Gradients reach what still needs them: norms, kernels and weights frozen one at a time."""
    block, x = make_block(8), image(1, 8, 6, 5)
    want = differentiate(block, x)
    for frozen, parameter in block.named_parameters():
        parameter.requires_grad_(False)
        block.zero_grad()
        weighting = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        block(x).backward(weighting)
        for name, p in block.named_parameters():
            assert (p.grad is None) if name == frozen else torch.equal(p.grad, want[name]), (frozen, name)
        parameter.requires_grad_(True)


def test_residual_stream_stays_in_float32_under_autocast():
    block, x = make_block(8), image(1, 8, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x.bfloat16()).dtype == torch.float32
    assert math.isfinite(block(x).sum().item())
