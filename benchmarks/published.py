"""The published LALIC with its CUDA operator, built for the GPU at hand; nothing in its checkout is changed.

Its constructor compiles the operator for sm_86 alone, from sources that newer versions of torch do not take. Both are
mended on the way to the compiler: another architecture flag, and copies of the sources in a temporary folder.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from lalic.errors import LalicError

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

    folder = Path(tempfile.mkdtemp(prefix="published-biwkv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copies = []
    for source in map(Path, sources):
        (folder / source.name).write_text(mended_source(source.read_text()))
        copies.append(str(folder / source.name))
    flags = flags_for(extra_cuda_cflags, torch.cuda.get_device_capability())
    return build(name=name, sources=copies, extra_cuda_cflags=flags, **more)


def load_operator(checkout: Path) -> Any:
    """Its operator for this GPU: `forward(w, u, k, v)` and `backward(w, u, k, v, gy)`, float32, contiguous."""
    return import_published(checkout).load_biwkv4()


def load_published(checkout: Path, like: Any) -> Any:
    """The published model of the architecture and with the weights of `like`, a LALIC."""
    from lalic.model import published_state_dict

    sizes = like.config
    model = import_published(checkout).LALIC(
        N=sizes["N"], M=sizes["dims"][3], dims=list(sizes["dims"]), depths=list(sizes["depths"]), groups=sizes["groups"]
    )
    model.load_state_dict(published_state_dict(like))
    return model
