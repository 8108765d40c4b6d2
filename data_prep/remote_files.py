"""Sources of single files that lie elsewhere: lists of URLs and ids, and buckets."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lalic.errors import LalicError
from lalic.remote import Patience, Remote, RemoteMissing, RemoteRefused, RemoteTooLarge, is_s3

from .fetching import Fetcher
from .files import Files
from .sources import Candidate, Cursor
from .spool import Spool
from .throttle import Throttle
from .validation import Checked, too_large

MISSING, REFUSED = "missing", "refused"

# So many files in a row that cannot be had are a mistake in the command rather than gaps in the data.
_HOPELESS = 100
# A damaged file is believed when the same bytes came so many times.
_SAME_BYTES = 3
_MOST_LOOKS = 20
# What no damage on the way can look like.
_SURE = frozenset({MISSING, REFUSED, "too small", "too many pixels", "file too large"})


@dataclass(frozen=True)
class Access:
    """How what lies elsewhere is reached. Nothing of the result depends on it."""

    endpoint: str | None = None
    """Of an S3-compatible server."""
    connections: int = 32
    bytes_per_second: float | None = None
    requests_per_second: float | None = None
    sums: bool = True
    """Whether bytes are compared with the sums that servers give."""
    patience: Patience = field(default_factory=Patience)

    def remote(self, root: str, *, encoded: bool = False) -> Remote:
        return Remote(root, endpoint=self.endpoint if is_s3(root) else None, patience=self.patience, encoded=encoded)

    def throttle(self) -> Throttle:
        return Throttle(self.bytes_per_second, self.requests_per_second)


class RemoteFiles(Files):
    """Files below one URL, or, with `root` None, of several servers: names then begin with the server's name."""

    def __init__(
        self,
        label: str,
        root: str | None,
        names: Sequence[str],
        access: Access,
        *,
        most: int,
        ignored: Counter[str] | None = None,
        keys: Sequence[str] | None = None,
        encoded: bool = False,
        servers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            most: larger files are left out unread.
            encoded: names are percent-encoded already.
            servers: when `root` is None, the URL of each server by its name.
        """
        super().__init__(label, names, ignored, keys)
        self.root, self.access, self.most = root, access, most
        self.encoded, self.servers = encoded, servers or {}
        self._remotes: dict[str, Remote] = {}
        self._throttle = access.throttle()
        self._spool: Spool | None = None
        self._good: int | None = None
        """Number of a file that was had in this run."""
        self._looks: Counter[int] = Counter()
        self.looks = _SAME_BYTES
        self._absent: set[int] = set()
        """Numbers of files that `find` could not have."""
        self._bytes = 0
        self._began = time.monotonic()
        if root is not None:
            self._remote(root)

    def prepare(self, scratch: Path, limit: int | None, seed: int) -> None:
        super().prepare(scratch, limit, seed)
        self._spool = Spool(scratch / "spool")
        self._began = time.monotonic()

    def candidates(self, position: int, cursor: Cursor | None) -> Generator[Candidate, None, None]:
        assert self._spool is not None, "prepare first"
        self._spool.drop_before(position)
        fetcher = Fetcher(self._fetch, self.access.connections)
        stream = fetcher.stream(range(position, len(self.order)))
        gone = 0
        try:
            for place, candidate in enumerate(stream, position):
                reason = candidate.outcome.reason if candidate.outcome else ""
                gone = gone + 1 if reason in (MISSING, REFUSED) else 0
                if candidate.error is None and not reason:
                    self._good = place
                last = place == len(self.order) - 1
                if gone == _HOPELESS or (gone and gone % _HOPELESS == 0) or (gone and last):
                    candidate = self._doubt(candidate, gone)
                yield candidate
                if candidate.error is not None:
                    return
        finally:
            stream.close()
            fetcher.close()

    def second_look(self, candidate: Candidate, checked: Checked) -> Candidate | None:
        """Fetch a file that is no image again, until the same bytes came three times: a server without sums may send
        half a file and call it whole.
        """
        if checked.reason in _SURE:
            return None
        place = int(os.path.basename(candidate.path).partition("-")[0])
        self._looks[place] += 1
        if self._looks[place] > _MOST_LOOKS:
            raise LalicError(f"{self._url(place)}: the server gives other bytes each time; try again later")
        for _ in range(_SAME_BYTES - 1):
            again = self._fetch(place, fresh=True)
            # The spooled file itself may be what could not be read.
            if checked.reason == "cannot be read" or _sum_in(again.path) != _sum_in(candidate.path):
                return again
        return None

    def finished(self, position: int) -> None:
        assert self._spool is not None
        self._spool.drop_before(position)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.remove()

    def note(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._began)
        retries = sum(remote.retries for remote in self._remotes.values())
        return f"{self._bytes / seconds / 1e6:.1f} MB/s fetched, {retries} retries"

    def find(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        def fetch(number: int) -> bytes | None:
            try:
                return self._read(number)
            except (RemoteMissing, RemoteRefused, RemoteTooLarge):
                self._absent.add(number)
                return None

        fetcher = Fetcher(fetch, self.access.connections)
        numbers = [number for number in self._numbers(keys) if number not in self._absent]
        try:
            for number, data in zip(numbers, fetcher.stream(numbers), strict=True):
                if data is not None:
                    yield self.keys[number], data
        finally:
            fetcher.close()

    def find_others(self, sizes: Collection[int]) -> Iterator[tuple[str, bytes]]:
        return iter(())

    def _fetch(self, place: int, fresh: bool = False) -> Candidate:
        """The candidate at `place` of the order, from the spool unless a `fresh` one is asked for."""
        assert self._spool is not None
        number = int(self.order[place])
        name, keys = self.names[number], (self.keys[number],)
        try:
            path = None if fresh else self._spool.get(place)
            if path is None:
                path = self._spool.put(place, self._read(number))
            return Candidate(name, keys, path)
        except RemoteMissing:
            return Candidate(name, keys, outcome=Checked(reason=MISSING, detail="the server does not have it"))
        except RemoteRefused:
            return Candidate(name, keys, outcome=Checked(reason=REFUSED, detail="the server refuses access to it"))
        except RemoteTooLarge as error:
            return Candidate(name, keys, outcome=too_large(error.size, self.most))
        # Whatever it is, it ends the job when its turn comes: a limit may be reached before.
        except Exception as error:
            return Candidate(name, keys, error=error)

    def _read(self, number: int) -> bytes:
        remote, name = self._locate(self.names[number])
        self._throttle.before_request()
        data = remote.fetch(name, most=self.most, sums=self.access.sums).data
        self._throttle.took(len(data))
        self._bytes += len(data)
        return data

    def _locate(self, name: str) -> tuple[Remote, str]:
        if self.root is not None:
            return self._remote(self.root), name
        server, _, rest = name.partition("/")
        return self._remote(self.servers[server]), rest

    def _remote(self, root: str) -> Remote:
        remote = self._remotes.get(root)
        if remote is None:
            remote = self._remotes.setdefault(root, self.access.remote(root, encoded=self.encoded))
        return remote

    def _url(self, place: int) -> str:
        remote, name = self._locate(self.names[int(self.order[place])])
        return remote.url(name)

    def _doubt(self, candidate: Candidate, gone: int) -> Candidate:
        """After many files in a row that cannot be had: the candidate, with an error if the fault is not the files'."""
        if self._good is None:
            if gone < _HOPELESS:
                return candidate
            problem = LalicError(
                f"--input {self.label}: none of the first {gone} files can be had, such as "
                f"{self._where(candidate)} ({candidate.outcome.reason if candidate.outcome else ''}): see whether "
                "--bucket, --subset and the list belong together"
            )
        else:
            try:
                self._read(int(self.order[self._good]))
                return candidate
            except (RemoteMissing, RemoteRefused):
                problem = LalicError(
                    f"{self._url(self._good)} could be had before and is refused now: see whether access was "
                    "withdrawn, then run the same command again"
                )
            except LalicError as error:
                problem = error
        return Candidate(candidate.name, candidate.keys, error=problem)

    def _where(self, candidate: Candidate) -> str:
        remote, name = self._locate(candidate.name)
        return remote.url(name)


def _sum_in(path: str) -> str:
    """The sum in a spooled file's name."""
    return os.path.basename(path).rpartition("-")[2]
