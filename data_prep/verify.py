"""`python data_prep/verify.py SHARDS`: are the shards what index.json says?

Every shard is read once from its first to its last byte: size, sum, the tar header of every sample (name, extension,
offset, size), width and height by the image's own header, nothing in the tar that the index does not know. Every
problem is one line; the status is 1 when there is any.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # As in shard.py.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from lalic.errors import run_main

from .checking import check_shards
from .command import processors, whole_number


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and check; 1 when there are problems. LalicError when nothing can be checked."""
    parser = argparse.ArgumentParser(
        prog="lalic check-shards" if __package__ == "lalic.data_prep" else "data_prep/verify.py",
        description="Check a folder of shards against its index.json. Every problem is one line.",
    )
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="the folder, or a URL such as s3://bucket/prefix (needs lalic[s3])")
    add("--quick", action="store_true", help="only whether every shard is there in full size; nothing is read")
    add("--decode", action="store_true", help="also decode every image fully")
    add("--manifest", metavar="FILE", help="also compare with this manifest")
    add("--endpoint", metavar="URL", help="of an S3-compatible server (default: Amazon's, or AWS_ENDPOINT_URL)")
    add(
        "--workers",
        type=whole_number(0, 1024),
        default=processors(),
        metavar="N",
        help="processes that check, a shard each (default: one per processor, %(default)s); 0: none but this one",
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.decode:
        parser.error("--quick reads nothing, --decode reads all: give one of them")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    problems = check_shards(
        arguments.shards,
        workers=arguments.workers,
        quick=arguments.quick,
        decode=arguments.decode,
        manifest=arguments.manifest,
        endpoint=arguments.endpoint,
    )
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
