"""Train LALIC: `accelerate launch [...] -m lalic.train --config configs/X.yaml run.dir=RUN [key=value ...]`.

One process or many, CPU or GPU: the same command. Started again with the same run folder, it resumes.
SIGTERM, SIGUSR1, Ctrl-C or a file RUN/STOP make it save a checkpoint and exit; RUN/DONE marks its end.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

from lalic.config import RunConfig, read_config
from lalic.errors import LalicError, run_main

if TYPE_CHECKING:
    from lalic.training.stop import StopRequest

logger = logging.getLogger("lalic.train")


def train(config: RunConfig) -> None:
    """Run a training to its end, or to the step at which it is asked to stop."""
    # Imported here, because `--help` and a wrong config need not wait for torch.
    from lalic.training.agreement import Agreement
    from lalic.training.distributed import SharedError, on_first_rank, start_processes
    from lalic.training.run_folder import RunFolder
    from lalic.training.session import Session
    from lalic.training.stop import StopRequest

    accelerator = start_processes(config.train)
    folder = RunFolder(config.folder)
    resume_from, finished = on_first_rank(accelerator, lambda: folder.open(config))
    if finished:
        logger.info("the run in %s is finished: nothing to do", config.folder)
        return
    session = Session(accelerator, config, resume_from)
    on_first_rank(accelerator, lambda: folder.record(config))
    agreement = Agreement(accelerator)
    stop = StopRequest(folder.stop_file, spread=accelerator.num_processes > 1)
    with stop, closing(session.tracker) as tracker:
        if session.validation_due() and not agreement.leave(stop.reason):
            session.validate(folder)
        while not session.done:
            session.recover(folder)
            stage, batches = session.stage, session.micro_batches()
            while session.step < stage.end and not session.halted:
                started = time.perf_counter()
                micro_batches, failure = fetch(batches, config.train.accumulation, stop)
                if leaving := agreement.leave(stop.reason, failure):
                    session.keep(folder)
                    if leaving.failure:
                        raise SharedError(leaving.failure)
                    logger.info("stopped at step %d: %s", session.step, leaving.reason)
                    return
                waited = time.perf_counter() - started
                result = session.stepper(micro_batches, step=session.step, lr=stage.lr)
                session.step += 1
                session.note_skipped()
                log_due = session.step % config.log.every == 0 or session.step == stage.end
                if log_due or session.validation_due() or session.save_due():
                    session.settle()
                tracker.add(result, micro_batches, seconds=time.perf_counter() - started, waited=waited)
                if session.halted:
                    break
                if log_due:
                    tracker.write(session.step, stage, session.stepper.compiled_graphs)
                # A stop does not wait for a validation: the resumed run makes up for it.
                if session.validation_due() and not agreement.leave(stop.reason):
                    session.validate(folder)
                if session.save_due():
                    session.save(folder, must=session.done)
    on_first_rank(accelerator, lambda: folder.finish(session.step))
    logger.info("finished after %d steps", session.step)


def fetch(
    batches: Iterator[Mapping[str, Any]], count: int, stop: StopRequest
) -> tuple[list[Mapping[str, Any]], str | None]:
    """The next `count` micro-batches, and what went wrong instead; neither, when the run is asked to stop."""
    from lalic.data.loader import worker_failure
    from lalic.training.stop import StopNow

    try:
        with stop.at_once():
            return list(islice(batches, count)), None
    except StopNow:
        return [], None
    except LalicError as error:
        return [], str(error)
    except RuntimeError as error:
        # torch raises this one from a signal handler, wherever the program happens to be.
        if failure := worker_failure(error):
            return [], str(failure)
        raise


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
    from lalic.training.stop import stop_with_launcher

    stop_with_launcher()
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
