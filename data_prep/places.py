"""What `--output` and `--manifest` name: a folder or file of this machine, or one behind a URL."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lalic.errors import LalicError
from lalic.remote import is_url

from .output import LocalFolder, OutputFolder
from .remote_output import RemoteFolder, ServedFolder

_READ_ONLY = frozenset({"http", "https", "zip", "tar", "github", "data"})


def output_folder(where: str | Path, endpoint: str | None = None, flag: str = "--output") -> OutputFolder:
    """The folder that `--output` names: a path, or a URL of a scheme that fsspec can write to.

    Args:
        endpoint: of an S3-compatible server.
        flag: what messages call the option that gave `where`.

    Raises LalicError for a scheme that cannot be written to.
    """
    if not str(where):
        # A variable that was not set, in a script: surely not the folder where the program was started.
        raise LalicError(f"{flag}: is empty; name a folder ('.' is the present one)")
    if not is_url(where):
        return LocalFolder(Path(where))
    scheme = str(where).partition("://")[0]
    if scheme in ("file", "local"):
        return LocalFolder(Path(url2pathname(urlsplit(str(where).replace("local://", "file://", 1)).path)))
    if scheme in _READ_ONLY:
        raise LalicError(f"{flag} {where}: {scheme}:// cannot be written to; use a folder or, for example, s3://")
    return RemoteFolder(str(where), endpoint)


def readable_folder(where: str | Path, endpoint: str | None = None) -> OutputFolder:
    """A folder of finished shards to read from; a web server's will do."""
    if is_url(where) and str(where).partition("://")[0] in ("http", "https"):
        return ServedFolder(str(where), endpoint)
    return output_folder(where, endpoint, "SHARDS")


def output_file(where: str | Path, endpoint: str | None = None) -> tuple[OutputFolder, str]:
    """The folder and the name of one file, such as a manifest."""
    parent, _, name = str(where).rpartition("/")
    if not name:
        raise LalicError(f"--manifest {where}: the name of a file was expected")
    return output_folder(parent or ("/" if str(where).startswith("/") else "."), endpoint, "--manifest"), name


def check_manifest_place(where: str | Path, output: OutputFolder, own: Collection[str], endpoint: str | None) -> None:
    """Whether a manifest can be written to `where`, as far as that is known before all the work for it is done.

    `own`: names of files that the job itself writes into `output`. Raises LalicError when it cannot.
    """
    folder, name = output_file(where, endpoint)
    if not isinstance(folder, LocalFolder) or not isinstance(output, LocalFolder):
        inside = folder.where == output.where
    else:
        inside = folder.folder.resolve() == output.folder.resolve()
    if inside and (name in own or name.endswith(".tar")):
        raise LalicError(f"--manifest {where}: {name} is a file of the shards themselves; take another name")
    if not isinstance(folder, LocalFolder):
        return
    path = folder.folder / name
    if path.exists() and not path.is_file():
        raise LalicError(f"--manifest {where}: is no file, nothing is written over it; take another name")
    if not inside and not folder.folder.is_dir():
        raise LalicError(f"--manifest {where}: there is no folder {folder.where}; make it first")
    if folder.folder.is_dir() and not os.access(folder.folder, os.W_OK | os.X_OK):
        raise LalicError(f"--manifest {where}: nothing can be written into the folder {folder.where}")
