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
from lalic.training import events
from lalic.training.standing import DATA, STEP

if TYPE_CHECKING:
    from lalic.training.stop import StopRequest
    from lalic.training.watchdog import Watchdog

logger = logging.getLogger("lalic.train")


def train(config: RunConfig, watchdog: Watchdog) -> None:
    """Run a training to its end, or to the step at which it is asked to stop."""
    # Imported here, because `--help` and a wrong config need not wait for torch.
    from lalic.training.agreement import Agreement
    from lalic.training.distributed import SharedError, on_first_rank, start_processes
    from lalic.training.run_folder import RunFolder
    from lalic.training.session import Session
    from lalic.training.stop import StopRequest

    accelerator = start_processes(config.train, watchdog.collective_timeout)
    watchdog.connect()
    folder = RunFolder(config.folder)
    resume_from, finished = on_first_rank(accelerator, lambda: folder.open(config))
    if finished:
        logger.info("the run in %s is finished: nothing to do", config.folder)
        return
    events.begin(config.folder, rank=accelerator.process_index, world_size=accelerator.num_processes)
    session = Session(accelerator, config, resume_from)
    on_first_rank(accelerator, lambda: folder.record(config))
    agreement = Agreement(accelerator, watchdog.collective_timeout)
    stop = StopRequest(folder.stop_file, spread=accelerator.num_processes > 1)
    with stop, session, closing(session.tracker) as tracker:
        if session.validation_due() and not agreement.leave(stop.reason):
            session.validate()
        while not session.done:
            session.recover()
            stage, batches = session.stage, session.micro_batches()
            while session.step < stage.end and not session.halted:
                watchdog.enter(DATA, session.step)
                started = time.perf_counter()
                micro_batches, failure = fetch(batches, config.train.accumulation, stop)
                if leaving := agreement.leave(stop.reason, failure):
                    session.keep()
                    if leaving.failure:
                        raise SharedError(leaving.failure)
                    logger.info("stopped at step %d: %s", session.step, leaving.reason)
                    if accelerator.is_main_process:
                        events.record("stopped", session.step, reason=leaving.reason)
                    return
                waited = time.perf_counter() - started
                watchdog.enter(STEP, session.step)
                result = session.stepper(micro_batches, step=session.step, lr=stage.lr_at(session.step))
                session.step += 1
                session.note_skipped()
                log_due = session.step % config.log.every == 0 or session.step == stage.end
                if log_due or session.validation_due() or session.save_due():
                    session.settle()
                tracker.add(result, micro_batches, seconds=time.perf_counter() - started, waited=waited)
                if session.halted:
                    break
                if log_due:
                    tracker.write(session.step, stage, **session.counts())
                # A stop does not wait for a validation: the resumed run makes up for it.
                if session.validation_due() and not agreement.leave(stop.reason):
                    session.validate()
                if session.save_due():
                    session.save(must=session.done)
    on_first_rank(accelerator, lambda: folder.finish(session.step))
    if accelerator.is_main_process:
        events.record("finished", session.step)
    logger.info("finished after %d steps", session.step)


def fetch(
    batches: Iterator[Mapping[str, Any]], count: int, stop: StopRequest
) -> tuple[list[Mapping[str, Any]], str | None]:
    """The next `count` micro-batches, and what went wrong instead; neither, when the run is asked to stop."""
    from lalic.data.workers import worker_failure
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
        return leave_after_first()
    return _train_and_leave(config, first)


def leave_after_first() -> int:
    """The status of a rank whose error the first one prints, late: the launcher ends all ranks when one has ended."""
    time.sleep(5)
    return 2


def _train_and_leave(config: RunConfig, first: bool) -> int:
    """Train; an error that all ranks share is printed by the first alone."""
    import torch.distributed

    from lalic.data.workers import worker_failure
    from lalic.training.distributed import SharedError
    from lalic.training.stop import stop_with_launcher
    from lalic.training.watchdog import Watchdog

    stop_with_launcher()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    watchdog = Watchdog(config.health.stall_timeout, rank=int(os.environ.get("RANK", 0)), world_size=ranks)
    try:
        with watchdog:
            train(config, watchdog)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    except SharedError as error:
        if not first:
            return leave_after_first()
        _record_failure(error, watchdog.step)
        raise
    except KeyboardInterrupt:
        events.record("stopped", watchdog.step, reason="interrupted, without a checkpoint")
        raise
    except Exception as error:
        # torch raises this one from a signal handler, wherever the program happens to be.
        failure = worker_failure(error)
        _record_failure(failure or error, watchdog.step)
        if failure:
            raise failure from error
        raise
    finally:
        events.end()
    return 0


def _record_failure(error: Exception, step: int) -> None:
    kind = "" if isinstance(error, LalicError) else f"{type(error).__name__}: "
    events.record_failure(step, error=(kind + " ".join(str(error).split()))[:500])


if __name__ == "__main__":
    run_main(main)
