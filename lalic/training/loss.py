"""The rate-distortion loss: lambda * 255^2 * MSE + bpp, or lambda * (1 - MS-SSIM) + bpp.

On a range of rates every sample has a lambda of its own, and its loss is divided by sqrt(lambda / reference).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor

from lalic.config import LossSection

_DECIBELS = -10 / math.log(10)


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
    terms = {"bpp": bpp, **rates, "mse": mse.mean(), "psnr": _DECIBELS * mse.detach().log().mean()}
    if metric == "mse":
        distortion = 255**2 * terms["mse"]
    else:
        terms["ms_ssim"] = ms_ssim(x_hat, target, data_range=1.0)
        distortion = 1 - terms["ms_ssim"]
    loss = lmbda * distortion + bpp
    return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}


class RungLoss:
    """The loss of a run on a range of rates. Its tables lie on the device: nothing in a call waits for it.

    Legend: B batch, R rungs.
    """

    def __init__(self, loss: LossSection, device: torch.device):
        assert loss.rungs is not None
        self.metric, self.lowest = loss.metric, loss.rungs[0]
        self.lambdas = torch.tensor(loss.lambdas, device=device)
        """(R,)"""
        self.weights = torch.tensor(loss.weights, device=device)
        """(R,)"""
        self._rungs = torch.arange(len(loss.rungs), device=device)

    def __call__(self, output: Mapping[str, Any], target: Tensor, quality: Tensor) -> dict[str, Tensor]:
        """Loss of a batch whose samples have the rungs `quality`, int64 (B,).

        Returns:
            What `rate_distortion` does, with "loss" the mean of the weighed losses, and "rungs" (R, 4), or (R, 5) for
            "ms-ssim": for every rung the sums of `rung_values` over its samples, and their number.
        """
        _, _, height, width = target.shape
        x_hat, target = output["x_hat"].float(), target.float()
        rung = quality - self.lowest
        rates = {
            f"bpp_{name}": -torch.log2(p.float()).sum(dim=tuple(range(1, p.ndim))) / (height * width)
            for name, p in output["likelihoods"].items()
        }
        bpp = torch.stack(list(rates.values())).sum(dim=0)
        mse = (x_hat - target).square().mean(dim=(1, 2, 3))
        each = {"bpp": bpp, **rates, "mse": mse, "psnr": _DECIBELS * mse.detach().log()}
        if self.metric == "mse":
            distortion = 255**2 * mse
        else:
            each["ms_ssim"] = ms_ssim(x_hat, target, data_range=1.0, size_average=False)
            distortion = 1 - each["ms_ssim"]
        loss = self.lambdas[rung] * distortion + bpp
        terms = {name: value.detach().mean() for name, value in each.items()}
        return {
            "loss": (self.weights[rung] * loss).mean(),
            **terms,
            "rungs": self._sums(rung, {**each, "loss": loss}),
        }

    @torch.no_grad()
    def _sums(self, rung: Tensor, each: Mapping[str, Tensor]) -> Tensor:
        """(R, ...) from values (B,) of the samples."""
        values = torch.stack([*(each[name] for name in rung_values(self.metric)), torch.ones_like(each["loss"])], dim=1)
        # Chosen, not multiplied: a value that is not finite stays with its own rung.
        own = (rung[:, None] == self._rungs)[:, :, None]
        return torch.where(own, values[:, None], 0.0).sum(dim=0)


def rung_values(metric: str) -> tuple[str, ...]:
    """Names of what a run on a range of rates tells of every rung; "loss" is not weighed here."""
    return ("loss", "bpp", "psnr") if metric == "mse" else ("loss", "bpp", "psnr", "ms_ssim")
