"""A file elsewhere read from some byte on, in chunks: a connection that is cut costs one chunk."""

from __future__ import annotations

import io
from concurrent.futures import Future

from lalic.remote import Remote

from .fetching import Fetcher
from .throttle import Throttle

CHUNK = 8 << 20


class RemoteStream(io.RawIOBase):
    """Seekable and best read forwards: the chunk at hand and the next ones are in memory or on their way.

    Chunks begin at the byte where reading begins after a far seek, so nothing before it is asked for. Errors of
    `Remote.read` come out of `read`.
    """

    def __init__(
        self, remote: Remote, name: str, size: int, throttle: Throttle, *, ahead: int = 4, chunk: int = CHUNK
    ) -> None:
        """`ahead`: chunks in memory, besides the one at hand; `chunk`: bytes of each."""
        super().__init__()
        self.remote, self.file_name, self.size = remote, name, size
        self.throttle, self.ahead, self.chunk = throttle, ahead, chunk
        self.fetched = 0
        """Bytes that have come."""
        self._place = self._base = 0
        self._chunks: dict[int, Future[bytes]] = {}
        self._fetcher: Fetcher[int, bytes] = Fetcher(self._fetch, max(1, ahead))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._place >= self.size:
            return 0
        start, data = self._at(self._place)
        part = memoryview(data)[self._place - start :][: len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            for future in self._chunks.values():
                future.cancel()
            self._chunks.clear()
            self._fetcher.close()
        super().close()

    def _at(self, place: int) -> tuple[int, bytes]:
        """First byte, and bytes, of the chunk that holds `place`."""
        start = self._start(place)
        if start not in self._chunks:
            # A far seek: what was read ahead is of no use.
            for future in self._chunks.values():
                future.cancel()
            self._chunks.clear()
            self._base = start = place
        for wanted in range(start, min(self.size, start + (self.ahead + 1) * self.chunk), self.chunk):
            if wanted not in self._chunks:
                self._chunks[wanted] = self._fetcher.submit(wanted)
        for old in [begin for begin in self._chunks if begin < start]:
            self._chunks.pop(old).cancel()
        return start, self._chunks[start].result()

    def _start(self, place: int) -> int:
        return self._base + (place - self._base) // self.chunk * self.chunk

    def _fetch(self, start: int) -> bytes:
        self.throttle.before_request()
        data = self.remote.read(self.file_name, start, min(self.size, start + self.chunk))
        self.throttle.took(len(data))
        self.fetched += len(data)
        return data
