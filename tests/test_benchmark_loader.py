"""benchmarks/loader.py runs, at a size that says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from checkout_root import ROOT
from PIL import Image


@pytest.mark.slow
def test_tiny_sizes(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        small = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    output = tmp_path / "loader.json"
    sizes = ["--shard-mib", "1", "--batches", "2", "--rounds", "1", "--work", str(tmp_path)]
    command = [sys.executable, "benchmarks/loader.py", str(tmp_path / "photos"), *sizes, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    result = json.loads(output.read_text())
    assert [row["task"] for row in result["rows"][:3]] == ["published", "ours", "ours, pillow"]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert set(result["ratios"]) == {"images per core", "resume", "worker memory"}
