"""What `--output` and `--manifest` name: a folder or file of this machine, or one behind a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lalic.errors import LalicError
from lalic.remote import is_url

from .output import LocalFolder, OutputFolder
from .remote_output import RemoteFolder, ServedFolder

_READ_ONLY = frozenset({"http", "https", "zip", "tar", "github", "data"})


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


def readable_folder(where: str | Path, endpoint: str | None = None) -> OutputFolder:
    """A folder of finished shards to read from; a web server's will do."""
    if is_url(where) and str(where).partition("://")[0] in ("http", "https"):
        return ServedFolder(str(where), endpoint)
    return output_folder(where, endpoint)


def output_file(where: str | Path, endpoint: str | None = None) -> tuple[OutputFolder, str]:
    """The folder and the name of one file, such as a manifest."""
    parent, _, name = str(where).rpartition("/")
    if not name:
        raise LalicError(f"{where}: the name of a file was expected")
    return output_folder(parent or ("/" if str(where).startswith("/") else "."), endpoint), name
