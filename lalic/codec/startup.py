"""CompressAI without its point clouds: half of the time in which a command that codes one picture starts.

CompressAI keeps a registry of transforms of pictures and point clouds, for which it imports torchvision and
torch_geometric, and these import transformers, torch's compiler and more. A command that codes pictures needs none of
it. While CompressAI is imported here, stand-ins take the place of torch_geometric and of that registry. Those of
torch_geometric are gone afterwards: who imports it gets the real one. Only CompressAI's transforms are of no use in
such a process, so the codec's own commands do this, never a library call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_GEOMETRIC = "torch_geometric"
_REGISTRY = "compressai.registry.transforms"


def import_compressai() -> None:
    """Import CompressAI with the stand-ins, or as it is where it does not come up with them."""
    if any(name in sys.modules for name in ("compressai", "torchvision", _GEOMETRIC)):
        return
    below = [f"{_GEOMETRIC}.{name}" for name in ("data", "data.datapipes", "transforms")]
    modules = {name: _StandIn(name) for name in (_GEOMETRIC, *below)}
    registry = ModuleType(_REGISTRY)
    registry.__dict__.update(TRANSFORMS={}, register_transform=_unchanged)
    sys.modules.update({**modules, _REGISTRY: registry})
    try:
        import compressai  # noqa: F401
    except Exception:
        # A CompressAI that wants more of them: away with what is half imported, the next import takes the real ones.
        for name in [name for name in sys.modules if name.partition(".")[0] == "compressai"]:
            del sys.modules[name]
    finally:
        for name in modules:
            sys.modules.pop(name, None)


class _StandIn(ModuleType):
    """A package in which every name is an empty class or a decorator that changes nothing."""

    __path__: list[str] = []  # noqa: RUF012 -- what makes a module a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged if name.islower() else type(name, (), {})


def _unchanged(*_: Any, **__: Any) -> Any:
    return lambda decorated: decorated
