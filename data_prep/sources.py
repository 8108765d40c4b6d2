"""Where the images come from: a folder, or a list of paths. And what each image is called in the shards."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lalic.data.images import suffix_of, walk_files
from lalic.errors import LalicError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# A key with its longest ending has to fit a plain tar header's 100 bytes.
_LONGEST_BASE = 75
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_/-]")


@dataclass(frozen=True)
class Listing:
    """The candidates of a job, in input order."""

    root: Path
    paths: list[str]
    """Relative to `root`, with '/'. Nothing of the job's result depends on where `root` is."""
    ignored: Counter[str] = field(default_factory=Counter)
    """What was passed over without a look, by kind."""

    def fingerprint(self) -> str:
        """SHA-256 of the candidates' paths and their order."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(path) + b"\0")
        return digest.hexdigest()


def list_inputs(source: str | Path) -> Listing:
    """List the images of a folder (sorted by path) or of a text file (in its order).

    Raises LalicError when `source` is missing, is something else, or names no image at all.
    """
    path = Path(source)
    if path.is_dir():
        listing = _list_folder(path)
        kinds = f"no file with the suffix {', '.join(sorted(SUFFIXES))}"
    elif path.is_file():
        listing = _list_file(path)
        kinds = "no path in it"
    else:
        raise LalicError(f"--input {source}: no such folder or list of paths")
    if not listing.paths:
        raise LalicError(f"--input {source}: no image to take, {kinds}")
    return listing


def make_keys(paths: Sequence[str]) -> list[str]:
    """A unique key for every path: the path without its suffix, in letters, digits, '_', '-' and '/'.

    WebDataset cuts a name at its first dot and skips names that begin with two underscores. A path that holds
    other characters, is too long, or would share its key with another one, gets the first digits of its own
    SHA-256 behind the key. So a key depends on the path, and on no more than the set of paths.
    """
    bases = [_key_base(path) for path in paths]
    uses = Counter(base for base, _ in bases)
    keys = [
        base if exact and uses[base] == 1 else f"{base}-{_path_digest(path, 8)}"
        for path, (base, exact) in zip(paths, bases, strict=True)
    ]
    uses = Counter(keys)
    if len(uses) < len(keys):
        keys = [
            key if uses[key] == 1 else f"{base}-{_path_digest(path, 16)}"
            for path, key, (base, _) in zip(paths, keys, bases, strict=True)
        ]
    return keys


def _key_base(path: str) -> tuple[str, bool]:
    """The readable part of the key, and whether it is the path's stem unchanged."""
    stem = os.path.splitext(path)[0]
    base = _NOT_IN_KEYS.sub("_", stem)[-_LONGEST_BASE:].lstrip("_/") or "image"
    return base, base == stem


def _path_digest(path: str, digits: int) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:digits]


def _list_folder(root: Path) -> Listing:
    paths = []
    ignored: Counter[str] = Counter()
    for path in walk_files(root):
        suffix = suffix_of(path)
        if suffix in SUFFIXES:
            paths.append(path)
        else:
            ignored[f"{suffix} files" if suffix else "files without a suffix"] += 1
    # By bytes: the same order in every locale.
    return Listing(root, sorted(paths, key=os.fsencode), ignored)


def _list_file(path: Path) -> Listing:
    if suffix_of(path.name) in SUFFIXES:
        raise LalicError(f"--input {path}: is one image; give a folder, or a text file with one path per line")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise LalicError(f"--input {path}: is not a text file with one path per line")
    lines = (os.fsdecode(line.rstrip(b"\r")) for line in data.split(b"\n"))
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    if not entries:
        return Listing(path.parent, [])
    here = os.path.abspath(path.parent)
    full = [os.path.normpath(os.path.join(here, entry)) for entry in entries]
    once = list(dict.fromkeys(full))
    root = os.path.commonpath([os.path.dirname(name) for name in once])
    ignored = Counter({"paths listed before": len(full) - len(once)} if len(once) < len(full) else {})
    return Listing(Path(root), [os.path.relpath(name, root) for name in once], ignored)
