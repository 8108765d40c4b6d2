"""benchmarks/codec_memory.py on the demo model and tiny pictures: both ways agree, and cases add up in its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/codec_memory.py", "--model", "demo", "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_figures(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    done = run(root, "--size", 70, 64, "--output", output)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(output.read_text())["rows"]
    assert (first["way"], second["way"]) == ("default", "whole")
    assert second["y_largest_difference"] == second["x_hat_largest_difference"] == 0
    assert all(first[f"{task}_peak_mib"] > 50 for task in ("encode", "decode"))


def test_cases_add_up(root: Path) -> None:
    sys.path.insert(0, str(root))
    from benchmarks.codec_memory import merge

    def row(width: int, way: str, seconds: int = 0) -> dict[str, object]:
        return {"model": "demo", "width": width, "height": 64, "way": way, "encode_s": seconds}

    old = [row(128, "default"), row(64, "whole", 1)]
    assert merge(old, [row(64, "whole", 2), row(64, "default")]) == [
        row(64, "default"),
        row(64, "whole", 2),
        row(128, "default"),
    ]


def test_a_case_without_enough_memory_is_a_line(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    done = run(root, "--size", 64, 64, "--ways", "default", "--limit-gib", 0.3, "--output", output)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a case failed")
    assert "0.3 GiB" in json.loads(output.read_text())["rows"][0]["error"]
