"""The codec for people: pictures to `.lalic` files and back.

`encode_image(model, rgb) -> CodedImage` and `decode_image(model, coded) -> rgb`, see `lalic.codec.coder`; the
bytes of a file are those of `lalic.codec.bitstream`.
"""

from typing import Any

from lalic.codec.bitstream import CodedImage

__all__ = ["CodedImage", "decode_image", "encode_image"]


def __getattr__(name: str) -> Any:
    # Imported on demand: reading a file's header shall not need torch.
    if name in __all__:
        from lalic.codec import coder

        return getattr(coder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
