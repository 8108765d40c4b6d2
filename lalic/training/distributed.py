"""What the processes of one run do together: start, agree, share an error. One process is a group of one."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from lalic.config import TrainSection
from lalic.errors import LalicError
from lalic.training.engine_settings import deepspeed_asked, deepspeed_settings, hidden_from_accelerate

logger = logging.getLogger("lalic.train")

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than a checkpoint or the decoding of a large image takes."""


class SharedError(LalicError):
    """An error that every rank raises at the same place: the first rank prints it for all."""


def start_processes(train: TrainSection) -> Accelerator:
    """Join the processes that the launcher started, and make their arithmetic repeatable.

    Raises SharedError when the launcher was asked for something that the config contradicts.
    """
    _check_launcher(train)
    make_deterministic(train.cpu_threads)
    # Newer torch renames the setting; accelerate passes the old name, which every supported version takes.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
    # Gradients of the merged depthwise kernels are laid out otherwise than DDP's buckets: a copy of a few kB.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with hidden_from_accelerate():
        accelerator = Accelerator(
            # bf16 is run inside the model (lalic.model), where latents and likelihoods stay in float32.
            mixed_precision="no",
            cpu=not torch.cuda.is_available(),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=TIMEOUT),
            ],
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise SharedError(
            f"{launched} processes were launched, but each found {accelerator.num_processes}: they would train "
            "apart; use one of launch/accelerate/*.yaml with --config_file"
        )
    together(accelerator, lambda: train.micro_batch(accelerator.num_processes))
    if deepspeed_asked():
        together(accelerator, lambda: deepspeed_settings(train, accelerator.num_processes))
        if not dist.is_initialized():
            raise SharedError(
                "DeepSpeed needs processes that accelerate started: accelerate launch --config_file "
                "launch/accelerate/deepspeed_zero1.yaml -m lalic.train ..."
            )
    return accelerator


def make_deterministic(cpu_threads: int | None = None) -> None:
    """Same input, same bits: deterministic kernels and a fixed number of threads."""
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode would also fill every new tensor with NaN, which costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(cpu_threads or shared)


def seed_from(*parts: int) -> int:
    """A seed for torch (63 bits) that depends on all the numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on any, end all of them alike, with the first one's error.

    `action` must not talk to other ranks: it may end early on one of them.
    """
    result: T
    problem: str | None = None
    try:
        result = action()
    except LalicError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.strerror or error}: {error.filename or 'run folder'}"
    problems = gather_object([problem])
    for rank, text in enumerate(problems):
        if text is not None:
            raise SharedError(text if rank == 0 else f"{text} (on rank {rank})")
    return result


def on_first_rank(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result to all; its error ends all ranks alike."""
    outcome = [together(accelerator, action if accelerator.is_main_process else lambda: None)]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    return cast(T, outcome[0])


def any_rank(accelerator: Accelerator, flags: Tensor) -> Tensor:
    """Each flag (0 or 1), 1 on every rank when it is 1 on any; nobody waits for the device."""
    if accelerator.num_processes > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def sum_over_ranks(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if accelerator.num_processes > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def check_equal(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Raise SharedError when a parameter does not have the same bits on every rank."""
    if accelerator.num_processes == 1:
        return
    sums = torch.stack([p.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64) for p in parameters])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise SharedError(
            f"the ranks hold different weights in {int((low != high).sum())} of {len(sums)} parameters: "
            "start again from the last checkpoint, and report this"
        )


def _check_launcher(train: TrainSection) -> None:
    """A setting of the launcher that the program would not follow is an error, never ignored."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() or "no"
    if precision not in ("no", "bf16" if train.precision == "bf16" else "no"):
        raise SharedError(
            f"the launcher asks for mixed_precision {precision}, the config for train.precision "
            f"{train.precision}: set mixed_precision to no and choose with train.precision=fp32 or bf16"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(train.accumulation)):
        raise SharedError(
            f"the launcher asks for {steps} gradient accumulation steps, the config for train.accumulation "
            f"{train.accumulation}: leave it to the config"
        )
    # Accelerator would divide the loss by it once more.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo != "no":
        raise SharedError(
            f"the launcher asks for torch.compile ({dynamo}) of the whole model, which breaks inside the "
            "entropy model: set dynamo_backend to no"
        )
