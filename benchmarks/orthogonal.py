"""CPU milliseconds of Muon's Newton-Schulz iterations on one thread: each way, in float32 and bfloat16.

    python benchmarks/orthogonal.py [--model small] [--repeats 12]

"direct" iterates on every matrix, "gram" on X X^T where that takes fewer operations (what Muon does in float32).
Time of the process, not of the clock, so that others on the machine disturb it less; the least of the repeats.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.stepping import MODELS, new_model, read_model_config  # noqa: E402 -- found from the checkout


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each way."""
    import torch

    from lalic.config import MuonSection
    from lalic.training import orthogonal
    from lalic.training.muon import Muon, find_matrices

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="small", help="which config's model (%(default)s)")
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = new_model(read_model_config(arguments.model))
    batches = Muon(model.main_parameters(), find_matrices(model, 16), MuonSection()).batches
    numbers = torch.randn(orthogonal.starts_of(batches)[-1], generator=torch.Generator().manual_seed(0))
    pays = orthogonal._Gram.pays
    for name, gram, dtype, steps in (
        ("direct, fp32", False, torch.float32, 5),
        ("gram, fp32", True, torch.float32, 5),
        ("gram, fp32, 4 steps", True, torch.float32, 4),
        ("direct, bf16", False, torch.bfloat16, 5),
    ):
        orthogonal._Gram.pays = pays if gram else lambda *_: False  # type: ignore[method-assign, assignment]
        ours = orthogonal.Orthogonaliser(batches, steps=steps, dtype=dtype, device=torch.device("cpu"))
        seconds = []
        for _ in range(arguments.repeats):
            started = time.process_time()
            ours(numbers)
            seconds.append(time.process_time() - started)
        print(f"{arguments.model}: {name:<20} {1e3 * min(seconds):6.1f} ms  {ours.flops() / 1e9:6.2f} GFLOP")
    return 0


if __name__ == "__main__":
    sys.exit(main())
