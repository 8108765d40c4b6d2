"""Releases of one model for several rates (lalic.model.rates): their loss as a configuration tells it, and weights of
one rate that are folded out of them.

    lalic-mse-vbr            all rates: {"metric": "mse", "quality": [1, 6], "lambdas": [0.0018, ...]}; no .pth
    lalic-mse-q1 ... q6      one rung each, in the published layout: {"metric": "mse", "lambda": 0.0018}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lalic.errors import LalicError
from lalic.ladder import LADDERS, loss_name, quality_of

if TYPE_CHECKING:
    from lalic.release import Weights

OF_THE_CHECKPOINT = ("step", "images", "weights")
"""Validation metrics that all rungs share."""


def range_loss(metric: str, rungs: Sequence[int]) -> dict[str, Any]:
    """The loss of weights for the qualities `rungs`; LalicError when the ladder of the metric does not have them."""
    ladder = LADDERS[metric]
    if missing := [rung for rung in rungs if rung not in ladder]:
        raise LalicError(
            f"quality {missing[0]} of the model is not on the ladder, which has {min(ladder)} to {max(ladder)}"
        )
    return {"metric": metric, "quality": [rungs[0], rungs[-1]], "lambdas": [ladder[rung] for rung in rungs]}


def quality_label(loss: Mapping[str, Any], rungs: Sequence[int] | None) -> int | list[int] | None:
    """The `quality` of a configuration: the rung of one rate (None off the ladder), [lowest, highest] of several.

    Args:
        loss: of the weights.
        rungs: of the model; None for one rate.

    Raises LalicError when the loss is not one of these rungs, KeyError, TypeError or ValueError when it is no loss.
    """
    metric = loss["metric"]
    if metric not in LADDERS:
        raise LalicError(f"there is no metric {metric!r}")
    if rungs is None:
        if "lambdas" in loss:
            raise LalicError("the loss is one of several rates, but the model has one")
        return quality_of(metric, float(loss["lambda"]))
    if "lambdas" not in loss:
        raise LalicError(f"the model has the qualities {rungs[0]} to {rungs[-1]}, but the loss is one of one rate")
    expected = range_loss(metric, rungs)
    lambdas = [float(value) for value in loss["lambdas"]]
    close = len(lambdas) == len(rungs) and all(map(_close, lambdas, expected["lambdas"]))
    if loss["quality"] != expected["quality"] or not close:
        raise LalicError(
            f"the loss is one of the qualities {loss['quality']} with lambda {lambdas}, but the model is one of the "
            f"qualities {expected['quality']} with lambda {expected['lambdas']}"
        )
    return [rungs[0], rungs[-1]]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def whole_rungs(weights: Weights, qualities: Sequence[float]) -> list[int]:
    """The qualities as rungs of a model of several rates; LalicError for what cannot be exported."""
    rates = weights.model.rates
    assert rates is not None
    for quality in qualities:
        try:
            rates.check(quality)
        except LalicError as error:
            raise LalicError(f"{weights.source}: {error}") from error
        if not quality.is_integer():
            raise LalicError(
                f"{weights.source}: a bundle of one rate has a whole quality, not {quality:g}; that of all rates, "
                "which export writes without --quality, codes at any"
            )
        if list(qualities).count(quality) > 1:
            raise LalicError(f"--quality names {quality:g} twice")
    return [int(quality) for quality in qualities]


def folded(weights: Weights, rung: int) -> Weights:
    """Weights of one rung in the published layout, out of weights of several rates.

    They are another model, the same to 1e-5, with a fingerprint of its own: evaluations of the weights of all rates are
    not theirs.
    """
    loss = weights.loss
    metrics = weights.metrics
    own = metrics.get("rungs", {}).get(str(rung), {}) if isinstance(metrics.get("rungs"), Mapping) else {}
    shared = {key: metrics[key] for key in OF_THE_CHECKPOINT if key in metrics} if own else {}
    return replace(
        weights,
        model=weights.model.at(rung).eval(),
        loss={"metric": loss["metric"], "lambda": loss["lambdas"][rung - loss["quality"][0]]},
        metrics={**shared, **own},
        evaluations=[],
        folded={"name": loss_name(loss), "quality": loss["quality"], "fingerprint": weights.fingerprint},
    )
