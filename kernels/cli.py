"""`lalic kernels`: which backends of BiWKV this machine has, and why not the others."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from lalic.errors import LalicError, run_main


def main(argv: Sequence[str] | None = None) -> int | None:
    """Print the table of backends; with --build, compile the C++ kernel first. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lalic kernels", description=__doc__)
    parser.add_argument("--build", action="store_true", help="compile the C++ kernel now, not at its first use")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    # Only now: --help must not wait for torch.
    from . import backend, builder

    if arguments.build:
        backend.load_cpp()
    rows = [
        ("cpp", *_cpp_state()),
        ("torch", "available", "plain PyTorch, any device, no compiler"),
        ("cuda", "no", backend.NO_CUDA),
    ]
    print("backend  state      remarks")
    for name, state, remark in rows:
        print(f"{name:8} {state:10} {remark}")
    print()
    print(f"chosen   {backend.chosen()} (LALIC_BACKEND)")
    for name, find in (("compiler", builder.compiler), ("ninja", builder.ninja)):
        try:
            print(f"{name:8} {find()}")
        except LalicError as error:
            print(f"{name:8} {error}")
    print(f"flags    {builder.flags()}")
    print(f"cache    {builder.library_path()}")
    return None


def _cpp_state() -> tuple[str, str]:
    from . import backend, builder

    if not builder.library_path().exists():
        try:
            builder.compiler()
            builder.ninja()
        except LalicError as error:
            return "no", str(error)
        return "not built", "is compiled at the first use, or by `lalic kernels --build`"
    try:
        backend.load_cpp()
    except LalicError as error:
        return "no", str(error)
    return "available", "compiled for this machine"


if __name__ == "__main__":
    run_main(main)
