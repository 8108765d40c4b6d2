"""The entropy models' training forward against CompressAI's own, of which they are faster forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.latent_codecs import CheckerboardLatentCodec
from torch import Tensor

from lalic.model import LALIC
from lalic.model.entropy import Bottleneck, Checkerboard, halves, whole

TINY: dict[str, Any] = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}


def as_compressai_has_it(model: LALIC) -> LALIC:
    """The same model with CompressAI's forward methods, by nothing but its class names."""
    for module in model.modules():
        if isinstance(module, Checkerboard):
            module.__class__ = CheckerboardLatentCodec
        elif isinstance(module, Bottleneck):
            module.__class__ = EntropyBottleneck
    return model


def outputs_and_gradients(model: LALIC, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    output = model(x)
    bits = sum(-p.log2().sum() for p in output["likelihoods"].values())
    main = model.main_parameters()
    gradients = torch.autograd.grad(bits + 100 * output["x_hat"].square().sum(), main)
    named = {str(i): g for i, g in enumerate(gradients)}
    return {"x_hat": output["x_hat"], **output["likelihoods"], **named}


@pytest.mark.parametrize("training", [True, False], ids=["noise", "rounding"])
def test_equals_compressai_in_values_and_gradients(training: bool) -> None:
    torch.manual_seed(0)
    model = LALIC(**TINY).double().train(training)
    # Another median than 0, and latents of some size, so that rounding has something to round.
    with torch.no_grad():
        model.quantiles()[0][:, :, 1] = 0.3
        list(model.g_a)[-1].weight.mul_(20)
    x = torch.rand(2, 3, 128, 64, dtype=torch.float64)
    ours = outputs_and_gradients(model, x)
    theirs = outputs_and_gradients(as_compressai_has_it(model), x)
    assert float(ours["y"].detach().min()) < 0.5 and float(ours["z"].detach().min()) < 0.9
    for name, value in theirs.items():
        scale = float(value.detach().abs().max())
        assert float((ours[name] - value).abs().max()) <= 1e-10 * scale, name


def test_halves_are_a_checkerboard() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    anchors, others = halves(x)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    even = (rows + columns) % 2 == 0
    assert torch.equal(anchors.flatten(2), x[..., even])
    assert torch.equal(others.flatten(2), x[..., ~even])
    assert torch.equal(whole(anchors, others), x)
    assert torch.autograd.gradcheck(halves, (x,))
    assert torch.autograd.gradcheck(whole, (anchors.detach().requires_grad_(), others.detach().requires_grad_()))


def test_bottleneck_keeps_the_place_of_the_noise() -> None:
    """The same random numbers at the same latents as CompressAI's: runs go on as they were."""
    torch.manual_seed(1)
    ours = Bottleneck(5).train()
    theirs = EntropyBottleneck(5).train()
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(3, 5, 4, 2).to(memory_format=torch.channels_last)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        results.append(model(z))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
