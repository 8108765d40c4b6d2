"""From the stages of a config to steps: where a stage starts, how long it is, which epochs it reads.

Position p of a stage is sample `p % n` of epoch `first_epoch + p // n`, n the samples as large as its crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lalic.config import StageSection


@dataclass(frozen=True)
class Stage:
    """A stage in steps of the run."""

    number: int
    """Counted from 1, for people."""
    first_step: int
    """Steps of the run before this stage."""
    steps: int
    lr: float
    crop: int
    first_epoch: int
    """No epoch of the run is used by two stages, so no stage sees the order of another."""
    samples: int

    @property
    def end(self) -> int:
        """Steps of the run when this stage is over."""
        return self.first_step + self.steps


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
    """The schedule of a run; `samples(crop)` counts the images that are as large as a crop."""
    planned: list[Stage] = []
    first_step = first_epoch = 0
    for number, stage in enumerate(stages, 1):
        n = samples(stage.crop)
        # The last batch of a stage of E epochs may reach into the next epoch; no sample is dropped.
        steps = stage.steps if stage.steps is not None else -(-(stage.epochs or 0) * n // batch_size)
        planned.append(Stage(number, first_step, steps, stage.lr, stage.crop, first_epoch, n))
        first_step += steps
        first_epoch += -(-steps * batch_size // n)
    return Schedule(tuple(planned))
