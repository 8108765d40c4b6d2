"""A photograph beside its LALIC file, and beside other codecs at equal bytes.

    lalic compare PHOTO [PHOTO ...] -o FOLDER [--quality Q] [--weights W] [--formats jpeg webp avif]
                  [--crop LEFT,TOP,WIDTH,HEIGHT] [--zoom 4] [--files]

For each photograph FOLDER/NAME-compared.png: the original, what comes out of its .lalic file, and of each format the
file of the highest quality that is not larger than the .lalic file (JPEG: 4:2:0, optimised tables, progressive where
that is smaller). Below each, a part of it enlarged: where the LALIC picture and the first format differ most, or the
one given. Bytes are those of whole files. --files also writes the files themselves. Where a format has no file so
small, its smallest is shown, and the caption says so.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lalic.anchors import FORMATS, format_of
from lalic.codec.cli import quality_argument
from lalic.data.images import list_images, read_rgb
from lalic.drawing import write_picture
from lalic.equal_bytes import best_within
from lalic.errors import LalicError, for_terminal, run_main
from lalic.files import atomic_open
from lalic.metrics import bits_per_pixel, decibels, ms_ssim, psnr
from lalic.picture_sheet import Box, Picture, Version, draw_sheet, part_size, where_they_differ

if TYPE_CHECKING:
    from lalic.release import Weights

_SUFFIXES = {"JPEG": ".jpg", "WEBP": ".webp", "AVIF": ".avif", "JPEG2000": ".jp2", "JPEGXL": ".jxl"}


@dataclass(frozen=True)
class Coded:
    """A photograph through one codec."""

    label: str
    suffix: str
    data: bytes
    picture: Picture
    """(H, W, 3) uint8, decoded from `data`."""
    psnr: float
    ms_ssim_db: float | None
    """None for a side of 160 pixels or less."""
    too_large: bool = False
    """No file of this codec is as small as the one it is compared with."""

    @property
    def bpp(self) -> float:
        """Bits per pixel of the whole file."""
        return bits_per_pixel(len(self.data), *self.picture.shape[:2])

    @property
    def lines(self) -> tuple[str, ...]:
        """The caption."""
        quality = f"PSNR {self.psnr:.2f} dB"
        if self.ms_ssim_db is not None:
            quality += f", MS-SSIM {self.ms_ssim_db:.2f} dB"
        size = f"{len(self.data):,} bytes, {self.bpp:.3f} bpp"
        return (self.label, f"{size}: its smallest file" if self.too_large else size, quality)


def lalic_file(weights: Weights, rgb: Picture, quality: float | None = None) -> Coded:
    """An (H, W, 3) photograph as `lalic compress` writes it, decoded from those bytes.

    The model must be `update()`d; of one of several rates, `quality` is the one to code with.
    """
    import torch

    from lalic.codec import bitstream
    from lalic.codec.pictures import Picture as Pixels
    from lalic.codec.pictures import decode_picture, encode_picture
    from lalic.codec.quality import equivalent_lambda, named_with_quality

    gray = bool((rgb == rgb[..., :1]).all())
    coded = encode_picture(weights.model, Pixels(rgb, gray=gray), quality=quality)
    label = bitstream.label_of(weights.loss, several_rates=quality is not None)
    data = bitstream.pack(coded, weights.fingerprint, label, torch.get_num_threads())
    decoded = decode_picture(weights.model, bitstream.parse(data, "the file").image).rgb
    lmbda = equivalent_lambda(weights.loss.get("metric"), coded.quality)
    return _coded(f"LALIC, {named_with_quality(weights.name, coded.quality, lmbda)}", ".lalic", data, rgb, decoded)


def other_file(rgb: Picture, format: str, budget: int) -> Coded:
    """The best file of at most `budget` bytes that another format has of an (H, W, 3) photograph."""
    fitted = best_within(rgb, format, budget)
    return _coded(fitted.label, _SUFFIXES[fitted.key], fitted.data, rgb, fitted.decoded(), not fitted.fits)


def _coded(label: str, suffix: str, data: bytes, rgb: Picture, decoded: Picture, too_large: bool = False) -> Coded:
    return Coded(label, suffix, data, decoded, psnr(rgb, decoded), decibels(ms_ssim(rgb, decoded)), too_large)


def compare(
    photo: Path,
    weights: Weights,
    formats: Sequence[str],
    folder: Path,
    *,
    quality: float | None = None,
    crop: Box | None,
    zoom: int,
    files: bool,
) -> list[Coded]:
    """Write the sheet of one photograph; what it shows, the LALIC file first. `quality` as in lalic_file."""
    rgb = read_rgb(photo)
    height, width = rgb.shape[:2]
    if crop is not None and (crop.left + crop.width > width or crop.top + crop.height > height):
        raise LalicError(f"{photo}: the crop reaches beyond its {width} x {height} pixels")
    ours = lalic_file(weights, rgb, quality)
    coded = [ours, *(other_file(rgb, format, len(ours.data)) for format in formats)]
    part, note = crop, ""
    if part is None:
        other = coded[1].picture if formats else rgb
        part = where_they_differ(ours.picture, other, *part_size(height, width, zoom))
        what = FORMATS[formats[0]].label if formats else "the original"
        note = f"Enlarged: where LALIC and {what} differ most."
    original = Version(rgb, ("original", photo.name, f"{width} x {height} pixels"))
    sheet = draw_sheet([original, *(Version(c.picture, c.lines) for c in coded)], part, note)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write_picture(_target(folder, photo), buffer)
    if files:
        for each in coded:
            with atomic_open(folder / f"{photo.stem}-compared{each.suffix}") as file:
                file.write(each.data)
    return coded


def _target(folder: Path, photo: Path) -> Path:
    return folder / f"{photo.stem}-compared.png"


def rows(photo: Path, coded: Sequence[Coded]) -> str:
    """Lines of the Markdown table whose head is HEAD."""
    cells = [
        (
            for_terminal(photo.name),
            c.label + (" (its smallest)" if c.too_large else ""),
            f"{len(c.data)}",
            f"{c.bpp:.4f}",
            f"{c.psnr:.2f}",
            "-" if c.ms_ssim_db is None else f"{c.ms_ssim_db:.2f}",
        )
        for c in coded
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


HEAD = "| photograph | file | bytes | bpp | PSNR, dB | MS-SSIM, dB |\n|---|---|---:|---:|---:|---:|"


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `lalic compare`."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    formats = list(dict.fromkeys(format_of(name) for name in args.formats))
    photos = [photo for given in args.photos for photo in (list_images(given) if given.is_dir() else [given])]
    _check_targets(photos, args.output)
    for photo in photos:
        if not photo.is_file():
            raise LalicError(f"no such photograph: {photo}")
    import torch

    from lalic.codec.bitstream import MAX_THREADS
    from lalic.codec.quality import chosen_quality
    from lalic.codec.reach import weights_of_quality
    from lalic.release import open_weights

    weights = open_weights(args.weights or weights_of_quality(args.quality))
    quality = chosen_quality(weights, args.quality)
    weights.model.update()
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    args.output.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    for photo in photos:
        options = {"quality": quality, "crop": args.crop, "zoom": args.zoom, "files": args.files}
        coded = compare(photo, weights, formats, args.output, **options)
        print(rows(photo, coded), flush=True)
    print("\n" + "\n".join(str(_target(args.output, photo)) for photo in photos))
    return 0


def _check_targets(photos: Sequence[Path], folder: Path) -> None:
    """LalicError where two photographs would have one sheet, or a sheet the place of a photograph."""
    found: dict[Path, Path] = {}
    for photo in photos:
        target = _target(folder, photo)
        if target in found:
            raise LalicError(f"{found[target]} and {photo} would both be {target}: compare them into two folders")
        found[target] = photo
    for target in found:
        if any(target.exists() and photo.exists() and target.samefile(photo) for photo in photos):
            raise LalicError(f"{target} is one of the photographs: name another folder with -o")


def _crop(text: str) -> Box:
    try:
        left, top, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no crop: LEFT,TOP,WIDTH,HEIGHT in pixels") from None
    if min(left, top) < 0 or min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no crop: it begins at 0 or later and has a pixel at least")
    return Box(left, top, width, height)


def _zoom(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 40:
        raise argparse.ArgumentTypeError(f"{text!r}: how many times the part is enlarged, 1 to 40")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a photograph, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the sheets go")
    parser.add_argument("--quality", type=quality_argument, metavar="Q", help="as for lalic compress")
    parser.add_argument("--weights", help="of any kind that lalic compress takes (default: the same as there)")
    parser.add_argument(
        "--formats", nargs="*", default=["jpeg"], metavar="FORMAT",
        help=f"to compare with (default: jpeg): {', '.join(f.lower() for f in FORMATS)}",
    )  # fmt: skip
    parser.add_argument("--crop", type=_crop, metavar="LEFT,TOP,WIDTH,HEIGHT", help="the part that is enlarged")
    parser.add_argument("--zoom", type=_zoom, default=4, help="how many times a part is enlarged (%(default)s)")
    parser.add_argument("--files", action="store_true", help="write the files as well")
    return parser


if __name__ == "__main__":
    run_main(main)
