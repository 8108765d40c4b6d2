"""`train.compile`: the same numbers, one graph per block shape and crop, errors in one line, exact resume.

Quick tests take the backend aot_eager, which traces and differentiates as inductor does and generates no code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from test_resume import assert_same_end, in_turn, launch_two
from test_train import config_path, own_process_state, pixels, records, run  # noqa: F401 -- fixtures
from torch import Tensor

from lalic.config import LossSection, TrainSection, read_config
from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.model.blocks import BiRWKVBlock
from lalic.training import compiling
from lalic.training.compiling import BlockCompiler, compile_errors
from lalic.training.distributed import start_processes
from lalic.training.run_folder import check_same_run
from lalic.training.step import TrainStep

SMALLEST: dict[str, Any] = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 0, 0, 0), "groups": (32,)}
"""Two blocks of one shape, so one graph for each crop."""

SETTINGS = ["train.compile=true", "model.depths=[1, 0, 0, 0]", "model.groups=[32]"]


@pytest.fixture(autouse=True)
def own_compiler_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler without graphs, and torch's settings as they were."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(), torch._inductor.config.patch():
        yield
    torch._dynamo.reset()


def new_step(**settings: Any) -> TrainStep:
    section = TrainSection(batch_size=2, cpu_threads=1, compile=True, **settings)
    accelerator = start_processes(section)
    torch.manual_seed(0)
    return TrainStep(accelerator, LALIC(**SMALLEST), section, LossSection(metric="mse", quality=3), 0)


def take(ours: TrainStep, number: int, side: int) -> dict[str, Tensor]:
    return ours([{"x": pixels(2, side, seed=number), "bad": 0}], step=number, lr=1e-4).values


def block_results(compiler: BlockCompiler | None, checkpointing: bool, dtype: torch.dtype) -> list[Tensor]:
    """Output and all gradients of a block on (2, 12, 8, 8)."""
    torch.manual_seed(1)
    block = BiRWKVBlock(12).to(dtype).train()
    block.gradient_checkpointing = checkpointing
    block.compiled_mix = compiler
    x = torch.randn(2, 12, 8, 8, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], torch.randn(y.shape, dtype=dtype))]


def assert_blocks_agree() -> None:
    """In float64, compiled with and without checkpointing against eager without."""
    compiler = BlockCompiler(start_processes(TrainSection(cpu_threads=1)))
    expected = block_results(None, False, torch.float64)
    for checkpointing in (False, True):
        for ours, theirs in zip(block_results(compiler, checkpointing, torch.float64), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    assert compiler.graphs == 1


def test_outputs_and_gradients_are_those_of_the_block() -> None:
    assert_blocks_agree()


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_the_block_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    assert_blocks_agree()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_has_the_loss_of_an_eager_one(precision: Any, checkpointing: bool) -> None:
    compiled = take(new_step(precision=precision, gradient_checkpointing=checkpointing), 0, 64)
    section = TrainSection(batch_size=2, cpu_threads=1, precision=precision)
    torch.manual_seed(0)
    eager = TrainStep(start_processes(section), LALIC(**SMALLEST), section, LossSection(metric="mse", quality=3), 0)
    expected = take(eager, 0, 64)
    rel = 1e-5 if precision == "fp32" else 5e-3
    assert float(compiled["loss"]) == pytest.approx(float(expected["loss"]), rel=rel)
    assert float(compiled["gradient_norm"]) == pytest.approx(float(expected["gradient_norm"]), rel=10 * rel)


def test_one_graph_for_each_shape_and_crop(caplog: pytest.LogCaptureFixture) -> None:
    ours = new_step()
    with caplog.at_level(logging.INFO, "lalic.train"):
        graphs = []
        for number, side in enumerate((64, 64, 128, 64, 128)):
            take(ours, number, side)
            graphs.append(ours.compiled_graphs)
    assert graphs == [1, 1, 2, 2, 2]
    lines = [m for m in caplog.messages if m.startswith("compiled graph")]
    assert [re.sub(".* on ", "", line) for line in lines] == ["float32 2x8x32x32", "float32 2x8x64x64"]


def test_validation_compiles_nothing() -> None:
    ours = new_step()
    take(ours, 0, 64)
    ours.bare.eval()
    for height, width in ((64, 128), (192, 64)):
        with torch.no_grad():
            ours.bare(torch.rand(1, 3, height, width))
    ours.bare(torch.rand(1, 3, 128, 128))
    ours.bare.train()
    with torch.no_grad():
        ours.bare(torch.rand(1, 3, 192, 128))
    assert ours.compiled_graphs == 1


def test_names_in_state_dicts_stay() -> None:
    ours = new_step()
    take(ours, 0, 64)
    assert list(ours.bare.state_dict()) == list(LALIC(**SMALLEST).state_dict())
    assert not any("_orig_mod" in name for name, _ in ours.bare.named_modules())


def test_a_graph_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = BiRWKVBlock._mix

    def broken(self: BiRWKVBlock, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return mix(self, x)

    monkeypatch.setattr(BiRWKVBlock, "_mix", broken)
    ours = new_step()
    with pytest.raises(LalicError, match=r"torch\.compile failed .*set train\.compile=false") as error:
        take(ours, 0, 64)
    assert "\n" not in str(error.value)


def test_too_many_graphs_are_an_error_and_not_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 1)
    ours = new_step()
    take(ours, 0, 64)
    with pytest.raises(LalicError, match=r"torch\.compile failed .*limit"):
        take(ours, 1, 128)


def test_a_backend_that_fails_is_one_line_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no room for code\nand more of it")

    monkeypatch.setattr(compiling, "BACKEND", fails)
    with pytest.raises(LalicError, match=r"torch\.compile failed .*no room for code") as error:
        new_step()
    assert "\n" not in str(error.value)


def test_without_a_compiler_nothing_starts(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(LalicError, match=r"torch\.compile failed .*set train\.compile=false") as error:
        run(config_path, tmp_path / "run", *SETTINGS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), compile_errors():
        raise ZeroDivisionError


def test_a_run_counts_its_graphs(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two stages of one shape each; the validations in between add none."""
    assert run(config_path, tmp_path / "run", *SETTINGS) == 0
    assert [r["compiled_graphs"] for r in records(tmp_path / "run")] == [1] * 4 + [2] * 3
    assert len(records(tmp_path / "run", "validation")) == 3


