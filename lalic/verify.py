"""Is a release what it says it is?

    lalic verify release/lalic-mse-q3 [--image photo.png]
    lalic verify release/                      every bundle in the folder, and the folder's SHA256SUMS
    lalic verify https://host/release/lalic-mse-q3    or https://host/release, all that its SHA256SUMS lists
    lalic verify lalic-mse-q3                  by name, see LALIC_WEIGHTS and LALIC_HUB_URL

One line for each check. Files: those of SHA256SUMS and no others. Sums: their SHA-256. Config: name, metric, lambda
and architecture fit each other. Weights: model.safetensors holds exactly the tensors of that architecture, and has
the fingerprint. Published: the .pth file has the published layout and the same numbers. Reference: the generated
picture in the bundle decodes to what the exporting machine got, and this machine codes it as well. Image: one of
yours, coded, decoded, measured, and its real rate compared with the estimated one. Ends with status 1 when a check
fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lalic.errors import LalicError, for_terminal, run_main
from lalic.fetch import address_of, resolve
from lalic.fetch_cache import FolderOfBundles
from lalic.release_files import CONFIG, SUMS
from lalic.release_folder import listed_sums, sums_of


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of every bundle named; 1 when something is wrong."""
    args = _parser().parse_args(argv)
    if args.image is not None and not args.image.is_file():
        raise LalicError(f"no such image: {args.image}")
    from lalic.verify_bundle import check_bundle

    failed = 0
    for place in _each(args.bundles):
        folder = resolve(place, whole=True)
        address = address_of(place)
        if address is not None:
            print(f"{address.shown} is in {folder}")
        if not folder.is_dir():
            raise LalicError(f"{folder} is not the folder of a bundle, nor a folder of bundles")
        bundles = bundles_in(folder)
        wrong = []
        for bundle in bundles:
            print(f"{for_terminal(str(bundle))}", flush=True)
            checks = []
            for check in check_bundle(bundle, args.image):
                print(check, flush=True)
                checks.append(check)
            if any(check.passed is False for check in checks):
                wrong.append(bundle.name)
        if bundles != [folder]:
            wrong += list(_check_folder(folder, bundles))
        print(f"{place}: {'FAILED: ' + ', '.join(wrong) if wrong else 'good'}", flush=True)
        failed += bool(wrong)
    return 1 if failed else 0


def _each(places: Sequence[str]) -> Iterator[str]:
    """The places; instead of a URL of several bundles, that of each of them."""
    for place in places:
        try:
            resolve(place, whole=True)
        except FolderOfBundles as folder:
            yield from (f"{place.partition('#')[0].rstrip('/')}/{name}" for name in folder.names)
        else:
            yield place


def bundles_in(folder: Path) -> list[Path]:
    """The folder itself, if it looks like a bundle, else the bundles in it; LalicError when there are none."""
    if (folder / CONFIG).exists():
        return [folder]
    listed = _listed(folder)
    named = {f.name for f in folder.iterdir() if f.name.startswith("lalic-") and f.is_dir()}
    found = [folder / name for name in sorted(named | listed.keys())]
    if not found:
        if (folder / SUMS).exists():
            return [folder]  # its report says what is missing
        raise LalicError(f"{folder} is no release bundle and holds none: it has no {SUMS}")
    return found


def _listed(folder: Path) -> dict[str, list[str]]:
    try:
        return listed_sums(folder)
    except LalicError:
        return {}


def _check_folder(folder: Path, bundles: Sequence[Path]) -> Iterator[str]:
    """Compare the folder's SHA256SUMS with those of its bundles; yields the names of what differs."""
    if not (folder / SUMS).exists():
        if len(bundles) > 1:
            print(f"  FAILED  {SUMS} over all bundles is missing")
            yield SUMS
        return
    listed = listed_sums(folder)
    wrong = [b.name for b in bundles if sorted(listed.get(b.name, [])) != sorted(sums_of(b))]
    if wrong:
        print(f"  FAILED  {folder / SUMS} does not agree with the bundle {wrong[0]}")
        yield SUMS
    else:
        print(f"  ok      {folder / SUMS} agrees with all {len(bundles)} bundles")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder, folder of bundles, name or URL")
    parser.add_argument("--image", type=Path, help="also code this picture with the weights")
    return parser


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
