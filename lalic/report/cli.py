"""One self-contained HTML page from a result of `lalic eval`.

    lalic report RESULT.json -o report.html [--images FOLDER] [--reconstructions FOLDER] [--compare MORE.json ...]

The page holds the table of operating points, R-D curves, BD-rates against the anchors in the result and against
published curves, and original, reconstruction and error of single images, to compare with a slider. It needs no
network, and works without JavaScript but for the slider. Results of the published code and of CompressAI, which
have no records of single images, give a report without pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lalic.errors import LalicError, run_main
from lalic.published import DATASETS
from lalic.report.html import size
from lalic.report.page import write_report
from lalic.report.pictures import PictureOptions
from lalic.results import Collection, curve_of, read_result


def main(argv: Sequence[str] | None = None) -> int | None:
    """Write the report of a result file."""
    args = _parser().parse_args(argv)
    options = PictureOptions(
        args.max_images, args.max_side, args.max_mib * 2**20, args.quality, args.lossless, args.error_gain
    )
    result = read_result(args.result)
    if "results" not in result:
        raise LalicError(
            f"{args.result} holds anchors alone: a report is of a result of lalic eval (--compare takes it)"
        )
    for folder in (args.images, args.reconstructions):
        if folder is not None and not folder.is_dir():
            raise LalicError(f"{folder}: no such folder")
    # Together, so that curves of one name are told apart by their files.
    collection = Collection(
        [args.result, *(path for path in args.compare if path != args.result)], dataset=args.dataset
    )
    if args.dataset:
        result = {**result, "dataset": args.dataset}
    own, *compared = collection.tests("psnr")
    if own.label != curve_of(result, args.result).label:
        result = {**result, "name": own.label}
    write_report(
        result,
        args.output,
        args.images,
        args.reconstructions,
        compared=compared,
        with_published=not args.no_published,
        options=options,
    )
    print(f"{args.output} ({size(args.output.stat().st_size)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = PictureOptions()
    parser.add_argument("result", help="result file of lalic eval, of the published code, or of CompressAI")
    parser.add_argument("-o", "--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--images", type=Path, help="folder of the originals (default: where the result says)")
    parser.add_argument(
        "--reconstructions", type=Path, help="folder that lalic eval -o wrote (default: where the result says)"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="RESULT", help="more curves to compare with")
    parser.add_argument("--dataset", choices=DATASETS, help="test set of the published curves (default: the images')")
    parser.add_argument("--no-published", action="store_true", help="leave published curves out")
    parser.add_argument(
        "--max-images", type=int, default=default.max_images, help="images shown, from low to high PSNR (%(default)s)"
    )
    parser.add_argument(
        "--max-side", type=int, default=default.max_side, help="reduce larger pictures to this side (%(default)s)"
    )
    parser.add_argument(
        "--max-mib", type=int, default=default.max_bytes >> 20, help="stop adding images at this size (%(default)s)"
    )
    parser.add_argument(
        "--quality", type=int, default=default.quality, help="of the embedded WebP pictures (%(default)s)"
    )
    parser.add_argument("--lossless", action="store_true", help="embed exact pixels, about three times as large")
    parser.add_argument(
        "--error-gain", type=int, default=default.gain, help="amplification of the error maps (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
