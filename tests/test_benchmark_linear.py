"""benchmarks/linear_bound.py beside what is known of blocks in a plane and of white noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.linear_bound import blocks_of, main, measure
from lalic.errors import LalicError


def write(folder: Path, pictures: list[np.ndarray]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def test_blocks_are_squares_of_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    blocks = blocks_of(picture)
    assert blocks.shape == (2 * 3, 768)
    assert np.array_equal(blocks[4].reshape(16, 16, 3), picture[16:32, 16:32] / 255)


def test_blocks_of_three_patterns_need_three_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    patterns = rng.integers(-20, 21, (3, 16, 16, 3))

    def picture() -> np.ndarray:
        rows = [[np.tensordot(rng.integers(-2, 3, 3), patterns, 1) for _ in range(8)] for _ in range(8)]
        return (128 + np.block([[[block] for block in row] for row in rows]).reshape(128, 128, 3)).astype(np.uint8)

    paths = write(tmp_path / "flat", [picture() for _ in range(4)])
    found = measure(paths[:3], paths[3:], [2, 3, 4])
    assert found[2] < 60 < 150 < found[3] and found[4] > 150


def test_white_noise_keeps_its_share(tmp_path: Path) -> None:
    """Every direction of white noise has the same variance: what M of 768 leave is known."""
    rng = np.random.default_rng(2)
    paths = write(tmp_path / "noise", [rng.integers(0, 256, (512, 512, 3), np.uint8) for _ in range(7)])
    variance = (256**2 - 1) / 12 / 255**2
    for m, psnr in measure(paths[:6], paths[6:], [1, 384, 640]).items():
        assert psnr == pytest.approx(-10 * np.log10(variance * (768 - m) / 768), abs=0.05)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    write(tmp_path / "noise", [rng.integers(0, 256, (64, 64, 3), np.uint8)])
    arguments = [str(tmp_path / "noise"), "--test", str(tmp_path / "noise"), "--channels"]
    assert main([*arguments, "4", "8", "--output", str(tmp_path / "x.json")]) == 0
    psnr = json.loads((tmp_path / "x.json").read_text())["psnr"]
    assert list(psnr) == ["4", "8"] and f"M    8: {psnr['8']:6.2f} dB" in capsys.readouterr().out
    with pytest.raises(LalicError, match="--channels 768"):
        main([*arguments, "768"])
