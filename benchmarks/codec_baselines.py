"""What encoding and decoding are measured beside: CompressAI's own coding, and the published code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lalic.errors import LalicError


def compressai_tasks(model: Any, x: Any, coded: Any, decoded: Any) -> dict[str, Callable[[], Any]]:
    """CompressAI's own coding of x (1, 3, H, W) with the same model, after checking that it gives the same."""
    import torch
    from compressai.models.base import SimpleVAECompressionModel as Codec

    compress, decompress = torch.no_grad()(Codec.compress), torch.no_grad()(Codec.decompress)
    theirs = compress(model, x)
    strings, shape = theirs["strings"], theirs["shape"]
    x_hat = decompress(model, strings, shape)["x_hat"][..., : coded.height, : coded.width]
    # On a GPU two runs of a layer may round differently, and a symbol flip: then pictures differ by little.
    same = tuple(s for (s,) in strings) == coded.strings and torch.equal(x_hat, decoded)
    if not (same or (x.is_cuda and (x_hat - decoded).square().mean() < 1e-6)):
        raise LalicError("CompressAI's strings or picture are others; no times of wrong results")
    return {
        "compressai encode": lambda: compress(model, x),
        "compressai decode": lambda: decompress(model, strings, shape),
    }


def published_tasks(folder: Path, model: Any, x: Any, decoded: Any) -> dict[str, Callable[[], Any]]:
    """Encoding and decoding of x (1, 3, H, W), on its CUDA device, by the published code with the weights of `model`.

    Its operator deviates from the formula, so its picture is another one: it must resemble `decoded` (1, 3, h, w),
    20 dB at least, which the zeros of a failed launch do not.
    """
    import torch

    from benchmarks.published import load_published

    theirs = load_published(folder, model).to(x.device).eval()
    theirs.update()
    compress, decompress = torch.no_grad()(theirs.compress), torch.no_grad()(theirs.decompress)
    coded = compress(x)
    x_hat = decompress(coded["strings"], coded["shape"])["x_hat"]
    error = (x_hat[..., : decoded.shape[-2], : decoded.shape[-1]] - decoded).square().mean().item()
    if not error < 1e-2:
        raise LalicError(f"the published code decodes another picture (mean squared difference {error:.2g})")
    return {
        "published encode": lambda: compress(x),
        "published decode": lambda: decompress(coded["strings"], coded["shape"]),
    }
