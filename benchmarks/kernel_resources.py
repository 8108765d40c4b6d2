"""Registers, shared memory and spills of the CUDA kernels, as ptxas tells them; needs nvcc, no GPU.

    python benchmarks/kernel_resources.py [--arch sm_80 sm_90 sm_100] [--output FILE.json]

Ends with 1 when a kernel spills registers to memory. Blocks per SM are what registers allow (65,536 of them).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

THREADS = {"connect_tiles": 512, "reduce": 1024}  # all others: the tile's
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_KERNEL = re.compile(r"_ZN5lalic3gpu\d+([a-z_]+)I(?:NS0_4TileI(\w+?)Li(\d+)ELi(\d+)EEE|([fd])E)")


def resources(arch: str) -> list[dict[str, Any]]:
    """One row per kernel, compiled for one generation of GPUs. Raises LalicError without a fitting nvcc."""
    from lalic.kernels import builder, cuda_builder

    from lalic.errors import LalicError

    with tempfile.TemporaryDirectory() as folder:
        command = [cuda_builder.nvcc(), *cuda_builder.NVCC_FLAGS.split(), f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        source = builder.SOURCE_FOLDER / cuda_builder.KERNELS
        done = subprocess.run([*command, "-o", f"{folder}/kernels", str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise LalicError(f"nvcc fails for {arch}: {done.stderr.strip().splitlines()[-1]}")
    return [row_of(match) for match in _ENTRY.finditer(done.stdout + done.stderr)]


def row_of(entry: re.Match[str]) -> dict[str, Any]:
    """A row from what ptxas says of one kernel."""
    kernel = _KERNEL.match(entry["name"])
    if kernel is None:
        raise SystemExit(f"error: {entry['name']} is not the name of a kernel that this script knows")
    name, tile_type, rows, _, scalar = kernel.groups()
    threads = THREADS.get(name, 32 * int(rows or 0))
    registers = int(entry["registers"])
    return {
        "arch": entry["arch"],
        "kernel": name,
        "type": TYPES[tile_type or scalar],
        "registers": registers,
        "threads": threads,
        "blocks_per_sm": 65536 // (-(-registers // 8) * 8 * threads),
        "stack_bytes": int(entry["stack"]),
        "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--output", type=Path, help="write the table to this JSON file")
    arguments = parser.parse_args()

    from lalic.kernels import cuda_builder

    rows = [row for arch in arguments.arch for row in resources(arch)]
    rows.sort(key=lambda row: (arguments.arch.index(row["arch"]), row["kernel"], row["type"]))
    titles = f"{'arch':7} {'kernel':14} {'type':9} {'registers':>9} {'threads':>8}"
    print(f"{titles} {'blocks/SM':>9} {'stack':>6} {'spilled':>8}")
    for row in rows:
        print(
            f"{row['arch']:7} {row['kernel']:14} {row['type']:9} {row['registers']:>9} {row['threads']:>8} "
            f"{row['blocks_per_sm']:>9} {row['stack_bytes']:>6} {row['spill_bytes']:>8}"
        )
    spilling = [row for row in rows if row["spill_bytes"]]
    print(f"{len(rows)} kernels, {len(spilling)} spill registers")
    if arguments.output:
        from lalic.files import write_json

        release = ".".join(map(str, cuda_builder.release(cuda_builder.nvcc())))
        command = " ".join(["python benchmarks/kernel_resources.py", *sys.argv[1:]])
        report = {"command": command, "nvcc": release, "flags": cuda_builder.NVCC_FLAGS, "kernels": rows}
        write_json(arguments.output, report)
    return 1 if spilling else 0


if __name__ == "__main__":
    from lalic.errors import run_main

    run_main(main)
