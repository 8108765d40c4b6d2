"""Picture files as the codec reads and writes them: 8-bit RGB or gray, and alpha.

Reading follows the rules of lalic.data.images (EXIF orientation applied, palettes looked up, the high byte of 16 bits,
no colour profile), with these differences: TIFF and GIF are read too; transparency is kept; of animations and
multi-page files nothing is coded, since one picture of them is not the file.

H, W: the upright picture's sides.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lalic.codec import alpha as alpha_section
from lalic.codec import bitstream
from lalic.codec.bitstream import CodedImage
from lalic.data import images
from lalic.data.images import ImageError, describe_error
from lalic.errors import LalicError
from lalic.files import atomic_open

if TYPE_CHECKING:
    from lalic.model import LALIC

FORMATS = (*images.FORMATS, "TIFF", "GIF")
LOSSLESS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM"}
"""Suffixes that pictures are written with, and Pillow's names of their formats."""
_LARGEST_PIXEL = 32
"""Bytes: three numbers of 16 bits as text take 18."""
_WITH_ALPHA = ("PNG", "TIFF")


@dataclass(frozen=True)
class Picture:
    """An upright 8-bit picture.

    Attributes:
        rgb: (H, W, 3) uint8; in a gray picture three equal channels. Not multiplied by alpha.
        alpha: (H, W) uint8, 255 = opaque; None for a picture that is opaque everywhere.
        gray: whether it is a gray picture.
    """

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    gray: bool = False

    @property
    def kind(self) -> str:
        """For people: "RGB", "gray", each perhaps with alpha."""
        return ("gray" if self.gray else "RGB") + ("" if self.alpha is None else " with alpha")


def read_picture(path: Path, max_pixels: int = images.MAX_PIXELS) -> Picture:
    """The picture file `path`. A picture is gray when its three channels are equal everywhere.

    Raises ImageError for what is no single 8-bit or 16-bit image of at most `max_pixels`, or does not fit a `.lalic`
    file; LalicError for a missing file.
    """
    name = str(path)
    _check_source(path, max_pixels)
    data = images.read_bytes(path)

    def check(image: Image.Image) -> None:
        bitstream.check_size(image.width, image.height, name)
        _refuse_several(image, name)

    try:
        image = images.load(data, name, max_pixels, FORMATS, check)
    except ImageError as error:
        if error.reason != "too many pixels":
            raise
        # Pillow has a limit of its own, which no option raises.
        fixed = isinstance(error.__cause__, Image.DecompressionBombError)
        advice = "scale it down" + ("" if fixed else ", or raise --max-pixels if the memory is there")
        raise LalicError(f"{error}: {advice}") from error
    try:
        if image.mode == "I" and image.format == "TIFF":
            raise ImageError(name, "unsupported pixel format", "32-bit integers")
        image = _straight(images.upright(image))
        alpha = _alpha_of(image)
        if alpha is not None:
            # Without its transparency, to_rgb lays the picture over nothing.
            image = _without_alpha(image)
        rgb = np.array(images.to_rgb(image, name))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(name, "damaged", describe_error(error)) from error
    if alpha is not None and (alpha == 255).all():
        alpha = None
    red, green, blue = (rgb[..., c] for c in range(3))
    return Picture(rgb, alpha, gray=bool((red == green).all() and (green == blue).all()))


def _check_source(path: Path, max_pixels: int) -> None:
    """LalicError for what is no file, or so large that it cannot be a picture: it is read as a whole."""
    if not path.exists():
        raise LalicError(f"no such file: {path}")
    if not path.is_file():
        raise LalicError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: name one picture")
    most = _LARGEST_PIXEL * max_pixels + (64 << 20)
    if (size := path.stat().st_size) > most:
        raise ImageError(
            str(path), "too large", f"{size:,} bytes, no picture within --max-pixels has more than {most:,}"
        )


