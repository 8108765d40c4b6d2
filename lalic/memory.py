"""How much memory a process has held, and what its CUDA tensors have taken. Imports no torch by itself."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_resident_bytes() -> int:
    """The most memory that this process has held since it began, or since Linux was last told to forget it.

    Not getrusage's `ru_maxrss` where it can be helped: on Linux it survives exec, so that a small program started
    by a large one reports the large one's memory.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Peak memory from construction to `bytes()`: of the CUDA allocator, or resident memory of this process.

    On Linux the kernel's high-water mark is reset at construction; where that is not possible, the CPU
    figure is the peak since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            import torch

            torch.cuda.init()  # before that, resetting is an error
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Not Linux, or not allowed: the docstring says what the figure is then.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type != "cuda":
            return peak_resident_bytes()
        import torch

        return torch.cuda.max_memory_allocated(self.device)
