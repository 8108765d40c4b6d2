"""Servers on 127.0.0.1 for what is read from elsewhere: a bucket over HTTP that stumbles on demand, and S3 (moto)."""

from __future__ import annotations

import hashlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

KINDS = ("500", "503", "429", "cut", "short", "long", "drop", "slow")
"""What can go wrong and pass: statuses, a body cut in the middle, Content-Length too small or too large, a connection
closed without an answer, a body in small pieces."""


@dataclass
class Fault:
    """Answers to paths that contain `path` go wrong, `times` times (each with probability `chance`)."""

    kind: str
    path: str = ""
    times: float = 1
    chance: float = 1.0


@dataclass
class Bucket:
    """What the server holds, how it misbehaves and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Path without the leading '/' -> bytes."""
    faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    """Whether ranges of bytes are served; otherwise the whole file comes, as from some servers."""
    delay: float = 0.0
    """Seconds before every answer."""
    etags: bool = True
    """S3's habit: the MD5 of the file."""
    chunked: str = ""
    """A path that is sent in chunks, without its size, as pages are that a program makes."""
    endless: str = ""
    """A path whose answers never end."""
    redirect: str = ""
    """A path that leads to itself."""
    moved: dict[str, str] = field(default_factory=dict)
    """Path -> the path that it leads to, as from a hub to the servers of its large files."""
    types: dict[str, str] = field(default_factory=dict)
    """Path -> its Content-Type, where that is no plain file's."""
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header) in order."""
    sent: dict[str, int] = field(default_factory=dict)
    """Path -> bytes of bodies sent so far."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    generator: random.Random = field(default_factory=lambda: random.Random(1))

    def fault(self, path: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path and self.generator.random() < fault.chance:
                    fault.times -= 1
                    return self.generator.choice(KINDS) if fault.kind == "any" else fault.kind
        return ""

    def count(self, path: str = "", method: str = "GET") -> int:
        """How often paths that contain `path` were asked for."""
        with self.lock:
            return sum(path in asked and verb == method for verb, asked, _ in self.requests)


@contextmanager
def serve(bucket: Bucket) -> Iterator[Bucket]:
    """Serve `bucket` in this process until the block ends; `bucket.url` is its address."""

    class Handler(_Handler):
        pass

    Handler.bucket = bucket

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        # With socketserver's 5, more clients at once are turned away and come again a second later.
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Of clients that were killed nothing is said."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        bucket = self.bucket
        wanted = self.headers.get("Range", "")
        with bucket.lock:
            bucket.requests.append((self.command, path, wanted))
        time.sleep(bucket.delay)
        kind = bucket.fault(path)
        if kind == "drop":
            self.close_connection = True
            return
        if kind.isdigit():
            self._status(int(kind), [("Retry-After", "0")] if kind in ("429", "503") else [])
            return
        if path == bucket.redirect:
            self._status(302, [("Location", self.path)])
            return
        if path in bucket.moved:
            self._status(302, [("Location", "/" + bucket.moved[path])])
            return
        data = bucket.files.get(path)
        if data is None:
            self._status(404, [])
            return
        if path in (bucket.chunked, bucket.endless):
            self._send_chunks(data, body, 206 if wanted else 200, endless=path == bucket.endless)
            return
        self._send(path, data, wanted, kind, body)

    def _send_chunks(self, data: bytes, body: bool, status: int, endless: bool) -> None:
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not body:
            return
        try:
            for start in range(0, 1 << 62 if endless else len(data), 64):
                part = data[:64] if endless else data[start : start + 64]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.close_connection = True

    def _status(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", "0")]:
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: str, data: bytes, wanted: str, kind: str, body: bool) -> None:
        part, status = data, 200
        if wanted and self.bucket.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            stop = min(len(data), int(last) + 1 if last else len(data))
            if start >= len(data):
                self._status(416, [("Content-Range", f"bytes */{len(data)}")])
                return
            part, status = data[start:stop], 206
        told = {"short": len(part) // 2, "long": len(part) + 1000}.get(kind, len(part))
        self.send_response(status)
        self.send_header("Content-Length", str(told))
        self.send_header("Content-Type", self.bucket.types.get(path, "application/octet-stream"))
        self.send_header("Accept-Ranges", "bytes" if self.bucket.ranges else "none")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if self.bucket.etags:
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.end_headers()
        if kind in ("cut", "short", "long"):
            self.close_connection = True
        if body:
            self._body(path, part[: len(part) // 2] if kind in ("cut", "short") else part, kind == "slow")

    def _body(self, path: str, part: bytes, slow: bool) -> None:
        step = max(1, len(part) // 4) if slow else 1 << 20
        try:
            for start in range(0, len(part), step):
                self.wfile.write(part[start : start + step])
                with self.bucket.lock:
                    self.bucket.sent[path] = self.bucket.sent.get(path, 0) + len(part[start : start + step])
                if slow:
                    time.sleep(0.02)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def forget_credentials(monkeypatch: Any, folder: Path) -> None:
    """Let botocore find no credentials; `folder` holds none."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@contextmanager
def serve_s3(bucket: str = "photos") -> Iterator[str]:
    """An S3-compatible server with one empty bucket; yields its endpoint. Its state is this process's memory."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", config=Config(signature_version=UNSIGNED)
        )
        client.create_bucket(Bucket=bucket, ACL="public-read-write")
        yield endpoint
    finally:
        # Servers of one process share their memory.
        urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        server.stop()
