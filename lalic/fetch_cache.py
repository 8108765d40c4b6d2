"""The cache of weights that lie elsewhere: fetched once, checked, told apart by content (see lalic.fetch).

weights/lalic-mse-q3-0123456789abcdef/   a bundle, by the SHA-256 of its SHA256SUMS; or one file, by its own
weights/.asked/                          what each URL gave last
weights/.coming/                         files whose sum is not known before they are here
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lalic.errors import LalicError
from lalic.fetch_stream import PATIENCE, download, read_small
from lalic.files import cache_folder, locked, sha256_of, write_json, write_text
from lalic.release_files import CONFIG, MOST_CONFIG, SAFETENSORS, SUMS, parse_sums, read_config
from lalic.remote import (
    Patience,
    Remote,
    RemoteError,
    RemoteMissing,
    RemoteRefused,
    RemoteTooLarge,
    without_password,
)

log = logging.getLogger("lalic.fetch")

OFFLINE = "LALIC_OFFLINE"
"""Environment variable: 1 asks no server."""

MOST_WEIGHTS = 4 << 30
"""Bytes of a weights file that are fetched at most; the published size has a quarter of a GiB."""
MOST_TEXT = 16 << 20
_MOST_FILES = 64
_OF_BUNDLES = re.compile(r"^[0-9a-f]{64} [ *](lalic-[A-Za-z0-9._+-]+)/[A-Za-z0-9._-]+$", re.MULTILINE)
_SUFFIX = re.compile(r"\.(pth|pt|tar|safetensors|ckpt)$")
_BRIEF = Patience(attempts=2, first_delay=0.5, most_delay=1.0, silence=10.0)
"""For asking whether what is cached is still the newest."""


class FolderOfBundles(LalicError):
    """A URL of several bundles where one is needed."""

    def __init__(self, shown: str, names: list[str]):
        super().__init__(f"{shown} is a folder of bundles: add the name of one ({', '.join(names[:12])})")
        self.names = names


class Address(NamedTuple):
    """A URL of weights, and the sum that they must have."""

    url: str
    sha256: str | None

    @property
    def shown(self) -> str:
        return without_password(self.url)


def local_copy(address: Address, *, whole: bool = False, needed: str = "") -> Path:
    """The copy in the cache of the file or bundle at a URL, fetched if it is not there or not the newest.

    Of a bundle, `whole` fetches every file, otherwise what loading needs; one whose fingerprint does not begin with
    `needed` is refused before its weights are fetched. Raises LalicError in one line; what was whole in the cache
    before stays.
    """
    if _SUFFIX.search(address.url.partition("?")[0]):
        return _file(address)
    return _bundle(address, None if whole else (CONFIG, SAFETENSORS), needed)


def forget(path: Path) -> None:
    """Take a file that turned out to be no weights out of the cache again."""
    if path.parent.parent == cache_folder() / "weights":
        shutil.rmtree(path.parent, ignore_errors=True)


def _bundle(address: Address, wanted: Sequence[str] | None, needed: str) -> Path:
    url, name = address.url, _plain_name(address.url)
    text, digest = _sums(address, name)
    if names := sorted({match[1] for match in _OF_BUNDLES.finditer(text)}):
        raise FolderOfBundles(address.shown, names)
    sums = parse_sums(text, f"{address.shown}/{SUMS}")
    for file in (CONFIG, SAFETENSORS):
        if file not in sums:
            raise LalicError(f"{address.shown}/{SUMS} does not list {file}: that is no release bundle")
    if len(sums) > _MOST_FILES:
        raise LalicError(f"{address.shown}/{SUMS} lists {len(sums)} files: that is no release bundle")
    folder = _entry(name, digest)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (folder / SUMS).exists():
            write_text(folder / SUMS, text)
        for file in [CONFIG, *(f for f in (wanted or sums) if f != CONFIG)]:
            if file != CONFIG and not read_config(folder)["fingerprint"].startswith(needed):
                raise LalicError(f"{address.shown} is another model")
            if not ((folder / file).is_file() and sha256_of(folder / file) == sums[file]):
                most = MOST_WEIGHTS if _SUFFIX.search(file) or file == SAFETENSORS else MOST_TEXT
                download(f"{url}/{file}", folder / file, most=most, sha256=sums[file])
        _note(url, {"url": address.shown, "sha256": digest})
    return folder


def _sums(address: Address, name: str) -> tuple[str, str]:
    """The bundle's SHA256SUMS and its own SHA-256: the server's, or the cache's where that is as good."""
    known = address.sha256 or _noted(address.url).get("sha256")
    cached = _entry(name, known) / SUMS if known else None
    if cached is not None and cached.is_file() and sha256_of(cached) == known:
        text = cached.read_text(encoding="utf-8")
        if address.sha256 or _offline():
            return text, str(known)
    else:
        text = ""
    _must_be_online(address)
    try:
        data = read_small(f"{address.url}/{SUMS}", MOST_CONFIG, _BRIEF if text else PATIENCE)
    except (RemoteMissing, RemoteRefused) as error:
        raise type(error)(f"{error} (a bundle's address is that of its folder, which holds {SUMS})") from error
    except RemoteError as error:
        if not text or isinstance(error, RemoteTooLarge):
            raise
        log.warning("%s; taking what was fetched before", error)
        return text, str(known)
    digest = hashlib.sha256(data).hexdigest()
    if address.sha256 not in (None, digest):
        raise LalicError(f"{address.shown}: its {SUMS} has SHA-256 {digest}, not {address.sha256}")
    try:
        return data.decode("utf-8"), digest
    except UnicodeDecodeError as error:
        raise LalicError(f"{address.shown}/{SUMS} is no list of checksums") from error


