"""What --input names: a folder, a list, a bucket or tars."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote, unquote

from lalic.data.images import suffix_of
from lalic.errors import LalicError
from lalic.remote import is_url, without_password

from .files import LocalFiles, list_folder, other_kind
from .lists import ImageIds, Listed, read_list
from .remote_files import Access, RemoteFiles
from .sources import SUFFIXES, Source
from .streams import RemoteStream
from .tars import Tars
from .validation import Limits, most_bytes

OPENIMAGES = "https://open-images-dataset.s3.amazonaws.com"
"""The public copy of the images that have boxes (train 1,743,042, validation 41,620, test 125,436)."""

_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_OTHER_ARCHIVE = re.compile(r"\.(tar\.\w+|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE)
_LIST = re.compile(r"\.(txt|csv|lst|list)(\.gz)?$", re.IGNORECASE)
_WEB = ("http://", "https://")


def open_source(
    inputs: str | Path | Sequence[str | Path],
    access: Access | None = None,
    *,
    bucket: str | None = None,
    subset: str | None = None,
    limits: Limits | None = None,
) -> Source:
    """The source that `inputs` name.

    Args:
        inputs: one folder, list, or bucket; or one or more tars.
        access: how what lies elsewhere is reached.
        bucket: URL or folder that a list's ids, or relative names, lie below.
        subset: of a list of ids.
        limits: files that are too large for them are not read.

    Raises LalicError when there is nothing there, it is something else, or it names no image.
    """
    places = [str(place) for place in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    access = access or Access()
    most = most_bytes(limits or Limits(256, 1 << 26))
    tars = [place for place in places if _TAR.search(_path_of(place)) and not os.path.isdir(place)]
    if len(tars) == len(places):
        source: Source = _open_tars(places, access, most)
    elif tars:
        other = next(place for place in places if place not in tars)
        raise LalicError(f"--input: {tars[0]} is a tar, {other} is none; shard them in two jobs")
    elif len(places) > 1:
        raise LalicError(f"--input: {places[1]}: only tars can be several; make one list, or one job for each")
    else:
        source = _Opening(places[0], access, most, bucket, subset).source()
    used = isinstance(source, RemoteFiles) or (isinstance(source, LocalFiles) and source.root == bucket)
    for flag, value in (("--bucket", bucket), ("--subset", subset)):
        if value is not None and not used:
            raise LalicError(f"{flag} goes with a list of ids or names, not with --input {places[0]}")
    if source.count == 0:
        raise LalicError(f"--input {places[0]}: no image to take, {_nothing(source, places[0])}")
    return source


def _open_tars(places: list[str], access: Access, most: int) -> Tars:
    for place in places:
        if not is_url(place) and not os.path.isfile(place):
            what = "is a pipe or a device, not a file" if os.path.exists(place) else "no such tar"
            raise LalicError(f"--input {place}: {what}")
    return Tars(places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else ""), places, access, most=most)


class _Opening:
    """One input that is no tar."""

    def __init__(self, place: str, access: Access, most: int, bucket: str | None, subset: str | None) -> None:
        self.place, self.access, self.most = place, access, most
        self.bucket, self.subset = bucket, subset

    def source(self) -> Source:
        path = _path_of(self.place)
        if os.path.isdir(self.place):
            return list_folder(Path(self.place))
        if suffix_of(path) in SUFFIXES:
            raise LalicError(
                f"--input {self.place}: is one image; give a folder, or a text file with one path per line"
            )
        if _OTHER_ARCHIVE.search(path):
            raise LalicError(f"--input {self.place}: of archives only .tar, .tar.gz and .tgz can be read")
        if is_url(self.place):
            return self._elsewhere(path)
        try:
            with open(self.place, "rb", 0) as file:
                return self._from_list(read_list(file, self.place, self.subset), os.path.dirname(self.place) or ".")
        except FileNotFoundError:
            raise LalicError(f"--input {self.place}: no such folder or list of paths") from None
        except OSError as error:
            raise LalicError(f"--input {self.place}: cannot be read ({error.strerror or error})") from error

    def _elsewhere(self, path: str) -> Source:
        if not _LIST.search(path):
            return self._from_bucket()
        folder, _, name = self.place.rpartition("/")
        remote = self.access.remote(folder, encoded=True)
        size = remote.info(name).size
        # Without a size there are no ranges to ask for.
        whole = remote.read(name) if size is None else b""
        with io.BytesIO(whole) if size is None else RemoteStream(remote, name, size, self.access.throttle()) as stream:
            return self._from_list(read_list(cast(IO[bytes], stream), self.place, self.subset), None)

    def _from_bucket(self) -> RemoteFiles:
        """Everything below a URL, sorted as a folder is."""
        if self.place.startswith(_WEB):
            raise LalicError(
                f"--input {self.place}: a web server cannot be listed; give a list of ids or URLs, or tars, instead"
            )
        names, ignored = [], Counter[str]()
        for name in self.access.remote(self.place).list():
            if any(part.startswith(".") for part in name.split("/")):
                continue
            if suffix_of(name) in SUFFIXES:
                names.append(name)
            else:
                ignored[other_kind(name)] += 1
        names.sort(key=os.fsencode)
        return RemoteFiles(self.place, self.place, names, self.access, most=self.most, ignored=ignored)

    def _from_list(self, listed: Listed, folder: str | None) -> Source:
        """`folder`: of the list, None when it lies elsewhere."""
        if listed.kind == "ids":
            assert isinstance(listed.entries, ImageIds)
            return self._below(self.bucket or OPENIMAGES, listed, listed.entries.keys())
        if listed.kind == "URLs":
            return self._urls(listed)
        if self.bucket is not None:
            return self._below(self.bucket, listed, None)
        if folder is None and listed.entries:
            raise LalicError(f"--input {self.place}: a list elsewhere holds ids or URLs, or names below a --bucket")
        return _paths(self.place, folder or ".", listed)

    def _below(self, root: str, listed: Listed, keys: Sequence[str] | None) -> Source:
        names = listed.entries
        if is_url(root):
            return RemoteFiles(self.place, root, names, self.access, most=self.most, ignored=listed.ignored, keys=keys)
        if not os.path.isdir(root):
            raise LalicError(f"--bucket {root}: is neither a URL nor a folder")
        return LocalFiles(self.place, root, names, listed.ignored, keys)

    def _urls(self, listed: Listed) -> RemoteFiles:
        if self.bucket is not None or self.subset is not None:
            raise LalicError(f"--input {self.place}: holds whole URLs, --bucket and --subset do not go with them")
        root, names, servers = split_urls(listed.entries)
        ignored = listed.ignored
        once = list(dict.fromkeys(names))
        if len(once) < len(names):
            ignored["URLs listed before"] += len(names) - len(once)
        plain = [unquote(name) for name in once]
        # Names without percent signs are those of the same images in a folder. Where they do not lead back to the
        # very same URLs (queries, odd escapes), they stay as they are.
        encoded = next(iter(listed.entries)).startswith(_WEB)
        if encoded and all(quote(name) == raw for name, raw in zip(plain, once, strict=True)):
            once, encoded = plain, False
        return RemoteFiles(
            self.place, root, once, self.access,
            most=self.most, ignored=ignored, encoded=encoded, servers=servers,
        )  # fmt: skip


def split_urls(urls: Sequence[str]) -> tuple[str | None, list[str], dict[str, str]]:
    """The folder that all URLs lie in and their names in it; or None, names that begin with the server's, and the
    servers' URLs.
    """
    servers: dict[str, str] = {}
    names = []
    for url in urls:
        scheme, _, rest = url.partition("://")
        address, slash, path = rest.partition("/")
        base = f"{scheme}://{address}"
        # A password is no part of a name, which stands in manifests.
        server = address.rpartition("@")[2]
        if servers.get(server, base) != base:
            server = f"{scheme}:{server}"
        if servers.setdefault(server, base) != base:
            raise LalicError(f"{without_password(base)} has two user names or passwords in one list")
        names.append(f"{server}{slash}{path}")
    if len(servers) > 1:
        return None, names, servers
    folder = os.path.commonpath([os.path.dirname(name.partition("?")[0]) for name in names])
    ((server, base),) = servers.items()
    return f"{base}{folder[len(server) :]}", [name[len(folder) + 1 :] for name in names], servers


def _paths(label: str, folder: str, listed: Listed) -> LocalFiles:
    """The files that a list names, relative to the folder that all of them lie in."""
    if not listed.entries:
        return LocalFiles(label, folder, [])
    here = os.path.abspath(folder)
    full = [os.path.normpath(os.path.join(here, entry)) for entry in listed.entries]
    once = list(dict.fromkeys(full))
    ignored = listed.ignored
    if len(once) < len(full):
        ignored["paths listed before"] += len(full) - len(once)
    root = os.path.commonpath([os.path.dirname(name) for name in once])
    return LocalFiles(label, root, [os.path.relpath(name, root) for name in once], ignored)


def _path_of(place: str) -> str:
    """The place without a URL's query."""
    return place.partition("?")[0] if place.startswith(_WEB) else place


def _nothing(source: Source, place: str) -> str:
    if not os.path.isdir(place) and (not is_url(place) or _LIST.search(_path_of(place))):
        return "no path in it"
    return f"no file with the suffix {', '.join(sorted(SUFFIXES))}"
