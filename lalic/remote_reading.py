"""One request of `lalic.remote`: the bytes and what the server says with them, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fsspec.asyn import sync

from lalic.errors import LalicError


class RemoteError(LalicError):
    """Something elsewhere that cannot be had: refused, or still failing after all attempts."""


class RemoteMissing(RemoteError):
    """There is no such file."""


class RemoteRefused(RemoteError):
    """Access is refused; public S3 buckets that may not be listed say so of missing files too."""


class RemoteTooLarge(RemoteError):
    """The file has more bytes than asked for."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{what}: is too large, {size} bytes")
        self.size = size


class Fetched(NamedTuple):
    """A whole file, or a part, and what its server says of it."""

    data: bytes
    headers: Mapping[str, str]
    """Names in lower case; empty where the protocol has none."""


class _Short(OSError):
    """A body of another length than asked for."""


class WrongSum(OSError):
    """Bytes that do not agree with the server's sum."""


class NoRanges(Exception):
    """The server sends whole files only."""


def read(system: Any, url: str, start: int | None, stop: int | None, most: int | None = None) -> Fetched:
    wanted = None if start is None or stop is None else stop - start
    if wanted == 0:
        return Fetched(b"", {})
    part = None if wanted is None else f"bytes={start}-{int(stop or 0) - 1}"
    if "http" in system.protocol:
        found = sync(system.loop, _read_http, system, url, part, most, wanted)
    elif "s3" in system.protocol:
        found = sync(system.loop, _read_s3, system, url, part, most)
    else:
        found = Fetched(system.cat_file(url, start=start, end=stop), {})
    if most is not None and len(found.data) > most:
        raise RemoteTooLarge(url, len(found.data))
    if wanted is not None and len(found.data) != wanted:
        raise _Short(f"{len(found.data)} bytes came where {wanted} were asked for")
    return found


async def _read_http(system: Any, url: str, part: str | None, most: int | None, wanted: int | None) -> Fetched:
    """As fsspec's HTTP does it, but it notices a server that answers a range with the whole file."""
    headers = {"Accept-Encoding": "identity", **({"Range": part} if part else {})}
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers) as answer:
        answer.raise_for_status()
        if part and answer.status != 206:
            raise NoRanges
        told = {name.lower(): value for name, value in answer.headers.items()}
        _check_size(url, answer.content_length, most)
        return Fetched(await _body(answer, most if wanted is None else wanted), told)


async def _body(answer: Any, most: int | None) -> bytes:
    """The body, broken off behind `most` bytes: one without a length, or one that is packed, may have any number."""
    parts, size = [], 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if most is not None and size > most:
            break
    return b"".join(parts)


async def _read_s3(system: Any, url: str, part: str | None, most: int | None) -> Fetched:
    """One request; s3fs's own cat_file asks for the size first, and does not give the headers."""
    bucket, key, _ = system.split_path(url)
    answer = await system._call_s3("get_object", Bucket=bucket, Key=key, **({"Range": part} if part else {}))
    try:
        _check_size(url, answer.get("ContentLength"), most)
        return Fetched(await answer["Body"].read(), answer["ResponseMetadata"]["HTTPHeaders"])
    finally:
        answer["Body"].close()


def _check_size(url: str, size: int | None, most: int | None) -> None:
    if size is not None and most is not None and size > most:
        raise RemoteTooLarge(url, size)
