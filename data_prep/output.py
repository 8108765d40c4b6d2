"""Where the results go: a folder of this machine, or any place that fsspec can write to. One interface for both.

A file appears under its name only when it is whole. On this machine that is a temporary name, fsync and rename; on
object stores an upload that is committed at its end; elsewhere a temporary name and a move.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lalic.errors import LalicError
from lalic.files import atomic_open
from lalic.remote import Patience, Remote, RemoteMissing, is_url

from .lease import Lease

T = TypeVar("T")

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Their objects appear when the upload is committed; everywhere else a file is seen while it is written.
_COMMIT_ON_CLOSE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
_READ_ONLY = frozenset({"http", "https", "zip", "tar", "github", "data"})

# S3 takes at most 10,000 parts: 160 GB in one file.
_PART = 16 << 20
_ATTEMPTS = 8
_BLOCK = 4 << 20


class OutputFolder(ABC):
    """A folder of results. Names within it are relative, with '/'."""

    def __init__(self, where: str) -> None:
        self.where = where
        """As messages call it."""

    def path(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.where.rstrip('/')}/{name}"

    @abstractmethod
    def prepare(self, state: str) -> None:
        """Make the folder and `state` in it, where the place has folders. Raises LalicError for a file."""

    @abstractmethod
    def held(self, lock: str) -> AbstractContextManager[None]:
        """Keep other processes out; `lock` is the name of what says so. LalicError when one is in already."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file for writing that takes its name when the block ends, and leaves nothing when it raises."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file, FileNotFoundError without one."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None without one."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """The files directly in this folder or in one below it, sorted, those of killed writers among them."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; none there is fine."""

    @abstractmethod
    def remove_uploads(self, pattern: re.Pattern[str]) -> None:
        """Give up what a killed writer began to upload under names that match, where that can be seen."""

    @contextmanager
    def open_text(self, name: str) -> Iterator[IO[str]]:
        """As `open`, for UTF-8 text."""
        with self.open(name) as file:
            # No TextIOWrapper: it closes what it wraps when it is collected, and closing an upload commits it.
            yield cast(IO[str], codecs.getwriter("utf-8")(file))

    def write_text(self, name: str, text: str) -> None:
        with self.open(name) as file:
            file.write(text.encode())

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's bytes in blocks, FileNotFoundError without one."""
        yield self.read(name)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file in hexadecimal, FileNotFoundError without one."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()


def output_folder(where: str | Path, endpoint: str | None = None) -> OutputFolder:
    """The folder that `--output` names: a path, or a URL of a scheme that fsspec can write to.

    `endpoint`: of an S3-compatible server. Raises LalicError for a scheme that cannot be written to.
    """
    if not is_url(where):
        return LocalFolder(Path(where))
    scheme = str(where).partition("://")[0]
    if scheme in ("file", "local"):
        return LocalFolder(Path(url2pathname(urlsplit(str(where).replace("local://", "file://", 1)).path)))
    if scheme in _READ_ONLY:
        raise LalicError(f"--output {where}: {scheme}:// cannot be written to; use a folder or, for example, s3://")
    return RemoteFolder(str(where), endpoint)


def output_file(where: str | Path, endpoint: str | None = None) -> tuple[OutputFolder, str]:
    """The folder and the name of one file, such as a manifest."""
    parent, _, name = str(where).rpartition("/")
    if not name:
        raise LalicError(f"{where}: the name of a file was expected")
    return output_folder(parent or ("/" if str(where).startswith("/") else "."), endpoint), name


@contextmanager
def full_disk_in_one_line(where: str, safe: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a full disk into a LalicError; `safe()` says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise LalicError(
            f"--output {where}: cannot be written on ({error.strerror}), {safe()}: "
            "make room and run the same command again"
        ) from error


class LocalFolder(OutputFolder):
    """A folder of this machine (or of a file system that it has mounted)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def prepare(self, state: str) -> None:
        try:
            (self.folder / state).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise LalicError(f"--output {self.where}: is not a folder") from error

    @contextmanager
    def held(self, lock: str) -> Iterator[None]:
        with open(self.folder / lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LalicError(
                    f"--output {self.where}: another process is writing shards into it; wait for it to end"
                ) from None
            except OSError as error:
                # Some network file systems have no locks; there the user has to take care.
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return atomic_open(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def blocks(self, name: str) -> Iterator[bytes]:
        with open(self.folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                yield block

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                found = [entry.name for entry in entries if not entry.is_dir()]
        except FileNotFoundError:
            return []
        return sorted(str(PurePosixPath(folder, name)) for name in found)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_uploads(self, pattern: re.Pattern[str]) -> None:
        pass


class RemoteFolder(OutputFolder):
    """A place behind a URL. Its files are listed once: between `held` and the end they are this process's own."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        super().__init__(url if url.endswith("://") else url.rstrip("/"))
        # Few attempts here: below, the client library tries each request again, parts of uploads too.
        self.remote = Remote(self.where, endpoint, Patience(attempts=3))
        self._once = Remote(self.where, endpoint, Patience(attempts=1))
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
        for start in range(0, size, _BLOCK):
            yield self.remote.read(name, start, min(size, start + _BLOCK))

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
        if self.remote.scheme not in ("s3", "s3a"):
            return
        # Parts of an upload that nobody ended are invisible, but paid for. Not every server lists them.
        with suppress(OSError, NotImplementedError):
            bucket, key, _ = self.system.split_path(self.where)
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
