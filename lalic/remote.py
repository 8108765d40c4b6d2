"""Files that lie elsewhere: HTTP(S), S3 and whatever else fsspec reaches, read with patience.

    place = Remote("s3://open-images-dataset")           # or https://..., gs://..., memory://...
    place.read("train/000002b66c9c498e.jpg")             # whole
    place.read("shards/shard-000000.tar", 512, 90_000)   # one range of bytes

A server that stumbles (5xx, 429, a cut or silent connection, a body of the wrong length) is asked again, later and
later; one that refuses (404, 403) is not. Either ends in one line. Objects may be used in many threads, be pickled and
survive a fork: each process makes its own connections.

S3 needs no credentials for public buckets: those that botocore finds are used, and without any the requests are
anonymous. fsspec's own configuration (FSSPEC_S3='{"anon": true}' and the like) is honoured.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import fsspec

from lalic.remote_errors import may_pass, reason, refusal, retry_after
from lalic.remote_reading import (
    Fetched,
    RemoteError,
    RemoteMissing,
    RemoteRefused,
    RemoteTooLarge,
    WrongSum,
    read,
)
from lalic.remote_sums import agrees, server_sum

__all__ = [
    "Fetched",
    "Info",
    "Patience",
    "Remote",
    "RemoteError",
    "RemoteMissing",
    "RemoteRefused",
    "RemoteTooLarge",
    "is_s3",
    "is_url",
    "join_url",
    "without_password",
]

logger = logging.getLogger("lalic.remote")

T = TypeVar("T")

_HTTP = ("http", "https")
_S3 = ("s3", "s3a")
_SILENT = 10.0
"""Seconds of waiting after which a line is logged."""
# Never let go of: a file system that is collected waits for the thread that serves it, which a forked process that has
# inherited it does not have, one second for each, even in the thread that serves its own.
_SYSTEMS: dict[tuple[Any, ...], Any] = {}
# Of its own: the global generators belong to the training run.
_JITTER = random.Random()


class Info(NamedTuple):
    """What a server says of a file before it is read."""

    size: int | None
    """Bytes; None when the server does not tell."""
    etag: str
    """Changes when the file does; empty when the server gives none."""


@dataclass(frozen=True)
class Patience:
    """How often, and how long apart, a server is asked."""

    attempts: int = 10
    first_delay: float = 0.5
    """Seconds before the second attempt; doubled each time, and shortened by chance so that clients spread."""
    most_delay: float = 30.0
    silence: float = 60.0
    """Seconds without a byte after which a connection is given up."""

    def delay(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait after the `attempt`-th (from 1) failure; `asked`: the server's Retry-After."""
        most = min(self.most_delay, self.first_delay * 2.0 ** (attempt - 1))
        return max(asked or 0.0, most * _JITTER.uniform(0.5, 1.0))


def is_url(path: object) -> bool:
    """Whether `path` names something by scheme://, rather than a file of this machine."""
    scheme, separator, _ = str(path).partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def is_s3(place: object) -> bool:
    """Whether `place` is an S3 URL."""
    return is_url(place) and str(place).partition("://")[0] in _S3


def join_url(root: str, name: str) -> str:
    """`root/name`, with what has a meaning in HTTP addresses escaped."""
    scheme = root.partition("://")[0]
    return f"{root.rstrip('/')}/{quote(name) if scheme in _HTTP else name}"


def without_password(url: str) -> str:
    """`url` for messages and logs: without the user's name and password that may stand before the server."""
    scheme, separator, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    return f"{scheme}{separator}{server.rpartition('@')[2]}{slash}{path}"


