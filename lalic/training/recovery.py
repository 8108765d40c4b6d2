"""Where a run goes back to when too many steps in a row were not finite, and what it remembers of that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalic.config import RunConfig
from lalic.errors import LalicError
from lalic.training import checkpoint
from lalic.training.ema import read_average


@dataclass(frozen=True)
class Health:
    """What a run has survived, as its checkpoints remember it."""

    skipped: int = 0
    """Steps that were not finite."""
    rollbacks: int = 0
    target: int | None = None
    """Step of the checkpoint that the run went back to last."""
    to_target: int = 0
    """How often it went back there, one time after the other."""
    left_at: int = 0
    """The step that it had come to when it did."""

    def rollbacks_to(self, step: int) -> int:
        """How often the run went back to the checkpoint of `step`, without going to another since."""
        return self.to_target if self.target == step else 0

    def after_rollback(self, step: int, left_at: int) -> Health:
        """One more, from the step `left_at` to the checkpoint of `step`."""
        return Health(self.skipped, self.rollbacks + 1, step, self.rollbacks_to(step) + 1, left_at)

    def gave_up(self, step: int) -> bool:
        """Whether the checkpoint of `step` is of the way that ended in the last rollback."""
        return self.target is not None and self.target < step <= self.left_at

    def may_return_to(self, begin: int, every: int) -> set[int]:
        """Steps of the checkpoints that a row of broken steps beginning at step `begin` may go back to."""
        periodic = begin - begin % every
        return {periodic, self.target} if self.target is not None and self.gave_up(periodic) else {periodic}


def _rollback_target(run: Path, health: Health, begin: int, every: int) -> Path | None:
    """The newest good periodic checkpoint of at most `begin` steps, else the newest good one of those.

    Periodic ones come first, because a run that was never stopped has no others: it would go back there. One that
    was written between skipped steps is not good: they may have begun with its weights.
    """
    steps = [step for step in checkpoint.steps_on_disk(run) if step <= begin and not health.gave_up(step)]
    for step in sorted(steps, key=lambda step: (step % every == 0, step), reverse=True):
        candidate = checkpoint.folder_of(run, step)
        if checkpoint.problem(candidate) is None:
            in_row = checkpoint.read_meta(candidate).get("health", {}).get("in_row", 0)
            if not in_row:
                return candidate
    return None


def choose_target(config: RunConfig, health: Health, begin: int, *, because: str) -> tuple[Path, int]:
    """The checkpoint to go back to, and its step, when the steps from `begin` on were not finite.

    Raises LalicError, with the reason in front, when the config wants no return, there is no such checkpoint, or the
    run went back to it too often.
    """
    rules = config.health
    advice = "lower the learning rate of the stage, or use train.precision=fp32"
    if rules.on_nonfinite == "stop":
        raise LalicError(f"{because} (health.on_nonfinite=stop): the last checkpoint is good; {advice}")
    target = _rollback_target(config.folder, health, begin, config.checkpoint.every)
    if target is None:
        raise LalicError(f"{because}, and there is no checkpoint before them to go back to: {advice}")
    back = checkpoint.read_meta(target)["step"]
    often = health.rollbacks_to(back)
    if often >= rules.max_rollbacks:
        raise LalicError(f"{because}, after {often} returns to {target} (health.max_rollbacks): {advice}")
    return target, back


def read_weights(path: Path) -> dict[str, Any]:
    """ "model", "optimizer" and "average" of a checkpoint folder."""
    tensors = {name: checkpoint.load_tensors(path, f"{name}.pt") for name in ("model", "optimizer")}
    return {**tensors, "average": read_average(path)}
