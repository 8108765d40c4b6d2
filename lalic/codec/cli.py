"""`lalic compress`, `lalic decompress` and `lalic info`.

    lalic compress photo.png photo.lalic [--quality 4.3] [--weights W]
    lalic decompress photo.lalic photo.png [--weights W]
    lalic info photo.lalic

Weights: those of `--weights` (a path, a name or a URL); else what LALIC_WEIGHTS or ./release hold, the only ones or
those of `--quality`; else the ones that come with the package. Of weights of several rates, `--quality` is any number
of their range with at most three decimals. A file is decoded by the weights that wrote it, which are found by its
fingerprint.

An existing output is kept unless `--force` is given. Output files are written whole or not at all. What needs
torch is imported only when it is needed, so that `info` and errors come at once.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lalic.codec import bitstream
from lalic.codec.quality import chosen_quality, equivalent_lambda, named_with_quality, parse_quality
from lalic.codec.reach import at_hand, built_in_offers, described_offers, weights_of_quality
from lalic.codec.startup import import_compressai
from lalic.errors import LalicError, run_main
from lalic.files import atomic_open
from lalic.release_builtin import DEFAULT_QUALITY


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of the three subcommands; `argv[0]` is `compress`, `decompress` or `info`."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        if args.command == "compress":
            options = (args.weights, args.quality, args.force, args.max_pixels, args.arithmetic, args.verify)
            return compress(args.picture, args.file, *options)
        if args.command == "decompress":
            return decompress(args.file, args.picture, args.weights, args.force, args.max_pixels)
        return info(args.file)
    except MemoryError as error:
        raise LalicError("not enough memory for this picture: take a smaller one, or a larger machine") from error


def compress(
    source: Path,
    target: Path,
    weights_path: str | None,
    quality: float | None,
    force: bool,
    max_pixels: int,
    arithmetic: str,
    verify: bool,
) -> int:
    """Write the picture `source` as the `.lalic` file `target`; `verify` decodes it again first.

    Without `weights_path`, weights of a `quality`, or the default ones (lalic.codec.reach). Weights of several rates
    code with the `quality`, or with a default one, which is printed.
    """
    _check_target(target, source, force)
    from lalic.codec.pictures import decode_picture, encode_picture, read_picture

    picture = read_picture(source, max_pixels)
    chosen = weights_path or weights_of_quality(quality)
    import_compressai()
    import torch

    from lalic.release import open_weights

    height, width = picture.rgb.shape[:2]
    weights = open_weights(chosen)
    used = chosen_quality(weights, quality)
    weights.model.update()
    torch.set_num_threads(min(torch.get_num_threads(), bitstream.MAX_THREADS))
    _build_operator()
    start = time.perf_counter()
    coded = encode_picture(weights.model, picture, arithmetic, quality=used)
    seconds = time.perf_counter() - start
    if verify:
        decode_picture(weights.model, coded)
    label = bitstream.label_of(weights.loss, several_rates=used is not None)
    data = bitstream.pack(coded, weights.fingerprint, label, torch.get_num_threads())
    lmbda = equivalent_lambda(weights.loss.get("metric"), used)
    model = named_with_quality(weights.name, used, lmbda, default=quality is None)
    with atomic_open(target) as file:
        file.write(data)
    print(
        f"{target}: {width} x {height} {picture.kind}, {_bytes(source.stat().st_size)} -> {_bytes(len(data))} "
        f"({_parts(coded, len(data))}), "
        f"{len(data) * 8 / (height * width):.4f} bpp, encoded in {seconds:.2f} s"
        f"{' and decoded again' if verify else ''}, model {model}"
    )
    return 0


def decompress(source: Path, target: Path, weights_path: str | None, force: bool, max_pixels: int) -> int:
    """Write the picture in the `.lalic` file `source` to `target`, a lossless format by its suffix."""
    from lalic.codec.pictures import check_colour, check_suffix, decode_picture, write_picture

    check_suffix(target)
    _check_target(target, source, force)
    parsed, size = bitstream.read(source, max_pixels)
    check_colour(target, parsed.image.colour == bitstream.GRAY)
    import_compressai()
    import torch

    from lalic.codec.weights import weights_for

    weights = weights_for(parsed, str(source), weights_path)
    weights.model.update()
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    _build_operator()
    start = time.perf_counter()
    try:
        picture = decode_picture(weights.model, parsed.image)
    except LalicError as error:
        raise LalicError(f"{source}: {error}") from error
    seconds = time.perf_counter() - start
    note = write_picture(picture, target)
    print(
        f"{target}: {parsed.image.width} x {parsed.image.height} {picture.kind}, {_bytes(size)} -> "
        f"{_bytes(target.stat().st_size)}, decoded in {seconds:.2f} s, "
        f"model {named_with_quality(weights.name, parsed.image.quality)}"
    )
    if note:
        print(f"note: {note}")
    return 0


def info(source: Path) -> int:
    """Print what a `.lalic` file says about itself, and whether its weights are at hand; loads none."""
    parsed, size = bitstream.read(source, max_pixels=bitstream.MAX_SIDE**2)
    image = parsed.image
    threads = f", {parsed.threads} threads" if parsed.threads else ""
    channels = ("gray" if image.colour == bitstream.GRAY else "RGB") + (" with alpha" if image.alpha else "")
    print(f"{source}: LALIC picture, format version {parsed.version}, checksums good")
    print(f"size:       {image.width} x {image.height}, {bitstream.BIT_DEPTH}-bit {channels}")
    print(f"model:      {parsed.model_name}")
    if image.quality is not None:
        lmbda = equivalent_lambda(parsed.metric, image.quality)
        print(
            f"quality:    {image.quality:g}" + (f", which stands for lambda {lmbda:.4g}" if lmbda is not None else "")
        )
    print(f"weights:    {at_hand(parsed)}")
    print(f"bytes:      {size} = {_parts(image, size)}")
    print(f"rate:       {size * 8 / (image.height * image.width):.4f} bpp")
    if image.arithmetic == bitstream.FLOAT32:
        *y, z = (len(string) for string in image.strings)
        print(f"strings:    y {' '.join(map(str, y))}, z {z}")
    for kind, data in image.sections:
        print(f"section:    type {kind}, {_bytes(len(data))}, of a kind that this version ignores")
    print(f"arithmetic: {image.arithmetic}{threads}")
    return 0


def _parts(image: bitstream.CodedImage, size: int) -> str:
    """What the bytes of a file are for."""
    parts = [(sum(len(s) for s in image.strings), "entropy-coded"), (len(image.exceptions), "exceptions")]
    sections = sum(len(section.data) for section in image.sections)
    parts += [(len(image.alpha), "alpha"), (sections, "sections")]
    parts.append((size - sum(count for count, _ in parts), "header and checksums"))
    return " + ".join(f"{count:,} {what}" for count, what in parts if count)


def _build_operator() -> None:
    """Call BiWKV once, so that what it compiles on a new machine is not told as coding time."""
    import torch

    from lalic.ops import biwkv

    one = torch.zeros(1)
    biwkv(one, one, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target.is_dir():
        raise LalicError(f"{target} is a folder: name the file to write")
    if target.exists() and source.exists() and target.samefile(source):
        raise LalicError(f"{target} is the input itself: name another file to write")
    if target.exists() and not force:
        raise LalicError(f"{target} exists: add --force to replace it")
    if not target.parent.is_dir():
        raise LalicError(f"no such folder: {target.parent}")


def _bytes(count: int) -> str:
    return f"{count:,} bytes"


def quality_argument(text: str) -> float:
    """`parse_quality` for argparse."""
    try:
        return parse_quality(text)
    except LalicError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    from lalic.codec.pictures import LOSSLESS

    weights = "weights file, release bundle, checkpoint or run folder"
    pixels = "refuse pictures of more pixels, because of the memory they need (%(default)s)"

    encoder = commands.add_parser("compress", help="picture -> .lalic file")
    encoder.add_argument(
        "picture", type=Path, help="JPEG, PNG, WebP, TIFF, ...; coded as 8-bit RGB or gray, with alpha"
    )
    encoder.add_argument("file", type=Path, help=".lalic file to write")
    encoder.add_argument("--weights", help=f"{weights}: path, name or URL")
    there = f"built in: {described_offers(built_in_offers().values()) or 'none'}; default: {DEFAULT_QUALITY}"
    encoder.add_argument(
        "--quality",
        type=quality_argument,
        metavar="Q",
        help="on the quality ladder, larger files for larger numbers: of weights of several rates any number with at "
        f"most three decimals, otherwise the rung of the weights to take ({there}, or the nearest)",
    )
    encoder.add_argument(
        "--arithmetic",
        choices=(bitstream.FLOAT64, bitstream.FLOAT32),
        default=bitstream.FLOAT64,
        help="of the probabilities: float64 decodes alike on every machine, float32 is faster (%(default)s)",
    )
    encoder.add_argument("--verify", action="store_true", help="decode the result before writing it")

    decoder = commands.add_parser("decompress", help=".lalic file -> picture")
    decoder.add_argument("file", type=Path, help=".lalic file")
    decoder.add_argument("picture", type=Path, help=f"picture to write ({', '.join(LOSSLESS)})")
    decoder.add_argument(
        "--weights",
        help=f"{weights} (default: found by the file's fingerprint in $LALIC_WEIGHTS, ./release, the built-in ones)",
    )
    for command in (encoder, decoder):
        command.add_argument("--force", action="store_true", help="replace an existing output")
        command.add_argument("--max-pixels", type=_positive, default=bitstream.MAX_PIXELS, help=pixels)

    about = commands.add_parser("info", help="what a .lalic file holds")
    about.add_argument("file", type=Path, help=".lalic file")
    return parser


if __name__ == "__main__":
    run_main(main)
