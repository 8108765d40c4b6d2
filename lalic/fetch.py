"""Weights by name, by path or by URL: where they lie on this machine, fetched into the cache when they lie elsewhere.

    lalic-mse-q3                                  searched in LALIC_WEIGHTS, ./release, LALIC_HUB_URL, the cache, and
                                                  last among those that come with the package
    https://host/release/lalic-mse-q3             a bundle's folder; every file is checked against its SHA256SUMS
    https://host/lalic-mse-q3.pth                 one weights file
    hf://owner/name[@revision][/folder]           the same at a model hub (HF_ENDPOINT, default https://huggingface.co)
    ...#sha256=HEX                                only what has this sum: of the file, or of a bundle's SHA256SUMS

The cache is `weights/` in `lalic.files.cache_folder()`; what is in it is told apart by content, so a new release under
an old name stands beside the old one. Servers that cannot be reached do not matter for what is cached; LALIC_OFFLINE=1
asks none at all. A URL with a sum is asked for once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lalic.errors import LalicError
from lalic.fetch_cache import Address, cached_bundles, local_copy, without_suffix
from lalic.release_builtin import builtin_bundle, builtin_names
from lalic.release_files import CONFIG
from lalic.remote import is_url, without_password

VARIABLE = "LALIC_WEIGHTS"
"""Environment variable: weights file, bundle, or folder of bundles; several are separated as in PATH."""
HUB = "LALIC_HUB_URL"
"""Environment variable: the URL under which bundles lie, each in the folder of its name. There is no default."""

_NAME = re.compile(r"lalic-(mse|ms-ssim)-(q[1-6]|vbr|lambda[0-9][0-9.e+-]*)")


def resolve(place: str | Path, *, whole: bool = False) -> Path:
    """The file or folder on this machine that `place` (a path, a release name or a URL) means.

    Of a bundle elsewhere, what loading needs is fetched, with `whole` every file. A path that is not there is returned
    as it is, unless it is a release name. Raises LalicError in one line.
    """
    address = address_of(place)
    if address is not None:
        return local_copy(address, whole=whole)
    path = Path(place)
    if os.path.lexists(path) or not is_name(place):
        return path
    return _by_name(str(place), whole)


def address_of(place: str | Path) -> Address | None:
    """`place` as a URL, hf:// spelt out and the sum taken off; None for what is none. LalicError for a bad sum."""
    text = str(place)
    if isinstance(place, Path):  # in a Path, a URL loses a slash
        text = re.sub(r"^([a-z][a-z0-9+-]+):/(?=[^/])", r"\1://", text)
    if not is_url(text):
        return None
    url, _, fragment = text.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-f]{64}", fragment.lower()):
        raise LalicError(f"{without_password(text)}: behind # stands sha256= and 64 hexadecimal digits, nothing else")
    return Address(_spelt_out(url.rstrip("/")), fragment.lower().removeprefix("sha256=") or None)


def is_name(place: str | Path) -> bool:
    """Whether `place` is written like the name of a release, `lalic-mse-q3`."""
    return _NAME.fullmatch(str(place)) is not None


def _spelt_out(url: str) -> str:
    if not url.startswith("hf://"):
        return url
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(/.*)?", url)
    if not match:
        raise LalicError(f"{url}: a model hub's address is hf://OWNER/NAME, with /FOLDER behind it for one of several")
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{server}/{match[1]}/resolve/{match[2] or 'main'}{match[3] or ''}"


def search_path() -> list[Path]:
    """Places named by LALIC_WEIGHTS (which must exist), then ./release if it is there."""
    named = [Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    for place in named:
        if not place.exists():
            raise LalicError(f"{VARIABLE} names {place}, which does not exist")
    release = Path("release")
    return [*named, *([release] if release.is_dir() else [])]


def candidates(place: Path) -> Iterator[Path]:
    """The weights file or bundle itself, or the bundles in a folder."""
    if not place.is_dir() or (place / CONFIG).exists():
        yield place
    else:
        yield from sorted(f for f in place.iterdir() if (f / CONFIG).exists() and not f.name.startswith("."))


def from_hub(name: str, *, whole: bool = False, needed: str = "") -> Path | None:
    """The bundle `name` below LALIC_HUB_URL; None when that is not set.

    With `needed`, the weights are fetched only if the bundle's fingerprint begins so; LalicError otherwise.
    """
    hub = os.environ.get(HUB)
    if not hub:
        return None
    if not is_url(hub):
        raise LalicError(f"{HUB} must be a URL, not {hub}; folders of this machine belong into {VARIABLE}")
    address = Address(f"{_spelt_out(hub.rstrip('/'))}/{name}", None)
    return local_copy(address, whole=whole, needed=needed)


def _by_name(name: str, whole: bool) -> Path:
    places = search_path()
    for place in places:
        for found in candidates(place):
            if without_suffix(found.name) == name:
                return found
    if (found_there := from_hub(name, whole=whole)) is not None:
        return found_there
    cached = [f for f in cached_bundles() if f.name.rpartition("-")[0] == name]
    if len(cached) > 1:
        raise LalicError(f"several weights called {name} are in the cache: name one of {', '.join(map(str, cached))}")
    if cached:
        return cached[0]
    if (built_in := builtin_bundle(name)) is not None:
        return built_in
    where = f"not in {', '.join(map(str, places))} and not in the cache" if places else "there is no ./release"
    inside = ", ".join(builtin_names()) or "none"
    raise LalicError(
        f"no weights called {name}: {where} (built in: {inside}); give a path or URL, or set {VARIABLE} or {HUB}"
    )
