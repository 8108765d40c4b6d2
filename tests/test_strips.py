"""Large pictures in row strips: the same numbers as the whole computation, in bounded memory."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from checkout_root import ROOT
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lalic.codec import coder
from lalic.codec.coder import decode, encode
from lalic.model import LALIC, functions, strips
from lalic.model.blocks import BiRWKVBlock, CheckerboardConv, EntropyParameters, EntropyParametersBlock, run_layers

sys.path.insert(0, str(ROOT))

from benchmarks.plain import use_plain_formulation
from benchmarks.tensors import peak_bytes

NEVER = 1 << 60
TINY = {"N": 16, "dims": [16, 24, 32, 48, 32, 24], "depths": [1, 1, 1, 1], "groups": [8, 16, 24]}


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test says itself what is computed in strips."""
    monkeypatch.setattr(strips, "WHOLE_BYTES", NEVER)


def cut(monkeypatch: pytest.MonkeyPatch, strip_bytes: int, cached_tokens: int = 2048) -> None:
    """From now on everything is computed in strips."""
    monkeypatch.setattr(strips, "WHOLE_BYTES", 0)
    monkeypatch.setattr(strips, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(strips, "CACHED_TOKENS", cached_tokens)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_block(dim: int, hidden_rate: int = 4, decay: float = 1.0) -> BiRWKVBlock:
    torch.manual_seed(dim)
    block = BiRWKVBlock(dim, hidden_rate).double().eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.2 * torch.randn_like(p))
        block.att.decay.mul_(decay)
    return block


# BiWKV

DECAYS = {"usual": (-2.0, 2.0), "steep": (2000.0, 8192.0), "growing": (-85.0, -20.0)}