def _refuse_several(image: Image.Image, name: str) -> None:
    # The second picture of a camera's MPO is a preview or the other eye's view; the first is the photograph.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        what = "pages" if image.format == "TIFF" else "frames, an animation"
        raise ImageError(name, "not a single picture", f"{frames} {what}: save the one you want as PNG")


def _straight(image: Image.Image) -> Image.Image:
    """The image, where it has an alpha channel as RGBA or LA."""
    mode = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(image.mode)
    return image if mode is None else image.convert(mode)


def _alpha_of(image: Image.Image) -> NDArray[np.uint8] | None:
    """(H, W) alpha of an image that has any kind of transparency."""
    if image.mode in ("RGBA", "LA"):
        return np.array(image.getchannel("A"))
    if "transparency" not in image.info:
        return None
    if image.mode.startswith("I"):
        # 16-bit gray, of which one value is transparent.
        return np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    colour = image.info["transparency"]
    if isinstance(colour, tuple) and max(colour) > 255:
        # Of 16 bits per channel, of which the pixels keep the high byte.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return np.array(image.convert("RGBA").getchannel("A"))


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours alone, as they are where they are transparent too."""
    if image.mode in ("RGBA", "LA"):
        image = image.convert({"RGBA": "RGB", "LA": "L"}[image.mode])
    image.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return image


def encode_picture(
    model: LALIC,
    picture: Picture,
    arithmetic: str = bitstream.FLOAT64,
    *,
    quality: float | None = None,
    sections: tuple[bitstream.Section, ...] = (),
) -> CodedImage:
    """Code `picture` with a model that was `update()`d: its colours with the model, alpha without loss.

    `quality` and `sections` belong to a model of several rates.
    """
    from lalic.codec.coder import encode_image

    alpha = b"" if picture.alpha is None else alpha_section.encode(picture.alpha)
    colour = bitstream.GRAY if picture.gray else bitstream.RGB
    return encode_image(model, picture.rgb, arithmetic, quality=quality, colour=colour, alpha=alpha, sections=sections)


def decode_picture(model: LALIC, coded: CodedImage) -> Picture:
    """The picture in `coded`; LalicError when any part of it is damaged or does not belong to `model`.

    Of a gray picture the model paints three channels that are not quite equal: their mean is taken, rounded.
    """
    from lalic.codec.coder import decode_image

    # Alpha first: it costs little, and what is wrong with it is known before the model runs.
    alpha = alpha_section.decode(coded.alpha, coded.width, coded.height) if coded.alpha else None
    rgb = decode_image(model, coded)
    gray = coded.colour == bitstream.GRAY
    if gray:
        mean = (rgb.sum(axis=2, dtype=np.uint16) + 1) // 3
        rgb = np.repeat(mean.astype(np.uint8)[..., None], 3, axis=2)
    return Picture(rgb, alpha, gray)


def check_suffix(target: Path) -> None:
    """LalicError for a file name whose suffix names no lossless format."""
    if target.suffix.lower() not in LOSSLESS:
        raise LalicError(f"{target}: write one of {', '.join(LOSSLESS)}; other formats would lose quality again")


def check_colour(target: Path, gray: bool) -> None:
    """LalicError for a format that cannot hold the picture's colours."""
    if target.suffix.lower() == ".pgm" and not gray:
        raise LalicError(f"{target}: .pgm holds gray pictures and this one has colours; write .ppm or .png")


def write_picture(picture: Picture, target: Path) -> str:
    """Write `picture` to `target` in the format its suffix names; a note on what that format cannot hold, or ""."""
    suffix, note = target.suffix.lower(), ""
    kind = LOSSLESS[suffix]
    check_colour(target, picture.gray)
    image = Image.fromarray(picture.rgb)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
        if kind not in _WITH_ALPHA:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            note = f"{suffix} holds no alpha channel: laid over white (write .png to keep it)"
    if picture.gray and suffix != ".ppm":
        image = image.convert("LA" if image.mode == "RGBA" else "L")
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    with atomic_open(target) as file:
        file.write(buffer.getbuffer())
    return note
