"""tarfile made strict: damage is an error and no silent end, and nothing is read that no member can need."""

from __future__ import annotations

import tarfile
from typing import Any

BUFFER = 1 << 20
# Headers with long names or PAX records are read whole. Nobody needs more; a damaged one may ask for anything.
MOST_HEADER = 16 << 20
_MOST_PLACE = 1 << 62


class TarDamaged(Exception):
    """A tar that cannot be read on."""


class CheckedHeader(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the tar; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind == "EOFHeaderError":
                raise
            if kind in ("EmptyHeaderError", "TruncatedHeaderError"):
                raise TarDamaged("is cut short") from error
            raise TarDamaged(f"is damaged or no tar ({error})") from error
        # tarfile believes the numbers in the records of sparse files, and those behind a header's sum.
        except (ValueError, OverflowError, IndexError) as error:
            raise TarDamaged(f"is damaged ({error})") from error


def begins_a_tar(data: bytes) -> int | None:
    """Where, behind zeros, a member's header stands in `data`, whole blocks from a tar; None where none does."""
    start = (len(data) - len(data.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    try:
        tarfile.TarInfo.frombuf(data[start : start + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return start


class Forward:
    """What tarfile needs of a file, forwards only, and no more at once than any member may need."""

    def __init__(self, file: Any, most: int) -> None:
        self.file, self.most = file, most
        self._place: int = file.tell()

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.most:
            raise TarDamaged(f"is damaged (a header of {size} bytes)")
        data: bytes = self.file.read(size)
        self._place += len(data)
        return data

    def seek(self, place: int) -> None:
        if place < self._place:
            raise TarDamaged("is damaged (it leads backwards)")
        self.skip_to(place)

    def skip_to(self, place: int) -> None:
        if place > _MOST_PLACE:
            raise TarDamaged("is damaged (it leads beyond any file)")
        if self.file.seekable():
            self.file.seek(place)
            self._place = place
            return
        while self._place < place:
            if not self.read(min(BUFFER, place - self._place)):
                raise TarDamaged("is cut short")