def _file(address: Address) -> Path:
    name = _plain_name(address.url)
    stem = without_suffix(name)
    noted = _noted(address.url)
    known = address.sha256 or noted.get("sha256")
    if known:
        there = _entry(stem, known) / name
        intact = there.is_file() and sha256_of(there) == known
        if intact and (address.sha256 or _offline() or _unchanged(address, noted)):
            return there
    _must_be_online(address)
    coming = cache_folder() / "weights" / ".coming" / _key(address.url)
    coming.mkdir(parents=True, exist_ok=True)
    with locked(coming):
        digest, etag = download(address.url, coming / name, most=MOST_WEIGHTS, sha256=address.sha256)
        folder = _entry(stem, digest)
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(coming / name, folder / name)
        _note(address.url, {"url": address.shown, "sha256": digest, "etag": etag})
    return folder / name


def _unchanged(address: Address, noted: dict[str, Any]) -> bool:
    """Whether the server still has what was fetched; also when it cannot be asked."""
    try:
        etag = Remote(address.url, patience=_BRIEF, encoded=True).info("").etag
    except (RemoteMissing, RemoteRefused):
        raise
    except RemoteError as error:
        log.warning("%s; taking what was fetched before", error)
        return True
    return bool(etag) and etag == noted.get("etag")


def cached_bundles() -> list[Path]:
    """Bundles in the cache that can be loaded without asking anybody, by name, the newest of a name first."""
    root = cache_folder() / "weights"
    found = [f for f in root.glob("*-*") if all((f / name).is_file() for name in (SUMS, CONFIG, SAFETENSORS))]
    return sorted(found, key=lambda f: (f.name.rpartition("-")[0], -(f / SUMS).stat().st_mtime))


def without_suffix(name: str) -> str:
    """`lalic-mse-q3.pth.tar` -> `lalic-mse-q3`."""
    return re.sub(r"(\.(pth|pt|tar|safetensors|ckpt))+$", "", name)


def _offline() -> bool:
    return os.environ.get(OFFLINE, "") not in ("", "0")


def _must_be_online(address: Address) -> None:
    if _offline():
        raise LalicError(f"{address.shown} is not in the cache, and {OFFLINE} is set: unset it, or fetch it elsewhere")


def _entry(name: str, digest: str) -> Path:
    return cache_folder() / "weights" / f"{name}-{digest[:16]}"


def _plain_name(url: str) -> str:
    """The last part of a URL's path, as a file's name that does no harm."""
    path = re.sub(r"^[^:]*://[^/]*", "", url).partition("?")[0]
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.rpartition("/")[2])[:80].lstrip(".-") or "weights"


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _noted(url: str) -> dict[str, Any]:
    """What was written down when `url` was fetched last; {} when it was not."""
    with suppress(OSError, ValueError):
        noted = json.loads((cache_folder() / "weights" / ".asked" / f"{_key(url)}.json").read_text(encoding="utf-8"))
        if isinstance(noted, dict) and re.fullmatch(r"[0-9a-f]{64}", str(noted.get("sha256"))):
            return noted
    return {}


def _note(url: str, noted: dict[str, Any]) -> None:
    folder = cache_folder() / "weights" / ".asked"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{_key(url)}.json", noted)
