"""The console script `lalic`: one name for every door."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lalic import __version__
from lalic.errors import fail, run_main

COMMANDS = {
    "shard": ("lalic.data_prep.shard", "turn folders of photographs into WebDataset shards"),
    "check-shards": ("lalic.data_prep.verify", "check shards against their index.json"),
    "train": ("lalic.train", "train in this one process (use `accelerate launch -m lalic.train` for more)"),
    "sweep": ("lalic.sweep.cli", "train the quality ladder q1 ... q6 of one config, and print where its runs stand"),
    "status": ("lalic.status", "where runs stand, from their folders alone"),
    "curves": ("lalic.curves", "draw the training curves of runs, with everything that interrupted them"),
    "export": ("lalic.export", "write the release bundles of runs"),
    "verify": ("lalic.verify", "check release bundles: sums, layout, weights, and a picture that they decode"),
    "eval": ("lalic.eval", "rate and distortion of weights on a folder of images"),
    "anchors": ("lalic.anchors", "measure JPEG, WebP, AVIF, JPEG 2000 and JPEG XL on a folder of images"),
    "bdrate": ("lalic.bdrate", "BD-rate between results of `lalic eval`, and against published curves"),
    "plot": ("lalic.plot", "draw R-D curves from results of `lalic eval`"),
    "report": ("lalic.report.cli", "one HTML page from a result of `lalic eval`: tables, curves, BD-rate, pictures"),
    "compare": ("lalic.compare", "a photograph beside its LALIC file and JPEG, WebP, AVIF at equal bytes"),
    "compress": ("lalic.codec.cli", "photograph -> .lalic file"),
    "decompress": ("lalic.codec.cli", ".lalic file -> photograph"),
    "info": ("lalic.codec.cli", "what a .lalic file holds"),
    "kernels": ("lalic.kernels.cli", "which BiWKV backends are there, and why not; --build compiles ahead of time"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; each command's module is imported only when it is called."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(f"lalic {__version__}")
        raise SystemExit(0)
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        fail(f"there is no command '{name}' (one of: {', '.join(COMMANDS)})")
    module = importlib.import_module(COMMANDS[name][0])
    # One module serves the three commands of the codec and is told which one it is.
    passed = arguments if COMMANDS[name][0] == "lalic.codec.cli" else rest
    run_main(lambda: module.main(passed))


def _usage() -> str:
    lines = [f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: lalic COMMAND [...]   (lalic COMMAND --help)\n\n" + "\n".join(lines)
