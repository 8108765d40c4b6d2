"""A run in memory: built anew or from a checkpoint, advanced by steps, written to checkpoints.

config, index, checkpoint ─► Session ── step, validate, save ──► RUN/checkpoints
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from lalic.config import RunConfig, config_text
from lalic.data.loader import build_loader
from lalic.model import LALIC
from lalic.remote import without_password
from lalic.training import checkpoint, events, watchdog
from lalic.training.distributed import SharedError, check_equal, on_first_rank, together
from lalic.training.ema import SavedAverage
from lalic.training.environment import changes, job, random_state, set_random_state, surroundings
from lalic.training.inputs import read_inputs
from lalic.training.recovery import Health, choose_target, read_weights
from lalic.training.run_folder import CONFIG
from lalic.training.schedule import Stage
from lalic.training.standing import CHECKPOINT, STARTING, VALIDATION
from lalic.training.step import TrainStep
from lalic.training.tracking import Tracker
from lalic.training.validate import validate
from lalic.training.writer import CheckpointWriter

logger = logging.getLogger("lalic.train")


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
        """Step of the last checkpoint that was asked for, whatever became of it: the same on all ranks."""
        self.writer = CheckpointWriter(config.folder) if accelerator.is_main_process else None
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
            rungs = config.loss.rungs
            rates = f", one model for q{rungs[0]} to q{rungs[-1]}" if rungs else ""
            logger.info("new run: %d images, %d steps%s", len(self.index), self.schedule.total_steps, rates)
            if accelerator.is_main_process:
                events.record("started", 0, total_steps=self.schedule.total_steps, **inputs.origin, **job())
        self.tracker.open(self.step)

    @property
    def model(self) -> LALIC:
        """The bare model, without DDP."""
        return self.stepper.bare

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the write under way come to its end (see CheckpointWriter.close)."""
        if self.writer:
            self.writer.close(kind)

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
        watchdog.enter(STARTING, self.step)
        if self.writer:
            self.writer.wait()  # worker processes are forked here; they would hold the files that are being written
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
                rungs=self.config.loss.rungs,
                pin_memory=self.accelerator.device.type == "cuda",
            ),
        )
        return iter(loader)

    def validation_due(self) -> bool:
        """Whether this step is to be validated and was not; also right after a resume."""
        due = self.step % self.config.validate.every == 0 or self.done
        return bool(self.images) and due and self.step > 0 and (self.metrics or {}).get("step") != self.step

    def validate(self) -> None:
        """Measure what would be exported on the validation images; note the step when it is the best so far.

        When an image cannot be read any more, the steps that are done are saved before the error is raised.
        """
        watchdog.enter(VALIDATION, self.step)
        log = self.config.log
        nth = self.step // self.config.validate.every
        pictures = log.images if nth % log.images_every == 0 or self.done else 0
        average = self.stepper.average
        try:
            metrics, shown = validate(
                self.accelerator,
                average.model if average else self.model,
                self.images,
                self.config.loss,
                crop=self.config.data.val_crop,
                pictures=pictures,
            )
        except SharedError:
            self.keep()
            raise
        metrics["weights"] = "ema" if average else "raw"
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
                values = {"loss": skipped.loss, "gradient_norm": skipped.gradient_norm, "broken_rank": skipped.rank}
                events.record("skipped", skipped.step + 1, **values)
        self.stepper.verdicts.unseen.clear()

    def counts(self) -> dict[str, Any]:
        """What a log line tells of the whole run so far."""
        health, graphs = self.health, self.stepper.compiled_graphs
        return {"skipped": health.skipped, "rollbacks": health.rollbacks, "compiled_graphs": graphs}

    @property
    def halted(self) -> bool:
        """Whether too many steps in a row were not finite, as far as is known; never at the end of a run."""
        return self.stepper.verdicts.halted_at is not None and not self.done

    def recover(self) -> None:
        """Where the run is halted: back to the weights of the last good checkpoint, and on past the data.

        The position stays: step number s takes the same batch whatever happened before it. Raises SharedError when
        the config says so, there is no such checkpoint, or the run went back to it too often.
        """
        if not self.halted:
            return
        watchdog.enter(STARTING, self.step)
        self.settle()
        verdicts = self.stepper.verdicts
        row = f"the last {verdicts.in_row} steps up to {self.step} were not finite and were not applied"
        if self.writer:
            self.writer.wait()
        begin = self.step - verdicts.in_row
        target, back = on_first_rank(
            self.accelerator, lambda: choose_target(self.config, self.health, begin, because=row)
        )
        state = together(self.accelerator, lambda: read_weights(target))
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["optimizer"])
        if self.stepper.average is not None:
            self.stepper.average.load(state["average"], self.model)
        verdicts.restart()
        self.health = self.health.after_rollback(back, self.step)
        self.saved_step = None
        if self.accelerator.is_main_process:
            logger.warning("%s: back to the weights of %s, and on with the data of step %d", row, target, self.step + 1)
            events.record("rollback", self.step, to_step=back)

    def save_due(self) -> bool:
        """Whether this step belongs on the disk: by the interval, as the best so far, or as the last one."""
        due = self.step % self.config.checkpoint.every == 0 or self.done
        is_best = self.best is not None and self.best["step"] == self.step
        return (due or is_best) and self.saved_step != self.step

    def save(self, *, must: bool) -> None:
        """Copy the state to host memory and begin to write a checkpoint of it; older ones are pruned after that.

        When the write fails (a full disk), nothing older is lost, and the run goes on to the next one with an error
        in the log. With `must` it is waited for, and a failure ends the run on all ranks, in one line.
        """
        watchdog.enter(CHECKPOINT, self.step)
        began = time.perf_counter()
        average = self.stepper.average
        check_equal(self.accelerator, [*self.model.parameters(), *(average.model.parameters() if average else ())])
        own = {**random_state(self.accelerator.device), "log": self.tracker.state_dict()}
        ranks = gather_object([own])
        optimizer = self.stepper.state_dict()
        writer, step = self.writer, self.step
        if writer:
            tensors = {
                "model.pt": self.model.state_dict(),
                "optimizer.pt": optimizer,
                "rng.pt": dict(enumerate(ranks)),
                **({checkpoint.AVERAGED: average.model.state_dict()} if average else {}),
            }
            writer.start(
                step,
                tensors=tensors,
                texts={CONFIG: config_text(self.config)},
                meta=self._meta(),
                prune=self._prune(),
                must=must,
                began=began,
            )
        self.saved_step = step
        if must:
            on_first_rank(self.accelerator, lambda: writer.must_be_written(step) if writer else None)
        self.tracker.saved(time.perf_counter() - began)

    def keep(self) -> None:
        """Write a checkpoint of the steps that are done, unless it is there; for a run that cannot go on."""
        self.settle()
        if not self.step:
            return
        asked = self.saved_step == self.step
        if not asked or on_first_rank(self.accelerator, lambda: bool(self.writer and self.writer.failed(self.step))):
            self.save(must=True)

    def _meta(self) -> dict[str, Any]:
        # Of the step that was done last: a stage that is only about to begin may still be changed.
        stage = next((s for s in self.schedule.stages if s.end >= self.step), self.schedule.stages[-1])
        average = self.stepper.average
        return {
            "step": self.step,
            "total_steps": self.schedule.total_steps,
            "stage": stage.number,
            "position": (self.step - stage.first_step) * self.config.train.batch_size,
            "samples": stage.samples,
            "first_epoch": stage.first_epoch,
            "model": self.model.config,
            "loss": self.config.loss.facts(),
            "ema": {"decay": average.decay, "updates": average.updates} if average else None,
            "best": self.best,
            "metrics": self.metrics,
            "health": {**asdict(self.health), "in_row": self.stepper.verdicts.in_row},
            "shards": self.index.fingerprint,
            **surroundings(self.accelerator, self.stepper.engine.name),
        }

    def _prune(self) -> Callable[[Path, int], None]:
        """The retention rule as it is now, for when the checkpoint is in place."""
        rule, protected, best = self.config.checkpoint, self._protected(), self.best["step"] if self.best else None

        def prune(run: Path, written: int) -> None:
            stay = set(protected)
            if best is not None and checkpoint.problem(checkpoint.folder_of(run, best), contents=False) is not None:
                # It could not be written: the best of those that are there takes its place.
                there = checkpoint.best_on_disk(run)
                if there is not None:
                    stay.add(there)
            checkpoint.prune(run, written, keep=rule.keep, keep_every=rule.keep_every, protected=stay)

        return prune

    def _protected(self) -> set[int]:
        """Steps whose checkpoints are needed still: the best one, and the one to go back to."""
        begin = self.step - self.stepper.verdicts.in_row
        best = {self.best["step"]} if self.best else set()
        return best | self.health.may_return_to(begin, self.config.checkpoint.every)

    def _restore(
        self, meta: dict[str, Any], optimizer: dict[str, Any], average: SavedAverage | None, rng: dict[int, Any]
    ) -> None:
        self.stepper.load_state_dict(optimizer)
        self._restore_average(average)
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        logs = [state.pop("log") for state in rng.values() if "log" in state]
        own = logs[rank : rank + 1] if size == len(logs) else logs if rank == 0 else []
        self.tracker.load_state_dicts(own, len(logs))
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

    def _restore_average(self, saved: SavedAverage | None) -> None:
        average, told = self.stepper.average, self.accelerator.is_main_process
        if average is not None:
            average.load(saved, self.model)
            if saved is None and told:
                logger.info("train.ema is new to this run: the average begins with the weights of the checkpoint")
        elif saved is not None and told:
            logger.warning("train.ema is off: the averaged weights of the checkpoint are left behind")

    def _tell_what_changed(self, meta: dict[str, Any]) -> None:
        """Log what keeps the rest of the run from having the bits of an uninterrupted one."""
        if not self.accelerator.is_main_process:
            return
        changed = changes(meta, surroundings(self.accelerator, self.stepper.engine.name))
        before = {"world_size_before": meta.get("world_size"), "changed": changed}
        events.record("resumed", self.step, total_steps=self.schedule.total_steps, **before, **job())
        if changed:
            logger.warning(
                "since the checkpoint has changed: %s; the run goes on over the same batches, but not bit for bit",
                ", ".join(changed),
            )
