"""Which quality a picture is coded with: what people write, and what weights offer.

With weights of several rates (lalic.model.rates) a quality is a real number with at most three decimals, as files hold
it: 4.3 lies between the rungs 4 and 5 of the quality ladder. Weights of one rate have the rung that they were trained
for. Nothing here imports torch.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from lalic.codec import bitstream
from lalic.errors import LalicError, for_terminal
from lalic.ladder import lambda_at
from lalic.release_builtin import DEFAULT_QUALITY

if TYPE_CHECKING:
    from lalic.model.rates import Rates
    from lalic.release import Weights

_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")


def parse_quality(text: str) -> float:
    """A quality as people write it, `4.3`; LalicError for what is no number, or has more than three decimals."""
    if not _NUMBER.fullmatch(text):
        raise LalicError(f"quality {for_terminal(text)!r} is not a number such as 3 or 4.3")
    thousandths = Decimal(text) * bitstream.SCALE
    if thousandths != int(thousandths):
        raise LalicError(f"quality {text} has more than three decimals, which files cannot hold")
    return int(thousandths) / bitstream.SCALE


def default_quality(rates: Rates) -> float:
    """The quality of a model of several rates where none is given: DEFAULT_QUALITY, or the nearest that it has."""
    return float(min(max(DEFAULT_QUALITY, rates.lowest), rates.highest))


def chosen_quality(weights: Weights, asked: float | None) -> float | None:
    """The quality to code with: of weights of several rates `asked` or the default, of others None.

    Raises LalicError for a quality that the weights do not have.
    """
    rates = weights.model.rates
    if rates is not None:
        if asked is None:
            return default_quality(rates)
        rates.check(asked)
        return asked
    rung = bitstream.label_of(weights.loss, several_rates=False) & 7
    if asked is not None and asked != rung:
        what = f"quality {rung}" if rung else "one that is not on the quality ladder"
        raise LalicError(f"{weights.name} has one rate, {what}, and not quality {asked:g}: leave --quality out")
    return None


def named_with_quality(name: str, quality: float | None, lmbda: float | None = None, *, default: bool = False) -> str:
    """`lalic-mse-vbr at quality 4.3 (lambda 0.01582)`; without a quality the name alone."""
    if quality is None:
        return name
    notes = ["the default"] if default else []
    notes += [f"lambda {lmbda:.4g}"] if lmbda is not None else []
    return f"{name} at quality {quality:g}" + (f" ({', '.join(notes)})" if notes else "")


def equivalent_lambda(metric: str | None, quality: float | None) -> float | None:
    """The multiplier that a quality stands for; None where there is none, for an unknown metric and off the ladder."""
    if metric is None or quality is None:
        return None
    try:
        return lambda_at(metric, quality)
    except KeyError:
        return None
