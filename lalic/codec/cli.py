"""`lalic compress`, `lalic decompress` and `lalic info`.

    lalic compress photo.png photo.lalic --weights W
    lalic decompress photo.lalic photo.png [--weights W]
    lalic info photo.lalic

An existing output is kept unless `--force` is given. Output files are written whole or not at all. What needs
torch is imported only when it is needed, so that `info` and errors come at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lalic.codec import bitstream
from lalic.errors import LalicError, run_main
from lalic.files import atomic_open

LOSSLESS = {".png": "PNG", ".bmp": "BMP", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF"}
MAX_THREADS = 64


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of the three subcommands; `argv[0]` is `compress`, `decompress` or `info`."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if args.command == "compress":
        return compress(args.picture, args.file, args.weights, args.force, args.max_pixels, args.verify)
    if args.command == "decompress":
        return decompress(args.file, args.picture, args.weights, args.force, args.max_pixels)
    return info(args.file)


def compress(source: Path, target: Path, weights_path: Path | None, force: bool, max_pixels: int, verify: bool) -> int:
    """Write the picture `source` as the `.lalic` file `target`; `verify` decodes it again first."""
    _check_target(target, force)
    import torch

    from lalic.codec.coder import decode_image, encode_image
    from lalic.codec.weights import default_weights
    from lalic.data.images import read_rgb
    from lalic.release import open_weights

    rgb = read_rgb(source, max_pixels=max_pixels)
    height, width = rgb.shape[:2]
    weights = open_weights(weights_path or default_weights())
    weights.model.update()
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    _build_operator()
    start = time.perf_counter()
    coded = encode_image(weights.model, rgb)
    seconds = time.perf_counter() - start
    if verify:
        decode_image(weights.model, coded)
    label = bitstream.model_label(weights.loss.get("metric"), weights.loss.get("lambda"))
    data = bitstream.pack(coded, weights.fingerprint, label, torch.get_num_threads())
    with atomic_open(target) as file:
        file.write(data)
    print(
        f"{target}: {width} x {height}, {_bytes(source.stat().st_size)} -> {_bytes(len(data))} "
        f"({len(data) - coded.num_bytes} of them header), "
        f"{len(data) * 8 / (height * width):.4f} bpp, encoded in {seconds:.2f} s"
        f"{' and decoded again' if verify else ''}, model {weights.name}"
    )
    return 0


def decompress(source: Path, target: Path, weights_path: Path | None, force: bool, max_pixels: int) -> int:
    """Write the picture in the `.lalic` file `source` to `target`, a lossless format by its suffix."""
    if target.suffix.lower() not in LOSSLESS:
        raise LalicError(f"{target}: write one of {', '.join(LOSSLESS)}; other formats would lose quality again")
    _check_target(target, force)
    data = _read(source)
    parsed = bitstream.parse(data, str(source), max_pixels)
    import torch

    from lalic.codec.coder import decode_image
    from lalic.codec.weights import weights_for

    weights = weights_for(parsed, str(source), weights_path)
    weights.model.update()
    torch.set_num_threads(parsed.threads)
    _build_operator()
    start = time.perf_counter()
    try:
        rgb = decode_image(weights.model, parsed.image)
    except LalicError as error:
        raise LalicError(f"{source}: {error}") from error
    seconds = time.perf_counter() - start
    _write_picture(rgb, target)
    print(
        f"{target}: {rgb.shape[1]} x {rgb.shape[0]}, {_bytes(len(data))} -> {_bytes(target.stat().st_size)}, "
        f"decoded in {seconds:.2f} s, model {weights.name}"
    )
    return 0


def info(source: Path) -> int:
    """Print what a `.lalic` file says about itself; needs no weights."""
    data = _read(source)
    parsed = bitstream.parse(data, str(source), max_pixels=bitstream.MAX_SIDE**2)
    image = parsed.image
    print(f"{source}: LALIC picture, format version {bitstream.VERSION}, checksum good")
    print(f"size:     {image.width} x {image.height}, 8-bit RGB")
    print(f"model:    {parsed.model_name}")
    print(f"bytes:    {len(data)} = {image.num_bytes} entropy-coded + {len(data) - image.num_bytes} header and checks")
    print(f"rate:     {len(data) * 8 / (image.height * image.width):.4f} bpp")
    sizes = [len(s) for s in image.strings]
    print(f"strings:  {len(sizes)}: y {' '.join(map(str, sizes[:-1]))}, z {sizes[-1] if sizes else 0}")
    print(f"threads:  {parsed.threads}")
    return 0


def _build_operator() -> None:
    """Call BiWKV once, so that what it compiles on a new machine is not told as coding time."""
    import torch

    from lalic.ops import biwkv

    one = torch.zeros(1)
    biwkv(one, one, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))


def _check_target(target: Path, force: bool) -> None:
    if target.is_dir():
        raise LalicError(f"{target} is a folder: name the file to write")
    if target.exists() and not force:
        raise LalicError(f"{target} exists: add --force to replace it")
    if not target.parent.is_dir():
        raise LalicError(f"no such folder: {target.parent}")


def _read(source: Path) -> bytes:
    if not source.is_file():
        raise LalicError(f"no such file: {source}")
    return source.read_bytes()


def _write_picture(rgb: NDArray[np.uint8], target: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=LOSSLESS[target.suffix.lower()])
    with atomic_open(target) as file:
        file.write(buffer.getbuffer())


def _bytes(count: int) -> str:
    return f"{count:,} bytes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    weights = "weights file, release bundle, checkpoint or run folder"
    pixels = "refuse pictures of more pixels, because of the memory they need (%(default)s)"

    encoder = commands.add_parser("compress", help="picture -> .lalic file")
    encoder.add_argument("picture", type=Path, help="JPEG, PNG, WebP, ...; coded as 8-bit RGB")
    encoder.add_argument("file", type=Path, help=".lalic file to write")
    encoder.add_argument("--weights", type=Path, help=f"{weights} (default: the one in $LALIC_WEIGHTS or ./release)")
    encoder.add_argument("--verify", action="store_true", help="decode the result before writing it")

    decoder = commands.add_parser("decompress", help=".lalic file -> picture")
    decoder.add_argument("file", type=Path, help=".lalic file")
    decoder.add_argument("picture", type=Path, help=f"picture to write ({', '.join(LOSSLESS)})")
    decoder.add_argument(
        "--weights",
        type=Path,
        help=f"{weights} (default: found by the file's fingerprint in $LALIC_WEIGHTS, ./release)",
    )
    for command in (encoder, decoder):
        command.add_argument("--force", action="store_true", help="replace an existing output")
        command.add_argument("--max-pixels", type=int, default=bitstream.MAX_PIXELS, help=pixels)

    about = commands.add_parser("info", help="what a .lalic file holds")
    about.add_argument("file", type=Path, help=".lalic file")
    return parser


if __name__ == "__main__":
    run_main(main)
