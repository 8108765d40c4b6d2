"""The candidates in the order of the job, checked ahead."""

from __future__ import annotations

import os
from collections.abc import Generator

import numpy as np

from lalic.data.order import shuffled

from .sources import Listing
from .validation import Checked
from .workers import Workers


class Feed:
    """The checked candidates in their order; the next one can be looked at before it is taken."""

    def __init__(self, pool: Workers, listing: Listing, order: np.ndarray) -> None:
        self.pool, self.listing, self.order = pool, listing, order
        self.position = 0
        """Place in the order of the candidate that is next."""
        self._results: Generator[Checked, None, None] | None = None
        self._next: Checked | None = None

    def seek(self, position: int) -> None:
        """Make the candidate at `position` the next one; what is being checked ahead is kept if it can be."""
        if position != self.position and self._results is not None:
            self._results.close()
            self._results = self._next = None
        self.position = position

    def candidate(self) -> int:
        """Number in the listing of the next candidate."""
        return int(self.order[self.position])

    def peek(self) -> Checked | None:
        """The next candidate's outcome, None at the end."""
        if self._next is None and self.position < len(self.order):
            if self._results is None:
                self._results = self.pool.stream(
                    os.path.join(self.listing.root, self.listing.paths[number])
                    for number in self.order[self.position :]
                )
            self._next = next(self._results)
        return self._next

    def advance(self) -> None:
        """Go on to the candidate behind the next one."""
        self.position += 1
        self._next = None


def candidate_order(count: int, limit: int | None, seed: int) -> np.ndarray:
    """(count,) int64: the first `limit` candidates shuffled, then the others in input order."""
    first = min(count, limit or count)
    return np.concatenate([shuffled(first, seed), np.arange(first, count)])
