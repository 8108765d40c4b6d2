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

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.asyn import sync

from lalic.errors import LalicError

logger = logging.getLogger("lalic.remote")

T = TypeVar("T")

_HTTP = ("http", "https")
_S3 = ("s3", "s3a")
_STUMBLES = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524})
# Of its own: the global generators belong to the training run.
_JITTER = random.Random()


class RemoteError(LalicError):
    """Something elsewhere that cannot be had: refused, or still failing after all attempts."""


class RemoteMissing(RemoteError):
    """There is no such file."""


class RemoteRefused(RemoteError):
    """Access is refused; public S3 buckets that may not be listed say so of missing files too."""


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


def join_url(root: str, name: str) -> str:
    """`root/name`, with what has a meaning in HTTP addresses escaped."""
    scheme = root.partition("://")[0]
    return f"{root.rstrip('/')}/{quote(name) if scheme in _HTTP else name}"


@dataclass
class Remote:
    """The files below one URL."""

    root: str
    endpoint: str | None = None
    """Of an S3-compatible server, such as http://127.0.0.1:9000; None: Amazon's, or AWS_ENDPOINT_URL."""
    patience: Patience = Patience()
    _systems: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.scheme in (*_HTTP, *_S3) and not self.root.partition("://")[2].strip("/"):
            raise RemoteError(f"{self.root}: names no server or bucket")

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "endpoint": self.endpoint, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def scheme(self) -> str:
        return self.root.partition("://")[0]

    @property
    def filesystem(self) -> Any:
        """The fsspec file system of this process. Raises RemoteError when there is none for the scheme."""
        with self._lock:
            process = os.getpid()
            if process not in self._systems:
                self._systems[process] = _file_system(self.scheme, self.endpoint, self.patience)
            return self._systems[process]

    def url(self, name: str = "") -> str:
        """Where `name` lies."""
        return join_url(self.root, name) if name else self.root

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes, or those from `start` to before `stop` (both or none given).

        Raises:
            RemoteMissing: no such file.
            RemoteError: refused, ranges not supported, or failing after all attempts.
        """
        url = self.url(name)
        return self.patiently(lambda: _read(self.filesystem, url, start, stop), f"{url}")

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

        `what` names the thing in messages. Raises RemoteMissing or RemoteError.
        """
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return action()
            except Exception as error:
                refusal = _refusal(error, what)
                if refusal is not None:
                    raise refusal from error
                if not _may_pass(error):
                    raise
                if attempt == self.patience.attempts:
                    raise RemoteError(
                        f"{what}: {_reason(error)}, {attempt} attempts; see whether the server and the network are "
                        "up, then run the same command again"
                    ) from error
                delay = self.patience.delay(attempt, _retry_after(error))
                level = logging.WARNING if attempt == 4 else logging.DEBUG
                logger.log(level, "%s: %s; attempt %d in %.1f s", what, _reason(error), attempt + 1, delay)
                time.sleep(delay)
        raise AssertionError("unreachable: the last attempt returns or raises")


class _Short(OSError):
    """A body of another length than asked for."""


class _NoRanges(Exception):
    """The server sends whole files only."""


def _read(system: Any, url: str, start: int | None, stop: int | None) -> bytes:
    wanted = None if start is None or stop is None else stop - start
    if wanted == 0:
        return b""
    if "http" in system.protocol:
        data = sync(system.loop, _read_http, system, url, start, stop)
    else:
        data = system.cat_file(url, start=start, end=stop)
    if wanted is not None and len(data) != wanted:
        raise _Short(f"{len(data)} bytes came where {wanted} were asked for")
    return data


async def _read_http(system: Any, url: str, start: int | None, stop: int | None) -> bytes:
    """As fsspec's HTTP does it, but it notices a server that answers a range with the whole file."""
    headers = {"Accept-Encoding": "identity"}
    if start is not None and stop is not None:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers) as answer:
        answer.raise_for_status()
        if "Range" in headers and answer.status != 206:
            raise _NoRanges
        return await answer.read()


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


def _refusal(error: Exception, what: str) -> RemoteError | None:
    """The error to end with at once, None for one that may pass."""
    status = getattr(error, "status", None)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteMissing(f"{what}: there is no such file")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return RemoteRefused(f"{what}: access is refused; is it public, are the credentials right?")
    if isinstance(error, _NoRanges):
        return RemoteError(f"{what}: the server does not send parts of files (HTTP ranges); copy the files first")
    if isinstance(status, int) and status not in _STUMBLES:
        return RemoteError(f"{what}: {_reason(error)}")
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return RemoteError(f"{what}: {_reason(error)}")
    return None


def _may_pass(error: Exception) -> bool:
    """Connections, time-outs, bodies cut short, S3's InternalError and SlowDown; all else is a mistake in a call."""
    clients = ("aiohttp", "aiobotocore", "botocore")
    return isinstance(error, (OSError, EOFError, asyncio.TimeoutError)) or type(error).__module__.startswith(clients)


def _retry_after(error: Exception) -> float | None:
    headers = getattr(error, "headers", None) or {}
    try:
        return min(300.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)) or "Timeout" in type(error).__name__:
        return "no answer in time"
    return " ".join(str(error).split())[:200] or type(error).__name__
