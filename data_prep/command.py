"""The command line of the sharding program."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from lalic import sizes
from lalic.data.images import MAX_PIXELS
from lalic.errors import LalicError

from .job import Options, run_job
from .writer import LEAST_SHARD_SIZE

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and shard; LalicError for everything that the user can mend."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    options = Options(
        limit=arguments.limit,
        shard_size=arguments.shard_size,
        min_side=arguments.min_side,
        max_pixels=arguments.max_pixels,
        seed=arguments.seed,
        prefix=arguments.prefix,
        keep_duplicates=arguments.keep_duplicates,
    )
    run_job(arguments.input, arguments.output, options, workers=arguments.workers)
    return 0


def parse_size(text: str) -> int:
    """The size of a shard; see `lalic.sizes`."""
    try:
        size = sizes.parse_size(text)
    except LalicError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < LEAST_SHARD_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is too small, a shard has at least {LEAST_SHARD_SIZE} bytes")
    return size


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return value

    return parse


def _prefix(text: str) -> str:
    if not _PREFIX.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '-' and '_' only")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic shard" if __package__ == "lalic.data_prep" else "data_prep/shard.py",
        description="Pack photographs (JPEG, PNG, WebP) into WebDataset tars with an index.json. Every image "
        "is decoded fully before it is taken, its bytes stay unchanged, exact duplicates are taken once. Run "
        "again, it continues where it stopped. What was left out, and why, is listed in OUTPUT/left_out.csv.",
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        metavar="DIR_OR_LIST",
        help="a folder, searched with its subfolders, or a text file with one path per line, relative to "
        "that file's folder ('#' begins a comment line)",
    )
    add("--output", required=True, metavar="DIR", help="folder for the shards")
    add(
        "--limit",
        type=_whole_number(1, 1 << 40),
        metavar="N",
        help="take the first N usable images of the input (default: all; the published recipe uses 400000)",
    )
    add(
        "--shard-size",
        type=parse_size,
        default=512 << 20,
        metavar="BYTES",
        help="largest size of a shard, such as 512MiB (the default); a larger image has a shard of its own",
    )
    add(
        "--min-side",
        type=_whole_number(1, 1 << 20),
        default=256,
        metavar="PIXELS",
        help="leave out images whose shorter side is below this (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=_whole_number(1, MAX_PIXELS),
        default=1 << 26,
        metavar="N",
        help="leave out images with more pixels (decompression bombs; default: %(default)s)",
    )
    add(
        "--workers",
        type=_whole_number(0, 1024),
        default=_processors(),
        metavar="N",
        help="processes that decode (default: one per processor, %(default)s); 0: none but this one. The "
        "result does not depend on it",
    )
    add(
        "--seed",
        type=_whole_number(0, 2**64 - 1),
        default=0,
        metavar="S",
        help="of the order of the images in the shards (default: %(default)s)",
    )
    add(
        "--prefix",
        type=_prefix,
        default="shard",
        metavar="NAME",
        help="the shards are called NAME-000000.tar ... (default: %(default)s)",
    )
    add("--keep-duplicates", action="store_true", help="take images with the very same bytes more than once")
    return parser


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
