"""Cut the coded units around a box out of a JPEG without decoding them: kernels/jpeg_cut.cpp, compiled at first use.

Most of what a region decoder does is to read the Huffman codes of what it does not need. This does it faster, and
leaves the decoder a small JPEG with the very same coefficients.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from lalic.data.images import Box
from lalic.kernels import builder

_SOURCE, _LIBRARY = "jpeg_cut.cpp", "lalic_jpeg.so"


class JpegCutter:
    """Callable; keeps its memory from one image to the next, so it is for one thread."""

    def __init__(self) -> None:
        """Raises BuildError where it cannot be compiled."""
        self._cut = _load().lalic_jpeg_cut
        self._out = np.empty(1 << 16, np.uint8)
        self._origin = np.zeros(2, np.int32)

    def __call__(self, data: bytes, box: Box) -> tuple[np.ndarray, Box] | None:
        """The smaller JPEG, valid until the next call, and the place of the box in it.

        None for unusual or damaged data, and for those with a stray marker before the end of the image. `box` is
        (left, top, right, bottom) in pixels of the stored image.
        """
        if len(self._out) < len(data) + 1024:
            self._out = np.empty(2 * len(data) + 1024, np.uint8)
        room = len(self._out)
        size = self._cut(data, len(data), *box, self._out.ctypes.data, room, self._origin.ctypes.data)
        if not size:
            return None
        x, y = self._origin.tolist()
        left, top, right, bottom = box
        return self._out[:size], (left - x, top - y, right - x, bottom - y)


def recipe() -> builder.Recipe:
    """How the library is compiled."""
    return builder.Recipe("jpeg", _LIBRARY, (_SOURCE,), builder.cpu_recipe().depends_on, _ninja_file)


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(builder.build(recipe())))
    library.lalic_jpeg_cut.restype = ctypes.c_int64
    memory, number = ctypes.c_void_p, ctypes.c_int
    library.lalic_jpeg_cut.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int64,
        number,
        number,
        number,
        number,
        memory,
        ctypes.c_int64,
        memory,
    ]
    return library


def _ninja_file() -> str:
    source = builder.escape(str(builder.SOURCE_FOLDER / _SOURCE), path=True)
    return "\n".join(
        [
            f"cxx = {builder.escape(builder.compiler())}",
            f"rule library\n  command = $cxx {builder.flags()} -shared $in -o $out",
            f"build {_LIBRARY}: library {source}\n",
        ]
    )
