"""What the launcher may say about DeepSpeed, and what is refused, in one line each."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_train import own_process_state  # noqa: F401 -- a fixture

from lalic.config import TrainSection
from lalic.errors import LalicError
from lalic.training import engine_settings
from lalic.training.distributed import SharedError, start_processes
from lalic.training.engine_deepspeed import Piece, pieces_of
from lalic.training.engine_settings import deepspeed_asked, deepspeed_settings

TRAIN = TrainSection(batch_size=16, accumulation=2, clip=0.5)


@pytest.fixture(autouse=True)
def launched_for_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(engine_settings, "find_spec", lambda name: object())


def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """What deepspeed gets for a file with these settings, on four processes."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **given}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    return deepspeed_settings(TRAIN, 4)


def test_the_runs_config_fills_in_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 1, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "none"}, "offload_param": None}
    same = {"gradient_clipping": 0.5, "train_batch_size": 16, "gradient_accumulation_steps": "auto"}
    ours = settings(tmp_path, monkeypatch, zero_optimization=zero, bf16={"enabled": False}, steps_per_print=7, **same)
    assert ours == {
        "steps_per_print": 7,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "gradient_accumulation_steps": 1,
        # Two micro-batches of 2, which DeepSpeed takes for one.
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage must be 1 or 2, not 3"),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1 or 2, not 0"),
        ({"zero_optimization": {}}, "stage must be 1 or 2, not null"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is not supported",
        ),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients is not supported"),
        ({"fp16": {"enabled": True}}, "fp16 may not be enabled: half precision is train.precision=bf16"),
        ({"bf16": {"enabled": "auto"}}, "bf16 may not be enabled"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast may not be enabled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is not supported: remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported: remove it"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps is 4, but it is 2 .*train\.accumulation"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is 1.0, but it is 0.5 .*train\.clip"),
        ({"train_batch_size": 8}, r"train_batch_size is 8, but it is 16 .*train\.batch_size"),
        ({"train_micro_batch_size_per_gpu": 16}, "train_micro_batch_size_per_gpu is 16, but it is 2"),
        ({"prescale_gradients": True}, "prescale_gradients is not supported"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_refused(given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LalicError, match=words) as error:
        settings(tmp_path, monkeypatch, **given)
    assert "\n" not in str(error.value) and "zero.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read .*: start from the checkout"), ("{", "is no JSON"), ("[]", "must hold one JSON object")],
    ids=["missing", "broken", "list"],
)
def test_files_that_say_nothing(
    content: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(LalicError, match=words):
        deepspeed_settings(TRAIN, 4)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "the launcher: zero_optimization.stage must be 1 or 2"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "the launcher: .*offload_optimizer is not supported",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "the launcher: gradient_clipping is 1.0, but it is 0.5"),
    ],
)
def test_without_a_file(variables: dict[str, str], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --use_deepspeed --zero_stage 1` says it."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words is None:
        stage = int(variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        assert deepspeed_settings(TRAIN, 4)["zero_optimization"] == {"stage": stage}
    else:
        with pytest.raises(LalicError, match=words):
            deepspeed_settings(TRAIN, 4)


def test_deepspeed_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_settings, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    with pytest.raises(LalicError, match=r"not installed: .*lalic\[deepspeed\]"):
        deepspeed_settings(TRAIN, 4)


def test_deepspeed_without_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "launch/deepspeed/zero1.json")
    with pytest.raises(SharedError, match="needs processes that accelerate started"):
        start_processes(TRAIN)
    assert deepspeed_asked()


def test_launcher_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that launch/train.slurm counts on; what the DeepSpeed ones name is found from any folder."""
    folder = root / "launch" / "accelerate"
    names = {"cpu1", "cpu2", "gpu1", "multi_gpu", "multi_node", "deepspeed_zero1", "deepspeed_zero2"}
    assert {path.stem for path in folder.glob("*.yaml")} == names
    monkeypatch.chdir(tmp_path)
    for name in names:
        content = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert content["mixed_precision"] == "no"
        if name.startswith("deepspeed"):
            deepspeed = content["deepspeed_config"]
            assert deepspeed["deepspeed_multinode_launcher"] == "standard"
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", deepspeed["deepspeed_config_file"])
            assert deepspeed_settings(TRAIN, 4)["zero_optimization"]["stage"] == int(name[-1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_pieces_cover_every_parameter_once(ranks: int) -> None:
    numels = [7, 1, 12, 3, 30, 1, 1]
    part = -(-sum(numels) // ranks) + 1  # the last part is padded
    flat = list(range(sum(numels)))
    starts = [sum(numels[:n]) for n in range(len(numels))]
    covered = []
    for rank in range(ranks):
        mine = flat[rank * part : (rank + 1) * part]
        for piece in pieces_of(numels, rank, part):
            first = starts[piece.parameter] + piece.start
            assert mine[piece.offset : piece.offset + piece.length] == flat[first : first + piece.length]
            covered += flat[first : first + piece.length]
    assert covered == flat
    assert pieces_of([4], 0, 4) == [Piece(0, 0, 0, 4)] and pieces_of([4], 1, 4) == []
