"""The candidates in the order of the job, checked ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace

from .sources import Candidate, Cursor, Source
from .validation import Checked, File
from .workers import Workers


class Feed:
    """The checked candidates in their order; the next one can be looked at before it is taken."""

    def __init__(self, pool: Workers, source: Source) -> None:
        self.pool, self.source = pool, source
        self.position = 0
        """Place in the order of the candidate that is next."""
        self.cursor: Cursor | None = None
        """Where the source goes on at `position`."""
        self._candidates: Generator[Candidate, None, None] | None = None
        self._results: Generator[Checked, None, None] | None = None
        self._waiting: deque[Candidate] = deque()
        self._next: tuple[Candidate, Checked] | None = None

    def seek(self, position: int, cursor: Cursor | None) -> None:
        """Make the candidate at `position` the next one; what is being checked ahead is kept if it can be."""
        if position != self.position:
            self.close()
        self.position, self.cursor = position, cursor

    def close(self) -> None:
        """Drop what is being read and checked ahead."""
        for generator in (self._results, self._candidates):
            if generator is not None:
                generator.close()
        self._results = self._candidates = self._next = None
        self._waiting.clear()

    def peek(self) -> Checked | None:
        """The next candidate's outcome, None at the end."""
        if self._next is None:
            if self._results is None:
                self._candidates = self.source.candidates(self.position, self.cursor)
                self._results = self.pool.stream(self._items(self._candidates))
            checked = next(self._results, None)
            if checked is None:
                return None
            self._next = self._settle(self._waiting.popleft(), checked)
        return self._next[1]

    @property
    def candidate(self) -> Candidate:
        """The candidate whose outcome `peek` gave."""
        assert self._next is not None, "peek first"
        return self._next[0]

    def advance(self) -> None:
        """Go on to the candidate behind the next one."""
        self.position += 1
        self.cursor = self.candidate.cursor
        self._next = None

    def _items(self, candidates: Iterator[Candidate]) -> Iterator[File | Checked]:
        for candidate in candidates:
            self._waiting.append(candidate)
            yield _item(candidate)

    def _settle(self, candidate: Candidate, checked: Checked) -> tuple[Candidate, Checked]:
        while True:
            if candidate.error is not None:
                raise candidate.error
            if not checked.reason:
                return candidate, replace(checked, data=candidate.data) if candidate.data is not None else checked
            again = self.source.second_look(candidate, checked)
            if again is None:
                return candidate, checked
            candidate = again
            (checked,) = self.pool.stream([_item(candidate)])


def _item(candidate: Candidate) -> File | Checked:
    if candidate.error is not None:
        return Checked(reason="error")
    return candidate.outcome or File(candidate.name, candidate.path, candidate.data)
