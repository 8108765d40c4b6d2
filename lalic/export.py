"""Turn checkpoints into release bundles (see lalic.release).

    python -m lalic.export --run RUN [RUN ...] --output release/ [--step N | --best] [--weights ema|raw]
    python -m lalic.export --sweep runs/lalic --output release/
    python -m lalic.export --checkpoint lalic-mse-q3.pth --output release/
    python -m lalic.export --checkpoint release/lalic-mse-q3 --eval kodak.json --output release/ --force
    python -m lalic.export --run RUN --precision float16 --output weights/
    python -m lalic.export --checkpoint weights/lalic-mse-q3 --output release/
    python -m lalic.export --run RUN --quality 1 2 3 4 5 6 --output release/

The second form takes the runs of a ladder, runs/lalic-q1 ... runs/lalic-q6, that have a checkpoint. The third bundles
weights that come from elsewhere, such as published ones. Metric and lambda are taken from the checkpoint or from a file
name like `lalic-mse-q3.pth`; otherwise give them with `--metric` and `--quality` or `--lambda`. `--eval` puts what
`lalic eval` measured on these weights into bundle and card; the last form adds it to a bundle that is there.

Of a run that was trained with `train.ema`, the averaged weights are taken, which are those that were validated;
`--weights raw` takes those of the last step.

`--precision float16` writes a compact bundle: what was learned alone, rounded to float16, and no .pth file. That is
another model than the checkpoint's, and what `--eval` adds must have been measured on the bundle. The last form but
one makes the full bundle of a compact one: the same numbers and fingerprint.

Weights that serve a range of qualities (`loss.quality: [1, 6]`) make one bundle, such as lalic-mse-vbr, without a .pth
file. With `--quality`, they make a bundle in the published layout for each of the whole qualities named, lalic-mse-q1
and so on: the gains of that quality are folded into two convolutions, which is another model with another fingerprint,
the same to 1e-5. On weights of a single rate, `--quality` is their label.

As soon as there are two bundles in the output folder, its SHA256SUMS lists the files of all of them. A run or
quality that cannot be exported is told at the end, with a non-zero status, and keeps none of the others back.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalic.card import Licence
from lalic.card_evaluation import joined, read_evaluations
from lalic.codec.quality import parse_quality
from lalic.errors import LalicError, run_main
from lalic.ladder import LADDERS, MSE, lambda_of, loss_name
from lalic.release import Weights, in_precision, open_checkpoint, open_weights, write_bundle
from lalic.release_files import FLOAT16, FLOAT32
from lalic.release_folder import check_sums, kept_sums
from lalic.release_rates import folded, quality_label, range_loss, whole_rungs
from lalic.release_training import training_facts

log = logging.getLogger("lalic.export")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Write the release bundles and print their folders."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    check_sums(args.output)
    _licence(args)
    if args.checkpoint is not None:
        if args.step is not None or args.best:
            raise LalicError("--step and --best choose a checkpoint of --run; --checkpoint names one itself")
        return _export(open_weights(args.checkpoint, args.weights), args)
    runs = args.run or runs_of_sweep(args.sweep)
    if len(runs) == 1:
        return _export(open_checkpoint(*_chosen(runs[0], args), args.weights), args)
    return _export_all(runs, args)


def runs_of_sweep(prefix: Path) -> list[Path]:
    """The run folders PREFIX-q1 ... PREFIX-q6 that have a checkpoint; LalicError when none has."""
    from lalic.training.checkpoint import steps_on_disk
    from lalic.training.run_folder import DONE

    runs = [prefix.with_name(f"{prefix.name}-q{quality}") for quality in range(1, 7)]
    found = [run for run in runs if steps_on_disk(run)]
    if not found:
        raise LalicError(f"there is no {runs[0]} ... {runs[-1].name} with a checkpoint: --sweep takes runs/NAME")
    for run in runs:
        if run not in found:
            log.warning("%s has no checkpoint and is left out", run)
        elif not (run / DONE).exists():
            log.warning("%s is not finished", run)
    return found


def _chosen(run: Path, args: argparse.Namespace) -> tuple[Path, int | None]:
    """A run and the step of it that is asked for; None: its newest complete checkpoint."""
    if not run.is_dir():
        raise LalicError(f"no such run folder: {run}")
    return run, best_step(run) if args.best else args.step


def _export(weights: Weights, args: argparse.Namespace) -> int:
    """Write the bundle of the weights, or of several rates those of the qualities named; 1 when one of them failed."""
    if weights.model.rates is None:
        weights.loss = _loss(weights, args.metric, args.lmbda, _label(weights, args.quality))
    else:
        weights.loss = _range_loss(weights, args.metric, args.lmbda)
    if weights.model.rates is None or args.quality is None:
        _write(weights, args)
        return 0
    rungs = whole_rungs(weights, args.quality)
    if len(rungs) == 1:
        _write(folded(weights, rungs[0]), args)
        return 0
    failures: dict[int, Exception] = {}
    for rung in rungs:
        try:
            _write(folded(weights, rung), args)
        except (LalicError, OSError) as error:
            failures[rung] = error
    for rung, failure in failures.items():
        print(f"error: quality {rung} is not exported: {' '.join(str(failure).split())}", file=sys.stderr)
    return 1 if failures else 0


def _write(weights: Weights, args: argparse.Namespace) -> None:
    weights = in_precision(weights, args.precision)
    log.info("weights of %s%s", weights.source, ", averaged" if weights.kind == "ema" else "")
    recipe = training_facts(Path(weights.source), averaged=weights.kind == "ema") or weights.training
    if args.evaluations:
        measured = read_evaluations(args.evaluations, weights.fingerprint)
        if not measured:
            log.warning("%s: --eval has no numbers of these weights", weights.source)
        weights.evaluations = joined(weights.evaluations, measured)
    with kept_sums(args.output, loss_name(weights.loss)):
        folder = write_bundle(weights, args.output, force=args.force, recipe=recipe, licence=_licence(args))
    print(folder, flush=True)


@dataclass(frozen=True)
class _Source:
    """A checkpoint folder that is to be exported, and the name of its bundle."""

    run: Path
    checkpoint: Path
    name: str


def _export_all(runs: Sequence[Path], args: argparse.Namespace) -> int:
    """Export several runs; returns 1 when one of them failed. Nothing is written when two are the same rung."""
    if args.quality is not None or args.lmbda is not None:
        raise LalicError("--quality and --lambda are for one run: each of several says itself what it was trained for")
    sources: list[_Source] = []
    failures: dict[Path, Exception] = {}
    for run in runs:
        try:
            sources.append(_source(run, args))
        except (LalicError, OSError) as error:
            failures[run] = error
    for i, source in enumerate(sources):
        twin = next((s for s in sources[:i] if s.name == source.name), None)
        if twin:
            raise LalicError(f"{twin.run} and {source.run} are both {source.name}: leave one of them out")
    for source in sources:
        try:
            _export(open_checkpoint(source.checkpoint, None, args.weights), args)
        except (LalicError, OSError) as error:
            failures[source.run] = error
    for run, failure in failures.items():
        print(f"error: {run} is not exported: {' '.join(str(failure).split())}", file=sys.stderr)
    return 1 if failures else 0


def _source(run: Path, args: argparse.Namespace) -> _Source:
    from lalic.training.checkpoint import find_checkpoint, read_meta

    folder = find_checkpoint(*_chosen(run, args))
    loss = read_meta(folder).get("loss") or {}
    try:
        return _Source(run, folder, loss_name(loss))
    except (KeyError, TypeError, ValueError) as error:
        raise LalicError(
            f"{folder} does not say what it was trained for: export it by itself with --quality"
        ) from error


def _licence(args: argparse.Namespace) -> Licence | None:
    """The licence of the flags; None: the one that the weights had, or the default."""
    if args.licence is None and args.licence_note is None:
        return None
    note = " ".join((args.licence_note or "").split())
    if (args.licence or "other") == "other" and not note:
        raise LalicError("--license other needs --license-note TEXT, which says what the weights may be used for")
    return Licence(args.licence or "other", note)


def _label(weights: Weights, qualities: Sequence[float] | None) -> int | None:
    """The rung that --quality names for weights of a single rate; LalicError for what only several rates have."""
    if qualities is None:
        return None
    has = f", {loss_name(weights.loss)}" if "lambda" in weights.loss else ""
    if len(qualities) > 1:
        raise LalicError(f"{weights.source} has one rate{has}: it cannot be exported at several qualities")
    (quality,) = qualities
    if not quality.is_integer():
        raise LalicError(f"{weights.source} has one rate{has}: it has no quality {quality:g}")
    if quality not in MSE:
        raise LalicError(f"--quality {quality:g} is not on the ladder, which has {min(MSE)} to {max(MSE)}")
    return int(quality)


def _range_loss(weights: Weights, metric: str | None, lmbda: float | None) -> dict[str, Any]:
    """The loss of weights of several rates: what the checkpoint says, or the ladder of `metric` at its rungs."""
    known, rungs = weights.loss, weights.model.config["rungs"]
    if lmbda is not None:
        raise LalicError(
            f"{weights.source} has several rates, whose lambdas are those of the ladder: leave --lambda out"
        )
    if not known:
        if metric is None:
            raise LalicError(f"{weights.source} does not say what it was trained for: add --metric")
        return range_loss(metric, rungs)
    try:
        quality_label(known, rungs)
    except (KeyError, TypeError, ValueError) as error:
        raise LalicError(f"{weights.source} does not say what it was trained for: {error}") from error
    except LalicError as error:
        raise LalicError(f"{weights.source}: {error}") from error
    if metric not in (None, known["metric"]):
        raise LalicError(f"{weights.source} was trained with {known['metric']}, not with {metric}: leave --metric out")
    return known


def _loss(weights: Weights, metric: str | None, lmbda: float | None, quality: int | None) -> dict[str, Any]:
    """Metric and lambda: what the checkpoint says, which the command line may complete but not contradict."""
    known = weights.loss
    metric = metric or known.get("metric") or ("mse" if lmbda or quality else None)
    if lmbda is None and quality is not None and metric:
        lmbda = lambda_of(metric, quality)
    if lmbda is None:
        lmbda = known.get("lambda")
    if metric is None or lmbda is None:
        raise LalicError(
            f"{weights.source} does not say what it was trained for: add --metric and --quality or --lambda"
        )
    loss = {"metric": metric, "lambda": float(lmbda)}
    if known and weights.step is not None and loss != {k: known.get(k) for k in loss}:
        raise LalicError(
            f"{weights.source} was trained with {known.get('metric')}, lambda {known.get('lambda')}, "
            f"not with {metric}, lambda {lmbda}: leave --metric, --quality and --lambda out"
        )
    return loss


def best_step(run: Path) -> int:
    """Step with the lowest validation loss so far; LalicError when the run was never validated.

    Where its checkpoint is damaged or could not be written, that of the best checkpoint which is there.
    """
    from lalic.training.checkpoint import best_on_disk, find_checkpoint, folder_of, problem, read_meta

    best = read_meta(find_checkpoint(run)).get("best")
    if not best:
        raise LalicError(f"{run} was never validated (data.val), so no checkpoint is the best: leave --best out")
    if reason := problem(folder_of(run, best["step"]), contents=False):
        there = best_on_disk(run)
        if there is not None:
            log.warning("the best step of %s is %d (%s): taking %d", run, best["step"], reason, there)
            return there
    return int(best["step"])


def _quality(text: str) -> float:
    """One --quality; whether the weights have it is asked later."""
    try:
        return parse_quality(text)
    except LalicError as error:
        raise LalicError(f"{error}; several are named one by one: --quality 1 2 3") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, nargs="+", metavar="RUN", help="run folders of lalic.train")
    source.add_argument("--sweep", type=Path, metavar="RUNS/NAME", help="the ladder of `lalic sweep`, all its runs")
    source.add_argument("--checkpoint", help="weights file, checkpoint folder or bundle: path, name or URL")
    parser.add_argument("--output", type=Path, default=Path("release"), help="folder of bundles (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint of this step (default: the newest complete one)")
    which.add_argument("--best", action="store_true", help="checkpoint with the lowest validation loss")
    kinds = "averaged weights or those of the last step of a run with train.ema (default: averaged where there are any)"
    parser.add_argument("--weights", choices=("ema", "raw"), help=kinds)
    parser.add_argument("--metric", choices=tuple(LADDERS), help="what the weights were trained for")
    multiplier = parser.add_mutually_exclusive_group()
    multiplier.add_argument(
        "--quality",
        type=_quality,
        nargs="+",
        metavar="Q",
        help="of weights of several rates: a bundle of one rate for each; of others: the label, which gives lambda",
    )
    multiplier.add_argument("--lambda", dest="lmbda", type=float, help="Lagrangian multiplier of the loss")
    parser.add_argument(
        "--eval",
        dest="evaluations",
        type=Path,
        nargs="+",
        metavar="RESULT",
        help="results of `lalic eval` on these weights, for bundle and card",
    )
    parser.add_argument(
        "--precision",
        choices=(FLOAT32, FLOAT16),
        default=FLOAT32,
        help="float16: a compact bundle of rounded weights, a quarter of the bytes (%(default)s)",
    )
    parser.add_argument(
        "--license",
        dest="licence",
        metavar="ID",
        help="of the weights, as hubs name it (default: what the card said before, or mit)",
    )
    parser.add_argument(
        "--license-note", dest="licence_note", metavar="TEXT", help="words about it for the card; needed with `other`"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle that differs")
    return parser


if __name__ == "__main__":
    run_main(main)
