"""Two processes shall not write into one remote folder: a lease, since object stores have no locks.

The lease is an object that only one process can create (S3: If-None-Match). Its holder counts a number up in it, its
heartbeat. A second process that finds the lease watches it: if the number changes, the folder is in use; if it stands
still for `EXPIRY` seconds, or the holder was a process of this machine that is gone, the lease is taken over.

What it cannot do: a holder whose machine was frozen for longer than `EXPIRY` may wake up and finish the one upload it
was at before it notices that the lease is no longer its own. Since both work on the same job (job.json says so), that
upload has the bytes which the other one would write. On a server that ignores If-None-Match, two processes that start
in the same second are told apart by reading the lease back, which is likely but not certain to notice.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from lalic.errors import LalicError
from lalic.remote import Remote, RemoteMissing

logger = logging.getLogger("lalic.data_prep")

HEARTBEAT = 10.0
EXPIRY = 60.0
_CONFIRM = 0.2


class Lease:
    """Held from `with` to the end of the block."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self._owner = uuid4().hex
        self._beats = 0
        self._seen = time.monotonic()
        """When the lease was last known to be ours."""
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Lease:
        """Raises LalicError when another process holds the lease."""
        while not self._create():
            self._wait_for(self._read())
        self._seen = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(Exception):
            if self._is_ours(self._read()):
                self.remote.filesystem.rm_file(self._url)

    def check(self) -> None:
        """Raise LalicError when the lease is no longer held."""
        if self._lost or time.monotonic() - self._seen > EXPIRY:
            raise LalicError(
                f"--output {self.remote.shown}: its lease {self.name} was lost, another process may be writing into it "
                "by now; see that only one is, then run the same command again"
            )

    @property
    def _url(self) -> str:
        return self.remote.url(self.name)

    def _create(self) -> bool:
        """Whether there was no lease, and now there is ours."""
        if self._read() is not None:
            return False

        def create() -> bool:
            try:
                self._write("create")
            except FileExistsError:
                return False
            return True

        try:
            if not self.remote.patiently(create, self._url):
                return False
        except RemoteMissing as error:
            raise LalicError(f"--output {self.remote.shown}: cannot be written to, there is no such place") from error
        time.sleep(_CONFIRM)
        return self._is_ours(self._read())

    def _wait_for(self, other: dict[str, Any] | None) -> None:
        """Return when the lease `other` may be replaced; LalicError when its holder is at work."""
        if other is None:
            return
        if not _is_gone(other):
            logger.info("the lease %s exists: watching for up to %.0f s whether its holder is alive", self._url, EXPIRY)
            deadline = time.monotonic() + EXPIRY
            while time.monotonic() < deadline:
                time.sleep(min(1.0, HEARTBEAT / 4))
                now = self._read()
                if now is None:
                    return
                if now != other:
                    raise LalicError(
                        f"--output {self.remote.shown}: another process is writing shards into it "
                        f"({now.get('host')}, process {now.get('process')}); wait for it to end"
                    )
        if self._read() == other:
            logger.info("the lease %s is taken over, its holder is gone", self._url)
            with suppress(FileNotFoundError):
                self.remote.filesystem.rm_file(self._url)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.remote.read(self.name))
        except RemoteMissing:
            return None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self, mode: str) -> None:
        self._beats += 1
        content = {"owner": self._owner, "beats": self._beats, **_this_process()}
        self.remote.filesystem.pipe_file(self._url, json.dumps(content).encode(), mode=mode)

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("owner") == self._owner

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            # A server that stumbles is asked at the next beat; `check` counts the time since the last good one.
            with suppress(Exception):
                if not self._is_ours(self._read()):
                    self._lost = True
                    return
                self._write("overwrite")
                self._seen = time.monotonic()


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "machine": _machine(), "began": _began(os.getpid())}


def _machine() -> str:
    """The running system and its space of process numbers; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process of this machine began, in ticks since the start of the system; empty without it."""
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if status[0] == "Z" else status[19]
    except (OSError, IndexError):
        return ""


def _is_gone(other: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    process = other.get("process")
    here = bool(other.get("machine")) and other.get("machine") == _machine() and isinstance(process, int)
    return here and _began(int(process or 0)) != other.get("began")
