"""The rungs of a ladder: one config, one quality each, one run folder each.

The folders have the names that `sbatch --array=1-6 launch/train.slurm` gives them (runs/lalic-q1 ... runs/lalic-q6),
so a sweep and an array job are the same runs and may take turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lalic.config import RunConfig, read_config
from lalic.errors import LalicError
from lalic.ladder import LADDERS
from lalic.training import checkpoint
from lalic.training.run_folder import CONFIG, DONE, check_same_run
from lalic.training.typed_yaml import load_yaml

WarmStart = Literal["highest", "previous"]


@dataclass(frozen=True)
class Rung:
    """One run of the ladder."""

    quality: int
    run: Path
    config: RunConfig
    settings: tuple[str, ...]
    """What `lalic.train` gets beside the config file, without run.dir and loss.quality."""
    parent: Rung | None = None
    """With a warm start: the rung whose weights a new run begins with."""

    @property
    def name(self) -> str:
        return f"q{self.quality}"

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint, so that a start goes on with it."""
        return bool(checkpoint.steps_on_disk(self.run))

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train; a run that the config has given more steps is not finished."""
        old = self.config_on_disk()
        return (self.run / DONE).exists() and (old is None or old.stages == self.config.stages)

    def config_on_disk(self) -> RunConfig | None:
        """The config of the newest checkpoint; None when there is none that can be read."""
        for step in checkpoint.steps_on_disk(self.run)[:1]:
            try:
                return read_config(checkpoint.folder_of(self.run, step) / CONFIG)
            except LalicError:
                return None
        return None


@dataclass(frozen=True)
class Ladder:
    """The rungs of one config."""

    config: Path
    prefix: Path
    """`runs/lalic`: the run folders without their -qN."""
    metric: str
    rungs: tuple[Rung, ...]
    """Those that are asked for, in the order in which they are trained: by quality, or with a warm start downwards."""
    whole: tuple[Rung, ...]
    """All of the ladder, by quality, for the table."""

    @property
    def by_quality(self) -> list[Rung]:
        """The rungs that are asked for."""
        return sorted(self.rungs, key=lambda rung: rung.quality)


def read_ladder(
    config: Path,
    settings: Sequence[str] = (),
    *,
    qualities: Sequence[int] | None = None,
    runs: Path | None = None,
    warm_start: WarmStart | None = None,
) -> Ladder:
    """The ladder of a config file with `key=value` settings. Raises LalicError for a config that no rung can have.

    Args:
        qualities: those to train; None: the whole ladder.
        runs: folder of the run folders; None: `runs`, or what `run.dir=` says (runs/other: runs/other-q1 ...).
        warm_start: train the highest quality first and begin the others with its weights ("highest") or with those
            of the next higher one ("previous").
    """
    prefix, settings = _prefix(config, settings, runs)
    # The same for every rung, and where the ladder is taken from.
    metric = read_config(config, [*settings, "loss.quality=1"]).loss.metric

    in_file = (load_yaml(config).get("loss") or {}).get("quality")
    if isinstance(in_file, list):
        raise LalicError(f"{config}: loss.quality {in_file} is one run for a range of rates: train it with lalic.train")

    def rung(quality: int, parent: Rung | None = None) -> Rung:
        own = tuple(settings)
        if parent:
            own = (*(s for s in settings if _key(s) != "train.init_from"), f"train.init_from={parent.run}")
        run = prefix.with_name(f"{prefix.name}-q{quality}")
        return Rung(quality, run, read_config(config, [*own, f"loss.quality={quality}"]), own, parent)

    rungs: list[Rung] = []
    for quality in sorted(set(qualities or LADDERS[metric]), reverse=warm_start is not None):
        parent = rungs[0 if warm_start == "highest" else -1] if warm_start and rungs else None
        rungs.append(rung(quality, parent))
    return Ladder(config, prefix, metric, tuple(rungs), tuple(rung(q) for q in LADDERS[metric]))


def check_runs(ladder: Ladder) -> None:
    """Raise LalicError when a run folder holds another run than the config describes, before any rung is trained."""
    for rung in ladder.by_quality:
        old = rung.config_on_disk()
        newest = checkpoint.steps_on_disk(rung.run)[:1]
        if old is None or not newest:
            continue
        try:
            meta = checkpoint.read_meta(checkpoint.folder_of(rung.run, newest[0]))
        except LalicError:
            continue  # training passes it over for an older one
        if not isinstance(meta.get("stage"), int):
            continue
        try:
            check_same_run(old, rung.config, meta)
        except LalicError as error:
            text = str(error).replace("the run folder", str(rung.run)).replace("another run.dir", "another --runs")
            raise LalicError(text) from error


def parse_qualities(text: str) -> list[int]:
    """`1-6`, `1,3,5`, `4` or `1-2,6` as a sorted list; LalicError for anything else."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d)(?:-(\d))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= 6:
            raise LalicError(f"--qualities {text}: give numbers of 1 to 6, such as 1-6 or 1,3,5")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def _prefix(config: Path, settings: Sequence[str], runs: Path | None) -> tuple[Path, list[str]]:
    """The run folders' common beginning, and the settings without run.dir."""
    kept = [s for s in settings if _key(s) != "run.dir"]
    folders = [s.partition("=")[2] for s in settings if _key(s) == "run.dir"]
    for setting in kept:
        if _key(setting) in ("loss.quality", "loss.lambda"):
            raise LalicError(f"{setting}: a sweep sets the quality of each run itself; choose with --qualities")
    if folders and runs is not None:
        raise LalicError("--runs and run.dir exclude each other: give one of them")
    if not folders:
        return (runs or Path("runs")) / config.name.removesuffix(".yaml"), kept
    prefix = Path(folders[-1])
    if not prefix.name:
        raise LalicError(f"run.dir={folders[-1]} is no name for run folders: write for example run.dir=runs/other")
    return prefix, kept


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()
