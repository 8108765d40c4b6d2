"""A folder of release bundles and one SHA256SUMS over all their files.

    release/SHA256SUMS        `sha256sum -c SHA256SUMS` in release/ checks every bundle
    release/lalic-mse-q1/     lalic.release
    release/lalic-mse-q2/

The sums are those that each bundle was written with, not those of what is there now: what was damaged since is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lalic.errors import LalicError
from lalic.files import locked, sha256_of, write_text
from lalic.release_files import SUMS, read_sums

_LINE = re.compile(r"([0-9a-f]{64}) [ *]lalic-[^/]+/[^/]+")


def check_sums(folder: Path) -> None:
    """Raise LalicError when `folder` has a SHA256SUMS of something other than bundles, which must not be lost."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise LalicError(f"{folder / SUMS} cannot be read: move it away, it is written anew") from error
    if any(not _LINE.fullmatch(line) for line in lines):
        raise LalicError(f"{folder / SUMS} lists other files than those of bundles: take another --output")


@contextmanager
def kept_sums(folder: Path, name: str) -> Iterator[None]:
    """Keep `folder`/SHA256SUMS true while the body writes the bundle `name`, also when it is killed in between.

    The bundle is off the list while it may be replaced, and on it again once it is whole. One bundle alone has no such
    file; the second one makes it. Others who write to the folder wait meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        before = listed_sums(folder)
        if before:
            _write(folder, {bundle: lines for bundle, lines in before.items() if bundle != name})
        try:
            yield
        finally:
            found = _bundles(folder, before)
            if before or len(found) > 1:
                _write(folder, found)


def _write(folder: Path, bundles: Mapping[str, list[str]]) -> None:
    write_text(folder / SUMS, "".join(line + "\n" for _, lines in sorted(bundles.items()) for line in lines))


def listed_sums(folder: Path) -> dict[str, list[str]]:
    """The lines of `folder`/SHA256SUMS by bundle; {} when there is no such file, LalicError when it is another list."""
    check_sums(folder)
    lines: dict[str, list[str]] = {}
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    for line in text.splitlines():
        lines.setdefault(line.split(maxsplit=1)[1].lstrip("*").partition("/")[0], []).append(line)
    return lines


def _bundles(folder: Path, listed: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The lines of all bundles in the folder. One whose own sums are lost keeps those that are `listed`, and fails."""
    found = {}
    for path in folder.iterdir():
        if path.name.startswith("lalic-") and path.is_dir() and (lines := sums_of(path) or listed.get(path.name)):
            found[path.name] = lines
    return found


def sums_of(bundle: Path) -> list[str]:
    """The lines for one bundle, that of its SHA256SUMS included; [] when it has none that can be read."""
    try:
        sums = {**read_sums(bundle), SUMS: sha256_of(bundle / SUMS)}
    except (LalicError, OSError):
        return []
    return [f"{digest}  {bundle.name}/{file}" for file, digest in sorted(sums.items())]
