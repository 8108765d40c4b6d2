"""The codec on a GPU: files that the CPU decodes to the same latents and the other way round; strips in CUDA memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lalic.codec.bitstream import FLOAT64
from lalic.codec.coder import decode, decode_latents, encode
from lalic.model import LALIC, strips
from lalic.model.blocks import BiRWKVBlock

pytestmark = pytest.mark.gpu
SIZES = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (1, 7, 8, 16)}


def make_model() -> LALIC:
    """Random weights whose latents are spread over many symbols."""
    torch.manual_seed(3)
    model = LALIC(**SIZES).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(20)
        model.h_a[-1].weight.mul_(20)
    return model


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_file_of_one_device_has_the_same_latents_on_the_other(writer: str, reader: str, precision: str) -> None:
    model = make_model()
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 200, 328))
    on_writer, on_reader = copy.deepcopy(model).to(writer), copy.deepcopy(model).to(reader)
    torch.set_float32_matmul_precision(precision)
    try:
        coded = encode(on_writer, torch.from_numpy(pixels / 255).float().to(writer), FLOAT64)
        there = decode_latents(on_reader, coded)
        assert torch.equal(there.cpu(), decode_latents(on_writer, coded).cpu())
        assert there.abs().max() > 8
        pictures = decode(on_writer, coded).cpu(), decode(on_reader, coded).cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (pictures[0] - pictures[1]).abs().max() < 1e-2


def both_ways(monkeypatch: pytest.MonkeyPatch, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """module(x) whole and in strips, and the most that each of them added to the memory."""
    results, peaks = [], []
    for whole, strip in ((1 << 60, 1 << 60), (1 << 20, 4 << 20)):
        monkeypatch.setattr(strips, "WHOLE_BYTES", whole)
        monkeypatch.setattr(strips, "STRIP_BYTES", strip)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            results.append(module(x).clone())
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return results[0], results[1], peaks[0], peaks[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_strips_are_the_whole_block_with_less_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    block = BiRWKVBlock(48).eval().to("cuda", dtype)
    x = torch.randn(1, 48, 400, 300, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    whole, in_strips, whole_peak, strip_peak = both_ways(monkeypatch, block, x)
    assert (whole - in_strips).abs().max() <= tolerance * whole.abs().max()
    assert strip_peak < whole_peak / 2


def test_strips_of_a_whole_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32 cuDNN's convolutions round to TF32, and by other algorithms for other heights.
    model = make_model().cuda().double()
    x = torch.rand(1, 3, 512, 768, device="cuda", dtype=torch.float64)
    whole, in_strips, _, _ = both_ways(monkeypatch, model.g_a, x)
    assert (whole - in_strips).abs().max() <= 1e-9 * whole.abs().max()
