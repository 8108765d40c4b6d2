"""benchmarks/codec.py on the demo model and a tiny picture: it runs, checks, and its figures are consistent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STAGES = ["g_a", "h_a", "h_s", "context + parameters", "g_s", "entropy coding", "the rest"]


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/codec.py", "--model", "demo", "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_figures(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "codec.json"
    done = run(root, "--size", 70, 64, "--rounds", 2, "--baseline", "compressai", "--output", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["picture"] == "synthetic 70x64"
    assert result["environment"]["device"] == "cpu"
    assert result["demanded"] == {}
    names = {f"{who}{what}" for who in ("", "network of ", "compressai ") for what in ("encode", "decode")}
    assert set(result["times"]) == names
    assert all(0 < t["min_ms"] <= t["median_ms"] for t in result["times"].values())
    assert set(result["ratios"]) == {
        "encode / network",
        "decode / network",
        "compressai encode / encode",
        "compressai decode / decode",
    }
    for name, stages in result["stages_ms"].items():
        assert list(stages) == [*STAGES, "total"]
        idle = {"g_s"} if "encode" in name else {"g_a", "h_a"}
        assert {s for s in STAGES if stages[s] == 0} == idle
    assert "median" in done.stdout and "ms by stage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--published", "nowhere"], "needs --device cuda"),
        (["--image", "missing.png"], "missing.png"),
        (["--rounds", "0"], "must be positive"),
        (["--device", "cuda"], "no CUDA device"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_arguments(root: Path, arguments: list[str], message: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(root, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("source", [None, "import nothing_of_this_name"], ids=["absent", "broken"])
def test_published_code_that_does_not_import(root: Path, tmp_path: Path, source: str | None) -> None:
    if source:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "lalic.py").write_text(source)
    code = "import sys; from pathlib import Path; from benchmarks.published import import_published as f; "
    code += "f(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ("does not import: No module named" if source else "no checkout of the published code") in done.stderr
