"""Metrics against other libraries and hand-computed values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import pytorch_msssim
import torch
from numpy.typing import NDArray
from photo_like import photo_like
from scipy.ndimage import correlate1d

from lalic import metrics

Picture = NDArray[np.uint8]


def noisy(picture: Picture, sigma: float, seed: int = 1) -> Picture:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


class TestPSNR:
    def test_off_by_one_everywhere(self) -> None:
        a = np.full((5, 7, 3), 100, dtype=np.uint8)
        assert metrics.psnr(a, a + 1) == pytest.approx(20 * math.log10(255), abs=1e-12)

    def test_one_sample_of_many(self) -> None:
        a = np.zeros((4, 5, 3), dtype=np.uint8)
        b = a.copy()
        b[2, 3, 1] = 255
        assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(4 * 5 * 3), abs=1e-12)

    def test_wraps_no_byte(self) -> None:
        a, b = np.zeros((2, 2, 3), dtype=np.uint8), np.full((2, 2, 3), 255, dtype=np.uint8)
        assert metrics.psnr(a, b) == metrics.psnr(b, a) == 0

    def test_as_scikit_image(self) -> None:
        ours = pytest.importorskip("skimage.metrics")
        a = photo_like(61, 83)
        b = noisy(a, 9)
        expected = ours.peak_signal_noise_ratio(a, b, data_range=255)
        assert metrics.psnr(a, b) == pytest.approx(expected, abs=1e-10)

    def test_identical_is_infinite(self) -> None:
        a = photo_like(8, 8)
        assert metrics.psnr(a, a) == math.inf

    def test_sizes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="different sizes"):
            metrics.psnr(photo_like(8, 8), photo_like(8, 9))

    def test_unrounded_sees_what_rounding_hides(self) -> None:
        a = photo_like(32, 32)
        inside = a < 255
        x_hat = torch.from_numpy((a + 0.3 * inside) / 255).permute(2, 0, 1)[None]
        share = inside.mean()
        expected = 20 * math.log10(255 / (0.3 * math.sqrt(share)))
        assert metrics.psnr_unrounded(a, x_hat) == pytest.approx(expected, abs=1e-9)
        assert metrics.psnr(a, metrics.to_rgb8(x_hat)) == math.inf

    def test_pictures_of_several_strips(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 256, (2, 23, 100_000, 3), dtype=np.uint8)
        mse = ((a.astype(np.float64) - b) ** 2).mean()
        assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-12)
        x_hat = metrics.to_tensor(b)
        assert metrics.psnr_unrounded(a, x_hat) == pytest.approx(metrics.psnr(a, b), abs=1e-6)
        assert np.array_equal(metrics.to_rgb8(x_hat), b)

    def test_unrounded_clamps(self) -> None:
        a = np.full((4, 4, 3), 255, dtype=np.uint8)
        assert metrics.psnr_unrounded(a, torch.full((1, 3, 4, 4), 1.5)) == math.inf


class TestPictureConversion:
    def test_round_trip_of_all_values(self) -> None:
        a = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        assert np.array_equal(metrics.to_rgb8(metrics.to_tensor(a)), a)

    @pytest.mark.parametrize(
        ("value", "byte"), [(-0.1, 0), (0.49 / 255, 0), (0.51 / 255, 1), (254.6 / 255, 255), (1.7, 255)]
    )
    def test_clamps_and_rounds(self, value: float, byte: int) -> None:
        assert metrics.to_rgb8(torch.full((1, 3, 2, 2), value)).tolist() == [[[byte] * 3] * 2] * 2


def ms_ssim_by_scipy(a: Picture, b: Picture) -> float:
    """Wang et al. 2003 in float64 with scipy's filters; sides must be divisible by 16."""
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return correlate1d(correlate1d(x, taps, axis=0), taps, axis=1)[5:-5, 5:-5]

    channels = []
    for c in range(3):
        x, y = a[..., c] / 255.0, b[..., c] / 255.0
        product = 1.0
        for scale, weight in enumerate(weights):
            mx, my = blur(x), blur(y)
            vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
            contrast = (2 * vxy + 0.03**2) / (vx + vy + 0.03**2)
            luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
            last = scale == len(weights) - 1
            product *= float((luminance * contrast if last else contrast).mean()) ** weight
            if not last:
                x, y = (p.reshape(p.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3)) for p in (x, y))
        channels.append(product)
    return float(np.mean(channels))