def test_it_belongs_to_the_run(config_path: Path) -> None:  # noqa: F811
    """Compiled code rounds otherwise, so like the precision it may not change under a run."""
    plain, compiled = read_config(config_path), read_config(config_path, ["train.compile=true"])
    assert (plain.train.compile, compiled.train.compile) == (False, True)
    check_same_run(compiled, compiled, {"stage": 1})
    with pytest.raises(LalicError, match=r"train\.compile \(False -> True\)"):
        check_same_run(plain, compiled, {"stage": 1})


@pytest.mark.slow
@pytest.mark.timeout(1500)  # three processes, each of which compiles with an empty cache
def test_a_killed_run_ends_with_the_same_bits(
    config_path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the second stage and resumed there, by a process that has compiled nothing for the first crop."""
    for name, orders in {
        "reference": [{"run": "reference"}],
        "killed": [{"run": "killed", "kill": "step", "at": 4}, {"run": "killed"}],
    }.items():
        # A cache each: what is resumed is compiled anew.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        statuses, said = in_turn(tmp_path, config_path, [{**order, "settings": SETTINGS} for order in orders])
        assert statuses[-1] == 0, said
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert [r["compiled_graphs"] for r in records(tmp_path / "killed")] == [1] * 4 + [1] * 3


@pytest.mark.slow
def test_two_processes_compile_and_are_one_run(config_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """DDP and checkpointing around compiled blocks, beside one eager process: the same losses but for rounding."""
    settings = [*SETTINGS, "train.gradient_checkpointing=true"]
    status, said = launch_two(tmp_path, config_path, {"run": "two", "settings": settings})
    assert status == 0, said
    eager = [*SETTINGS[1:], "train.accumulation=2"]
    statuses, said_by_one = in_turn(tmp_path, config_path, [{"run": "one", "settings": eager}])
    assert statuses == [0], said_by_one
    two, one = (records(tmp_path / folder) for folder in ("two", "one"))
    assert [r["compiled_graphs"] for r in two] == [1] * 4 + [2] * 3
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
