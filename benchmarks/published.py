"""The published LALIC with its CUDA operator, built for the GPU at hand; nothing in its checkout is changed.

Its constructor compiles the operator for sm_86 alone, from sources that newer versions of torch do not take. Both are
mended on the way to the compiler: another architecture flag, and copies of the sources in the cache, always at the same
place, so that only the first process on a machine waits for the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lalic.errors import LalicError
from lalic.files import cache_folder, write_text

REPLACEMENTS = (("k.type()", "k.scalar_type()"), ("#include <THC/THCAtomics.cuh>\n", ""))
"""What torch >= 1.11 has no more: dispatch on Tensor.type(), and the THC headers."""


def mended_source(text: str) -> str:
    """A published source file as newer versions of torch compile it."""
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    return text


def flags_for(flags: list[str], capability: tuple[int, int]) -> list[str]:
    """The published nvcc flags with another GPU's architecture in place of theirs."""
    architecture = "".join(map(str, capability))
    kept = [flag for flag in flags if not flag.startswith("-gencode")]
    return [*kept, f"-gencode arch=compute_{architecture},code=sm_{architecture}"]


@functools.cache
def import_published(checkout: Path) -> ModuleType:
    """Its module `models.lalic`, which builds its operator for this GPU. LalicError when it does not import."""
    import torch.utils.cpp_extension
    from compressai.registry import MODELS

    if not (checkout / "models" / "lalic.py").is_file():
        raise LalicError(f"{checkout} is no checkout of the published code: it has no models/lalic.py")
    build, ours = torch.utils.cpp_extension.load, MODELS.get("LALIC")
    # Their module takes the function when it is imported, and calls it when a model is made.
    torch.utils.cpp_extension.load = functools.partial(_build_here, build)
    sys.path.insert(0, str(checkout))
    try:
        import models.lalic as published  # type: ignore[import-not-found]
    except Exception as error:
        raise LalicError(f"the published code in {checkout} does not import: {error}") from error
    finally:
        torch.utils.cpp_extension.load = build
        sys.path.remove(str(checkout))
        if ours is not None:
            MODELS["LALIC"] = ours  # theirs registers itself under the same name
    return published


def _build_here(build: Any, name: str, sources: list[str], extra_cuda_cflags: list[str], **more: Any) -> Any:
    import torch

    copies = [str(path) for path in mended_copies([Path(source) for source in sources], cache_folder())]
    flags = flags_for(extra_cuda_cflags, torch.cuda.get_device_capability())
    return build(name=name, sources=copies, extra_cuda_cflags=flags, **more)


def mended_copies(sources: list[Path], cache: Path) -> list[Path]:
    """Mended copies of the source files in a folder of their own, left alone when they are there already."""
    texts = {source.name: mended_source(source.read_text()) for source in sources}
    digest = hashlib.sha256("\0".join([*texts, *texts.values()]).encode()).hexdigest()[:16]
    folder = cache / f"published-biwkv-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = folder / name
        if not path.exists():  # renamed into place: then it is whole
            write_text(path, text)
    return [folder / name for name in texts]


def load_operator(checkout: Path) -> Any:
    """Its operator for this GPU: `forward(w, u, k, v)` and `backward(w, u, k, v, gy)`, float32, contiguous."""
    return import_published(checkout).load_biwkv4()


def published_sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What the published constructor takes of an architecture; LalicError for weights `name` that do not fit it."""
    from lalic.model.weights import AGGREGATION_RATE, CONTEXT_RATE

    widths = {"context_rate": CONTEXT_RATE, "aggregation_rate": AGGREGATION_RATE}
    if "rungs" in config or any(config[key] != value for key, value in widths.items()):
        raise LalicError(
            f"{name} does not fit the published code, which has context_rate {CONTEXT_RATE}, aggregation_rate "
            f"{AGGREGATION_RATE} and one rate"
        )
    return {key: config[key] for key in ("N", "M", "dims", "depths", "groups")}


def load_published(checkout: Path, like: Any) -> Any:
    """The published model of the architecture and with the weights of `like`, a LALIC."""
    from lalic.model import published_state_dict

    model = import_published(checkout).LALIC(**published_sizes(like.config, "the model"))
    model.load_state_dict(published_state_dict(like))
    return model
