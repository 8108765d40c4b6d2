"""A run in memory: built anew or from a checkpoint, advanced by steps, written to checkpoints.

config, index, checkpoint ─► Session ── step, validate, save ──► RUN/checkpoints
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lalic.config import RunConfig, config_text
from lalic.data.images import list_images
from lalic.data.loader import build_loader, eligible_samples
from lalic.data.reader import Reader
from lalic.data.source import open_shards
from lalic.errors import LalicError
from lalic.model import LALIC, load_weights
from lalic.remote import without_password
from lalic.training import checkpoint
from lalic.training.distributed import SharedError, check_equal, on_first_rank, seed_from, together
from lalic.training.environment import device_name, random_state, set_random_state, versions
from lalic.training.recovery import Health, read_weights, rollback_target
from lalic.training.run_folder import CONFIG, RunFolder
from lalic.training.schedule import Schedule, Stage, plan
from lalic.training.step import TrainStep
from lalic.training.tracking import Tracker
from lalic.training.validate import validate

logger = logging.getLogger("lalic.train")


@dataclass(frozen=True)
class Inputs:
    """What a run reads before its first step."""

    reader: Reader
    images: list[Path]
    """To validate on."""
    schedule: Schedule
    model: LALIC
    saved: dict[str, Any] | None
    """Of the checkpoint to resume from: "meta", "optimizer" and "rng"."""


def read_inputs(config: RunConfig, resume_from: Path | None) -> Inputs:
    """Everything from the disk, on one rank. Raises LalicError for what is missing or does not fit."""
    data = config.data
    reader = open_shards(data.shards, endpoint=data.endpoint, cache=data.cache, cache_size=data.cache_size)
    index = reader.index
    images = list_images(data.val) if data.val else []

    def samples(crop: int) -> int:
        return len(eligible_samples(index, crop))

    schedule = plan(config.stages, config.train.batch_size, samples)
    seed = seed_from(config.run.seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if resume_from is None:
        return Inputs(reader, images, schedule, new_model(config), None)
    saved = {
        "meta": checkpoint.read_meta(resume_from),
        "optimizer": checkpoint.load_tensors(resume_from, "optimizer.pt"),
        "rng": checkpoint.load_tensors(resume_from, "rng.pt"),
    }
    if saved["meta"]["shards"] != index.fingerprint:
        raise LalicError(
            f"{without_password(data.shards)} does not hold the samples that this run was started on: point "
            "data.shards at them, or use another run.dir"
        )
    return Inputs(reader, images, schedule, checkpoint.load_model(resume_from), saved)


class Session:
    """All that a run is between two steps. `step` counts the optimiser steps that are done."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, resume_from: Path | None):
        self.accelerator, self.config = accelerator, config
        inputs = together(accelerator, lambda: read_inputs(config, resume_from))
        self.reader, self.index = inputs.reader, inputs.reader.index
        self.images, self.schedule = inputs.images, inputs.schedule
        if len(set(gather_object([self.index.fingerprint]))) > 1:
            raise SharedError(
                f"data.shards={without_password(config.data.shards)} does not hold the same samples on all machines: "
                "copy them again"
            )
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, Any] | None = None
        self.saved_step: int | None = None
        self.stepper = TrainStep(
            accelerator,
            inputs.model,
            config.train,
            config.loss,
            config.run.seed,
            max_skipped=config.health.max_skipped,
        )
        self.tracker = Tracker(accelerator, config, self.schedule)
        self.health = Health()
        if inputs.saved:
            self._restore(**inputs.saved)
            logger.info("resumed from %s: step %d of %d", resume_from, self.step, self.schedule.total_steps)
        else:
            logger.info("new run: %d images, %d steps", len(self.index), self.schedule.total_steps)
        self.tracker.open(self.step)

    @property
    def model(self) -> LALIC:
        """The bare model, without DDP."""
        return self.stepper.bare

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.schedule.total_steps

    @property
    def stage(self) -> Stage:
        """The stage of the next step; at the end, the last one."""
        return next(iter(self.schedule.remaining(self.step)), self.schedule.stages[-1])

    def micro_batches(self) -> Iterator[Mapping[str, Any]]:
        """This rank's micro-batches of what is left of the stage."""
        data, train, stage = self.config.data, self.config.train, self.stage
        start = self.step - stage.first_step
        loader = together(
            self.accelerator,
            lambda: build_loader(
                self.index,
                reader=self.reader,
                crop=stage.crop,
                seed=self.config.run.seed,
                first_epoch=stage.first_epoch,
                start_step=start,
                num_steps=stage.steps - start,
                batch_size=train.batch_size,
                accumulation=train.accumulation,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                workers=data.workers,
                window=data.window,
                flip=data.flip,
                max_bad=data.max_bad,
                decoder=data.decoder,
                pin_memory=self.accelerator.device.type == "cuda",
            ),
        )
        return iter(loader)

    def validation_due(self) -> bool:
        """Whether this step is to be validated and was not; also right after a resume."""
        due = self.step % self.config.validate.every == 0 or self.done
        return bool(self.images) and due and self.step > 0 and (self.metrics or {}).get("step") != self.step

    def validate(self, folder: RunFolder) -> None:
        """Measure the validation images, and note the step when it is the best so far.

        When an image cannot be read any more, the steps that are done are saved before the error is raised.
        """
        log = self.config.log
        nth = self.step // self.config.validate.every
        pictures = log.images if nth % log.images_every == 0 or self.done else 0
        try:
            metrics, shown = validate(
                self.accelerator,
                self.model,
                self.images,
                self.config.loss,
                crop=self.config.data.val_crop,
                pictures=pictures,
            )
        except SharedError:
            self.keep(folder)
            raise
        # A loss that is not finite is smaller than nothing.
        is_best = metrics["loss"] < (self.best["loss"] if self.best else float("inf"))
        self.metrics = {"step": self.step, **metrics}
        if is_best:
            self.best = {"step": self.step, "loss": metrics["loss"]}
        if self.accelerator.is_main_process:
            self.tracker.validation(self.step, metrics, shown, is_best)

    def settle(self) -> None:
        """Wait until it is known of every step whether it was applied, and take note of those that were not."""
        verdicts = self.stepper.verdicts
        verdicts.settle()
        self.note_skipped()
        if verdicts.halted_at is not None:
            self.step = verdicts.halted_at  # what was queued behind it was not applied

    def note_skipped(self) -> None:
        """Count and tell the skipped steps that are known of by now."""
        for skipped in self.stepper.verdicts.unseen:
            self.health = replace(self.health, skipped=self.health.skipped + 1)
            if self.accelerator.is_main_process:
                logger.warning("skipped, because it is not finite: %s", skipped)
        self.stepper.verdicts.unseen.clear()

    @property
    def halted(self) -> bool:
        """Whether too many steps in a row were not finite, as far as is known; never at the end of a run."""
        return self.stepper.verdicts.halted_at is not None and not self.done

    def recover(self, folder: RunFolder) -> None:
        """Where the run is halted: back to the weights of the last good checkpoint, and on past the data.

        The position stays: step number s takes the same batch whatever happened before it. Raises SharedError when
        the config says so, there is no such checkpoint, or the run went back to it too often.
        """
        if not self.halted:
            return
        self.settle()
        health, verdicts = self.config.health, self.stepper.verdicts
        row = f"the last {verdicts.in_row} steps up to {self.step} were not finite and were not applied"
        advice = "lower the learning rate of the stage, or use train.precision=fp32"
        if health.on_nonfinite == "stop":
            raise SharedError(f"{row} (health.on_nonfinite=stop): the last checkpoint is good; {advice}")
        begin = self.step - verdicts.in_row
        target = on_first_rank(
            self.accelerator,
            lambda: rollback_target(folder.path, self.health, begin, self.config.checkpoint.every),
        )
        if target is None:
            raise SharedError(f"{row}, and there is no checkpoint before them to go back to: {advice}")
        back = checkpoint.read_meta(target)["step"]
        often = self.health.rollbacks_to(back)
        if often >= health.max_rollbacks:
            raise SharedError(f"{row}, after {often} returns to {target} (health.max_rollbacks): {advice}")
        state = together(self.accelerator, lambda: read_weights(target))
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["optimizer"])
        verdicts.restart()
        self.health = self.health.after_rollback(back, self.step)
        self.saved_step = None
        if self.accelerator.is_main_process:
            logger.warning("%s: back to the weights of %s, and on with the data of step %d", row, target, self.step + 1)

    def save_due(self) -> bool:
        """Whether this step belongs on the disk: by the interval, as the best so far, or as the last one."""
        due = self.step % self.config.checkpoint.every == 0 or self.done
        is_best = self.best is not None and self.best["step"] == self.step
        return (due or is_best) and self.saved_step != self.step

    def save(self, folder: RunFolder, *, must: bool) -> None:
        """Write a checkpoint and prune old ones.

        When that fails (a full disk), nothing older is lost, and the run goes on to the next one with an error in
        the log; with `must` it ends instead, in one line.
        """
        check_equal(self.accelerator, self.model.parameters())
        own = {**random_state(self.accelerator.device), "log": self.tracker.state_dict()}
        ranks = gather_object([own])
        # All ranks: under DeepSpeed each has a part of it.
        optimizer = self.stepper.state_dict()

        def write() -> str | None:
            try:
                path = self._write(folder.path, ranks, optimizer)
            except OSError as error:
                reason = error.strerror or str(error)
                message = f"the checkpoint of step {self.step} could not be written to {folder.path}: {reason}"
                if must:
                    raise LalicError(f"{message}; older checkpoints are intact") from error
                logger.error("%s; the run goes on", message)
                return None
            return str(path)

        if on_first_rank(self.accelerator, write) is not None:
            self.saved_step = self.step

    def keep(self, folder: RunFolder) -> None:
        """Write a checkpoint of the steps that are done, unless it is there; for a run that cannot go on."""
        self.settle()
        if self.step and self.saved_step != self.step:
            self.save(folder, must=True)

    def _write(self, run: Path, ranks: list[Any], optimizer: dict[str, Any]) -> Path:
        # Of the step that was done last: a stage that is only about to begin may still be changed.
        stage = next((s for s in self.schedule.stages if s.end >= self.step), self.schedule.stages[-1])
        meta = {
            "step": self.step,
            "total_steps": self.schedule.total_steps,
            "stage": stage.number,
            "position": (self.step - stage.first_step) * self.config.train.batch_size,
            "samples": stage.samples,
            "first_epoch": stage.first_epoch,
            "model": self.model.config,
            "loss": {"metric": self.config.loss.metric, "lambda": self.config.loss.multiplier},
            "best": self.best,
            "metrics": self.metrics,
            "health": {**asdict(self.health), "in_row": self.stepper.verdicts.in_row},
            "shards": self.index.fingerprint,
            "world_size": self.accelerator.num_processes,
            "backend": self.stepper.engine.name,
            "cpu_threads": torch.get_num_threads(),
            "device": device_name(self.accelerator.device),
            "versions": versions(),
        }
        path = checkpoint.save(
            run,
            self.step,
            tensors={
                "model.pt": self.model.state_dict(),
                "optimizer.pt": optimizer,
                "rng.pt": dict(enumerate(ranks)),
            },
            texts={CONFIG: config_text(self.config)},
            meta=meta,
        )
        checkpoint.prune(run, self.config.checkpoint.keep, self._protected())
        logger.info("checkpoint %s", path)
        return path

    def _protected(self) -> set[int]:
        """Steps whose checkpoints are needed still: the best one, and the one to go back to."""
        begin = self.step - self.stepper.verdicts.in_row
        best = {self.best["step"]} if self.best else set()
        return best | self.health.may_return_to(begin, self.config.checkpoint.every)

    def _restore(self, meta: dict[str, Any], optimizer: dict[str, Any], rng: dict[int, Any]) -> None:
        self.stepper.load_state_dict(optimizer)
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        logs = [state.pop("log") for state in rng.values() if "log" in state]
        self.tracker.load_state_dicts(logs[rank : rank + 1] if size == len(logs) else logs if rank == 0 else [])
        if rank in rng:
            set_random_state(rng[rank], self.accelerator.device)
        self.step = self.saved_step = meta["step"]
        self.best, self.metrics = meta["best"], meta["metrics"]
        health = dict(meta.get("health", {}))
        in_row = health.pop("in_row", 0)
        self.health = Health(**health)
        self.stepper.verdicts.restart(in_row)
        if in_row >= self.config.health.max_skipped:
            self.stepper.verdicts.halted_at = self.step
        self._tell_what_changed(meta)

    def _tell_what_changed(self, meta: dict[str, Any]) -> None:
        """Log what keeps the rest of the run from having the bits of an uninterrupted one."""
        now = {
            "world_size": self.accelerator.num_processes,
            "backend": self.stepper.engine.name,
            "cpu_threads": torch.get_num_threads(),
            "device": device_name(self.accelerator.device),
            **versions(),
        }
        was = {"backend": "DDP", **{k: meta[k] for k in now if k in meta}, **meta.get("versions", {})}
        changed = [f"{k} {was[k]} -> {v}" for k, v in now.items() if was.get(k) != v]
        if changed and self.accelerator.is_main_process:
            logger.warning(
                "since the checkpoint has changed: %s; the run goes on over the same batches, but not bit for bit",
                ", ".join(changed),
            )


def new_model(config: RunConfig) -> LALIC:
    """The model of a new run: fresh weights, or those of `train.init_from`."""
    if config.train.init_from is None:
        return LALIC(**config.model.arguments())
    source = Path(config.train.init_from)
    if (source / checkpoint.FOLDER).is_dir():
        source = checkpoint.find_checkpoint(source)
    found = checkpoint.load_model(source) if (source / checkpoint.META).exists() else load_weights(source)
    model = LALIC(**config.model.arguments())
    try:
        model.load_state_dict(found.state_dict())
    except RuntimeError as error:
        differing = [f"{k} {v} there, {model.config[k]} here" for k, v in found.config.items() if v != model.config[k]]
        raise LalicError(
            f"train.init_from: {source} is of another architecture than the config's model section "
            f"({'; '.join(differing)})"
        ) from error
    logger.info("weights from %s", source)
    return model
