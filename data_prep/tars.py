"""Tars and tar.gz, here or elsewhere, read once from front to back: nothing is unpacked to the disk.

The order of the candidates is that of the members; the seed does not shuffle them (training has its own order).
Where a finished shard ends, its record keeps the place of the last member, and for tar.gz a point to inflate from
(gunzip.Point): whoever goes on reads from there, over the network by a range of bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from lalic.data.images import suffix_of
from lalic.errors import LalicError
from lalic.remote import Remote, is_url

from .files import other_kind
from .gunzip import Gunzip, GzipError, Point
from .keys import possible_keys
from .remote_files import Access
from .sources import SUFFIXES, Candidate, Cursor
from .streams import CHUNK, RemoteStream
from .tar_reading import BUFFER, MOST_HEADER, CheckedHeader, Forward, TarDamaged, begins_a_tar
from .validation import Checked, too_large

_GZIP = b"\x1f\x8b"
_OTHER_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_MOST_AHEAD = 8


class Tars:
    """The images in one or more tars, in their order."""

    def __init__(self, label: str, places: list[str], access: Access, *, most: int) -> None:
        """`most`: bytes of the largest member that is read."""
        self.label, self.places, self.access, self.most = label, places, access, most
        self.archives = _archive_names(places)
        self.count: int | None = None
        self.readers = self.looks = 1
        self.ignored: Counter[str] = Counter()
        self._throttle = access.throttle()
        self._remotes: list[Remote] = []
        self._streams: list[RemoteStream] = []
        self._began = time.monotonic()

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256("\0".join(self.archives).encode("utf-8", "surrogateescape"))
        return {"tars": len(self.archives), "tars_sha256": digest.hexdigest()}

    def prepare(self, scratch: Path, limit: int | None, seed: int) -> None:
        self._began = time.monotonic()

    def candidates(self, position: int, cursor: Cursor | None) -> Generator[Candidate, None, None]:
        first = cursor["tar"] if cursor else 0
        for number in range(first, len(self.places)):
            try:
                with _Tar(self, number, cursor if number == first else None) as tar:
                    yield from tar.candidates()
            # It ends the job when its turn comes: a limit may be reached before.
            except LalicError as error:
                yield Candidate(self.archives[number], (), error=error)
                return
            except OSError as error:
                problem = LalicError(f"--input {self.places[number]}: cannot be read ({error.strerror or error})")
                yield Candidate(self.archives[number], (), error=problem)
                return

    def second_look(self, candidate: Candidate, checked: Checked) -> Candidate | None:
        return None

    def finished(self, position: int) -> None: ...

    def close(self) -> None: ...

    def note(self) -> str:
        if not self._remotes:
            return ""
        seconds = max(1e-3, time.monotonic() - self._began)
        fetched = sum(stream.fetched for stream in self._streams) / seconds / 1e6
        return f"{fetched:.1f} MB/s fetched, {sum(remote.retries for remote in self._remotes)} retries"

    def find(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """All images, since all have to be read anyway: their bytes tell which of them are wanted."""
        for candidate in self.candidates(0, None):
            if candidate.error is not None:
                raise candidate.error
            if candidate.data is not None:
                yield next((key for key in candidate.keys if key in keys), candidate.keys[0]), candidate.data

    def find_others(self, sizes: Collection[int]) -> Iterator[tuple[str, bytes]]:
        return iter(())

    def open(self, number: int) -> io.BufferedReader:
        """The bytes of a tar as they lie."""
        place = self.places[number]
        if not is_url(place):
            return io.BufferedReader(io.FileIO(place), BUFFER)
        folder, _, name = place.rpartition("/")
        remote = self.access.remote(folder, encoded=True)
        size = remote.info(name).size
        if size is None:
            raise LalicError(f"--input {place}: the server does not tell its size; copy the file first")
        self._remotes.append(remote)
        ahead = min(_MOST_AHEAD, self.access.connections)
        stream = RemoteStream(remote, name, size, self._throttle, ahead=ahead, chunk=CHUNK)
        self._streams.append(stream)
        return io.BufferedReader(stream, 1 << 18)


class _Place(NamedTuple):
    """A member that was dealt with."""

    offset: int
    """Of its first header, in the tar itself."""
    name: str


class _Tar:
    """One tar, from its beginning or from behind the member that a cursor names."""

    def __init__(self, tars: Tars, number: int, cursor: Cursor | None) -> None:
        self.tars, self.number, self.cursor = tars, number, cursor
        self.archive, self.place = tars.archives[number], tars.places[number]
        self.file = tars.open(number)
        self.gunzip: Gunzip | None = None

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def candidates(self) -> Iterator[Candidate]:
        stream = Forward(self._open(), self.tars.most + MOST_HEADER)
        try:
            tar = self._tarfile(stream)
            while (member := tar.next()) is not None:
                _forget_members(tar)
                candidate = self._candidate(tar, member)
                if candidate is not None:
                    yield candidate
            self._check_end(stream)
        except (tarfile.TarError, TarDamaged, GzipError) as error:
            raise LalicError(
                f"--input {self.place}: {_what(error)} at byte {stream.tell()}"
                f"{' of the tar inside' if self.gunzip else ''}; get the file again and run the same command: "
                "finished shards are safe"
            ) from error

    def _check_end(self, stream: Forward) -> None:
        """Read what follows the end of the tar: behind it stands the sum of a gzip stream, or a second tar."""
        try:
            place, zeros = stream.tell(), True
            while rest := stream.read(BUFFER):
                if zeros and (another := begins_a_tar(rest)) is not None:
                    raise LalicError(
                        f"--input {self.place}: another tar begins at byte {place + another}, behind the end of the "
                        "first (were files put one behind the other?); its images would be lost: make two tars of it"
                    )
                place, zeros = place + len(rest), zeros and not rest.strip(b"\0")
                if self.gunzip is None:
                    return  # the end of a plain tar is filled up with far less
        except GzipError as error:
            raise LalicError(
                f"--input {self.place}: the gzip stream is {error}, so images from it may be damaged: get the file "
                "again and use another --output"
            ) from error

    def _open(self) -> Any:
        """The tar itself, at the cursor's place."""
        cursor = self.cursor
        head = b"" if cursor else self.file.peek(8)
        gzipped = bool(cursor["gzip"] is not None) if cursor else head[:2] == _GZIP
        other = next((name for magic, name in _OTHER_PACKERS.items() if head.startswith(magic)), None)
        if other:
            raise LalicError(f"--input {self.place}: is packed by {other}; only .tar and .tar.gz can be read")
        if not gzipped:
            if cursor:
                self.file.seek(cursor["offset"])
            return self.file
        point: Point | None = (cursor["gzip"] or None) if cursor else None
        try:
            self.gunzip = Gunzip(self.file, point)
        except GzipError:
            # Nothing to take it up with: from the beginning then.
            self.gunzip = Gunzip(self.file)
        return io.BufferedReader(self.gunzip, BUFFER)

    def _tarfile(self, stream: Forward) -> tarfile.TarFile:
        cursor = self.cursor
        if cursor:
            stream.skip_to(cursor["offset"])
        tar = tarfile.TarFile(
            fileobj=stream,  # type: ignore[arg-type]
            tarinfo=CheckedHeader,
            errors="surrogateescape",
            pax_headers=cursor["pax"] if cursor else None,
        )
        if cursor:
            member = tar.next()
            _forget_members(tar)
            if member is None or member.name != cursor["name"]:
                raise LalicError(
                    f"--input {self.place}: has changed since this job began: at byte {cursor['offset']} was "
                    f"{cursor['name']}; put the old file back, or use another --output"
                )
        return tar

    def _candidate(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Candidate | None:
        name = member.name
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        kind = _passed_over(member, name)
        if kind:
            self.tars.ignored[kind] += 1
            return None
        shown, keys = f"{self.archive}:{name}", tuple(possible_keys(name, self.archive))
        cursor = self._cursor(tar, member)
        if member.size > self.tars.most:
            return Candidate(shown, keys, outcome=too_large(member.size, self.tars.most), cursor=cursor)
        file = tar.extractfile(member)
        data = file.read() if file else b""
        return Candidate(shown, keys, data=data, cursor=cursor)

    def _cursor(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Cursor:
        point: Point | None = None
        if self.gunzip is not None:
            points = self.gunzip.points
            while len(points) > 1 and points[1]["output"] <= member.offset:
                del points[0]
            point = points[0]
        place = _Place(member.offset, member.name)
        return {"tar": self.number, **place._asdict(), "pax": dict(tar.pax_headers), "gzip": point}


def _forget_members(tar: tarfile.TarFile) -> None:
    """tarfile keeps a list of all that it has seen, a kilobyte for each."""
    tar.members = []  # type: ignore[attr-defined]


def _passed_over(member: tarfile.TarInfo, name: str) -> str:
    """What a member that is not looked at is counted as; empty for an image by its name."""
    if not member.isfile():
        for kind, holds in (("folders", member.isdir()), ("links", member.issym() or member.islnk())):
            if holds:
                return kind
        return "special files"
    if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return "hidden files"
    return "" if suffix_of(name) in SUFFIXES else other_kind(os.path.basename(name))


def _what(error: Exception) -> str:
    if isinstance(error, GzipError):
        return f"the gzip stream is {error}"
    return "is cut short" if "unexpected end of data" in str(error) else str(error)


def _archive_names(places: list[str]) -> list[str]:
    """The tars' names without their folders; where the job is done does not matter. A second one of a name says so."""
    names: list[str] = []
    for place in places:
        path = unquote(urlsplit(place).path) if is_url(place) else place
        name = os.path.basename(path.rstrip("/"))
        again = sum(before.partition("#")[0] == name for before in names)
        names.append(f"{name}#{again + 1}" if again else name)
    return names
