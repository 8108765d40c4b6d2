"""Train the quality ladder q1 ... q6 of one config, one run after the other, and keep one table of their state.

    lalic sweep configs/lalic.yaml [key=value ...]                 train here; started again, it goes on
    lalic sweep configs/lalic.yaml --status                        the table, also of an array job that runs elsewhere
    lalic sweep configs/lalic.yaml --slurm [-- SBATCH OPTIONS]     submit what is not finished as an array job

The run folders are runs/lalic-q1 ... runs/lalic-q6, as `sbatch --array=1-6 launch/train.slurm` names them. Each run
is an `accelerate launch` of its own. SIGTERM, SIGUSR1 or Ctrl-C make the present one save a checkpoint, and the sweep
ends with status 0; it ends with status 1 when a run failed, after the others had their turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lalic.errors import LalicError, run_main
from lalic.sweep.plan import Ladder, check_runs, parse_qualities, read_ladder


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `lalic sweep`."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = _parser().parse_intermixed_args(own)
    qualities = parse_qualities(args.qualities) if args.qualities else None
    ladder = read_ladder(args.config, args.settings, qualities=qualities, runs=args.runs, warm_start=args.warm_start)
    if args.status:
        return _status(ladder)
    check_runs(ladder)
    if args.slurm:
        if args.launch or args.num_processes:
            raise LalicError("--launch and --num_processes are for training here; a job chooses by its own resources")
        from lalic.sweep.slurm import submit

        print(*submit(ladder, passed), sep="\n")
        return 0
    from lalic.sweep.climb import Climb
    from lalic.sweep.launcher import choose_launcher

    if args.num_processes:
        passed = ["--num_processes", str(args.num_processes), *passed]
    return Climb(ladder, choose_launcher(ladder.rungs[0].config.train, args.launch, passed)).run()


def _status(ladder: Ladder) -> int:
    """Print the table, and write it where that is possible."""
    from lalic.sweep.table import read_rows, text, write_rows

    rows = read_rows(ladder)
    print(text(ladder, rows, time.time()))
    if ladder.prefix.parent.is_dir():
        try:
            write_rows(ladder, rows)
        except OSError as error:
            print(f"not written to {ladder.prefix.parent}: {error.strerror}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="such as configs/lalic.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs, such as train.precision=bf16")
    parser.add_argument("--qualities", metavar="Q", help="1-6 (all, the default), 4, 1,3,5 ...")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the run folders (default: runs)")
    parser.add_argument(
        "--warm-start",
        choices=("highest", "previous"),
        help="the highest quality first; the others begin with its weights, or with those of the next higher one",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="print the table and train nothing")
    what.add_argument("--slurm", action="store_true", help="submit an array job; options for sbatch follow after --")
    parser.add_argument(
        "--launch", type=Path, metavar="YAML", help="accelerate's config (default: for the GPUs of this machine)"
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="of each run; other options of accelerate launch follow after --"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
