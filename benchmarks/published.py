"""The published LALIC with its CUDA operator, built for the GPU at hand; nothing in its checkout is changed.

Its constructor compiles the operator for sm_86 alone, from sources that newer versions of torch do not take. Both are
mended on the way to the compiler: another architecture flag, and copies of the sources in a temporary folder.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def load_published(checkout: Path, config: Any, like: Any) -> Any:
    """The published model of a config, with the weights of `like`, a LALIC. Raises SystemExit in one line."""
    import torch
    import torch.utils.cpp_extension

    from lalic.model import published_state_dict

    if not (checkout / "models" / "lalic.py").is_file():
        raise SystemExit(f"error: {checkout} is no checkout of the published code: it has no models/lalic.py")
    folder = Path(tempfile.mkdtemp(prefix="published-biwkv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build = torch.utils.cpp_extension.load

    def build_here(name: str, sources: list[str], extra_cuda_cflags: list[str], **more: Any) -> Any:
        copies = []
        for source in map(Path, sources):
            (folder / source.name).write_text(mended_source(source.read_text()))
            copies.append(str(folder / source.name))
        flags = flags_for(extra_cuda_cflags, torch.cuda.get_device_capability())
        return build(name=name, sources=copies, extra_cuda_cflags=flags, **more)

    # Their module takes the function when it is imported.
    torch.utils.cpp_extension.load = build_here
    sys.path.insert(0, str(checkout))
    try:
        from models.lalic import LALIC  # type: ignore[import-not-found]

        sizes = config.model
        model = LALIC(
            N=sizes.N, M=sizes.dims[3], dims=list(sizes.dims), depths=list(sizes.depths), groups=like.config["groups"]
        )
    finally:
        torch.utils.cpp_extension.load = build
        sys.path.remove(str(checkout))
    model.load_state_dict(published_state_dict(like))
    return model
