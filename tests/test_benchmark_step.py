"""The benchmarks of the training step run, and say what they promise; their figures are nobody's here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import profile_step, tables, train_step
from benchmarks.published import flags_for, mended_copies, mended_source


def call(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / script), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_profile_of_a_step(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    settings = ["--model", "demo", "--crop", "64", "--batch", "1", "--steps", "1", "--output", str(output)]
    for label in ("before", "after"):
        done = call(root, "profile_step.py", *settings, "--label", label)
        assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report) == ["before", "after"]
    result = report["after"]
    groups = result["groups"]
    expected = {"BiWKV", "convolutions", "matmul", "layer norm", "entropy model", "optimiser", "copies and casts"}
    assert expected <= set(groups)
    assert sum(g["share"] for g in groups.values()) == pytest.approx(1)
    # Nearly everything has a group of its own.
    assert groups.get("other", {"share": 0})["share"] < 0.05
    assert result["operators"] == sorted(result["operators"], key=lambda row: -row["ms"])
    # Operators account for the step, within what the profiler costs.
    assert 0.3 < result["operators_ms"] / result["step_ms_without_profiler"] < 10
    assert "aten::mm" in done.stdout and result["revision"] != "unknown"


def test_steps_of_two_batches(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    variants = ["plain", "fp32", "fp32+ckpt"]
    settings = ["--model", "demo", "--crop", "64", "--rounds", "1", "--variants", *variants]
    done = call(root, "train_step.py", *settings, "--batch", "1", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["batches"]) == ["1", "2"]
    for figures in report["batches"].values():
        assert list(figures) == variants
        assert figures["plain"]["speed_up"] == 1 and {v["baseline"] for v in figures.values()} == {"plain"}
        assert all(v["images_per_second"] > 0 and v["peak_mib"] > v["idle_mib"] > 0 for v in figures.values())
        assert figures["fp32"]["first_loss"] == pytest.approx(figures["plain"]["first_loss"], rel=1e-3)


def test_a_variant_that_cannot_run_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {"plain": {"seconds": 2.0}, "fp32": {"error": "out of memory: ..."}, "bf16": {"seconds": 0.5}}

    def turn(worker: str) -> dict[str, Any]:
        return {"loss": 3.0, "peak_mib": 8.0, "idle_mib": 4.0, **turns[worker]}

    class Named(str):
        def kill(self) -> None: ...
        def wait(self) -> None: ...

    monkeypatch.setattr(train_step, "start_worker", lambda variant, *_: Named(variant))
    monkeypatch.setattr(train_step, "one_turn", turn)
    figures = train_step.measure(4, SimpleNamespace(variants=list(turns), rounds=3))
    assert figures["fp32"] == {"error": "out of memory: ..."}
    assert (figures["plain"]["images_per_second"], figures["bf16"]["speed_up"]) == (2.0, 4.0)
    turns["bf16"]["loss"] = 3.2
    figures = train_step.measure(4, SimpleNamespace(variants=list(turns), rounds=3))
    assert figures["bf16"] == {"error": "computes another loss: 3.2 instead of 3"}
    assert figures["plain"]["images_per_second"] == 2.0


def test_out_of_memory_is_said_so() -> None:
    text = train_step.reason(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert text == "out of memory: CUDA out of memory. Tried to allocate 2 GiB more"


def test_a_worker_that_dies_is_an_error_of_its_variant(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", "import os; os._exit(9)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert train_step.one_turn(worker) == {"error": "the process died with status 9"}


def test_what_a_compiler_prints_is_no_reply(root: Path) -> None:
    """A program that a variant starts writes to the descriptor itself."""
    code = f"""
import os, sys
sys.path.insert(0, {str(root)!r})
import torch
from benchmarks import train_step
def build(*_):
    os.system("echo ninja: no work to do.")
    return lambda number: torch.tensor(2.0)
train_step.build_step = build
train_step.work(train_step.parse(["--worker", "fp32", "--threads", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", code], input="turn\nturn\n", capture_output=True, text=True)
    assert [json.loads(line)["loss"] for line in done.stdout.splitlines()] == [2.0, 2.0], done.stderr
    assert "no work to do" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--published", "/x"], "needs --device cuda"), (["--variants", "published"], "needs --published DIR")],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train_step.parse(arguments)
    assert words in capsys.readouterr().err


def test_published_sources_are_mended_for_another_gpu() -> None:
    flags = ["-O3", "-gencode arch=compute_86,code=sm_86"]
    assert flags_for(flags, (9, 0)) == ["-O3", "-gencode arch=compute_90,code=sm_90"]
    source = "#include <torch/extension.h>\n#include <THC/THCAtomics.cuh>\nAT_DISPATCH(k.type(), f);\n"
    assert mended_source(source) == "#include <torch/extension.h>\nAT_DISPATCH(k.scalar_type(), f);\n"


def test_mended_copies_stay_where_they_are(tmp_path: Path) -> None:
    """Newer ones would be compiled again by every process."""
    source, cache = tmp_path / "op.cu", tmp_path / "cache"
    source.write_text("AT_DISPATCH(k.type(), f);\n")
    (copy,) = mended_copies([source], cache)
    before = copy.stat().st_mtime_ns
    assert copy.read_text() == "AT_DISPATCH(k.scalar_type(), f);\n"
    assert mended_copies([source], cache) == [copy] and copy.stat().st_mtime_ns == before
    source.write_text("AT_DISPATCH(k.type(), g);\n")
    assert mended_copies([source], cache) != [copy] and len(list(cache.iterdir())) == 2


def test_every_result_has_its_table(root: Path) -> None:
    text = (root / "benchmarks" / "README.md").read_text()
    for name, make in tables.SECTIONS.items():
        for path in (root / "benchmarks" / "results").glob(f"{name}*.json"):
            assert make(json.loads(path.read_text())) in text, f"{path.name}: run python benchmarks/tables.py"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("lalic::biwkv", "BiWKV"),
        ("aten::mkldnn_convolution_backward", "convolutions"),
        ("aten::addmm", "matmul"),
        ("aten::copy_", "copies and casts"),
        ("aten::threshold_backward", "elementwise and reductions"),
        ("aten::_fused_adam_", "optimiser"),
        ("triton_poi_fused_add_0", "compiled blocks"),
        ("aten::as_strided", "views and autograd"),
    ],
)
def test_operators_have_groups(name: str, group: str) -> None:
    assert profile_step.group_of(name) == group
