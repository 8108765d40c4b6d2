"""What the benchmarks have in common: the allocator's settings, resident memory, what machine the figures are from."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
"""glibc otherwise gives freed tensors back to the system, and the page faults of new ones dominate the times.

They are read when a process starts, so a benchmark that measures times sets them and starts (itself) again.
"""


def begin_peak() -> int:
    """Bytes of resident memory; `memory_bytes("VmHWM")` is their peak from here on. Linux only.

    Free memory that the allocator has kept goes back to the system first: what is given it again would not grow.
    (glibc keeps up to 64 MiB for each further thread that allocates, so measure in a process that has none.)
    """
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """A size that /proc/self/status tells, such as VmRSS, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(threads: int, device: str = "cpu", tf32: str | None = None) -> dict[str, Any]:
    """What the figures depend on. `tf32`, "on" or "off", is what a script sets in place of torch's defaults."""
    import torch
    from lalic.kernels import backend, builder, cuda_builder

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: this machine has no CUDA device; use --device cpu")
    facts = {
        "device": "cpu",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "nice": os.nice(0),
        "backend": backend.for_device(torch.device(device)).name,
        "flags": builder.flags(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": {name: os.environ[name] for name in MALLOC if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "flags": cuda_builder.NVCC_FLAGS,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32 if tf32 is None else tf32 == "on",
            "tf32_cudnn": torch.backends.cudnn.allow_tf32 if tf32 is None else tf32 == "on",
        }
    return facts
