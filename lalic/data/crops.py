"""A position to its pixels: read, decode, crop, and replace what cannot be decoded. Runs in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lalic.data.images import ImageError
from lalic.data.order import Crop, random_crop, random_crops, random_rungs, replacement_word
from lalic.data.reader import Reader
from lalic.data.regions import CropDecoder, Decoder
from lalic.data.slots import Slots
from lalic.errors import LalicError

# A bad sample is replaced by another one of its shard, which is near at hand; when that many fail, of any
# shard.
_SAME_SHARD_ATTEMPTS = 8
_ATTEMPTS = 64


@dataclass
class Failure:
    """An error that must end the run, on its way from a worker to the main process.

    Raised in the worker, it would arrive as a LalicError whose text is torch's traceback.
    """

    message: str


class ShardCrops(Dataset[Any]):
    """Map-style dataset whose items are whole micro-batches: `crops[number, (positions, sample_ids)]`.

    Nothing but (seed, epoch, index) decides on a crop, so the items are the same in whatever process they
    are made.
    """

    def __init__(
        self,
        reader: Reader,
        eligible: np.ndarray,
        *,
        crop: int,
        seed: int,
        first_epoch: int,
        flip: bool,
        decoder: Decoder = "auto",
        rungs: Sequence[int] | None = None,
    ) -> None:
        self.reader, self.index, self.eligible = reader, reader.index, eligible
        self.crop, self.seed, self.first_epoch, self.flip = crop, seed, first_epoch, flip
        self.rungs = None if rungs is None else np.array(rungs, np.int64)
        self._decoder = CropDecoder(decoder)
        self.slots: Slots | None = None
        """Where worker processes leave the pixels; "x" is then the number of the batch."""

    def __getitem__(self, item: tuple[int, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any] | Failure:
        number, (positions, samples) = item
        # Rows of pixels, as decoders write them and as the model takes them (channels last): nothing is transposed.
        shape = len(positions), self.crop, self.crop, 3
        pixels = torch.empty(shape, dtype=torch.uint8) if self.slots is None else self.slots[number]
        bad: list[tuple[int, str]] = []
        replaced = 0
        try:
            self.reader.expect(samples.tolist())
            crops = self._places(positions, samples)
            for row, (position, sample) in enumerate(zip(positions.tolist(), samples.tolist(), strict=True)):
                found = self._fill(pixels[row], position, sample, crops[row])
                bad += found
                replaced += bool(found)
        except LalicError as error:
            return Failure(str(error))
        x = pixels.permute(0, 3, 1, 2) if self.slots is None else number
        batch = {"x": x, "bad": replaced, "positions": positions, "bad_samples": bad}
        return batch if self.rungs is None else {**batch, "quality": self._qualities(positions, self.rungs)}

    def _places(self, positions: np.ndarray, samples: np.ndarray) -> list[Crop]:
        """The crops at consecutive positions."""
        crops: list[Crop] = []
        for epoch, index, count in self._epochs(positions):
            part = samples[len(crops) : len(crops) + count]
            sizes = self.index.width[part].tolist(), self.index.height[part].tolist()
            crops += random_crops(self.seed, epoch, index, *sizes, self.crop)
        return crops

    def _qualities(self, positions: np.ndarray, rungs: np.ndarray) -> np.ndarray:
        """The rungs drawn at consecutive positions, one each."""
        parts = [random_rungs(self.seed, *part, len(rungs)) for part in self._epochs(positions)]
        return rungs[np.concatenate(parts)]

    def _epochs(self, positions: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Consecutive positions as (epoch, index of the first one in it, how many lie in it)."""
        done = 0
        while done < len(positions):
            epoch, index = divmod(int(positions[done]), len(self.eligible))
            count = min(len(positions) - done, len(self.eligible) - index)
            yield self.first_epoch + epoch, index, count
            done += count

    def _fill(self, out: torch.Tensor, position: int, sample: int, crop: Crop) -> list[tuple[int, str]]:
        """Write the crop at `position` to `out` (crop, crop, 3); returns the bad samples met on the way."""
        epoch, index = divmod(position, len(self.eligible))
        epoch += self.first_epoch
        bad: list[tuple[int, str]] = []
        for attempt in range(_ATTEMPTS):
            if attempt:
                sample = self._replacement(epoch, index, attempt, bad[0][0])
                size = int(self.index.width[sample]), int(self.index.height[sample])
                crop = random_crop(self.seed, epoch, index, *size, self.crop, attempt)
            try:
                self._read_crop(out, sample, crop)
                return bad
            except ImageError as error:
                bad.append((sample, error.reason + (f" ({error.detail})" if error.detail else "")))
        raise LalicError(
            f"{self.index.describe(bad[0][0])} and {_ATTEMPTS - 1} replacements cannot be decoded: "
            f"the shards in {self.index.folder} are damaged, make or copy them again"
        )

    def _replacement(self, epoch: int, index: int, attempt: int, sample: int) -> int:
        first, last = 0, len(self.eligible)
        if attempt < _SAME_SHARD_ATTEMPTS:
            # `eligible` ascends and so do the shards: a shard's samples lie side by side.
            shard = int(self.index.shard[sample])
            ids = self.index.first[shard : shard + 2].astype(self.eligible.dtype)
            first, last = np.searchsorted(self.eligible, ids).tolist()
        return int(self.eligible[first + replacement_word(self.seed, epoch, index, attempt) % (last - first)])

    def _read_crop(self, out: torch.Tensor, sample: int, crop: Crop) -> None:
        """Read, decode and mirror one crop into `out` (crop, crop, 3)."""
        name = self.index.key(sample)
        box = (crop.left, crop.top, crop.left + self.crop, crop.top + self.crop)
        try:
            pixels = self._decoder.decode(self.reader.read(sample), name, box)
        except ImageError:
            again = self.reader.read_again(sample)
            if again is None:
                raise
            pixels = self._decoder.decode(again, name, box)
        if self.flip and crop.flip:
            # NumPy takes five times as long to reverse pixels of three bytes.
            out.copy_(torch.from_numpy(np.ascontiguousarray(pixels)).flip(1))
        else:
            out.numpy()[...] = pixels