class TestMSSSIM:
    def test_as_the_definition(self) -> None:
        a = photo_like(192, 208)  # divisible by 16: no scale needs padding
        b = noisy(a, 12)
        value = metrics.ms_ssim(a, b)
        assert value == pytest.approx(ms_ssim_by_scipy(a, b), abs=1e-11)
        assert 0.3 < value < 0.999

    def test_as_compressai(self) -> None:
        compressai_eval = pytest.importorskip("compressai.utils.eval_model.__main__")
        a = photo_like(176, 180)
        b = noisy(a, 6)
        tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].float() / 255 for p in (a, b)]
        theirs = compressai_eval.compute_metrics(*tensors, max_val=255)
        assert metrics.ms_ssim(a, b) == pytest.approx(theirs["ms-ssim-rgb"], abs=1e-5)
        assert metrics.psnr(a, b) == pytest.approx(theirs["psnr-rgb"], abs=1e-4)

    @pytest.mark.parametrize("size", [(161, 161), (163, 250), (177, 162)])
    def test_odd_sides_as_pytorch_msssim(self, size: tuple[int, int]) -> None:
        a = photo_like(*size)
        b = noisy(a, 15)
        tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].double() / 255 for p in (a, b)]
        # Its window is rounded to float32.
        assert metrics.ms_ssim(a, b) == pytest.approx(float(pytorch_msssim.ms_ssim(*tensors, data_range=1.0)), abs=1e-6)

    @pytest.mark.parametrize("strip", [1, 5000, 1 << 30])
    def test_strips_do_not_matter(self, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
        a = photo_like(170, 190)
        b = noisy(a, 10)
        whole = metrics.ms_ssim(a, b)
        monkeypatch.setattr("lalic.ms_ssim.STRIP", strip)
        assert metrics.ms_ssim(a, b) == pytest.approx(whole, abs=1e-12)

    def test_opposites(self) -> None:
        a = photo_like(176, 176)
        assert 0 <= metrics.ms_ssim(a, 255 - a) < 0.01

    @pytest.mark.parametrize(("side", "defined"), [(160, False), (161, True)])
    def test_shortest_side(self, side: int, defined: bool) -> None:
        a = photo_like(side, 170)
        assert (metrics.ms_ssim(a, noisy(a, 3)) is not None) == defined

    def test_decibels(self) -> None:
        assert metrics.decibels(0.99) == pytest.approx(20)
        assert metrics.decibels(None) is None
        a = photo_like(170, 170)
        assert metrics.decibels(metrics.ms_ssim(a, a)) == math.inf


class TestRate:
    def test_bits_per_pixel(self) -> None:
        assert metrics.bits_per_pixel(100, height=20, width=10) == 4

    def test_estimated_bits_by_hand(self) -> None:
        likelihoods = {"y": torch.full((1, 2, 2, 2), 0.25), "z": torch.tensor([[0.5, 1.0]])}
        assert metrics.estimated_bits(likelihoods) == 8 * 2 + 1

    def test_estimated_bits_do_not_drift_in_float32(self) -> None:
        p = torch.full((3_000_001,), 0.9)
        exact = -math.log2(float(torch.tensor(0.9))) * p.numel()
        assert metrics.estimated_bits({"y": p}) == pytest.approx(exact, rel=1e-12)


class TestJSON:
    def test_no_infinity_reaches_a_file(self) -> None:
        value = {"a": math.inf, "b": [math.nan, 1.0], "c": (None, {"d": -math.inf}), "e": "text", "f": 3}
        text = json.dumps(metrics.json_ready(value), allow_nan=False)
        assert json.loads(text) == {"a": None, "b": [None, 1.0], "c": [None, {"d": None}], "e": "text", "f": 3}

    def test_mean_of_what_is_finite(self) -> None:
        assert metrics.finite_mean([1.0, math.inf, 3.0, None]) == 2
        assert metrics.finite_mean([math.inf, None]) is None