@dataclass
class Remote:
    """The files below one URL."""

    root: str
    endpoint: str | None = None
    """Of an S3-compatible server, such as http://127.0.0.1:9000; None: Amazon's, or AWS_ENDPOINT_URL."""
    patience: Patience = Patience()
    encoded: bool = False
    """Whether names are percent-encoded already, as in a list of web addresses."""
    retries: int = field(default=0, init=False, compare=False)
    """Attempts beyond the first, of this object in this process."""

    def __post_init__(self) -> None:
        if self.scheme in (*_HTTP, *_S3) and not self.root.partition("://")[2].partition("/")[0]:
            raise RemoteError(f"{self.shown}: names no server or bucket")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("root", "endpoint", "patience", "encoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def scheme(self) -> str:
        return self.root.partition("://")[0]

    @property
    def shown(self) -> str:
        """The root as messages name it."""
        return without_password(self.root)

    @property
    def filesystem(self) -> Any:
        """The fsspec file system of this process. Raises RemoteError when there is none for the scheme."""
        key = os.getpid(), self.scheme, self.endpoint, self.patience
        found = _SYSTEMS.get(key)
        # No lock, which another thread could hold at a fork: of two that are made at once one is dropped unused.
        return found or _SYSTEMS.setdefault(key, _file_system(self.scheme, self.endpoint, self.patience))

    def url(self, name: str = "") -> str:
        """Where `name` lies."""
        if not name:
            return self.root
        return f"{self.root.rstrip('/')}/{name}" if self.encoded else join_url(self.root, name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes, or those from `start` to before `stop` (both or none given).

        Raises:
            RemoteMissing: no such file.
            RemoteError: refused, ranges not supported, or failing after all attempts.
        """
        url = self.url(name)
        return self.patiently(lambda: read(self.filesystem, url, start, stop).data, url)

    def fetch(self, name: str, *, most: int | None = None, sums: bool = True) -> Fetched:
        """The whole file, compared (with `sums`) with the sum that its server gives, if it gives one.

        Raises as `read`, and RemoteTooLarge above `most` bytes, before they are read where the server says so.
        """
        url = self.url(name)

        def ask() -> Fetched:
            found = read(self.filesystem, url, None, None, most)
            expected = server_sum(found.headers, s3=self.scheme in _S3) if sums else None
            if expected is not None and not agrees(found.data, expected):
                raise WrongSum(f"the bytes do not have the {expected.algorithm} that the server gives")
            return found

        return self.patiently(ask, url)

    def list(self) -> Iterator[str]:
        """Yield the names of all files below the root, in no particular order.

        Raises RemoteError where there is no listing (HTTP has none), or it is refused.
        """
        if self.scheme in _HTTP:
            raise RemoteError(f"{self.shown}: a web server cannot be listed; give a list of the files instead")
        if self.scheme in _S3:
            yield from self._list_s3()
            return
        top = self.filesystem._strip_protocol(self.root).rstrip("/")
        for path in self.patiently(lambda: self.filesystem.find(top), self.root):
            yield path[len(top) :].lstrip("/")

    def _list_s3(self) -> Iterator[str]:
        """Page by page: fsspec's own listing keeps a dictionary per file."""
        bucket, _, prefix = self.root.partition("://")[2].partition("/")
        prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        more: dict[str, str] = {}

        def ask() -> dict[str, Any]:
            page: dict[str, Any] = self.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            return page

        while True:
            page = self.patiently(ask, self.root)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield entry["Key"][len(prefix) :]
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def info(self, name: str) -> Info:
        """Size and version of a file. Raises as `read`."""
        url = self.url(name)

        def ask() -> Info:
            try:
                found = self.filesystem.info(url)
            except FileNotFoundError as error:
                # fsspec's HTTP says so whatever went wrong, and keeps the answer as the cause.
                if self.scheme in _HTTP and isinstance(error.__cause__, Exception):
                    raise error.__cause__ from None
                raise
            etag = found.get("ETag") or found.get("Last-Modified") or found.get("LastModified") or ""
            return Info(found.get("size"), str(etag))

        return self.patiently(ask, url)

    def patiently(self, action: Callable[[], T], what: str) -> T:
        """`action()`, tried again while it fails in a way that may pass.

        `what` names the thing in messages, less a password in it. Raises RemoteMissing or RemoteError.
        """
        what = without_password(what)
        began, told = time.monotonic(), False
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return action()
            except Exception as error:
                final = refusal(error, what)
                if final is not None:
                    raise final from error
                # What fsspec's many other file systems raise when a server fails is for each of them to choose.
                if self.scheme in (*_HTTP, *_S3) and not may_pass(error):
                    raise
                if attempt == self.patience.attempts:
                    raise RemoteError(
                        f"{what}: {reason(error)}, {attempt} attempts; see whether the server and the network are "
                        "up, then run the same command again"
                    ) from error
                delay = self.patience.delay(attempt, retry_after(error))
                self.retries += 1
                # One line is enough, but nobody shall wait for long without one.
                tell = not told and (attempt >= 4 or time.monotonic() - began > _SILENT)
                told = told or tell
                level = logging.WARNING if tell else logging.DEBUG
                logger.log(level, "%s: %s; attempt %d in %.1f s", what, reason(error), attempt + 1, delay)
                time.sleep(delay)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _file_system(scheme: str, endpoint: str | None, patience: Patience) -> Any:
    if endpoint is not None and scheme not in _S3:
        raise RemoteError(f"an endpoint ({endpoint}) goes with s3:// only, not with {scheme}://")
    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in _HTTP:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=patience.silence, sock_read=patience.silence)
        # trust_env: proxies, as every other command-line tool takes them.
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    elif scheme in _S3:
        options |= _s3_options(endpoint, patience)
    try:
        system = fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise RemoteError(f"{scheme}:// cannot be read: {' '.join(str(error).split())}") from error
    if scheme in _S3:
        system.retries = 1  # `patiently` is the one that tries again
    return system


def _s3_options(endpoint: str | None, patience: Patience) -> dict[str, Any]:
    if find_spec("s3fs") is None:
        raise RemoteError("s3:// needs the package s3fs: pip install 'lalic[s3]'")
    import botocore.session

    options: dict[str, Any] = {
        "config_kwargs": {
            "retries": {"max_attempts": 0},
            "connect_timeout": patience.silence,
            "read_timeout": patience.silence,
            "max_pool_connections": 128,
        }
    }
    if endpoint is not None:
        options["endpoint_url"] = endpoint
    configured = fsspec.config.conf.get("s3", {})
    if not {"anon", "key", "profile", "session"} & set(configured):
        options["anon"] = botocore.session.get_session().get_credentials() is None
    return options
