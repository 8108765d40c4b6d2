"""What a sample is called in the shards: its candidate's name without the suffix, made plain and unique."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence

# A key with its longest ending has to fit a plain tar header's 100 bytes.
_LONGEST_BASE = 75
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_/-]")


def make_keys(names: Sequence[str]) -> list[str]:
    """A unique key for every name: the name without its suffix, in letters, digits, '_', '-' and '/'.

    WebDataset cuts a name at its first dot and skips names that begin with two underscores. A name that holds
    other characters, is too long, or would share its key with another one, gets the first digits of its own
    SHA-256 behind the key. So a key depends on the name, and on no more than the set of names.
    """
    bases = [_key_base(name) for name in names]
    uses = Counter(base for base, _ in bases)
    keys = [
        base if exact and uses[base] == 1 else f"{base}-{_digest(name, 8)}"
        for name, (base, exact) in zip(names, bases, strict=True)
    ]
    uses = Counter(keys)
    if len(uses) < len(keys):
        keys = [
            key if uses[key] == 1 else f"{base}-{_digest(name, 16)}"
            for name, key, (base, _) in zip(names, keys, bases, strict=True)
        ]
    return keys


def possible_keys(name: str, archive: str) -> list[str]:
    """The keys that a member of a tar may get, the first that is free: nobody knows the names behind it yet.

    Where no two names share a key these are the keys of `make_keys`. `archive` tells members of two tars apart.
    """
    base, exact = _key_base(name)
    keys = [f"{base}-{_digest(name, 8)}", f"{base}-{_digest(f'{archive}:{name}', 16)}"]
    return [base, *keys] if exact else keys


def free_key(keys: Sequence[str], taken: Collection[str]) -> str | None:
    """The first of `keys` that is not taken, None when all are: a second member of one name in one tar."""
    return next((key for key in keys if key not in taken), None)


def _key_base(name: str) -> tuple[str, bool]:
    """The readable part of the key, and whether it is the name's stem unchanged."""
    stem = os.path.splitext(name)[0]
    base = _NOT_IN_KEYS.sub("_", stem)[-_LONGEST_BASE:].lstrip("_/") or "image"
    return base, base == stem


def _digest(name: str, digits: int) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:digits]
