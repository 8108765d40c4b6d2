"""Decode no more of a photograph than a crop needs.

    file ─► layout (lalic.data.jpeg) ─► common JPEG: cut (lalic.data.jpeg_cut), nvImageCodec decodes ─► upright crop
                                     └► all else:    Pillow decodes the whole (lalic.data.images), then it is cut

All else is what Pillow alone decodes by our rules (PNG, WebP, CMYK ...), what is uncommon, and progressive JPEG, all of
which any decoder must read, with no gain left to speak of.

Both give the same bits. The region decoder is libjpeg-turbo with the same settings as in Pillow: it must read the
Huffman codes of everything above the crop, but neither transforms nor colours it, and reads nothing below. Where it
is used is limited to what tests/test_region.py compares with Pillow, and `choose_decoder` compares the two at the
start of a run, since Pillow may be built on another libjpeg. Without a C++ compiler it gets the file uncut.

A file is bad when Pillow would refuse it, or when it is a JPEG without an end. Neither cutting nor the region decoder
sees what lies below the crop, but as long as no stray marker stands there (which the cut looks for, or `StrayMarkers`)
Pillow cannot fail there either; and when there is one, or the region decoder fails, Pillow decides.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lalic.data.images import MAX_PIXELS, Box, decode_rgb
from lalic.data.jpeg import START, Layout, StrayMarkers, check_end, read_layout
from lalic.data.jpeg_cut import JpegCutter
from lalic.kernels.builder import BuildError

logger = logging.getLogger("lalic.data")

Decoder = Literal["auto", "pillow"]

# Two pixels wide or high, libjpeg-turbo interpolates colour differently in a region and in the whole.
_LEAST_SIDE = 16

_PACKAGE = "nvidia.nvimgcodec"


class CropDecoder:
    """Decodes the part `box` of an upright image to RGB. Usable after a fork and after pickling."""

    def __init__(self, decoder: Decoder = "auto") -> None:
        """decoder: "auto" takes the region decoder where it can be used, "pillow" never does."""
        self.decoder = decoder
        self._process = -1
        self._regions: RegionDecoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "_process": -1, "_regions": None}

    def decode(self, data: bytes, name: str, box: Box) -> np.ndarray:
        """(bottom - top, right - left, 3) uint8 for box = (left, top, right, bottom).

        Views of memory that the next call overwrites are possible: copy what is to stay.
        Raises ImageError as `decode_rgb` does, and for a JPEG without an end.
        """
        if data.startswith(START):
            layout = read_layout(data)
            check_end(data, name, layout.scan if layout else None)
            regions = self._region_decoder()
            if layout and regions:
                pixels = self._decode_region(regions, data, layout, box)
                if pixels is not None:
                    return pixels
        return decode_rgb(data, name, box=box)

    def _region_decoder(self) -> RegionDecoder | None:
        # Made anew after a fork, where it would share its locks with the parent.
        if self._process != os.getpid():
            self._process = os.getpid()
            self._regions = None if self.decoder == "pillow" else open_region_decoder()
        return self._regions

    def _decode_region(self, regions: RegionDecoder, data: bytes, layout: Layout, box: Box) -> np.ndarray | None:
        stored = stored_box(box, layout)
        if stored is None or layout.width * layout.height > MAX_PIXELS:
            return None
        pixels = regions.decode(data, layout, stored)
        return None if pixels is None else turn_upright(pixels, layout.orientation)


def stored_box(box: Box, layout: Layout) -> Box | None:
    """The box of the upright image as it lies in the stored one; None when it is outside, or very small."""
    left, top, right, bottom = box
    width, height = layout.width, layout.height
    if layout.orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    if not (0 <= left and left + _LEAST_SIDE <= right <= width and 0 <= top and top + _LEAST_SIDE <= bottom <= height):
        return None
    if layout.orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if layout.orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of a stored (H, W, 3) region as it stands upright, for EXIF's orientation 1 to 8."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    return pixels.transpose(1, 0, 2) if orientation >= 5 else pixels


class RegionDecoder:
    """nvImageCodec's libjpeg-turbo on the CPU, in the calling thread. For one thread."""

    def __init__(self, nvimgcodec: Any, cutter: JpegCutter | None) -> None:
        self._codec, self._cutter = nvimgcodec, cutter
        self._stray = StrayMarkers()
        self._image: Any = None
        """The last one, whose memory serves again."""
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
            options=":fancy_upsampling=1 :fast_idct=0",
        )
        self._settings = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, data: bytes, layout: Layout, box: Box) -> np.ndarray | None:
        """(H, W, 3) uint8 of the stored image's box = (left, top, right, bottom); None when it cannot.

        Valid until the next call.
        """
        if self._cutter and not layout.restarts:
            cut = self._cutter(data, box)
            # Otherwise mostly damage, about which libjpeg would complain on the standard error output.
            return self._decode(*cut) if cut else None
        return None if self._stray.found(data, layout) else self._decode(data, box, region=True)

    def _decode(self, data: bytes | np.ndarray, box: Box, *, region: bool = False) -> np.ndarray | None:
        left, top, right, bottom = box
        try:
            stream = self._codec.CodeStream(data)
            if region:
                part = self._codec.Region(top, left, bottom, right)
                stream = stream.get_sub_code_stream(region=part)
                left, top, right, bottom = 0, 0, right - left, bottom - top
            image = self._decoder.decode(stream, image=self._image, params=self._settings)
        # pybind11 translates C++ exceptions to several kinds.
        except Exception:
            return None
        if image is None:
            return None
        self._image = image
        pixels = np.asarray(image)
        return pixels[top:bottom, left:right] if pixels.shape[0] >= bottom and pixels.shape[1] >= right else None


