"""Small inputs for the sharding program, and readers of what it made."""

from __future__ import annotations

import csv
import hashlib
import io
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lalic.data_prep.job import Options
from PIL import Image

from lalic.data.index import ShardIndex

SMALL = Options(shard_size=60_000, min_side=32)
"""Several shards of the images below."""


def picture(seed: int, height: int = 48, width: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, count: int = 40, first: int = 0) -> Path:
    """JPEG, PNG and WebP in subfolders."""
    for number in range(first, first + count):
        suffix, kind = [(".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP"), (".JPEG", "JPEG")][number % 4]
        path = folder / f"set{number % 3}" / f"img{number:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number), kind))
    return folder


def result(folder: Path) -> dict[str, str]:
    """Sum of every file that a job leaves, but for its state."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def shard_command(root: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(root / "data_prep" / "shard.py"), *map(str, arguments)]


def kill_once(command: list[str], reached: Callable[[], bool], delay: float, interval: float = 0.001) -> bool:
    """Run `command` and kill it `delay` seconds after `reached()`, asked every `interval`; False if it ended before.

    A clock alone would depend on the machine's load.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not reached():
        time.sleep(interval)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def error_on_a_full_disk(command: list[str], most: int) -> str:
    """The one line with which a program ends that cannot write more than `most` bytes to a file.

    write() fails as on a full disk, for any user.
    """
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    lines = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert full.returncode == 2 and len(lines) == 1 and "Traceback" not in full.stderr
    return lines[0]


def left_out(folder: Path) -> dict[str, str]:
    with open(folder / "left_out.csv", encoding="utf-8") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def keys(folder: Path) -> list[str]:
    index = ShardIndex.load(folder)
    return [index.key(i) for i in range(len(index))]


def read_back(folder: Path):
    """The samples as WebDataset, an independent reader, gives them."""
    # Imported here: it brings torch, which the worker processes that import this file can do without.
    from webdataset import WebDataset

    return WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
