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
from lalic.remote import is_s3, is_url

from .find import finders
from .job import Options, run_job
from .lists import SUBSETS
from .opening import OPENIMAGES, open_source
from .rebuild import run_rebuild
from .remote_files import Access, RemoteFiles
from .sources import Source
from .validation import CHECKS, Limits
from .writer import LEAST_SHARD_SIZE

# More than any file system takes; sizes are int64 in a manifest's arrays.
_MOST_SHARD_SIZE = 1 << 60
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FIXED_BY_MANIFEST = {
    *("limit", "shard_size", "min_side", "max_pixels", "seed", "prefix", "keep_duplicates", "check", "manifest")
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and shard; LalicError for everything that the user can mend."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if arguments.from_manifest is not None:
        _rebuild(arguments, argv)
        return 0
    if arguments.staging is not None and not is_url(arguments.output):
        raise LalicError("--staging goes with --from-manifest, or with a URL as --output")
    options = Options(
        limit=arguments.limit,
        shard_size=arguments.shard_size,
        min_side=arguments.min_side,
        max_pixels=arguments.max_pixels,
        seed=arguments.seed,
        prefix=arguments.prefix,
        keep_duplicates=arguments.keep_duplicates,
        check=arguments.check,
    )
    run_job(
        _source(arguments, Limits(options.min_side, options.max_pixels)),
        arguments.output,
        options,
        workers=arguments.workers,
        manifest=arguments.manifest,
        endpoint=arguments.endpoint,
        scratch=arguments.staging,
    )
    return 0


def _source(arguments: argparse.Namespace, limits: Limits) -> Source:
    access = Access(
        endpoint=arguments.endpoint,
        connections=arguments.connections,
        bytes_per_second=arguments.rate_limit,
        requests_per_second=arguments.request_limit,
        sums=not arguments.no_checksums,
    )
    source = open_source(arguments.input, access, bucket=arguments.bucket, subset=arguments.subset, limits=limits)
    _refuse_idle(arguments, source)
    return source


def _refuse_idle(arguments: argparse.Namespace, source: Source) -> None:
    """LalicError for an option that would do nothing: who asks for a limit shall not think that it is kept."""
    fetched = isinstance(source, RemoteFiles) or any(is_url(place) for place in arguments.input)
    idle = {
        "--rate-limit": arguments.rate_limit is not None and not fetched,
        "--request-limit": arguments.request_limit is not None and not fetched,
        "--no-checksums": arguments.no_checksums and not isinstance(source, RemoteFiles),
    }
    for flag, does_nothing in idle.items():
        if does_nothing:
            raise LalicError(f"{flag} goes with an input that lies elsewhere, not with --input {arguments.input[0]}")
    places = [*arguments.input, arguments.output, arguments.bucket, arguments.manifest]
    s3 = any(map(is_s3, places))
    if isinstance(source, RemoteFiles):
        s3 = s3 or any(map(is_s3, [source.root, *source.servers.values()]))
    if arguments.endpoint is not None and not s3:
        raise LalicError(f"--endpoint {arguments.endpoint} goes with s3:// in --input, --bucket or --output")


def _rebuild(arguments: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """`--from-manifest`: what the manifest fixes cannot be asked for as well."""
    parser = _parser()
    parser.set_defaults(**dict.fromkeys(_FIXED_BY_MANIFEST))
    given = vars(parser.parse_args(argv))
    clash = sorted("--" + name.replace("_", "-") for name in _FIXED_BY_MANIFEST if given[name] is not None)
    if clash:
        raise LalicError(f"--from-manifest goes without {', '.join(clash)}: the manifest says what the shards hold")
    # Pixels beyond the default of --max-pixels may be in the manifest.
    source = _source(arguments, Limits(1, MAX_PIXELS))
    run_rebuild(
        arguments.from_manifest,
        finders(source, arguments.workers),
        arguments.output,
        label=source.label,
        workers=arguments.workers,
        staging=arguments.staging,
        endpoint=arguments.endpoint,
    )


def parse_size(text: str) -> int:
    """The size of a shard; see `lalic.sizes`."""
    size = _bytes(text)
    if size < LEAST_SHARD_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is too small, a shard has at least {LEAST_SHARD_SIZE} bytes")
    if size > _MOST_SHARD_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is too large, a shard has at most {_MOST_SHARD_SIZE} bytes")
    return size


def _bytes(text: str) -> int:
    try:
        return sizes.parse_size(text)
    except LalicError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> int:
    """Bytes per second, such as `50MB` or `50MB/s`."""
    size = _bytes(text.removesuffix("/s"))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: nothing would come")
    return size


def whole_number(least: int, most: int) -> Callable[[str], int]:
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
    _add_input(parser)
    add(
        "--output",
        required=True,
        metavar="DIR_OR_URL",
        help="folder for the shards, or a URL such as s3://bucket/prefix (needs lalic[s3])",
    )
    add("--endpoint", metavar="URL", help="of an S3-compatible server (default: Amazon's, or AWS_ENDPOINT_URL)")
    add(
        "--manifest",
        metavar="FILE",
        help="also write the frozen manifest, such as out.csv.gz: what the shards hold, row by row, enough to make "
        "the very same ones elsewhere. For a job that is complete, only this is done",
    )
    add(
        "--from-manifest",
        metavar="FILE",
        help="make the shards and the index of this manifest, byte for byte, from --input, which may hold the images "
        "in any order. Options that decide on the shards are the manifest's",
    )
    add(
        "--staging",
        metavar="DIR",
        help="with a URL as --output: a local folder, for the shards under way with --from-manifest, else for what was "
        "fetched and is in no shard yet (without it, a killed job fetches that again)",
    )
    add(
        "--limit",
        type=whole_number(1, 1 << 40),
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
        type=whole_number(1, 1 << 20),
        default=256,
        metavar="PIXELS",
        help="leave out images whose shorter side is below this (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=whole_number(1, MAX_PIXELS),
        default=1 << 26,
        metavar="N",
        help="leave out images with more pixels (decompression bombs; default: %(default)s)",
    )
    add(
        "--workers",
        type=whole_number(0, 1024),
        default=processors(),
        metavar="N",
        help="processes that decode (default: one per processor, %(default)s); 0: none but this one. The "
        "result does not depend on it",
    )
    add(
        "--seed",
        type=whole_number(0, 2**64 - 1),
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
    add(
        "--check",
        choices=CHECKS,
        default="full",
        help="full (the default): decode all of every image. headers: believe its header, and see that a JPEG has its "
        "end and a PNG the right sums; many times faster, but images with damaged pixels are kept",
    )
    add("--keep-duplicates", action="store_true", help="take images with the very same bytes more than once")
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add(
        "--input",
        required=True,
        nargs="+",
        metavar="INPUT",
        help="a folder, searched with its subfolders; a list (text or CSV, .gz or not, here or at a URL) of paths "
        "relative to its folder, of URLs, or of OpenImages ids; a bucket such as s3://bucket/train/; or tars (.tar, "
        ".tar.gz, .tgz; here or URLs; several are taken one after the other, in their own order)",
    )
    add(
        "--bucket",
        metavar="URL_OR_DIR",
        help="where the images of a list of ids lie, as SUBSET/ID.jpg, or those of a list of relative names "
        f"(default for ids: {OPENIMAGES})",
    )
    add(
        "--subset",
        choices=SUBSETS,
        help=f"of a list of ids (default: what the list says, else {SUBSETS[0]})",
    )
    add(
        "--connections",
        type=whole_number(1, 100),
        default=32,
        metavar="N",
        help="requests under way at once (default: %(default)s)",
    )
    add("--rate-limit", type=_rate, metavar="BYTES", help="take no more than this per second, such as 50MB")
    add("--request-limit", type=whole_number(1, 1 << 20), metavar="N", help="send no more requests per second")
    add(
        "--no-checksums",
        action="store_true",
        help="do not compare with the checksums that servers give (for one whose ETags look like MD5s and are none)",
    )


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
