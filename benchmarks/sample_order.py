"""The sample order at the size of all OpenImages: time and memory of a plan, of the index, of any step.

    python benchmarks/sample_order.py [--shards 9000] [--per-shard 1000] [--window 16] [--output FILE.json]

Each figure comes from a process of its own, which begins after its imports; `MB` is what its peak memory grew by.

    plan             EpochOrder from the shards' counts, to the first batch of 8 samples
    any step         the batch of a random step, in a window that is not at hand (median of 200)
    whole epoch      every sample number of the epoch, in order
    randperm         the baseline: torch.randperm(n).tolist(), which torch's DistributedSampler does for an epoch
    index, parsed    ShardIndex.load of an index.json of that many samples for the first time on a machine
    index, mapped    the same in every other process
    loader           index, mapped + eligible samples of a crop + plan + first batch: what a rank does before it reads
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout

_BEGIN = """
import json, statistics, sys, time
import numpy as np, torch
from lalic.data.index import ShardIndex
from lalic.data.loader import MicroBatches, eligible_samples
from lalic.data.order import EpochOrder
from lalic.memory import peak_resident_bytes
folder, shards, each, window = sys.argv[1], *map(int, sys.argv[2:])
n = shards * each
more = {}
def peak(): return peak_resident_bytes() / 1e6
before, began = peak(), time.perf_counter()
"""
_END = """
print(json.dumps({"seconds": time.perf_counter() - began, "mb": peak() - before} | more))
"""
TASKS = {
    "plan": "EpochOrder(np.full(shards, each), 1, window).samples(n // 2, n // 2 + 8)",
    "any step": """
order, steps = EpochOrder(np.full(shards, each), 1, window), np.random.default_rng(0).integers(0, n - 8, 200)
taken = []
for step in steps.tolist():
    t = time.perf_counter()
    order.samples(step, step + 8)
    taken.append(time.perf_counter() - t)
more["seconds"] = statistics.median(taken)
""",
    "whole epoch": "assert len(EpochOrder(np.full(shards, each), 1, window).samples(0, n)) == n",
    "randperm": "indices = torch.randperm(n).tolist()",
    "index, parsed": "assert len(ShardIndex.load(folder)) == n",
    "index, mapped": "assert len(ShardIndex.load(folder)) == n",
    "loader": """
index = ShardIndex.load(folder)
eligible = eligible_samples(index, 256)
order = EpochOrder(index.counts(eligible), 1, window)
step = n // 16384
positions, samples = next(iter(MicroBatches(order, eligible, 8, 1, 77, 1024, step, step + 1)))
offsets = [int(index.offset[sample]) for sample in samples]
""",
}


def write_index(folder: Path, shards: int, each: int) -> None:
    """An index.json as data_prep/shard.py writes it, of shards that are not there."""
    with open(folder / "index.json", "w", encoding="utf-8") as file:
        file.write('{"version": 1, "prefix": "shard", "seed": 0, "min_side": 256, "shards": [\n')
        for shard in range(shards):
            head = {"name": f"shard-{shard:06d}.tar", "bytes": each << 19, "sha256": f"{shard:064x}"}
            rows = (
                f'{{"key": "train/{shard * each + i:016x}", "ext": "jpg", "offset": {512 + (i << 18)}, '
                f'"size": {200_000 + i}, "width": 1024, "height": {600 + i % 168}}}'
                for i in range(each)
            )
            separator = ",\n" if shard else ""
            file.write(separator + json.dumps(head)[:-1] + ', "samples": [\n ' + ",\n ".join(rows) + "\n]}")
        file.write("\n]}\n")


def run(task: str, folder: Path, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Seconds and megabytes of one task, in a process of its own."""
    program = [sys.executable, "-c", _BEGIN + TASKS[task] + _END, str(folder), *map(str, sizes)]
    environment = {"LALIC_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {task}: {done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=9000)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = (arguments.shards, arguments.per_shard, arguments.window)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_index(Path(name), *sizes[:2])
        index_mb = (Path(name) / "index.json").stat().st_size / 1e6
        print(f"{sizes[0] * sizes[1]} samples in {sizes[0]} shards, index.json {index_mb:.0f} MB")
        for task in TASKS:
            rows[task] = run(task, Path(name), sizes)
            print(f"{task:<14} {rows[task]['seconds']:>10.4f} s {rows[task]['mb']:>8.1f} MB", flush=True)
    result = {
        "command": "python benchmarks/sample_order.py",
        "environment": describe(1),
        "settings": {"shards": sizes[0], "per_shard": sizes[1], "window": sizes[2], "index_mb": index_mb},
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