@functools.cache
def choose_decoder(decoder: Decoder) -> tuple[str, str]:
    """What "auto" comes to on this machine, and why: ("nvimgcodec" or "pillow", a phrase for the log)."""
    if decoder == "pillow":
        return "pillow", "data.decoder is pillow"
    try:
        regions = RegionDecoder(_load_nvimgcodec(), None)
    except ImportError as error:
        return "pillow", f"nvidia-nvimgcodec, which decodes JPEG several times faster, cannot be used: {error}"
    except Exception as error:
        return "pillow", f"nvidia-nvimgcodec cannot be used on this machine: {' '.join(str(error).split())}"
    if not _agrees_with_pillow(regions):
        return "pillow", "nvidia-nvimgcodec decodes to other bits than this Pillow"
    try:
        regions = RegionDecoder(_load_nvimgcodec(), JpegCutter())
    except BuildError as error:
        return "nvimgcodec", f"regions of JPEG, with Pillow's bits; of the whole files, which is slower, since {error}"
    if not _agrees_with_pillow(regions):
        return "pillow", "parts of a JPEG decode to other bits than the whole with this Pillow"
    return "nvimgcodec", "regions of JPEG, with Pillow's bits"


def log_decoder(decoder: Decoder) -> None:
    """Log, once per process, what decodes."""
    if decoder not in _logged:
        _logged.add(decoder)
        logger.info("images are decoded by %s: %s", *choose_decoder(decoder))


_logged: set[str] = set()


def open_region_decoder() -> RegionDecoder | None:
    """A region decoder for the calling process, None where there is none."""
    if choose_decoder("auto")[0] != "nvimgcodec":
        return None
    try:
        cutter = JpegCutter()
    except BuildError:
        cutter = None
    return RegionDecoder(_load_nvimgcodec(), cutter)


@functools.cache
def _load_nvimgcodec() -> Any:
    """Import nvImageCodec with its JPEG decoder alone.

    It otherwise loads every plug-in beside it, and those that miss a CUDA library complain on the standard error
    output. The folder of plug-ins and the verbosity are environment variables that it reads while it is imported.
    """
    spec = importlib.util.find_spec("nvidia") and importlib.util.find_spec(_PACKAGE)
    if not spec or not spec.submodule_search_locations:
        raise ImportError("it is not installed (pip install nvidia-nvimgcodec-cu13)")
    plugins = [
        path for place in spec.submodule_search_locations for path in Path(place).glob("extensions/libjpeg_turbo*")
    ]
    if not plugins:
        raise ImportError("its libjpeg-turbo plug-in is missing")
    with tempfile.TemporaryDirectory(prefix="lalic-") as folder:
        (Path(folder) / plugins[0].name).symlink_to(plugins[0])
        settings = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            from nvidia import nvimgcodec
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
    return nvimgcodec


def _agrees_with_pillow(regions: RegionDecoder) -> bool:
    """Whether both decode a few small JPEGs to the same bits."""
    rows, columns = np.mgrid[:75, :91]
    waves = [127 + 90 * np.sin(rows / (2 + i) + columns / (5 - i)) for i in range(3)]
    texture = (rows * 7919 + columns * 104729) % 61
    picture = Image.fromarray((np.stack(waves, -1) + texture[..., None] - 30).clip(0, 255).astype(np.uint8))
    for options in ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88, **options)
        data = buffer.getvalue()
        layout, whole = read_layout(data), decode_rgb(data, "a test image")
        for left, top, right, bottom in ((0, 0, 91, 75), (17, 23, 59, 70), (32, 16, 91, 64)):
            part = layout and regions.decode(data, layout, (left, top, right, bottom))
            if part is None or not np.array_equal(part, whole[top:bottom, left:right]):
                return False
    return True
