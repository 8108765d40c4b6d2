"""From the stages of a config to steps: where a stage starts, how long it is, its learning rates, the epochs it reads.

    lr ┤   ╭──────╮                 warm-up: lr (s + 1) / warmup
       │  ╱        ╲                decay:   lr_end + (lr - lr_end) f(p),  p = (s - warmup) / (steps - warmup)
    lr_end          ╰──             f: (1 + cos(pi p)) / 2, or 1 - p
       └───┴────────────┴─► s       s: steps of the stage that are done

Position p of a stage is sample `p % n` of epoch `first_epoch + p // n`, n the samples as large as its crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lalic.config import StageSection


@dataclass(frozen=True)
class Stage:
    """A stage in steps of the run."""

    number: int
    """Counted from 1, for people."""
    first_step: int
    """Steps of the run before this stage."""
    steps: int
    crop: int
    first_epoch: int
    """No epoch of the run is used by two stages, so no stage sees the order of another."""
    samples: int
    lr: float
    warmup: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    lr_end: float | None = None

    @property
    def end(self) -> int:
        """Steps of the run when this stage is over."""
        return self.first_step + self.steps

    def lr_at(self, step: int) -> float:
        """Learning rate of the step after `step` steps of the run, which is one of this stage."""
        done = step - self.first_step
        if done < self.warmup:
            return self.lr * (done + 1) / self.warmup
        if self.lr_end is None:
            return self.lr
        part = (done - self.warmup) / (self.steps - self.warmup)
        share = (1 + math.cos(math.pi * part)) / 2 if self.decay == "cosine" else 1 - part
        return self.lr_end + (self.lr - self.lr_end) * share


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, in order."""

    stages: tuple[Stage, ...]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    def remaining(self, step: int) -> tuple[Stage, ...]:
        """The stages that are not over after `step` steps; the first of them may be under way."""
        return tuple(stage for stage in self.stages if stage.end > step)


def plan(stages: Sequence[StageSection], batch_size: int, samples: Callable[[int], int]) -> Schedule:
    """The schedule of a run; `samples(crop)` counts the images that are as large as a crop.

    Raises LalicError for a warm-up that is longer than its stage.
    """
    planned: list[Stage] = []
    first_step = first_epoch = 0
    for number, stage in enumerate(stages, 1):
        n = samples(stage.crop)
        # The last batch of a stage of E epochs may reach into the next epoch; no sample is dropped.
        steps = stage.steps if stage.steps is not None else -(-(stage.epochs or 0) * n // batch_size)
        stage.check_warmup(steps, number - 1)
        rates = (stage.lr, stage.warmup, stage.decay, stage.lr_end)
        planned.append(Stage(number, first_step, steps, stage.crop, first_epoch, n, *rates))
        first_step += steps
        first_epoch += -(-steps * batch_size // n)
    return Schedule(tuple(planned))
