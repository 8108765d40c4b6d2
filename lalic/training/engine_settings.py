"""What the launcher says about DeepSpeed, made into the settings that DeepSpeed gets.

    launch/deepspeed/zero1.json ─► check ─► + batch, clip, accumulation of the run's config ─► deepspeed.initialize

The run's config says how to train, whatever the backend, so a setting here that would say it otherwise is refused,
and so is one that the engine was not made for. What is left are the stage and the sizes of the buffers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lalic.config import TrainSection
from lalic.errors import LalicError

USE = "ACCELERATE_USE_DEEPSPEED"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"

ZERO_SETTINGS = {
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
}
"""Of `zero_optimization`: those that change neither what is computed nor how the parameters are cut."""

HARMLESS = {"comms_logger", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"}
"""Top-level settings that are handed on as they are: what DeepSpeed prints."""


def deepspeed_asked() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get(USE, "false").lower() == "true"


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Let accelerate start the processes as for DDP: the engine calls DeepSpeed itself.

    Its own way would step right after the backward pass, before it is known whether a step is finite on all ranks;
    it needs transformers, and on a CPU it would need ACCELERATE_USE_CPU to be unset.
    """
    asked = os.environ.pop(USE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[USE] = asked


def deepspeed_settings(train: TrainSection, num_processes: int) -> dict[str, Any]:
    """DeepSpeed's whole configuration for a run. Raises LalicError for what cannot be followed."""
    if train.optimizer != "adam":
        raise LalicError(
            f"train.optimizer={train.optimizer} needs whole matrices, and DeepSpeed's ZeRO cuts them up: launch "
            "with launch/accelerate/multi_gpu.yaml (DDP), or take train.optimizer=adam"
        )
    if find_spec("deepspeed") is None:
        raise LalicError("the launcher asks for DeepSpeed, which is not installed: pip install 'lalic[deepspeed]'")
    source, given = _given()
    zero = given.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2) or isinstance(stage, bool):
        raise LalicError(
            f"{source}: zero_optimization.stage must be 1 or 2, not {json.dumps(stage)}: the weights of this model are "
            "too small to be worth cutting up (stage 3), and without ZeRO there is launch/accelerate/multi_gpu.yaml"
        )
    assert isinstance(zero, dict)
    _check_zero(source, zero)
    micro_batch = train.micro_batch(num_processes)
    ours = {
        "gradient_accumulation_steps": ("train.accumulation", train.accumulation),
        "gradient_clipping": ("train.clip", train.clip),
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.batch_size over processes and accumulation", micro_batch),
    }
    for key, value in given.items():
        if key in ours:
            name, expected = ours[key]
            if value not in ("auto", expected):
                raise LalicError(
                    f"{source}: {key} is {json.dumps(value)}, but it is {expected} in the run's config ({name}): "
                    'set it to "auto"'
                )
        elif key in ("fp16", "bf16", "torch_autocast"):
            if not isinstance(value, dict) or value.get("enabled", False) not in (False, "false"):
                raise LalicError(
                    f"{source}: {key} may not be enabled: half precision is train.precision=bf16 in the run's config"
                )
        elif key in ("optimizer", "scheduler"):
            raise LalicError(f"{source}: {key} is not supported: remove it (Adam and its schedule are the run's own)")
        elif key not in HARMLESS and key != "zero_optimization":
            raise LalicError(f"{source}: {key} is not supported: remove it")
    return {
        **{k: v for k, v in given.items() if k in HARMLESS},
        "zero_optimization": {k: v for k, v in zero.items() if k in ZERO_SETTINGS},
        # The engine is told which backward pass is the last one, so to DeepSpeed a step has one large micro-batch.
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": micro_batch * train.accumulation,
        "gradient_clipping": train.clip,
    }


def _given() -> tuple[str, dict[str, Any]]:
    """Where the settings come from, and themselves: a file, or what `accelerate launch --zero_stage` says."""
    name = os.environ.get(FILE, "none")
    if name == "none":
        stage = os.environ.get(STAGE, "2")
        given: dict[str, Any] = {"zero_optimization": {"stage": int(stage) if stage.isdigit() else stage}}
        for place in ("optimizer", "param"):
            device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{place.upper()}_DEVICE", "none")
            given["zero_optimization"][f"offload_{place}"] = {"device": device}
        clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
        given["gradient_clipping"] = _number(clipping)
        return "the launcher", given
    path = _find(name)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LalicError(
            f"the launcher names {name} for DeepSpeed, which cannot be read ({error.strerror}): start from the "
            "checkout, or give deepspeed_config_file as an absolute path"
        ) from error
    except ValueError as error:
        raise LalicError(f"{path} is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise LalicError(f"{path} must hold one JSON object, as launch/deepspeed/zero1.json does")
    return name, given


def _find(name: str) -> Path:
    """A path as it is written in launch/accelerate/*.yaml, seen from here or from the checkout of this code."""
    path = Path(name)
    in_checkout = Path(__file__).resolve().parents[2] / path
    return in_checkout if not path.exists() and in_checkout.exists() else path


def _check_zero(source: str, zero: Mapping[str, Any]) -> None:
    for key, value in zero.items():
        off = value in (None, "none") or (isinstance(value, dict) and value.get("device", "none") in (None, "none"))
        if key in ZERO_SETTINGS or (key.startswith("offload_") and off):
            continue
        if key.startswith("offload_"):
            raise LalicError(
                f"{source}: zero_optimization.{key} is not supported: remove it (this model's optimiser fits any GPU)"
            )
        raise LalicError(f"{source}: zero_optimization.{key} is not supported: remove it")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
