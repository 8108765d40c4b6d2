"""From photographs to verified bundles, trained for a few steps: the MS-SSIM ladder, and one model for every rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lalic.data_prep import shard
from PIL import Image
from test_train import own_process_state  # noqa: F401 -- a fixture

from lalic import train, verify
from lalic.eval import main as evaluate_main
from lalic.export import main as export
from lalic.ladder import MS_SSIM, MSE
from lalic.release import open_weights

CONFIG = """
model: {{N: 8, dims: [8, 12, 16, 32, 16, 8], depths: [1, 1, 1, 1], groups: [4, 4, 8, 16]}}
data: {{shards: {shards}, workers: 0, val: {images}, val_crop: 192}}
loss: {{metric: ms-ssim, quality: 1}}
train: {{batch_size: 2, cpu_threads: 1}}
stages:
- {{steps: 3, lr: 1e-3, crop: 192}}
validate: {{every: 3}}
checkpoint: {{every: 3, keep: 1}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config, its shards and its images."""
    generator, images = np.random.default_rng(1), tmp_path / "images"
    images.mkdir()
    for i in range(4):
        colours = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        colours.resize((220, 200), Image.Resampling.BICUBIC).save(images / f"{i}.png")
    shard.main(["--input", str(images), "--output", str(tmp_path / "shards"), "--min-side", "64", "--workers", "1"])
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(shards=tmp_path / "shards", images=images))
    return config


@pytest.mark.slow
def test_from_photographs_to_verified_bundles(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    for quality in (1, 6):
        settings = [f"run.dir={tmp_path / f'runs/tiny-q{quality}'}", f"loss.quality={quality}"]
        assert train.main(["--config", str(config), *settings]) == 0

    release = tmp_path / "release"
    assert export(["--sweep", str(tmp_path / "runs" / "tiny"), "--output", str(release)]) == 0
    bundles = [release / f"lalic-ms-ssim-q{quality}" for quality in (1, 6)]
    assert sorted(p.name for p in release.iterdir()) == ["SHA256SUMS", *(b.name for b in bundles)]
    for bundle, quality in zip(bundles, (1, 6), strict=True):
        weights = open_weights(bundle)
        assert weights.loss == {"metric": "ms-ssim", "lambda": MS_SSIM[quality]} and weights.metrics["bpp"] > 0
        assert "lambda * (1 - MS-SSIM) + bpp" in (bundle / "README.md").read_text()

    result = tmp_path / "result.json"
    arguments = ["-p", *map(str, bundles), "-q", "q1", "q6", "-i", str(images), "--result", str(result), "--both"]
    assert not evaluate_main(arguments)
    for bundle in bundles:
        again = ["--checkpoint", str(bundle), "--output", str(release), "--eval", str(result), "--force"]
        assert export(again) == 0
        (entry,) = json.loads((bundle / "evaluation.json").read_text())
        assert entry["dataset"] == "images" and entry["images"] == 4 and 0 < entry["metrics"]["ms-ssim"] <= 1
    capsys.readouterr()
    assert verify.main([str(release), "--image", str(images / "0.png")]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_one_model_for_every_rate(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, run, release = tmp_path / "images", tmp_path / "runs" / "tiny", tmp_path / "release"
    settings = [f"run.dir={run}", "loss.metric=mse", "loss.quality=[1, 6]"]
    assert train.main(["--config", str(config), *settings]) == 0
    assert export(["--run", str(run), "--output", str(release)]) == 0
    assert export(["--run", str(run), "--output", str(release), "--quality", *"123456"]) == 0
    bundle = release / "lalic-mse-vbr"
    weights = open_weights(bundle)
    assert weights.loss == {"metric": "mse", "quality": [1, 6], "lambdas": [*MSE.values()]}
    assert sorted(weights.metrics["rungs"]) == [*"123456"]
    for quality, lmbda in MSE.items():
        folded = open_weights(release / f"lalic-mse-q{quality}")
        assert folded.loss == {"metric": "mse", "lambda": lmbda}
        assert folded.folded["fingerprint"] == weights.fingerprint
        assert folded.metrics["bpp"] == weights.metrics["rungs"][str(quality)]["bpp"]

    result = tmp_path / "result.json"
    arguments = ["-p", str(bundle), "-q", "1", "2.5", "6", "-i", str(images), "--result", str(result), "--both"]
    assert not evaluate_main(arguments)
    assert export(["--checkpoint", str(bundle), "--output", str(release), "--eval", str(result), "--force"]) == 0
    entries = json.loads((bundle / "evaluation.json").read_text())
    assert [entry["quality"] for entry in entries] == [1, 2.5, 6]
    assert all(entry["dataset"] == "images" and entry["metrics"]["bpp"] > 0 for entry in entries)
    capsys.readouterr()
    assert verify.main([str(release), "--image", str(images / "0.png")]) == 0, capsys.readouterr().out
