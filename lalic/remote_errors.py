"""What the errors of servers, and of the packages that speak with them, mean: final or not, and in which words."""

from __future__ import annotations

import asyncio
import time
from email.utils import parsedate_to_datetime

from lalic.remote_reading import NoRanges, RemoteError, RemoteMissing, RemoteRefused

_MOST_ASKED = 300.0
"""Seconds of a Retry-After that are waited."""
_STUMBLES = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524})
# botocore's, of a bucket's name or of the user's own files; asked again they say the same.
_MISTAKES = frozenset({"ParamValidationError", "ProfileNotFound", "ConfigParseError"})


def refusal(error: Exception, what: str) -> RemoteError | None:
    """The error to end with at once, None for one that may pass. `what` names the file in messages."""
    status = getattr(error, "status", None)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteMissing(f"{what}: there is no such file")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return RemoteRefused(f"{what}: access is refused; is it public, are the credentials right?")
    if isinstance(error, NoRanges):
        return RemoteError(f"{what}: the server does not send parts of files (HTTP ranges); copy the files first")
    if isinstance(status, int) and status not in _STUMBLES:
        return RemoteError(f"{what}: {reason(error)}")
    if isinstance(error, (ValueError, TypeError, NotImplementedError)) or type(error).__name__ in _MISTAKES:
        return RemoteError(f"{what}: {reason(error)}")
    return None


def may_pass(error: Exception) -> bool:
    """Connections, time-outs, bodies cut short, S3's InternalError and SlowDown; all else is a mistake in a call."""
    clients = ("aiohttp", "aiobotocore", "botocore")
    return isinstance(error, (OSError, EOFError, asyncio.TimeoutError)) or type(error).__module__.startswith(clients)


def retry_after(error: Exception) -> float | None:
    """Seconds that the server asks for, as a number or as a date; None when it does not say."""
    text = str((getattr(error, "headers", None) or {}).get("Retry-After", "")).strip()
    try:
        number = text.replace(".", "", 1).isdecimal()
        seconds = float(text) if number else parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(_MOST_ASKED, max(0.0, seconds))


def reason(error: Exception) -> str:
    """The error in a line's worth of words."""
    status = getattr(error, "status", None)
    if type(error).__name__ == "TooManyRedirects":
        return "the server sends from one address to the next without end"
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)) or "Timeout" in type(error).__name__:
        return "no answer in time"
    return " ".join(str(error).split())[:200] or type(error).__name__
