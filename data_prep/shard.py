"""`python data_prep/shard.py --input INPUT --output shards/`: photographs to WebDataset tars + index.json.

Every image is decoded fully before it is taken; its bytes go into the tar unchanged. The same input and the
same options give the same bytes, whatever the number of workers. Stopped at any point and run again, it
continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a file, perhaps from a checkout that is not installed: this checkout's packages come first, and
    # this folder, whose modules have everyday names, is no place to import from.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data_prep"

from lalic.errors import run_main

from .command import main

if __name__ == "__main__":
    run_main(main)
