"""The bundles that are installed with the package: `weights/` at the top of the tree, installed as lalic.weights.

They need no network and no setting, and are asked last: whatever a user names or puts in reach comes first. Nothing
here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from lalic.errors import LalicError
from lalic.release_files import CONFIG
from lalic.release_folder import listed_sums

DEFAULT_QUALITY = 5
"""The rung of the ladder that `lalic compress` takes where nothing else is said."""

_MEND = "`git checkout -- weights` in a clone, or install lalic again (pip install --force-reinstall --no-deps)"


def builtin_folder() -> Path | None:
    """Where the bundles lie; None where this installation has no such folder."""
    # The package is not imported: its folder may be damaged, and only data is wanted of it.
    found = importlib.util.find_spec("lalic.weights")
    places = (found.submodule_search_locations if found else None) or ()
    return next((Path(place) for place in places if Path(place).is_dir()), None)


def builtin_names() -> list[str]:
    """Names of the bundles that were installed, those that are lost since included."""
    folder = builtin_folder()
    if folder is None:
        return []
    try:
        listed = set(listed_sums(folder))
    except (LalicError, OSError):
        listed = set()
    return sorted(listed | {f.name for f in _folders(folder)})


def builtin_bundles() -> list[Path]:
    """The bundles that are there."""
    folder = builtin_folder()
    return sorted(_folders(folder)) if folder is not None else []


def builtin_bundle(name: str) -> Path | None:
    """The bundle of a name; None when there is no such one, LalicError when it is lost."""
    if name not in builtin_names():
        return None
    folder = builtin_folder()
    assert folder is not None
    if not os.path.isfile(folder / name / CONFIG):
        raise LalicError(f"the built-in weights {name} are missing from {folder}: get them again with {_MEND}")
    return folder / name


def is_builtin(path: Path) -> bool:
    """Whether a path is in the folder of the built-in bundles."""
    folder = builtin_folder()
    return folder is not None and path.absolute().is_relative_to(folder.absolute())


def damaged(path: Path, error: Exception) -> LalicError:
    """What to say of a built-in bundle that cannot be opened."""
    why = str(error).removesuffix("; get the bundle again")
    return LalicError(f"the built-in weights {path.name} cannot be used ({why}): get them again with {_MEND}")


def none_built_in() -> LalicError:
    """What to say where an installation has no bundles at all."""
    where = builtin_folder()
    return LalicError(
        "this installation of lalic has no built-in weights"
        f"{f' (there are none in {where})' if where else ''}: get them with {_MEND}, or give --weights"
    )


def _folders(folder: Path) -> Iterator[Path]:
    try:
        found = list(folder.iterdir())
    except OSError:
        return
    # os.path: a bundle that may not be read is one that is not there, and no reason to lose the others.
    yield from (f for f in found if f.name.startswith("lalic-") and os.path.isfile(f / CONFIG))
