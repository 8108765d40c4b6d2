"""benchmarks/remote_shards.py runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkout_root import ROOT


@pytest.mark.slow
def test_tiny_sizes(tmp_path):
    output = tmp_path / "remote.json"
    sizes = ["--shards", "4", "--images", "8", "--window", "1", "--rounds", "1", "--workers", "0"]
    command = [sys.executable, "benchmarks/remote_shards.py", *sizes, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["local", "cache, warm", "cache, cold", "ranges"]
    assert all(value > 0 for row in rows for name, value in row.items() if name != "variant")
