"""benchmarks/sample_order.py runs, and its sizes are those it says."""

from __future__ import annotations

import json
import subprocess
import sys

from checkout_root import ROOT


def test_tiny_sizes(tmp_path):
    output = tmp_path / "order.json"
    sizes = ["--shards", "6", "--per-shard", "4096", "--window", "2"]
    command = [sys.executable, "benchmarks/sample_order.py", *sizes, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert "24576 samples in 6 shards" in done.stdout
    assert all(row["seconds"] > 0 and row["mb"] >= 0 for row in result["rows"].values())
    assert set(result["rows"]) >= {"plan", "any step", "whole epoch", "randperm", "index, parsed", "index, mapped"}
