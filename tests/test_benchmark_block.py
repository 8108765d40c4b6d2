"""benchmarks/block.py runs, checks before it times, and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from checkout_root import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import block as benchmark


def test_tiny_sizes(tmp_path):
    output = tmp_path / "block.json"
    command = [sys.executable, "benchmarks/block.py", "--rounds", "2", "--case", "1", "8", "6", "5", "--threads", "1"]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    (case,) = result["cases"]
    assert case["shape"] == {"B": 1, "C": 8, "H": 6, "W": 5} and case["demand"] is None
    rows = {(r["precision"], r["mode"], r["variant"]): r for r in case["rows"]}
    assert len(rows) == 2 * (2 + 3)
    for precision in benchmark.PRECISIONS:
        plain, ours, checkpointed = (rows[precision, "forward + backward", v] for v in ("plain", "ours", "ours+ckpt"))
        assert checkpointed["saved_mib"] < ours["saved_mib"] < plain["saved_mib"]
        assert 0 < ours["peak_mib"] < plain["peak_mib"]
        assert plain["operations"] > ours["operations"] > 0
    assert "forward + backward" in done.stdout and result["environment"]["torch"] == torch.__version__


def test_wrong_results_are_not_timed():
    blocks = benchmark.make_blocks((1, 4, 3, 3), "cpu")
    x, gradient = torch.randn(2, 1, 4, 3, 3)
    benchmark.check(blocks, x, gradient)
    with torch.no_grad():
        blocks["ours"].att.decay[0] += 1e-6  # float32 does not resolve less
    with pytest.raises(SystemExit, match="ours in float64 is off"):
        benchmark.check(blocks, x, gradient)


def test_a_missed_demand_is_said():
    row = {"precision": "float32", "mode": "forward + backward", "variant": "ours", "speed_up_of_minima": 1.29}
    case = {"shape": {"B": 1, "C": 96, "H": 128, "W": 128}, "rows": [row]}
    assert benchmark.judge(case, "cpu") == {"speed_up": 1.29, "demanded": ">= 1.3", "met": False}
    row["speed_up_of_minima"] = 1.3
    verdict = benchmark.judge(case, "cpu")
    assert verdict is not None and verdict["met"]
    assert benchmark.judge(case, "cuda") is None
