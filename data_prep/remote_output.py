"""An output folder behind a URL, through fsspec."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar, cast

from lalic.errors import LalicError
from lalic.remote import Patience, Remote, RemoteMissing, is_s3, without_password

from .lease import Lease
from .output import BLOCK, OutputFolder

T = TypeVar("T")

# Their objects appear when the upload is committed; everywhere else a file is seen while it is written.
_COMMIT_ON_CLOSE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})

# S3 takes at most 10,000 parts: 160 GB in one file.
_PART = 16 << 20
_ATTEMPTS = 8


class RemoteFolder(OutputFolder):
    """A place behind a URL. Its files are listed once: between `held` and the end they are this process's own."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        url = url if url.endswith("://") else url.rstrip("/")
        super().__init__(without_password(url))
        # Few attempts here: below, the client library tries each request again, parts of uploads too.
        self.remote = Remote(url, endpoint, Patience(attempts=3))
        self._once = Remote(url, endpoint, Patience(attempts=1))
        self.system = self.remote.filesystem
        if hasattr(self.system, "config_kwargs"):
            retries = {"max_attempts": _ATTEMPTS, "mode": "standard"}
            self.system.config_kwargs = {**self.system.config_kwargs, "retries": retries}
            self.system.retries = _ATTEMPTS
        self._sizes: dict[str, dict[str, int]] = {}
        """Folder -> name -> bytes, of the folders that were listed."""
        self._lease: Lease | None = None

    def prepare(self, state: str) -> None:
        # Object stores have no folders; s3fs would make a bucket.
        if self.remote.scheme not in _COMMIT_ON_CLOSE:
            self._ask(lambda: self.system.makedirs(self._url(state), exist_ok=True), self._url(state))

    @contextmanager
    def held(self, lock: str) -> Iterator[None]:
        with Lease(self.remote, lock) as self._lease:
            self._sizes.clear()
            yield
        self._lease = None

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        if self._lease is not None:
            self._lease.check()
        direct = self.remote.scheme in _COMMIT_ON_CLOSE
        target = PurePosixPath(name)
        temporary = self._url(name if direct else str(target.with_name(f".{target.name}.{os.getpid()}.tmp")))
        file = self._try(lambda: self.system.open(temporary, "wb", block_size=_PART), name)
        upload = _Upload(file, lambda action: self._try(action, name))
        try:
            yield cast(IO[bytes], upload)
            if self._lease is not None:
                self._lease.check()
            self._try(file.close, name)
        except BaseException:
            # Closing would commit what is there, so would the garbage collector's closing.
            with suppress(Exception):
                file.discard()
            with suppress(AttributeError):
                file.closed = True
            if not direct:
                with suppress(Exception):
                    self.system.rm_file(temporary)
            raise
        if not direct:
            self._try(lambda: self._move(temporary, self._url(name)), name)
        self._note(name, upload.size)

    def read(self, name: str) -> bytes:
        try:
            return self.remote.read(name)
        except RemoteMissing:
            raise FileNotFoundError(self.path(name)) from None

    def blocks(self, name: str) -> Iterator[bytes]:
        try:
            size = self.remote.info(name).size
        except RemoteMissing:
            raise FileNotFoundError(self.path(name)) from None
        if size is None:
            raise LalicError(f"{self.path(name)}: the server does not tell its size")
        for start in range(0, size, BLOCK):
            yield self.remote.read(name, start, min(size, start + BLOCK))

    def size(self, name: str) -> int | None:
        folder, base = _split(name)
        return self._listed(folder).get(base)

    def names(self, folder: str = "") -> list[str]:
        return sorted(str(PurePosixPath(folder, name)) for name in self._listed(folder))

    def remove(self, name: str) -> None:
        folder, base = _split(name)
        if self._listed(folder).pop(base, None) is not None:
            with suppress(RemoteMissing):
                self._ask(lambda: self.system.rm_file(self._url(name)), self._url(name))

    def remove_uploads(self, pattern: re.Pattern[str]) -> None:
        if not is_s3(self.remote.root):
            return
        # Parts of an upload that nobody ended are invisible, but paid for. Not every server lists them.
        with suppress(OSError, NotImplementedError):
            bucket, key, _ = self.system.split_path(self.remote.root)
            begun = self.system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
            for upload in begun.get("Uploads") or ():
                if pattern.fullmatch(upload["Key"].removeprefix(f"{key}/" if key else "")):
                    self.system.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _url(self, name: str) -> str:
        return self.remote.url(name)

    def _ask(self, action: Callable[[], T], what: str) -> T:
        return self.remote.patiently(action, what)

    def _try(self, action: Callable[[], T], name: str) -> T:
        """For what cannot be done a second time."""
        return self._once.patiently(action, self._url(name))

    def _move(self, source: str, target: str) -> None:
        with suppress(FileNotFoundError):
            self.system.rm_file(target)
        self.system.mv(source, target)

    def _listed(self, folder: str) -> dict[str, int]:
        if folder not in self._sizes:
            self.system.invalidate_cache()
            url = self._url(folder)
            try:
                entries = self._ask(lambda: self.system.ls(url, detail=True), url)
            except RemoteMissing:
                entries = []
            self._sizes[folder] = {
                PurePosixPath(entry["name"]).name: entry["size"] for entry in entries if entry["type"] == "file"
            }
        return self._sizes[folder]

    def _note(self, name: str, size: int) -> None:
        folder, base = _split(name)
        if folder in self._sizes:
            self._sizes[folder][base] = size


class ServedFolder(RemoteFolder):
    """A folder behind a web server: its files are read by name, it can be neither listed nor written to."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        super().__init__(url, endpoint)
        self.remote = Remote(self.remote.root, endpoint)  # nothing below tries again

    def size(self, name: str) -> int | None:
        try:
            size = self.remote.info(name).size
        except RemoteMissing:
            return None
        if size is None:
            raise LalicError(f"{self.path(name)}: the server does not tell its size")
        return size

    def names(self, folder: str = "") -> list[str]:
        return []


class _Upload:
    """The file that a block writes into: errors in one line, and how much it was."""

    def __init__(self, file: Any, attempt: Callable[[Callable[[], int]], int]) -> None:
        self._file, self._attempt = file, attempt
        self.size = 0

    def write(self, data: bytes) -> int:
        self._attempt(lambda: self._file.write(data))
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing: what is written counts when all of it is there."""


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base
