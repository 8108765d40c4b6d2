"""Turn a checkpoint into a release bundle (see lalic.release).

    python -m lalic.export --run RUN --output release/ [--step N | --best] [--weights ema|raw]
    python -m lalic.export --checkpoint lalic-mse-q3.pth --output release/

Of a run that was trained with `train.ema`, the averaged weights are taken, which are those that were validated;
`--weights raw` takes those of the last step. The second form bundles weights that come from elsewhere, such as
published ones. Metric and lambda are taken from the checkpoint or from a file name like `lalic-mse-q3.pth`; otherwise
give them with `--metric` and `--quality` or `--lambda`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalic.errors import LalicError, run_main
from lalic.ladder import LADDERS, lambda_of
from lalic.release import Weights, open_checkpoint, open_weights, write_bundle

log = logging.getLogger("lalic.export")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Write the release bundle and print its folder."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if args.run is not None:
        if not args.run.is_dir():
            raise LalicError(f"no such run folder: {args.run}")
        weights = open_checkpoint(args.run, best_step(args.run) if args.best else args.step, args.weights)
    elif args.step is not None or args.best:
        raise LalicError("--step and --best choose a checkpoint of --run; --checkpoint names one itself")
    else:
        weights = open_weights(args.checkpoint, args.weights)
    weights.loss = _loss(weights, args.metric, args.lmbda, args.quality)
    log.info("weights of %s%s", weights.source, ", averaged" if weights.kind == "ema" else "")
    recipe = training_facts(Path(weights.source), averaged=weights.kind == "ema")
    folder = write_bundle(weights, args.output, force=args.force, recipe=recipe)
    print(folder)
    return 0


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
    """Step with the lowest validation loss so far; LalicError when the run was never validated."""
    from lalic.training.checkpoint import find_checkpoint, read_meta

    best = read_meta(find_checkpoint(run)).get("best")
    if not best:
        raise LalicError(f"{run} was never validated (data.val), so no checkpoint is the best: leave --best out")
    return int(best["step"])


def training_facts(checkpoint: Path, *, averaged: bool = False) -> dict[str, Any]:
    """What a checkpoint folder says about its training, for the model card; {} for weights from elsewhere."""
    if not (checkpoint / "meta.json").exists():
        return {}
    from lalic.training.checkpoint import read_meta

    meta, config = read_meta(checkpoint), _config_of(checkpoint)
    facts: dict[str, Any] = {"steps": meta["step"]}
    train = config.get("train") or {}
    if isinstance(train.get("batch_size"), int):
        facts |= {"batch size": train["batch_size"], "crops seen": meta["step"] * train["batch_size"]}
    if train.get("precision"):
        facts["precision of the transforms"] = train["precision"]
    stages = [stage for stage in config.get("stages") or () if isinstance(stage, dict)]
    if stages:
        facts["stages"] = "; ".join(_stage(stage) for stage in stages)
    if averaged:
        facts["decay of the averaged weights"] = str(meta["ema"]["decay"])
    return facts


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """The run's config as it stood when the checkpoint was written; {} when it cannot be read."""
    import yaml

    try:
        config = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _stage(stage: dict[str, Any]) -> str:
    keys = {"epochs": "epochs", "steps": "steps", "lr": "learning rate", "crop": "crop"}
    return ", ".join(f"{name} {stage[key]}" for key, name in keys.items() if stage.get(key) is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder of lalic.train")
    source.add_argument("--checkpoint", type=Path, help="weights file, checkpoint folder or bundle")
    parser.add_argument("--output", type=Path, default=Path("release"), help="folder of bundles (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint of this step (default: the newest complete one)")
    which.add_argument("--best", action="store_true", help="checkpoint with the lowest validation loss")
    kinds = "averaged weights or those of the last step of a run with train.ema (default: averaged where there are any)"
    parser.add_argument("--weights", choices=("ema", "raw"), help=kinds)
    parser.add_argument("--metric", choices=tuple(LADDERS), help="what the weights were trained for")
    multiplier = parser.add_mutually_exclusive_group()
    multiplier.add_argument("--quality", type=int, choices=range(1, 7), help="quality label, gives lambda")
    multiplier.add_argument("--lambda", dest="lmbda", type=float, help="Lagrangian multiplier of the loss")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle that differs")
    return parser


if __name__ == "__main__":
    run_main(main)
