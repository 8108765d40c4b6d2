"""What a run tells: the log line, RUN/log.jsonl and TensorBoard. On the first rank only."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lalic.config import RunConfig
from lalic.durations import duration
from lalic.memory import PeakMemory, peak_resident_bytes
from lalic.training.distributed import rows_of_ranks
from lalic.training.loss import rung_values
from lalic.training.run_folder import LOG, TENSORBOARD
from lalic.training.schedule import Schedule, Stage
from lalic.training.step import StepResult

logger = logging.getLogger("lalic.train")


class Tracker:
    """Adds up the values of steps on the device and writes their means over steps and ranks.

    Every rank has one, because the means need all of them; only the first writes. A log that cannot be written
    (a full disk) is reported once and does not end the run.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, schedule: Schedule):
        self.accelerator, self.schedule = accelerator, schedule
        self.batch_size = config.train.batch_size
        self.rungs = config.loss.rungs or ()
        self._rung_values = rung_values(config.loss.metric)
        self._complained = False
        self._memory = PeakMemory(accelerator.device)
        self._folder = config.folder
        self._log = config.folder / LOG
        self._board: Any = None
        self._reset()

    def open(self, step: int) -> None:
        """Begin to write, for a run of which `step` steps are done."""
        self._first_step, self._started = step, time.monotonic()
        if self.accelerator.is_main_process:
            # TensorBoard takes seconds to import.
            from torch.utils.tensorboard import SummaryWriter

            keep_until(self._log, step)
            # What a killed run wrote past its last checkpoint is done again and would stand there twice.
            self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=step + 1)

    def _reset(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._rungs = torch.zeros(
            len(self.rungs), len(self._rung_values) + 1, dtype=torch.float64, device=self.accelerator.device
        )
        self._steps = self._bad = 0
        self._busy = self._waited = 0.0
        self._saving = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added up since the last log line, so that a resumed run writes the same next one."""
        return {
            "names": list(self._names),
            "sums": None if self._sums is None else self._sums.cpu(),
            **({"rungs": self._rungs.cpu()} if self.rungs else {}),
            "steps": self._steps,
            "bad": self._bad,
            "busy": self._busy,
            "waited": self._waited,
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]], ranks: int) -> None:
        """Go on from these: this rank's own, or on the first of another number of ranks those of all `ranks`."""
        for state in states:
            if state["sums"] is None:
                continue
            # A step counts once for each rank: those of the other number of ranks must weigh as much as those to come.
            sums = state["sums"].to(self.accelerator.device) * (self.accelerator.num_processes / ranks)
            self._names = list(state["names"])
            self._sums = sums if self._sums is None else self._sums + sums
            if self.rungs:
                self._rungs = self._rungs + state["rungs"].to(self._rungs.device)
            self._steps, self._bad = state["steps"], self._bad + state["bad"]
            self._busy, self._waited = state["busy"], state["waited"]

    def add(
        self, result: StepResult, micro_batches: Sequence[Mapping[str, Any]], *, seconds: float, waited: float
    ) -> None:
        """Take note of one step: its values, how long it took, and how much of that went on waiting for data."""
        self._names = list(result.values)
        # The last entry counts the steps: what is not finite was not applied and is in no mean.
        values = torch.stack([*result.values.values(), torch.ones_like(result.left_out)]).detach().double()
        values = torch.where(result.left_out.bool(), 0.0, values)
        self._sums = values if self._sums is None else self._sums + values
        if result.rungs is not None:
            self._rungs = self._rungs + torch.where(result.left_out.bool(), 0.0, result.rungs.double())
        self._steps += 1
        self._bad += sum(batch["bad"] for batch in micro_batches)
        self._busy += seconds
        self._waited += waited

    def saved(self, seconds: float) -> None:
        """Take note that the steps have stood still for a checkpoint."""
        self._saving += seconds

    def write(
        self, step: int, stage: Stage, *, skipped: int = 0, rollbacks: int = 0, compiled_graphs: int | None = None
    ) -> None:
        """Write the means since the last call, as those after `step` steps of the run. All ranks call it.

        This is where the device is waited for. `skipped`, `rollbacks`: those of the run so far; `compiled_graphs`:
        those of this process, if it compiles. docs/training.md says what the names mean.
        """
        if self._sums is None:
            return
        own = (self._bad, self._waited / self._busy, self._memory.bytes(), peak_resident_bytes())
        row = torch.cat((self._rungs.flatten(), self._sums, self._sums.new_tensor(own)))
        rows = rows_of_ranks(self.accelerator, row).cpu()
        of_rungs, others = rows.sum(dim=0).split((self._rungs.numel(), len(row) - self._rungs.numel()))
        *totals, count, bad, _, _, _ = others.tolist()
        share, device, host = rows[:, -3:].unbind(dim=1)
        # Without one step that was applied there is no mean: null in the JSON.
        values = {n: t / count if count else math.nan for n, t in zip(self._names, totals, strict=True)}
        speed, ranks = self._steps * self.batch_size / self._busy, self.accelerator.num_processes
        extra = {
            "lr": stage.lr_at(step - 1),
            "images_per_second": speed,
            "images_per_second_per_rank": speed / ranks,
            "step_seconds": self._busy / self._steps,
            "data_wait_share": float(share.mean()),
            "data_wait_share_worst": float(share.max()),
            "data_wait_worst_rank": int(share.argmax()),
            "checkpoint_seconds": self._saving,
            "bad_samples": int(bad),
            "skipped_steps": self._steps - round(count / ranks),
            "skipped_steps_total": skipped,
            "rollbacks": rollbacks,
            "memory_gib": float(device.max()) / 2**30,
            "host_memory_gib": float(host.max()) / 2**30,
        }
        if compiled_graphs is not None:
            extra["compiled_graphs"] = compiled_graphs
        if self.rungs:
            extra["rungs"] = self._means_of_rungs(of_rungs.view(self._rungs.shape))
        self._reset()
        if not self.accelerator.is_main_process:
            return
        logger.info("%s", self._line(step, stage, values, extra))
        self._write("train", step, {"stage": stage.number, **values, **extra})

    def _means_of_rungs(self, sums: Tensor) -> dict[str, dict[str, Any]]:
        """{"1": {"loss", "bpp", "psnr", ..., "samples"}, ...}: means over the samples of a rung, None without any."""
        means = {}
        for rung, (*totals, samples) in zip(self.rungs, sums.tolist(), strict=True):
            found = [total / samples if samples else None for total in totals]
            means[str(rung)] = {**dict(zip(self._rung_values, found, strict=True)), "samples": round(samples)}
        return means

    def _line(self, step: int, stage: Stage, values: Mapping[str, float], extra: Mapping[str, Any]) -> str:
        total, stages = self.schedule.total_steps, len(self.schedule.stages)
        left = (time.monotonic() - self._started) / (step - self._first_step) * (total - step)
        quality = f"ms-ssim {values['ms_ssim']:.4f} " if "ms_ssim" in values else ""
        quality += f"{_rungs_shown(extra['rungs'])} " if self.rungs else ""
        return (
            f"step {step}/{total} ({100 * step / total:.1f} %) stage {stage.number}/{stages} "
            f"loss {values['loss']:.4f} bpp {values['bpp']:.4f} psnr {values['psnr']:.2f} {quality}"
            f"aux {values['aux']:.2f} gnorm {values['gradient_norm']:.3f} lr {extra['lr']:.1e} "
            f"{extra['images_per_second']:.1f} img/s wait {100 * extra['data_wait_share']:.0f} % "
            f"eta {duration(left)}"
            + (f" bad {extra['bad_samples']}" if extra["bad_samples"] else "")
            + (f" skipped {extra['skipped_steps']}" if extra["skipped_steps"] else "")
        )

    def validation(
        self, step: int, metrics: Mapping[str, Any], pictures: Sequence[tuple[str, Tensor]], is_best: bool
    ) -> None:
        """Write what a validation found. `pictures`: (name, (3, H, W) in [0, 1]). First rank only."""
        shown = " ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        best = " (best so far)" if is_best else ""
        shown += f" {_rungs_shown(metrics['rungs'])}" if self.rungs else ""
        logger.info("validation at step %d: %s on %d images%s", step, shown, metrics["images"], best)
        self._write("validation", step, dict(metrics))
        for name, picture in pictures:
            self._guard(lambda name=name, picture=picture: self._board.add_image(f"validation/{name}", picture, step))
        self._guard(self._board.flush)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        record = _without_nonfinite({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        scalars = {name: value for name, value in values.items() if name != "rungs"}
        for rung, found in values.get("rungs", {}).items():
            scalars |= {f"q{rung}/{name}": value for name, value in found.items()}

        def write() -> None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in scalars.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

        self._guard(write)

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            if not self._complained:
                logger.error("the log of the run cannot be written any more: %s", error)
            self._complained = True

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self._board is not None:
            self._guard(self._board.close)


def _rungs_shown(rungs: Mapping[str, Mapping[str, Any]]) -> str:
    """Bits per pixel and PSNR of every rung: "q1 0.213/27.1 q2 -" where no sample of q2 was drawn."""
    return " ".join(
        f"q{rung} {v['bpp']:.3f}/{v['psnr']:.1f}" if v["bpp"] is not None else f"q{rung} -" for rung, v in rungs.items()
    )


def _without_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for numbers that JSON does not have."""
    return {
        k: _without_nonfinite(v)
        if isinstance(v, dict)
        else None
        if isinstance(v, float) and not math.isfinite(v)
        else v
        for k, v in record.items()
    }


def keep_until(log: Path, step: int) -> None:
    """Drop what a log says of later steps, which a resumed run does again, and a line cut by a kill."""
    from lalic.files import write_text

    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(log, "".join(kept))
