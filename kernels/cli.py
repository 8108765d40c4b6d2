"""`lalic kernels`: which backends of BiWKV this machine has, and why not the others."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lalic.errors import LalicError, run_main

NO_GPU = "no CUDA device here"


def main(argv: Sequence[str] | None = None) -> int | None:
    """Print the table of backends; with --build, compile the kernels first. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lalic kernels", description=__doc__)
    parser.add_argument(
        "--build",
        nargs="?",
        const="here",
        choices=("here", "cuda"),
        help="compile now, not at the first use: what this machine can run, or with `cuda` also the CUDA kernel where "
        "there is no GPU, for others (TORCH_CUDA_ARCH_LIST says which; it takes a CUDA toolkit that fits PyTorch)",
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    # Only now: --help must not wait for torch.
    from . import backend, builder, cuda_builder

    if arguments.build:
        _build(for_others=arguments.build == "cuda")
    rows = [
        ("cpp", *_state(builder.library_path, [builder.compiler, builder.ninja], backend.load_cpp)),
        ("cuda", *_cuda_state()),
        ("torch", "available", "plain PyTorch, any device, no compiler"),
    ]
    print("backend  state      remarks")
    for name, state, remark in rows:
        print(f"{name:8} {state:10} {remark}")
    print()
    print(f"chosen   {backend.chosen()} (LALIC_BACKEND)")
    facts: list[tuple[str, Callable[[], object]]] = [
        ("compiler", builder.compiler),
        ("ninja", builder.ninja),
        ("flags", builder.flags),
        ("cache", builder.library_path),
        ("nvcc", cuda_builder.nvcc),
        ("cuda", cuda_builder.library_path),
    ]
    for name, find in facts:
        try:
            print(f"{name:8} {find()}")
        except LalicError as error:
            print(f"{name:8} {error}")
    return None


def _build(for_others: bool) -> None:
    """Compile; LalicError where that is not possible."""
    import torch

    from . import backend, cuda_builder

    backend.load_cpp()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            backend.load_cuda(index)
    elif for_others:
        cuda_builder.build_cuda()


def _state(
    path: Callable[[], Path], tools: Sequence[Callable[[], object]], load: Callable[[], object]
) -> tuple[str, str]:
    try:
        if not path().exists():
            for tool in tools:
                tool()
            return "not built", "is compiled at the first use, or by `lalic kernels --build`"
        load()
    except LalicError as error:
        return "no", str(error)
    return "available", "compiled for this machine"


def _cuda_state() -> tuple[str, str]:
    import torch

    from . import backend, builder, cuda_builder

    if torch.cuda.is_available():
        tools = [cuda_builder.nvcc, builder.compiler, builder.ninja]
        return _state(cuda_builder.library_path, tools, backend.load_cuda)
    try:
        if cuda_builder.library_path().exists():
            return "built", f"{NO_GPU}; compiled ahead of time for others"
        cuda_builder.nvcc()
    except LalicError as error:
        return "no", f"{NO_GPU}, and {error}"
    return "no", f"{NO_GPU}; `lalic kernels --build cuda` compiles it for others"


if __name__ == "__main__":
    run_main(main)