def biwkv_as_defined(w: NDArray[Any], u: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """The formula, token by token; w, u (C,), k, v (T, C)."""
    y = np.empty_like(v)
    places = np.arange(len(k))
    for t in places:
        exponents = k - (np.abs(places - t) - 1)[:, None] * w
        exponents[t] = k[t] + u
        weights = np.exp(exponents - exponents.max(0))
        y[t] = (weights * v).sum(0) / weights.sum(0)
    return y


def tokens(decay: tuple[float, float], count: int, channels: int) -> tuple[NDArray[Any], ...]:
    rng = np.random.default_rng(0)
    w, u = rng.uniform(*decay, channels) / count, rng.normal(size=channels) / count
    k, v = 3 * rng.normal(size=(count, channels)), rng.normal(size=(count, channels))
    k[count // 3, 0] = 40  # one token that outweighs all others
    return w, u, k, v


@pytest.mark.parametrize("cached", [1, 7, 2048])
@pytest.mark.parametrize("decay", DECAYS)
def test_one_token_stands_for_many(decay, cached, monkeypatch):
    monkeypatch.setattr(strips, "CACHED_TOKENS", cached)
    count = 61
    w, _, k, v = tokens(DECAYS[decay], count, 5)
    found = strips.summaries(*map(torch.from_numpy, (w, k, v)))
    distance = np.arange(count)[:, None]
    for token, far in zip(found, (distance[::-1], distance), strict=True):
        exponents = k - far * w
        weights = np.exp(exponents - exponents.max(0))
        np.testing.assert_allclose(token.key, exponents.max(0) + np.log(weights.sum(0)), rtol=1e-13, atol=1e-12)
        np.testing.assert_allclose(token.value, (weights * v).sum(0) / weights.sum(0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("width, height, rows", [(1, 40, 1), (7, 11, 3), (19, 5, 4), (30, 1, 1)])
@pytest.mark.parametrize("decay", DECAYS)
def test_biwkv_of_strips_is_the_formula(decay, width, height, rows, dtype, tolerance):
    count, step = width * height, rows * width
    numbers = tokens(DECAYS[decay], count, 3)
    # The tolerance of float32 is for the formula; its input is what float32 holds.
    w, u, k, v = (torch.from_numpy(x).to(dtype) for x in numbers)
    cuts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    found = [strips.summaries(w, k[own], v[own]) for own in cuts]
    lengths = [len(k[own]) * w.double() for own in cuts]
    arriving = strips._arriving(found, lengths)
    got = torch.cat([strips._attend(w, u, k[own], v[own], *ab) for own, *ab in zip(cuts, *arriving, strict=True)])
    want = biwkv_as_defined(*(x.double().numpy() for x in (w, u, k, v)))
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=tolerance)


# Blocks


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "batch, dim, hidden_rate, height, width", [(2, 6, 4, 13, 9), (1, 5, 8, 8, 1), (1, 3, 4, 1, 12), (1, 2, 4, 1, 1)]
)
def test_block_equals_the_plain_formulation_in_float64(batch, dim, hidden_rate, height, width, rows, monkeypatch):
    block, x = make_block(dim, hidden_rate, decay=5), random(batch, dim, height, width)
    plain = copy.deepcopy(block)
    use_plain_formulation(plain)
    kept = x.clone()
    with torch.no_grad():
        want = plain(x)
        cut(monkeypatch, rows * strips.row_bytes(block, width), cached_tokens=4)
        got = block(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)


def errors(block: BiRWKVBlock, x: Tensor, truth: Tensor, bf16: bool) -> float:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = block(x)
    assert y.dtype == torch.float32
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_block_is_as_exact_as_whole(bf16, monkeypatch):
    exact, x = make_block(48), random(1, 48, 40, 52).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        truth = exact(x)
    block, x = copy.deepcopy(exact).float(), x.float()
    whole_error = errors(block, x, truth, bf16)
    cut(monkeypatch, 3 * strips.row_bytes(block, 52), cached_tokens=100)
    assert errors(block, x, truth, bf16) < 1.1 * whole_error + 1e-7


@pytest.mark.gpu
def test_block_on_a_gpu(monkeypatch):
    block, x = make_block(48, decay=5), random(1, 48, 40, 52).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = block(x)
        cut(monkeypatch, 3 * strips.row_bytes(block, 52))
        got = block.cuda()(x.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)


def test_block_in_place_writes_where_its_input_stood(monkeypatch):
    block, x = make_block(6), random(1, 6, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = block(x)
        cut(monkeypatch, 2 * strips.row_bytes(block, 7))
        got = block(x, in_place=True)
    assert got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_whole_block(monkeypatch):
    block, x = make_block(6), random(1, 6, 9, 7).requires_grad_()
    (want,) = torch.autograd.grad(block(x).square().sum(), x)
    cut(monkeypatch, 1)
    (got,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(got, want)


def test_layers_leave_their_input_alone(monkeypatch):
    """A block in front has no layer before it whose result it could overwrite."""
    layers, x = [make_block(6), make_block(6)], random(1, 6, 9, 7).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        want = run_layers(layers, x)
        cut(monkeypatch, 1000)
        got = run_layers(layers, x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# Convolutions and pointwise networks

LAYERS = {
    "5x5 down": lambda: nn.Conv2d(3, 4, 5, stride=2, padding=2),
    "3x3 down": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "3x3": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "1x1": lambda: nn.Conv2d(3, 4, 1),
    "5x5 up": lambda: nn.ConvTranspose2d(3, 4, 5, stride=2, padding=2, output_padding=1),
    "3x3 up": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "checkerboard": lambda: CheckerboardConv(3, 4, kernel_size=5, padding=2),
}


@pytest.mark.parametrize("sides", [(14, 6), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("strip_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name, strip_bytes, sides, monkeypatch):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = random(2, 3, *sides)
    with torch.no_grad():
        want = layer(x)
        cut(monkeypatch, strip_bytes)
        got = strips.convolve(layer, x, layer.forward if isinstance(layer, nn.ConvTranspose2d) else layer)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("strip_bytes", [1, 3000, 10**9])
def test_entropy_parameters(strip_bytes, monkeypatch):
    torch.manual_seed(0)
    network = EntropyParameters(EntropyParametersBlock(7, 5), nn.Identity(), EntropyParametersBlock(5, 4)).double()
    x = random(2, 7, 6, 3)
    with torch.no_grad():
        want = network(x)
        cut(monkeypatch, strip_bytes)
        got = network(x)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


# The model


@pytest.fixture(scope="module")
def tiny() -> LALIC:
    torch.manual_seed(0)
    model = LALIC(**TINY).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(30)  # latents over several integers
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    model.update()
    return model


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 200_000])
def test_model_equals_whole_in_float64(tiny, strip_bytes, monkeypatch):
    model, x = copy.deepcopy(tiny).double(), random(2, 3, 128, 192).sigmoid()
    with torch.no_grad():
        want = model(x)
        cut(monkeypatch, strip_bytes)
        got = model(x)
    torch.testing.assert_close(got["x_hat"], want["x_hat"], rtol=1e-10, atol=1e-10)
    for name, likelihood in want["likelihoods"].items():
        torch.testing.assert_close(got["likelihoods"][name], likelihood, rtol=1e-9, atol=1e-12)


def test_transforms_in_bfloat16(tiny, monkeypatch):
    model, x = copy.deepcopy(tiny), random(1, 3, 128, 192, dtype=torch.float32).sigmoid()
    with torch.no_grad():
        truth = model.g_a(x)
        model.set_compute_dtype(torch.bfloat16)
        whole_error = (model.g_a(x) - truth).norm()
        cut(monkeypatch, 20_000)
        got = model.g_a(x)
    assert got.dtype == torch.float32
    assert (got - truth).norm() < 1.2 * whole_error


def test_files_decode_to_what_the_encoder_has(tiny, monkeypatch):
    x = random(1, 3, 100, 130, dtype=torch.float32).sigmoid()
    rate = encode(tiny, x).num_bytes
    cut(monkeypatch, 20_000)
    coded = encode(tiny, x)
    decoded = decode(tiny, coded)
    latents: list[Tensor] = []
    hook = tiny.g_s.register_forward_hook(lambda _layer, inputs, _x_hat: latents.append(inputs[0]))
    try:
        assert torch.equal(decode(tiny, coded), decoded)
    finally:
        hook.remove()
    monkeypatch.setattr(strips, "WHOLE_BYTES", NEVER)
    with torch.no_grad():
        want = tiny.g_s(latents[0]).clamp(0, 1)[..., :100, :130]
    assert (decoded - want).abs().max() < 1e-4
    assert abs(coded.num_bytes - rate) <= 4  # no tiles: strips cost nothing


@pytest.mark.skipif(not hasattr(coder, "decode_latents"), reason="this codec has no float64 arithmetic")
@pytest.mark.parametrize("encoder, decoder", [(NEVER, 0), (0, NEVER)], ids=["whole to strips", "strips to whole"])
def test_float64_files_decode_alike_either_way(tiny, encoder, decoder, monkeypatch):
    x = nn.functional.interpolate(random(1, 3, 10, 13, dtype=torch.float32).sigmoid(), (100, 130), mode="bicubic")
    cut(monkeypatch, 20_000)
    monkeypatch.setattr(strips, "WHOLE_BYTES", encoder)
    coded = encode(tiny, x.clamp(0, 1))
    want = coder.decode_latents(tiny, coded)
    monkeypatch.setattr(strips, "WHOLE_BYTES", decoder)
    assert torch.equal(coder.decode_latents(tiny, coded), want)


# Memory


def test_block_in_place_needs_a_few_strips(monkeypatch):
    block = make_block(16).float()
    x = random(1, 16, 256, 64, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert peak_bytes(lambda: block(x), x.device) > 6 * x.nbytes
        cut(monkeypatch, 4 * strips.row_bytes(block, 64))
        block(x, in_place=True)
        assert peak_bytes(lambda: block(x, in_place=True), x.device) < 0.5 * x.nbytes


class LiveBytes(TorchDispatchMode):
    """What tensors of any device take, `meta` included, that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known.update(given)  # the input and the weights
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                memory = x.untyped_storage()
                self.known.add(memory._cdata)
                self.live += memory.nbytes()
                weakref.finalize(memory, self._freed, memory._cdata, memory.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> LALIC:
    """The full model's widths without numbers: layers tell shapes, and nothing is computed. Limits as they are."""
    monkeypatch.undo()
    monkeypatch.setattr(functions, "compute_dtype", lambda x: x.dtype)  # autocast knows no such device
    return LALIC(depths=(1, 1, 1, 1)).eval().to("meta")


def live_bytes(layer: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    x = torch.empty(shape, device="meta", dtype=dtype)
    with torch.no_grad(), LiveBytes() as memory:
        layer(x)
    assert memory.live == 0
    return memory.peak


@pytest.mark.parametrize("side", [4096, pytest.param(8192, marks=pytest.mark.slow)])
def test_memory_of_the_full_model(full, side):
    """One tensor of the first stage, the next stage's beside it, and some strips; or what just counts as small."""
    first, second = 4 * 96 * (side // 2) ** 2, 4 * 144 * (side // 4) ** 2
    some = 6 * strips.STRIP_BYTES
    limit = max(first + second, 5 * strips.WHOLE_BYTES // 2)
    grid = side // 16
    assert live_bytes(full.g_a, 1, 3, side, side) < limit + some
    assert live_bytes(full.g_s, 1, 320, grid, grid) < limit + some
    full.double()  # as the entropy path is computed
    context = full.latent_codec.y.channel_context["y4"]
    y_bytes = 8 * 320 * grid**2
    assert live_bytes(context, 1, 128, grid, grid, dtype=torch.float64) < 2 * y_bytes + strips.WHOLE_BYTES + some
    parameters = full.latent_codec.y.latent_codec["y4"].entropy_parameters
    known = parameters[0].mix.in_channels
    parameters_bytes = 8 * 384 * grid * grid // 2
    needed = live_bytes(parameters, 1, known, grid, grid // 2, dtype=torch.float64)
    assert needed < parameters_bytes + strips.WHOLE_BYTES + some


def test_kodak_and_2k_are_computed_whole(full, monkeypatch):
    """Small pictures keep their path, and so their bits."""

    def no_strips(*_: Any) -> Iterator[Any]:
        raise AssertionError("in strips")

    monkeypatch.setattr(strips, "_strips", no_strips)
    for width, height in ((768, 512), (2048, 1088)):
        y = torch.empty(1, 320, height // 16, width // 16, device="meta")
        with torch.no_grad():
            assert full.g_a(torch.empty(1, 3, height, width, device="meta")).shape == y.shape
            assert full.g_s(y).shape[-2:] == (height, width)
            for context in full.latent_codec.y.channel_context.values():
                context(y[:, : context[0].in_channels])
            for group in full.latent_codec.y.latent_codec.values():
                group.context_prediction(y[:, : group.context_prediction.in_channels])
    with torch.no_grad(), pytest.raises(AssertionError, match="in strips"):
        full.g_a(torch.empty(1, 3, 2176, 3840, device="meta"))
