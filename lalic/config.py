"""What a training run is: typed, frozen, and checked when it is built.

    configs/lalic.yaml  +  key=value ...  ->  read_config  ->  RunConfig  ->  RUN/config.yaml

Sections and fields here are the sections and keys of the YAML files. Importing this module is cheap (no torch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lalic import ladder
from lalic.errors import LalicError
from lalic.sizes import Size
from lalic.training.typed_yaml import as_mapping, build, dump_yaml, load_yaml, override

STRIDE = 64
"""Sides of images in the network are multiples of this."""

MS_SSIM_MIN_SIDE = 161
"""Five scales of an 11-tap window need sides above (11 - 1) * 2^4 = 160 pixels."""

_MAY_CHANGE: dict[str, Any] = {"may_change": True}


def _check(holds: object, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise LalicError(f"{key} must be {allowed}, not {'null' if value is None else value}")


@dataclass(frozen=True)
class RunSection:
    """`run`: the folder and the seed."""

    dir: str | None = field(default=None, metadata=_MAY_CHANGE)
    """The run folder. Started again with the same one, a run resumes."""

    seed: int = 0
    """Of the initial weights, the sample order, the crops and the quantisation noise."""

    def __post_init__(self) -> None:
        _check(self.dir is None or self.dir.strip(), "run.dir", self.dir, "a folder")
        _check(0 <= self.seed < 2**63, "run.seed", self.seed, "between 0 and 2^63 - 1")


@dataclass(frozen=True)
class ModelSection:
    """`model`: the architecture; the defaults are the published one."""

    N: int = 128
    """Half the least width inside the parameter aggregation."""

    dims: tuple[int, ...] = (96, 144, 256, 320, 256, 192)
    """Channels: the three stages of g_a, y, the hyper transforms, z."""

    depths: tuple[int, ...] = (2, 4, 6, 6)
    """Bi-RWKV blocks: the three stages of g_a (and g_s), and h_a (and h_s)."""

    groups: tuple[int, ...] | None = None
    """Channels of y that are coded together; they sum to dims[3]. null: 16, 16, 32, 64 and the rest."""

    context_rate: int = 8
    """Widths of the hidden layers in the channel contexts, in channels of y."""

    aggregation_rate: int = 2
    """Widths of the hidden layers in the parameter aggregation, in the layer's own width."""

    def __post_init__(self) -> None:
        for name in ("N", "context_rate", "aggregation_rate"):
            _check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _check(len(self.dims) == 6 and min(self.dims) >= 1, "model.dims", list(self.dims), "six positive numbers")
        _check(
            len(self.depths) == 4 and min(self.depths) >= 0,
            "model.depths",
            list(self.depths),
            "four numbers, none negative",
        )
        groups, y = self.groups, self.dims[3]
        if groups is None:
            _check(y > 128, "model.groups", None, f"given, summing to {y}: the default needs more than 128 channels")
        else:
            fits = len(groups) >= 1 and min(groups) >= 1 and sum(groups) == y
            _check(fits, "model.groups", list(groups), f"positive numbers that sum to model.dims.3 = {y}")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `lalic.model.LALIC`."""
        return asdict(self)


@dataclass(frozen=True)
class DataSection:
    """`data`: shards to train on and images to validate on."""

    shards: str = field(default="shards", metadata=_MAY_CHANGE)
    """Folder that data_prep/shard.py wrote, or its URL (https://, s3:// or whatever else fsspec reads). A resumed run
    may find it elsewhere, but not with other samples."""

    name: str | None = field(default=None, metadata=_MAY_CHANGE)
    """What the training images are, in words for the model card: "BSDS500 train and val (research use)"."""

    endpoint: str | None = field(default=None, metadata=_MAY_CHANGE)
    """Address of an S3-compatible server that has the s3:// shards; null: Amazon's, or AWS_ENDPOINT_URL."""

    cache: str | None = field(default=None, metadata=_MAY_CHANGE)
    """Folder on this machine for what comes from a URL, shared by its ranks and runs; null: LALIC_CACHE_DIR or
    ~/.cache/lalic."""

    cache_size: Size | None = field(default=None, metadata=_MAY_CHANGE)
    """Most bytes of shards in the cache, such as 200GiB; null: 100GiB. 0: none are kept, and each sample is read by
    itself (docs/data.md says when)."""

    window: int = 16
    """Shards whose samples are mixed with each other."""

    workers: int = field(default=4, metadata=_MAY_CHANGE)
    """Processes per rank that read and decode; 0 loads in the training process."""

    flip: bool = False
    """Mirror half of the crops left to right. The published recipe does not."""

    max_bad: float = field(default=0.01, metadata=_MAY_CHANGE)
    """Share of samples that may turn out undecodable before the run stops."""

    decoder: Literal["auto", "pillow"] = field(default="auto", metadata=_MAY_CHANGE)
    """auto decodes only the part of a JPEG that a crop needs, where that can be done; pillow decodes whole images.
    The pixels are the same."""

    val: str | None = field(default=None, metadata=_MAY_CHANGE)
    """Folder of images to validate on, or null for no validation."""

    val_crop: int | None = field(default=None, metadata=_MAY_CHANGE)
    """Validate on the centre of this size (multiple of 64) instead of on whole images."""

    def __post_init__(self) -> None:
        _check(self.shards.strip(), "data.shards", self.shards, "a folder")
        _check(self.window >= 1, "data.window", self.window, "at least 1")
        _check(self.workers >= 0, "data.workers", self.workers, "0 or more")
        _check(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "between 0 and 1")
        if self.val_crop is not None:
            fits = self.val_crop >= STRIDE and self.val_crop % STRIDE == 0
            _check(fits, "data.val_crop", self.val_crop, f"a positive multiple of {STRIDE}")


@dataclass(frozen=True)
class LossSection:
    """`loss`: lambda * 255^2 * MSE + bpp, or lambda * (1 - MS-SSIM) + bpp."""

    metric: Literal["mse", "ms-ssim"] = "mse"
    """Distortion that is trained for."""

    quality: int | tuple[int, ...] | None = field(default=None, metadata={"instead_of": "lambda"})
    """1 to 6 on the quality ladder of the metric, or a range of it, such as [1, 6]: one model for all these rungs.
    Give this or lambda."""

    lmbda: float | None = field(default=None, metadata={"key": "lambda", "instead_of": "quality"})
    """The multiplier itself. Give this or quality."""

    def __post_init__(self) -> None:
        if self.quality is not None and self.lmbda is not None:
            raise LalicError("loss.quality and loss.lambda exclude each other: give one of them")
        if self.quality is None and self.lmbda is None:
            raise LalicError("the loss needs loss.quality=1 ... 6 (the ladder) or loss.lambda=NUMBER")
        steps = ladder.LADDERS[self.metric]
        if isinstance(self.quality, tuple):
            rising = len(self.quality) == 2 and self.quality[0] < self.quality[1]
            allowed = f"a range of two rungs from {min(steps)} to {max(steps)}, the lower one first, such as [1, 6]"
            _check(rising and all(q in steps for q in self.quality), "loss.quality", list(self.quality), allowed)
        elif self.quality is not None:
            _check(self.quality in steps, "loss.quality", self.quality, f"{min(steps)} to {max(steps)}")
        if self.lmbda is not None:
            _check(self.lmbda > 0, "loss.lambda", self.lmbda, "positive")

    @property
    def rungs(self) -> tuple[int, ...] | None:
        """The qualities of a range, lowest first; None for a single rate."""
        return tuple(range(self.quality[0], self.quality[-1] + 1)) if isinstance(self.quality, tuple) else None

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Lambda of every rung; of a single rate, one."""
        if self.rungs is None:
            return (self.multiplier,)
        return tuple(ladder.lambda_of(self.metric, rung) for rung in self.rungs)

    @property
    def multiplier(self) -> float:
        """Lambda of a single rate, whichever way it was given. Raises LalicError for a range, which has several."""
        if self.lmbda is not None:
            return self.lmbda
        if not isinstance(self.quality, int):
            raise LalicError(
                f"loss.quality={as_mapping(self.quality)} is a range of rates, and this needs a single one"
            )
        return ladder.lambda_of(self.metric, self.quality)

    @property
    def reference(self) -> float:
        """The lambda at which a range's loss has the weight 1: the geometric middle of the range."""
        return math.sqrt(self.lambdas[0] * self.lambdas[-1])

    @property
    def weights(self) -> tuple[float, ...]:
        """What a sample's loss is multiplied by, for every rung: without it the highest rungs would be all that counts,
        because the loss grows with about the root of lambda."""
        return tuple(1 / math.sqrt(lmbda / self.reference) for lmbda in self.lambdas)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the loss: metric and lambda, or of a range metric, quality and lambdas."""
        if isinstance(self.quality, tuple):
            return {"metric": self.metric, "quality": list(self.quality), "lambdas": list(self.lambdas)}
        return {"metric": self.metric, "lambda": self.multiplier}


@dataclass(frozen=True)
class MuonSection:
    """`train.muon`: with train.optimizer=muon, how it steps; docs/training.md."""

    momentum: float = 0.95
    """Of the moving average of the gradients, which looks one step ahead (Nesterov)."""

    scale: float = 0.2
    """Root mean square of an update's numbers, in learning rates; about Adam's."""

    rest_lr: float = 1.0
    """Learning rate of Adam, which trains what is no matrix, in learning rates of the stage."""

    min_side: int = 16
    """Matrices with a side below this are Adam's."""

    newton_schulz: int = 5
    """Newton-Schulz steps that orthogonalise an update."""

    products: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of their products. auto: bf16 on a GPU, fp32 on a CPU."""

    def __post_init__(self) -> None:
        _check(0 <= self.momentum < 1, "train.muon.momentum", self.momentum, "0 or more, and below 1")
        _check(self.scale > 0, "train.muon.scale", self.scale, "positive")
        _check(self.rest_lr > 0, "train.muon.rest_lr", self.rest_lr, "positive")
        _check(self.min_side >= 1, "train.muon.min_side", self.min_side, "at least 1")
        _check(self.newton_schulz >= 1, "train.muon.newton_schulz", self.newton_schulz, "at least 1")


@dataclass(frozen=True)
class TrainSection:
    """`train`: the optimiser step."""

    batch_size: int = 8
    """Images per optimiser step over all ranks and accumulation steps."""

    accumulation: int = field(default=1, metadata=_MAY_CHANGE)
    """Micro-batches per optimiser step on every rank: less memory, the same batch."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the transforms alone; latents, likelihoods, rate and loss stay in float32."""

    compile: bool = False
    """Bi-RWKV blocks through torch.compile: faster after some minutes of compiling, with other rounding. Needs a C++
    compiler on the CPU, Triton on a GPU."""

    gradient_checkpointing: bool = field(default=False, metadata=_MAY_CHANGE)
    """Recompute the Bi-RWKV blocks in the backward pass: less memory, more time, the same gradients."""

    clip: float = 1.0
    """Largest gradient norm of the main parameters; 0 does not clip."""

    optimizer: Literal["adam", "muon"] = "adam"
    """Of the main parameters. adam: the published recipe; muon: orthogonal updates of matrices, far fewer steps."""

    muon: MuonSection = MuonSection()
    """Of muon alone: other than the defaults, it is refused with adam."""

    aux_lr: float = 1e-3
    """Learning rate of the entropy bottleneck's quantiles."""

    init_from: str | None = field(default=None, metadata=_MAY_CHANGE)
    """Weights to start a new run from: a .pth or .safetensors file, a release bundle (path, name or URL), a run or a
    checkpoint."""

    ema: float | None = field(default=None, metadata=_MAY_CHANGE)
    """Decay of an exponential moving average of the weights, such as 0.999, which is then what is validated and
    exported; null: none. It does not touch the training."""

    cpu_threads: int | None = field(default=None, metadata=_MAY_CHANGE)
    """Threads per process on the CPU; null shares the cores among the processes of a machine. Bits of the
    results depend on it."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        _check(self.accumulation >= 1, "train.accumulation", self.accumulation, "at least 1")
        _check(self.clip >= 0, "train.clip", self.clip, "0 (off) or positive")
        if self.optimizer == "adam" and self.muon != MuonSection():
            raise LalicError("train.muon is set, but train.optimizer is adam: set it to muon, or leave train.muon out")
        _check(self.aux_lr > 0, "train.aux_lr", self.aux_lr, "positive")
        _check(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "between 0 and 1, or null")
        threads = self.cpu_threads
        _check(threads is None or threads >= 1, "train.cpu_threads", threads, "at least 1, or null")
        self.micro_batch(1)

    def micro_batch(self, world_size: int) -> int:
        """Images per forward pass on each of `world_size` ranks; LalicError when the batch does not divide."""
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise LalicError(
                f"train.batch_size {self.batch_size} is not a multiple of {parts} "
                f"({world_size} processes x train.accumulation {self.accumulation}): "
                f"use {math.ceil(self.batch_size / parts) * parts}, or change the other two"
            )
        return self.batch_size // parts


@dataclass(frozen=True)
class StageSection:
    """One item of `stages`: a length, a learning rate and a crop."""

    lr: float
    """Learning rate of the main parameters, that of whichever optimiser; see warmup and decay."""

    crop: int
    """Side of the random square crops in pixels, a multiple of 64."""

    epochs: int | None = field(default=None, metadata={"instead_of": "steps"})
    """Length in passes over the images that are as large as the crop. Give this or steps."""

    steps: int | None = field(default=None, metadata={"instead_of": "epochs"})
    """Length in optimiser steps. Give this or epochs."""

    warmup: int = 0
    """Steps at the beginning of the stage in which the learning rate rises to lr, in equal parts from 0."""

    decay: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes from lr, after the warm-up, to lr_end at the end of the stage."""

    lr_end: float | None = None
    """With a decay: the learning rate that the step after the stage would have, 0 or more."""

    t_max: int | None = None
    """Most tokens that the first Bi-RWKV stage may get, a guard for memory; null: what the crop needs."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise LalicError("stages.N.epochs and stages.N.steps: give one of them, the length of the stage")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            _check(value is None or value >= 1, f"stages.N.{name}", value, "at least 1")
        _check(self.lr > 0, "stages.N.lr", self.lr, "positive")
        _check(self.warmup >= 0, "stages.N.warmup", self.warmup, "0 or more")
        if self.steps is not None:
            self.check_warmup(self.steps)
        if self.decay == "constant":
            fits, wanted = self.lr_end is None, "left out, or stages.N.decay=cosine or linear given"
        else:
            fits = self.lr_end is not None and 0 <= self.lr_end <= self.lr
            wanted = f"given with stages.N.decay={self.decay}, between 0 and stages.N.lr = {self.lr}"
        _check(fits, "stages.N.lr_end", self.lr_end, wanted)
        crop_fits = self.crop >= STRIDE and self.crop % STRIDE == 0
        _check(crop_fits, "stages.N.crop", self.crop, f"a positive multiple of {STRIDE}")
        if self.t_max is not None and self.tokens > self.t_max:
            raise LalicError(
                f"stages.N.crop: a crop of {self.crop} needs t_max {self.tokens} (tokens of the first stage, "
                f"(crop/2)^2), but stages.N.t_max is {self.t_max}: raise it or take a smaller crop"
            )

    def check_warmup(self, steps: int, number: int | str = "N") -> None:
        """LalicError when the warm-up is longer than the stage, item `number` of the list, of so many steps."""
        allowed = f"at most the {steps} steps of the stage"
        _check(self.warmup <= steps, f"stages.{number}.warmup", self.warmup, allowed)

    @property
    def tokens(self) -> int:
        """Tokens of the first Bi-RWKV stage."""
        return (self.crop // 2) ** 2


@dataclass(frozen=True)
class ValidateSection:
    """`validate`: when to look at data.val."""

    every: int = field(default=5000, metadata=_MAY_CHANGE)
    """Steps between validations; the end of the run is always validated."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "validate.every", self.every, "at least 1")


@dataclass(frozen=True)
class CheckpointSection:
    """`checkpoint`: when to save, and what to keep."""

    every: int = field(default=2000, metadata=_MAY_CHANGE)
    """Steps between checkpoints. A new best, a stop and the end of a run are saved too."""

    keep: int = field(default=3, metadata=_MAY_CHANGE)
    """Newest checkpoints that stay, besides the best one."""

    keep_every: int | None = field(default=None, metadata=_MAY_CHANGE)
    """Checkpoints of steps that are multiples of this stay for ever; null: none does."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "checkpoint.every", self.every, "at least 1")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        for_ever = self.keep_every
        _check(for_ever is None or for_ever >= 1, "checkpoint.keep_every", for_ever, "at least 1, or null")


@dataclass(frozen=True)
class HealthSection:
    """`health`: what happens to steps that are not finite, and to ranks that stand still."""

    max_skipped: int = field(default=10, metadata=_MAY_CHANGE)
    """A step with a loss or gradient that is not finite is skipped; so many in a row are too many."""

    on_nonfinite: Literal["rollback", "stop"] = field(default="rollback", metadata=_MAY_CHANGE)
    """After too many: back to the weights of the last good checkpoint, and on with the data that follow; or stop."""

    max_rollbacks: int = field(default=3, metadata=_MAY_CHANGE)
    """How often a run may go back to the same checkpoint before it stops."""

    stall_timeout: float | None = field(default=1800, metadata=_MAY_CHANGE)
    """Seconds without progress of some rank after which the run ends and names it; null: it waits for ever."""

    def __post_init__(self) -> None:
        _check(self.max_skipped >= 1, "health.max_skipped", self.max_skipped, "at least 1")
        _check(self.max_rollbacks >= 0, "health.max_rollbacks", self.max_rollbacks, "0 or more")
        limit = self.stall_timeout
        _check(limit is None or limit > 0, "health.stall_timeout", limit, "positive, or null")


@dataclass(frozen=True)
class LogSection:
    """`log`: the log line, log.jsonl and TensorBoard."""

    every: int = field(default=100, metadata=_MAY_CHANGE)
    """Steps between log lines; their values are means over these steps and all ranks."""

    images: int = field(default=4, metadata=_MAY_CHANGE)
    """Validation images of which TensorBoard gets original and reconstruction side by side."""

    images_every: int = field(default=1, metadata=_MAY_CHANGE)
    """Validations between these pictures."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "log.every", self.every, "at least 1")
        _check(self.images >= 0, "log.images", self.images, "0 or more")
        _check(self.images_every >= 1, "log.images_every", self.images_every, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    loss: LossSection
    train: TrainSection = TrainSection()
    stages: tuple[StageSection, ...]
    """One after the other; the optimisers' state goes on from one to the next."""
    validate: ValidateSection = ValidateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    health: HealthSection = HealthSection()
    log: LogSection = LogSection()

    def __post_init__(self) -> None:
        if not self.stages:
            raise LalicError("stages is empty: a run needs at least one stage with a length, lr and crop")
        if self.loss.metric == "ms-ssim":
            crops = {f"stages.{i}.crop": stage.crop for i, stage in enumerate(self.stages)}
            if self.data.val and self.data.val_crop is not None:
                crops["data.val_crop"] = self.data.val_crop
            for key, crop in crops.items():
                _check(crop >= MS_SSIM_MIN_SIDE, key, crop, "at least 192 for loss.metric ms-ssim (five scales)")

    @property
    def folder(self) -> Path:
        """The run folder; LalicError when none was given."""
        if self.run.dir is None:
            raise LalicError("the run has no folder: add run.dir=runs/NAME")
        return Path(self.run.dir)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `key=value` overrides describe. Raises LalicError in one line."""
    return build(RunConfig, override(RunConfig, load_yaml(path), overrides))


def config_text(config: RunConfig) -> str:
    """The YAML of `RUN/config.yaml`, with every key."""
    return dump_yaml(config)
