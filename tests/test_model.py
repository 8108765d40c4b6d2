"""The network against the golden values: layout, outputs in float64, strings, and what training needs of it."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lalic.model import LALIC
from lalic.model.blocks import BiRWKVBlock, OmniShift

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 2, 1, 1), "groups": (4, 4, 8, 16)}


@pytest.fixture(scope="module")
def golden_state(reference_dir):
    """The weights of the golden run, as the float32 model holds them."""
    sys.path.insert(0, str(reference_dir))
    from fill_weights import fill

    sys.path.remove(str(reference_dir))
    torch.manual_seed(0)
    model = LALIC()
    state = fill(model.state_dict())
    bottleneck = np.load(reference_dir / "entropy_bottleneck.npz")
    for name in bottleneck.files:
        state[f"latent_codec.hyper.entropy_bottleneck.{name}"] = torch.from_numpy(bottleneck[name])
    model.load_state_dict(state)
    return model.state_dict()


@pytest.fixture(scope="module")
def golden(reference_dir):
    return dict(np.load(reference_dir / "lalic_golden.npz"))


def test_layout_is_the_published_one(reference_dir):
    want = json.loads((reference_dir / "state_dict.json").read_text())
    model = LALIC()
    have = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in model.state_dict().items()
    }
    assert list(have) == list(want)
    assert have == want
    assert len(have) == 1623
    # Published: 66.13 M numbers with the derived kernels; every module counted once, constants left out.
    numbers = sum(
        math.prod(v["shape"])
        for n, v in want.items()
        if not n.startswith("latent_codec.hyper.h_") and not n.endswith((".mask", ".bound", ".target", "_bound"))
    )
    assert round(numbers / 1e6, 2) == 66.13
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 65.62


def test_golden_outputs_in_float64(golden_state, golden):
    model = LALIC.from_state_dict(golden_state).double().eval()
    with torch.no_grad():
        x = torch.from_numpy(golden["x"])
        out = model(x)
        y = model.g_a(x)
        z = model.h_a(y)
    for name, value in {"y": y, "z": z, "x_hat": out["x_hat"]}.items():
        error = np.abs(value.numpy() - golden[name]).max() / np.abs(golden[name]).max()
        assert error < 1e-8, (name, error)
    for name in ("y", "z"):
        bpp = -out["likelihoods"][name].log2().sum().item() / 128**2
        assert bpp == pytest.approx(float(golden[f"bpp_{name}"]), rel=1e-8)


def test_golden_strings_in_float32(golden_state, golden):
    model = LALIC.from_state_dict(golden_state).eval()
    model.update()
    x = torch.from_numpy(golden["x"]).float()
    coded = model.compress(x)
    sizes = np.array([len(s[0]) for s in coded["strings"]])
    np.testing.assert_allclose(sizes, golden["string_bytes_float32"], rtol=5e-3)
    with torch.no_grad():
        x_hat = model(x)["x_hat"]
    assert np.abs(x_hat.numpy() - golden["x_hat"]).max() < 1e-4
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert (decoded - x_hat.clamp(0, 1)).abs().max() < 1e-4


def _four_branches(shift: OmniShift, x: torch.Tensor) -> torch.Tensor:
    """OmniShift as it is defined: a weighted sum of identity and three depthwise convolutions; x (B, C, H, W)."""
    a = shift.alpha
    return a[0] * x + a[1] * shift.conv1x1(x) + a[2] * shift.conv3x3(x) + a[3] * shift.conv5x5(x)


def test_omni_shift_equals_its_four_branches():
    torch.manual_seed(3)
    shift = OmniShift(6).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    inputs = [x, *shift.parameters()]

    merged = shift(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    plain = _four_branches(shift, x)
    torch.testing.assert_close(merged, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(merged, inputs, gradient),
        torch.autograd.grad(plain, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_stale_merged_kernels_are_ignored():
    torch.manual_seed(0)
    model = LALIC(**TINY).eval()
    state = model.state_dict()
    for name in state:
        if name.endswith("conv5x5_reparam.weight"):
            state[name] = torch.full_like(state[name], 7.0)
    again = LALIC.from_state_dict(state).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)["x_hat"], again(x)["x_hat"])
    with torch.no_grad():
        model.g_a[1].att.omni_shift.alpha.add_(1.0)
    merged = model.state_dict()["g_a.1.att.omni_shift.conv5x5_reparam.weight"]
    assert torch.equal(merged, model.g_a[1].att.omni_shift.merged_kernel())


def test_gradient_checkpointing_gives_the_same_gradients():
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = LALIC(**TINY).double().train()
        model.set_gradient_checkpointing(enabled)
        assert all(m.gradient_checkpointing is enabled for m in model.modules() if isinstance(m, BiRWKVBlock))
        torch.manual_seed(1)
        out = model(x)
        (out["x_hat"].square().sum() - out["likelihoods"]["y"].log().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-12, atol=1e-12)


def test_only_the_auxiliary_loss_moves_the_quantiles():
    torch.manual_seed(0)
    model = LALIC(**TINY)
    out = model(torch.rand(1, 3, 64, 64))
    (out["x_hat"].square().sum() - sum(v.log().sum() for v in out["likelihoods"].values())).backward()
    assert all(q.grad is None or not q.grad.any() for q in model.quantiles())
    missing = [n for n, p in model.named_parameters() if p.grad is None and not n.endswith("quantiles")]
    assert missing == []
    model.zero_grad()
    model.aux_loss().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.main_parameters())
    assert all(q.grad.any() for q in model.quantiles())


def test_bfloat16_stays_inside_the_transforms():
    torch.manual_seed(0)
    model = LALIC(**TINY).train()
    seen = {}

    def note(name):
        return lambda module, args, out: seen.update({name: out.dtype})

    model.g_a[1].att.key.register_forward_hook(note("inside g_a"))
    model.g_a.register_forward_hook(note("y"))
    model.h_s.register_forward_hook(note("params"))
    model.latent_codec.y.channel_context["y1"].register_forward_hook(note("channel context"))
    model.set_compute_dtype(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # an outer region must not reach the entropy model
        out = model(torch.rand(1, 3, 64, 64))
    assert seen["inside g_a"] == torch.bfloat16
    assert {seen["y"], seen["params"], seen["channel context"]} == {torch.float32}
    assert {out["x_hat"].dtype, *(v.dtype for v in out["likelihoods"].values())} == {torch.float32}
    out["x_hat"].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_no_copies_between_layouts():
    """Blocks keep (B, C, H, W) channels-last, so tokens are a view of it."""
    block = BiRWKVBlock(8)
    x = torch.randn(1, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
def test_compress_and_decompress_small_models(height, width):
    torch.manual_seed(0)
    model = LALIC(**TINY).eval()
    model.update()
    x = torch.rand(2, 3, height, width)
    coded = model.compress(x)
    assert len(coded["strings"]) == 2 * 4 + 1
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    with torch.no_grad():
        torch.testing.assert_close(decoded, model(x)["x_hat"].clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dims": (8, 12, 16, 32)}, "six"),
        ({"depths": (1, 1)}, "four"),
        ({"M": 31}, "must equal dims"),
        ({"groups": (4, 4)}, "sum to M"),
        ({"N": 0}, "positive"),
        ({"context_rate": 0}, "context_rate must be positive"),
        ({"aggregation_rate": 0}, "aggregation_rate must be positive"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        LALIC(**{**TINY, **arguments})


def test_rates_are_the_widths_of_the_hidden_layers():
    published, thin = LALIC(**TINY), LALIC(**TINY, context_rate=3, aggregation_rate=1)
    changed = {n for n, t in thin.state_dict().items() if t.shape != published.state_dict()[n].shape}
    assert changed == {
        n
        for n in published.state_dict()
        if ("channel_context" in n and n.endswith(("ffn.key.weight", "ffn.value.weight")))
        or ("entropy_parameters" in n and n.endswith(("key.weight", "value.weight")))
    }
    contexts = thin.latent_codec.y.channel_context
    assert contexts["y1"][1].ffn.key.weight.shape == (3 * 32, 32) and contexts["y3"][2].ffn.key.weight.shape == (96, 32)
    # One group has no channel context: no weights would tell the rate, so it is always the same.
    assert LALIC(**{**TINY, "groups": (32,)}, context_rate=3).config["context_rate"] == 8


@pytest.mark.parametrize("shape", [(1, 3, 65, 64), (1, 1, 64, 64), (3, 64, 64), (0, 3, 64, 64)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="multiples of 64"):
        LALIC(**TINY)(torch.zeros(shape))


def test_registered_with_compressai():
    from compressai.registry import MODELS

    assert MODELS["LALIC"] is LALIC
    assert issubclass(MODELS["LALIC"], nn.Module)


def test_encoder_and_decoder_compute_the_same_bits():
    """The encoder's latents are channels-last, the decoder builds its own: both must take the same kernels."""
    torch.manual_seed(0)
    model = LALIC(N=16, dims=(8, 8, 8, 48, 16, 8), depths=(1, 1, 1, 1), groups=(4, 4, 8, 8, 24)).eval()
    model.update()
    seen = {"compress": [], "decompress": []}
    for context in model.latent_codec.y.channel_context.values():
        context.register_forward_hook(lambda module, args, out: seen[phase].append(out))
    y = 3 * torch.randn(1, 48, 92, 92).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        phase = "compress"
        coded = model.latent_codec.compress(y)
        phase = "decompress"
        decoded = model.latent_codec.decompress(coded["strings"], coded["shape"])
    assert torch.equal(coded["y_hat"], decoded["y_hat"])
    assert len(seen["compress"]) == len(seen["decompress"]) == 4
    assert all(map(torch.equal, seen["compress"], seen["decompress"]))
