"""Train LALIC: `accelerate launch [...] -m lalic.train --config configs/X.yaml run.dir=RUN [key=value ...]`.

One process or many, CPU or GPU: the same command. Started again with the same run folder, it resumes.
SIGTERM, SIGUSR1, Ctrl-C or a file RUN/STOP make it save a checkpoint and exit; RUN/DONE marks its end.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice

from lalic.config import RunConfig, read_config
from lalic.errors import LalicError, run_main

logger = logging.getLogger("lalic.train")


def train(config: RunConfig) -> None:
    """Run a training to its end, or to the step at which it is asked to stop."""
    # Imported here, because `--help` and a wrong config need not wait for torch.
    from lalic.training.distributed import on_first_rank, start_processes
    from lalic.training.run_folder import RunFolder
    from lalic.training.session import Session
    from lalic.training.stop import StopNow, StopRequest
    from lalic.training.tracking import Tracker

    accelerator = start_processes(config.train)
    folder = RunFolder(config.folder)
    resume_from, finished = on_first_rank(accelerator, lambda: folder.open(config))
    if finished:
        logger.info("the run in %s is finished: nothing to do", config.folder)
        return
    session = Session(accelerator, config, resume_from)
    on_first_rank(accelerator, lambda: folder.record(config))
    stop = StopRequest(folder.stop_file if accelerator.is_main_process else None)
    # Ranks that have their data already wait for the others in the step: one rank of many may not leave before it.
    alone = accelerator.num_processes == 1
    with stop, closing(Tracker(accelerator, config, session.step, session.schedule)) as tracker:
        if session.validation_due():
            session.validate(tracker)
        for stage in session.schedule.remaining(session.step):
            batches = session.micro_batches(stage)
            while session.step < stage.end:
                started = time.perf_counter()
                waiting: AbstractContextManager[None] = stop.at_once() if alone else nullcontext()
                try:
                    with waiting:
                        micro_batches = list(islice(batches, config.train.accumulation))
                except (StopNow, LalicError) as ended:
                    if alone:
                        session.keep(folder)
                    if isinstance(ended, LalicError):
                        raise
                    logger.info("stopped at step %d: %s, while waiting for data", session.step, stop.reason)
                    return
                waited = time.perf_counter() - started
                result = session.stepper(micro_batches, step=session.step, lr=stage.lr, asked_to_stop=stop.is_requested)
                session.step += 1
                log_due = session.step % config.log.every == 0 or session.step == stage.end
                asked = result.stop
                if asked or log_due or session.validation_due() or session.save_due():
                    asked = session.stepper.settle()
                stopping = asked and not session.done
                tracker.add(result, micro_batches, seconds=time.perf_counter() - started, waited=waited)
                if log_due or stopping:
                    tracker.write(session.step, stage, session.stepper.compiled_graphs)
                if session.validation_due() and not stopping:
                    session.validate(tracker)
                if session.save_due() or stopping:
                    session.save(folder, must=stopping or session.done)
                if stopping:
                    logger.info("stopped at step %d: %s", session.step, stop.reason or "asked on another rank")
                    return
    on_first_rank(accelerator, lambda: folder.finish(session.step))
    logger.info("finished after %d steps", session.step)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lalic.train` and `lalic train`."""
    parser = argparse.ArgumentParser(
        prog="lalic.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="configs/lalic.yaml, small.yaml, demo.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. run.dir=runs/q3 loss.quality=3")
    arguments = parser.parse_intermixed_args(argv)

    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    try:
        config = read_config(arguments.config, arguments.settings)
        config.folder  # noqa: B018 -- asks for run.dir before anything is started
    except LalicError:
        if first:
            raise
        return 2
    return _train_and_leave(config, first)


def _train_and_leave(config: RunConfig, first: bool) -> int:
    """Train; an error that all ranks share is printed by the first alone."""
    import torch.distributed

    from lalic.data.loader import worker_failure
    from lalic.training.distributed import SharedError

    try:
        train(config)
    except SharedError:
        if first:
            raise
        return 2
    except RuntimeError as error:
        # torch raises this one from a signal handler, wherever the program happens to be.
        if failure := worker_failure(error):
            raise failure from error
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_main(main)
