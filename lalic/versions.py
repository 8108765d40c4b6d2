"""Versions of what numbers and files depend on."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    found = {}
    for package in packages:
        # A module's own version tells builds apart (2.6.0+cu124), the package's metadata does not.
        module = sys.modules.get(package.replace("-", "_"))
        with suppress(PackageNotFoundError):
            found[package] = str(getattr(module, "__version__", None) or version(package))
    return found
