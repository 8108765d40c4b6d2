"""The rate-distortion loss: lambda * 255^2 * MSE + bpp, or lambda * (1 - MS-SSIM) + bpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor


def rate_distortion(output: Mapping[str, Any], target: Tensor, metric: str, lmbda: float) -> dict[str, Tensor]:
    """Loss of a batch, in float32 whatever precision made `output`.

    Args:
        output: of the model: "x_hat" (B, 3, H, W), "likelihoods" {name: any shape}.
        target: (B, 3, H, W) in [0, 1]. For "ms-ssim", H and W above 160.
        metric: "mse" or "ms-ssim".
        lmbda: weight of the distortion.

    Returns:
        Scalars, means over the batch: "loss" (with gradient), and for the log "bpp", "bpp_<name>" (bits per
        pixel), "mse" (of values in [0, 1]), "psnr" (dB, mean of the images' own), "ms_ssim" (if trained for).
    """
    batch, _, height, width = target.shape
    x_hat, target = output["x_hat"].float(), target.float()
    bits = {name: -torch.log2(p.float()).sum() for name, p in output["likelihoods"].items()}
    rates = {f"bpp_{name}": value / (batch * height * width) for name, value in bits.items()}
    bpp = torch.stack(list(rates.values())).sum()
    mse = (x_hat - target).square().mean(dim=(1, 2, 3))
    terms = {"bpp": bpp, **rates, "mse": mse.mean(), "psnr": (-10 / math.log(10)) * mse.detach().log().mean()}
    if metric == "mse":
        distortion = 255**2 * terms["mse"]
    else:
        terms["ms_ssim"] = ms_ssim(x_hat, target, data_range=1.0)
        distortion = 1 - terms["ms_ssim"]
    loss = lmbda * distortion + bpp
    return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}
