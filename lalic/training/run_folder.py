"""The run folder: one process at a time, the same run every time, and a mark when it is finished.

RUN/config.yaml   what runs here, every key     RUN/DONE    the run is finished
RUN/checkpoints/  see checkpoint.py             RUN/STOP    asks the run to checkpoint and stop
RUN/log.jsonl     one object per log line       RUN/.lock   held while a process trains here
RUN/events.jsonl  what happened to the run      see events.py
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import sys
import time
from pathlib import Path
from typing import IO

from lalic.config import RunConfig, config_text, read_config
from lalic.errors import LalicError
from lalic.files import write_json, write_text
from lalic.training import checkpoint
from lalic.training.typed_yaml import as_mapping, differences

logger = logging.getLogger("lalic.train")

CONFIG, DONE, STOP, LOG, TENSORBOARD = "config.yaml", "DONE", "STOP", "log.jsonl", "tensorboard"
LOCK = ".lock"

_LOCK_PATIENCE = 20.0
"""Seconds to wait for the lock: a killed run's last process may need a moment to die."""


class RunFolder:
    """What the first rank does with a run folder; the other ranks only know its path."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def stop_file(self) -> Path:
        """The file that asks a run to stop."""
        return self.path / STOP

    def open(self, config: RunConfig) -> tuple[Path | None, bool]:
        """Take the folder for this process.

        Returns the checkpoint to resume from (None for a new run), and whether the run is finished already.
        Raises LalicError when another process has the folder, when its checkpoints are all damaged, or when
        `config` is another run's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.stop_file.unlink(missing_ok=True)
        checkpoint.remove_leftovers(self.path)
        if not checkpoint.steps_on_disk(self.path):
            return None, False
        latest = checkpoint.find_checkpoint(self.path)
        old = read_config(latest / CONFIG)
        check_same_run(old, config, checkpoint.read_meta(latest))
        return latest, (self.path / DONE).exists() and old.stages == config.stages

    def record(self, config: RunConfig) -> None:
        """Write config.yaml, and take away the mark of an earlier, shorter run."""
        write_text(self.path / CONFIG, config_text(config))
        (self.path / DONE).unlink(missing_ok=True)

    def finish(self, step: int) -> None:
        """Mark the run as finished, for people and job scripts."""
        write_json(self.path / DONE, {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def _take_lock(self) -> None:
        # lockf, not flock: a lock of this kind does not live on in data loading processes after a kill.
        self._lock = open(self.path / LOCK, "a")  # noqa: SIM115 -- held until the process ends
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise LalicError(f"another process is training in {self.path}: stop it first") from None
                time.sleep(0.5)
            except OSError as error:
                logger.warning("this file system has no locks (%s): start a run only once", error.strerror)
                return


def is_held(run: Path) -> bool | None:
    """Whether another process trains in the run folder; None when that cannot be asked. The lock is not taken."""
    if sys.platform != "linux":
        return None
    layout = "hhqqi"  # struct flock: type, whence, start, length, pid
    try:
        with open(run / LOCK, "rb") as file:
            question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0).ljust(64, b"\0")
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(struct.unpack_from(layout, answer)[0] != fcntl.F_UNLCK)


def check_same_run(old: RunConfig, new: RunConfig, meta: dict[str, object]) -> None:
    """Raise LalicError naming every key in which `new` would make this another run.

    May change: what does not touch the result (folders, workers, logs, checkpoints, validation), what changes it
    by rounding alone (threads, accumulation, gradient checkpointing), and the future: stages that have not begun,
    and the length of the present one where no past learning rate follows from it.
    """
    changed = [(key, a, b) for key, a, b in differences(old, new) if key != "stages"]
    changed = [c for c in changed if c[0] not in ("loss.quality", "loss.lambda")]
    if old.loss.rungs or new.loss.rungs:
        if (old.loss.rungs, old.loss.lambdas) != (new.loss.rungs, new.loss.lambdas):
            before, now = (as_mapping(loss.quality) or f"lambda {loss.lmbda:g}" for loss in (old.loss, new.loss))
            changed.append(("loss.quality", before, now))
    elif old.loss.multiplier != new.loss.multiplier:
        changed.append(("loss.lambda", old.loss.multiplier, new.loss.multiplier))
    begun = meta.get("stage")
    assert isinstance(begun, int)
    for i in range(min(begun, len(old.stages))):
        if i >= len(new.stages):
            changed.append((f"stages.{i}", as_mapping(old.stages[i]), None))
            continue
        length = {"epochs", "steps"} if i == begun - 1 and old.stages[i].decay == "constant" else set()
        changed += [
            (key, a, b)
            for key, a, b in differences(old.stages[i], new.stages[i], f"stages.{i}")
            if key.rsplit(".", 1)[-1] not in {"t_max", *length}
        ]
    if changed:
        listed = ", ".join(f"{key} ({a} -> {b})" for key, a, b in changed)
        raise LalicError(f"the run folder holds another run, these settings differ: {listed}; use another run.dir")
