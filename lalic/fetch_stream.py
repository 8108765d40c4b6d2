"""One file from elsewhere onto the disk: in pieces, resumed where the connection broke, never more than a limit.

HTTP comes as one stream, which goes on with a range request where it broke; everything else that fsspec reaches comes
in ranges. What is not yet known to be right lies in a `.part` file beside the target.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any, NamedTuple

from fsspec.asyn import sync
from tqdm import tqdm

from lalic.files import fsync_folder, sha256_of
from lalic.remote import Patience, Remote, RemoteError, RemoteTooLarge

PATIENCE = Patience(attempts=6, first_delay=0.5, most_delay=8.0, silence=30.0)
"""Less than a training run has: somebody sits before the screen."""

_PIECE = 8 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class NotThatFile(OSError):
    """The bytes that came do not have the sum they should have; asked again, the server may do better."""


class WebPage(RemoteError):
    """HTML where a file was asked for."""


class Got(NamedTuple):
    """What is known of a file that was fetched."""

    sha256: str
    etag: str
    """As `lalic.remote.Info.etag`; empty when the server gives none."""


def download(url: str, target: Path, *, most: int, sha256: str | None = None) -> Got:
    """Bring the file at `url` to `target`, whole or not at all.

    With `sha256`, only a file with that sum is taken, and what an earlier call left half done is gone on with.
    Raises RemoteError in one line: missing, refused, a web page instead of a file, more than `most` bytes, another
    sum, or still failing after all attempts.
    """
    remote = Remote(url, patience=PATIENCE, encoded=True)
    part = target.with_name(f".{target.name}.{(sha256 or 'unknown')[:16]}.part")
    if sha256 is None:
        part.unlink(missing_ok=True)
    # disable=None: silent without a terminal.
    bar = tqdm(desc=target.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)
    stream = _Stream(remote, part, most, bar, summed=sha256 is not None)
    wrong = 0

    def ask() -> str:
        nonlocal wrong
        stream.fetch()
        found = sha256_of(part)
        if sha256 is not None and found != sha256:
            part.unlink()
            stream.version = ""
            wrong += 1
            if wrong > 1:
                raise RemoteError(f"{remote.shown}: has not the SHA-256 that is expected ({found}, not {sha256})")
            raise NotThatFile("the bytes do not have the SHA-256 that is expected")
        return found

    try:
        with bar:
            digest = remote.patiently(ask, url)
    except BaseException:
        if sha256 is None:
            part.unlink(missing_ok=True)
        raise
    os.replace(part, target)
    fsync_folder(target.parent)
    return Got(digest, stream.etag)


class _Stream:
    """What has come of one file so far, through all the connections that it took."""

    def __init__(self, remote: Remote, part: Path, most: int, bar: Any, *, summed: bool):
        self.remote, self.part, self.most, self.bar, self.summed = remote, part, most, bar, summed
        self.version = ""
        """ETag of the file that the part belongs to, where it stands for the very bytes."""
        self.etag = ""

    def fetch(self) -> None:
        """Complete the part, or raise what `Remote.patiently` understands."""
        with open(self.part, "ab") as file:
            self._show(file.tell())
            if self.remote.scheme in ("http", "https"):
                system = self.remote.filesystem
                sync(system.loop, self._http, system, file)
            else:
                self._ranges(file)
            file.flush()
            os.fsync(file.fileno())

    def _ranges(self, file: IO[bytes]) -> None:
        size, self.etag = self.remote.info("")
        if size is None:
            raise RemoteError(f"{self.remote.shown}: its server does not tell how large it is")
        self._check(size)
        self.bar.total = size
        while file.tell() < size:
            self._take(file, self.remote.read("", file.tell(), min(size, file.tell() + _PIECE)))

    async def _http(self, system: Any, file: IO[bytes]) -> None:
        if not (self.summed or self.version):  # two halves of different files would not be noticed
            file.truncate(0)
            self._show(0)
        have = file.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.version:
                headers["If-Range"] = self.version
        session = await system.set_session()
        async with session.get(system.encode_url(self.remote.root), headers=headers) as answer:
            if (
                have and answer.status == 416
            ):  # nothing is behind what is there already: the sum tells whether it is all
                return
            answer.raise_for_status()
            if "html" in answer.content_type:
                raise WebPage(
                    f"{self.remote.shown}: the server answers with a web page, not with the file; give the address "
                    "of the file itself"
                )
            if have and _start_of(answer.headers) != have:
                file.truncate(0)
                self._show(0)
            length = answer.content_length
            if length is not None:
                self._check(file.seek(0, os.SEEK_END) + length)
                self.bar.total = file.tell() + length
            etag = answer.headers.get("ETag", "")
            self.version = "" if etag.startswith("W/") else etag
            self.etag = etag or answer.headers.get("Last-Modified", "")
            async for piece in answer.content.iter_any():
                self._take(file, piece)

    def _take(self, file: IO[bytes], piece: bytes) -> None:
        self._check(file.tell() + len(piece))
        file.write(piece)
        self.bar.update(len(piece))

    def _check(self, size: int) -> None:
        if size > self.most:
            self.part.unlink(missing_ok=True)
            raise RemoteTooLarge(self.remote.shown, size)

    def _show(self, size: int) -> None:
        self.bar.n = size
        self.bar.refresh()


def _start_of(headers: Any) -> int:
    """Where the bytes of an answer begin in the file: 0 for one that is the whole file."""
    match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
    return int(match[1]) if match else 0


def read_small(url: str, most: int, patience: Patience = PATIENCE) -> bytes:
    """A small file's bytes. Raises as `download`."""
    remote = Remote(url, patience=patience, encoded=True)
    found = remote.fetch("", most=most, sums=False)
    start = found.data[:256].lstrip().lower()
    if "html" in found.headers.get("content-type", "") or start.startswith((b"<!doctype", b"<html")):
        raise WebPage(f"{remote.shown}: the server answers with a web page, not with the file")
    return found.data
