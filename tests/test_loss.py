"""The rate-distortion loss against plain float64 arithmetic and against another library's MS-SSIM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compressai.losses import RateDistortionLoss
from torch import Tensor

from lalic.training.loss import rate_distortion


def made_up_output(batch: int, height: int, width: int, seed: int = 0) -> tuple[dict, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 3, height, width, generator=generator)
    x_hat = x + 0.1 * torch.randn(x.shape, generator=generator)
    likelihoods = {
        "y": torch.rand(batch, 32, height // 16, width // 16, generator=generator).clamp(1e-9),
        "z": torch.rand(batch, 8, height // 64, width // 64, generator=generator).clamp(1e-9),
    }
    return {"x_hat": x_hat, "likelihoods": likelihoods}, x


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 128, 192)])
def test_mse_loss_is_the_formula(batch: int, height: int, width: int) -> None:
    output, x = made_up_output(batch, height, width)
    terms = rate_distortion(output, x, "mse", 0.0067)
    a, b = (t.numpy().astype(np.float64) for t in (x, output["x_hat"]))
    bits = {k: -np.log2(p.numpy().astype(np.float64)).sum() for k, p in output["likelihoods"].items()}
    pixels = batch * height * width
    errors = ((a - b) ** 2).reshape(batch, -1).mean(axis=1)
    assert float(terms["bpp_y"]) == pytest.approx(bits["y"] / pixels, rel=1e-5)
    assert float(terms["bpp_z"]) == pytest.approx(bits["z"] / pixels, rel=1e-5)
    assert float(terms["bpp"]) == pytest.approx(sum(bits.values()) / pixels, rel=1e-5)
    assert float(terms["mse"]) == pytest.approx(errors.mean(), rel=1e-5)
    assert float(terms["psnr"]) == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-5)
    expected = 0.0067 * 255**2 * errors.mean() + sum(bits.values()) / pixels
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_agrees_with_compressai(metric: str) -> None:
    output, x = made_up_output(2, 192, 256)
    theirs = RateDistortionLoss(lmbda=8.73, metric=metric, return_type="all")(output, x)
    ours = rate_distortion(output, x, metric, 8.73)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
    assert float(ours["bpp"]) == pytest.approx(float(theirs["bpp_loss"]), rel=1e-5)


def test_gradient_is_the_formulas() -> None:
    output, x = made_up_output(2, 64, 64)
    output["x_hat"].requires_grad_()
    y = output["likelihoods"]["y"].requires_grad_()
    rate_distortion(output, x, "mse", 0.0483)["loss"].backward()
    expected = 0.0483 * 255**2 * 2 * (output["x_hat"].detach() - x).double() / x.numel()
    torch.testing.assert_close(output["x_hat"].grad.double(), expected, rtol=1e-4, atol=1e-9)
    expected = -1 / (y.detach().double() * math.log(2) * 2 * 64 * 64)
    torch.testing.assert_close(y.grad.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_bfloat16_output_is_summed_in_float32(metric: str) -> None:
    """A bfloat16 sum of 100,000 terms would be off by far more than the rounding of its terms."""
    output, x = made_up_output(2, 192, 192)
    half = {
        "x_hat": output["x_hat"].bfloat16(),
        "likelihoods": {k: p.bfloat16() for k, p in output["likelihoods"].items()},
    }
    same = {
        "x_hat": half["x_hat"].double(),
        "likelihoods": {k: p.double() for k, p in half["likelihoods"].items()},
    }
    terms = rate_distortion(half, x, metric, 0.01)
    assert all(value.dtype == torch.float32 for value in terms.values())
    expected = rate_distortion(same, x, metric, 0.01)["loss"]
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_only_the_loss_carries_a_gradient() -> None:
    output, x = made_up_output(1, 192, 192)
    output["x_hat"].requires_grad_()
    for metric in ("mse", "ms-ssim"):
        terms = rate_distortion(output, x, metric, 1.0)
        assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
