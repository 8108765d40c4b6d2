"""One generated picture, coded when a bundle is written, so that `lalic verify` has something to compare with.

The bundle holds the coded picture (reference.lalic); its configuration holds, under "reference", what the exporting
machine got from it. The pixels follow from integers alone, so that every machine generates the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lalic.codec import bitstream
from lalic.codec.coder import decode_image, encode_image, pad
from lalic.errors import LalicError
from lalic.metrics import estimated_bits, psnr, to_tensor
from lalic.model import LALIC

HEIGHT, WIDTH = 88, 120

PSNR_DECODED = 0.01
"""dB between machines for the same file: its latents are the same, g_s rounds otherwise."""
PSNR_CODED = 0.1
BYTES_CODED = 0.02
"""Share between machines for files that each has coded itself: g_a and h_a round otherwise, and a few symbols flip."""
BITS_ESTIMATED = 0.01


def reference_picture() -> NDArray[np.uint8]:
    """(88, 120, 3): gradients, edges, a disc, stripes of growing frequency and noise, without floating point."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.int64)
    noise = ((x * 73_856_093) ^ (y * 19_349_663) ^ (x * y * 83_492_791)) >> 5 & 31
    stripes = np.abs((x * x // 12) % 128 - 64) * 3
    disc = (x - 84) ** 2 + (y - 30) ** 2 < 22**2
    checks = ((x // 6 + y // 6) % 2) * 90
    sky = np.stack([60 + y, 90 + y + x // 4, 200 - y // 2 + x // 8], axis=-1)
    picture = np.where((y > 60)[..., None], np.stack([stripes, stripes // 2 + 40, 200 - stripes], axis=-1), sky)
    picture = np.where(disc[..., None], np.stack([230 - x // 3, 120 + noise * 2, 40 + noise], axis=-1), picture)
    box = (x > 8) & (x < 44) & (y > 16) & (y < 52)
    picture = np.where(box[..., None], np.stack([checks + noise, checks + 60, 255 - checks], axis=-1), picture)
    return np.clip(picture + noise[..., None] // 8, 0, 255).astype(np.uint8)


def picture_sum() -> str:
    """SHA-256 of the picture's pixels, rows of RGB."""
    return hashlib.sha256(reference_picture().tobytes()).hexdigest()


def code_reference(model: LALIC, fingerprint: str, label: int, path: Path) -> dict[str, Any]:
    """Code the picture, write the file `path`, and return what its decoder gets; LalicError when it cannot."""
    picture = reference_picture()
    with _one_thread():
        model.update()
        coded = encode_image(model, picture, quality=middle_quality(model))
        data = bitstream.pack(coded, fingerprint, label, 1)
        decoded = psnr(picture, decode_image(model, coded))
        estimated = _estimated(model, picture, coded.quality)
    path.write_bytes(data)
    return {
        "picture_sha256": picture_sum(),
        "bytes": len(data),
        "psnr": decoded,
        "bpp_estimated": estimated,
    }


def check_reference(model: LALIC, told: Mapping[str, Any], data: bytes, fingerprint: str, name: str) -> str:
    """Compare this machine with what a bundle's configuration says under "reference"; returns a line's worth of words.

    `data` is its reference.lalic, called `name` in messages. Raises LalicError for what differs.
    """
    try:
        told_psnr, told_bits, told_bytes = (float(told[key]) for key in ("psnr", "bpp_estimated", "bytes"))
    except (KeyError, TypeError, ValueError) as error:
        raise LalicError(f"the configuration does not say what the reference picture gives: {error}") from error
    if told.get("picture_sha256") != picture_sum():
        raise LalicError("this program generates another reference picture than the one that the bundle was made with")
    parsed = bitstream.parse(data, name, HEIGHT * WIDTH)
    if (parsed.image.width, parsed.image.height) != (WIDTH, HEIGHT):
        raise LalicError(f"{name} holds another picture")
    if not fingerprint.startswith(parsed.fingerprint.hex()):
        raise LalicError(f"{name} was written with {parsed.model_name}, which is another model")
    picture = reference_picture()
    with _one_thread():
        model.update()
        decoded = psnr(picture, decode_image(model, parsed.image))
        coded = encode_image(model, picture, quality=parsed.image.quality)
        again = psnr(picture, decode_image(model, coded))
        estimated = _estimated(model, picture, coded.quality)
    size = len(bitstream.pack(coded, fingerprint, 0, 1))
    _compare("the decoded picture has a PSNR of", decoded, told_psnr, PSNR_DECODED, "dB")
    _compare("the picture coded here has a PSNR of", again, told_psnr, PSNR_CODED, "dB")
    _compare("the picture coded here has", size, told_bytes, BYTES_CODED * told_bytes + 16, "bytes")
    _compare("the estimated rate is", estimated, told_bits, BITS_ESTIMATED * told_bits, "bpp")
    return f"decodes to {decoded:.3f} dB (told {told_psnr:.3f}), coded here {size} bytes (told {told_bytes:.0f})"


def _compare(what: str, found: float, told: float, allowed: float, unit: str) -> None:
    if not abs(found - told) <= allowed:
        raise LalicError(f"{what} {found:.6g} {unit} here, and {told:.6g} {unit} where the bundle was written")


def middle_quality(model: LALIC) -> float | None:
    """What pictures are coded with to check a bundle: the middle of the model's range; None for a model of one rate."""
    return None if model.rates is None else (model.rates.lowest + model.rates.highest) / 2


@torch.inference_mode()
def _estimated(model: LALIC, rgb: NDArray[np.uint8], quality: float | None) -> float:
    out = model(pad(to_tensor(rgb).to(next(model.parameters()).device)), quality)
    return estimated_bits(out["likelihoods"]) / (HEIGHT * WIDTH)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so the file, must not depend on how many cores this machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
