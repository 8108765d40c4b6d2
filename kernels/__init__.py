"""BiWKV kernels: sources, build and backends. Use the operator through `lalic.ops.biwkv`.

    reference.py   the definition, and BiWKV in plain PyTorch (chunked.py: one exponent per chunk)
    biwkv_scan.h   the algebra of the scan, for every machine
    biwkv_cpu.cpp  the C++ kernel for CPUs (biwkv_strip.h, biwkv_wide.h, biwkv_layout.h, simd.h)
    builder.py     compiles it on first use; backend.py chooses; cli.py is `lalic kernels`
"""

from __future__ import annotations

from pathlib import Path


def build() -> Path:
    """Compile the C++ kernel for this machine if that has not been done yet, and return the library's path.

    Raises LalicError when there is no compiler or no ninja, or when the compiler fails.
    """
    from .builder import build_cpu

    return build_cpu()
