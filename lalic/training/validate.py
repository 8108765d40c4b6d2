"""Loss, rate and quality on a folder of images, the same on any number of ranks.

Whole images, or centre crops of `val_crop`, are padded to multiples of 64 by repeating their edge and the
reconstruction is cut back; rates count the pixels of the image itself. Quantisation is by rounding, as in coding.
PSNR is that of the clamped, unrounded reconstruction (lalic.eval also rounds to 8 bits).

On a range of rates every image is measured at every rung. What is told is the mean over the rungs, of the losses that
of the weighed ones, and each rung by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from compressai.layers import CheckerboardMaskedConv2d
from pytorch_msssim import ms_ssim
from torch import Tensor

from lalic.codec.coder import cut, pad
from lalic.config import MS_SSIM_MIN_SIDE, LossSection
from lalic.data.images import read_rgb
from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.training.distributed import sum_over_ranks, together
from lalic.training.watchdog import moved

logger = logging.getLogger("lalic.train")

_METRICS = ("loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr", "ms_ssim")

Pictures = list[tuple[str, Tensor]]


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: LALIC,
    images: Sequence[Path],
    loss: LossSection,
    *,
    crop: int | None = None,
    pictures: int = 0,
) -> tuple[dict[str, Any], Pictures]:
    """Means over the images, and original beside reconstruction of the first `pictures` ones (on rank 0).

    Returns {"loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr", "ms_ssim" (of images above 160 pixels), "images"}; on a
    range of rates also "rungs", {"1": the same names without "images", ...}, whose losses are not weighed. Pictures are
    those of its middle rung. All ranks call it and get the same numbers. Always in float32: bfloat16 is for training
    alone.
    """
    training, compute_dtype = model.training, model.g_a.compute_dtype
    model.eval()
    model.set_compute_dtype(None)
    _apply_masks(model)
    rungs: tuple[int | None, ...] = loss.rungs or (None,)
    middle = rungs[len(rungs) // 2]
    prefix = "" if middle is None else f"q{middle}/"
    table = torch.zeros(len(images), len(rungs), len(_METRICS) + 1, dtype=torch.float64, device=accelerator.device)
    shown: Pictures = []

    def measure_own() -> None:
        for i, path in enumerate(images):
            own = i % accelerator.num_processes == accelerator.process_index
            wanted = i < pictures and accelerator.is_main_process
            if not (own or wanted):
                continue
            x = _read(path, crop)[None].to(accelerator.device)
            y = model.g_a(pad(x))
            for j, rung in enumerate(rungs):
                if not (own or rung == middle):
                    continue
                moved()
                row, picture = _measure(model, x, y, loss.metric, loss.lambdas[j], rung, path)
                if own:
                    table[i, j] = row
                if wanted and rung == middle:
                    shown.append((prefix + path.name, picture))

    try:
        # An image that has gone ends all ranks alike, not one of them alone.
        together(accelerator, measure_own)
    finally:
        model.train(training)
        model.set_compute_dtype(compute_dtype)
    # Each row comes from one rank, and rows are added in order: the sum does not depend on the ranks.
    each = [_means(sums, len(images)) for sums in sum_over_ranks(accelerator, table).cpu().sum(dim=0).tolist()]
    if loss.rungs is None:
        return {**each[0], "images": len(images)}, shown
    metrics: dict[str, Any] = {name: _mean([found[name] for found in each]) for name in _METRICS}
    metrics["loss"] = _mean([weight * found["loss"] for weight, found in zip(loss.weights, each, strict=True)])
    return {**metrics, "images": len(images), "rungs": dict(zip(map(str, loss.rungs), each, strict=True))}, shown


def _means(sums: list[float], images: int) -> dict[str, Any]:
    """Of the sums of a table's rows; MS-SSIM over the images that were large enough for it."""
    *totals, with_ms_ssim = sums
    means: dict[str, Any] = {name: total / images for name, total in zip(_METRICS, totals, strict=True)}
    means["ms_ssim"] = totals[-1] / with_ms_ssim if with_ms_ssim else None
    return means


def _mean(values: list[Any]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _apply_masks(model: LALIC) -> None:
    """Zero the weights that the checkerboard's masks hide.

    CompressAI's forward pass does it in place. A rank that has no image would otherwise keep what the optimiser, or the
    average, has moved there, and be left with other weights than the ranks that have one.
    """
    for module in model.modules():
        if isinstance(module, CheckerboardMaskedConv2d):
            module.weight.data = module.weight.data * module.mask


def _measure(
    model: LALIC, x: Tensor, y: Tensor, metric: str, lmbda: float, quality: int | None, path: Path
) -> tuple[Tensor, Tensor]:
    """A row of the table for one image x (1, 3, H, W) with y = g_a(x) at one rate, and original and reconstruction side
    by side (3, H, 2 W)."""
    height, width = x.shape[-2:]
    output = model.reconstruct(y, quality)
    x_hat = cut(output["x_hat"].float(), height, width).clamp(0, 1)
    bits = {name: -torch.log2(p.double()).sum() for name, p in output["likelihoods"].items()}
    bpp_y, bpp_z = (bits[name] / (height * width) for name in ("y", "z"))
    mse = (x_hat.double() - x.double()).square().mean()
    large = min(height, width) >= MS_SSIM_MIN_SIDE
    similarity = ms_ssim(x_hat, x, data_range=1.0).double() if large else torch.zeros_like(mse)
    if metric == "mse":
        distortion = 255**2 * mse
    elif large:
        distortion = 1 - similarity
    else:
        raise LalicError(f"{path}: a side has 160 pixels or less, too few for MS-SSIM: take it out of data.val")
    total = lmbda * distortion + bpp_y + bpp_z
    psnr = -10 / math.log(10) * mse.clamp(min=1e-12).log()
    row = [total, bpp_y + bpp_z, bpp_y, bpp_z, mse, psnr, similarity, torch.full_like(mse, large)]
    return torch.stack(row), torch.cat((x[0], x_hat[0]), dim=-1).cpu()


def _read(path: Path, crop: int | None) -> Tensor:
    """(3, H, W) in [0, 1], the centre of the image when a crop is asked for."""
    rgb = read_rgb(path)
    if crop is not None:
        height, width = rgb.shape[:2]
        top, left = max(0, height - crop) // 2, max(0, width - crop) // 2
        rgb = rgb[top : top + crop, left : left + crop]
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))).float() / 255
