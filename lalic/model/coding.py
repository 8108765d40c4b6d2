"""What is entropy-coded, in which order, with which tables: the walk that encoder and decoder share.

                    ┌──────────────── for each channel group k, in order ────────────────┐
    z ─► h_s ─► side ─┬─► [side, channel context of y_hat before k] ─► parameters of ■ ─► code ■ ─┐
                      └─► [the same, and the checkerboard context of ■] ─► parameters of □ ─► code □

B: batch; M channels of y in groups of C; H x W: grid of y; ■ anchors (row + column even), □ the others, each on a
grid of H x W/2. A *message* is what one string holds: all of z, then the anchors and the others of each group.

Two arithmetics can compute what the walk needs, Float32 here and `lalic.model.exact`. With Float32, strings are bit by
bit those of CompressAI's codecs for this structure (ELIC). Their own `compress` and `decompress`
are not called: they make lists of all tables for every string, find a scale's table by 63 comparisons of the whole
tensor, compute the context of anchors to set it to zero, and decode every string again right after encoding it.
Shapes and memory layouts of what the network sees are the same as there, in encoder and decoder: another layout
takes another kernel with other rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel, GaussianConditional
from numpy.typing import NDArray
from torch import Tensor, nn

from lalic.errors import LalicError

Symbols = NDArray[np.int32]
"""Integers to be coded, or indexes of their tables: (n,) of one string, in the order of channels, rows, columns."""

MAX_SYMBOL = 1 << 24
"""Larger integers are not exact in float32, and the rANS coder's escape codes overflow soon after."""


class Tables:
    """Coding tables in the form that an entropy coder takes.

    Attributes:
        name: of the coder, `ans` for CompressAI's rANS.
        digest: CRC-32 of the tables, 4 bytes, so that tables built differently are noticed.
    """

    def __init__(self, cdf: Symbols, lengths: Symbols, offsets: Symbols, coder: Any):
        """`cdf` (n, longest), rows padded with zeros, `lengths` (n,) and `offsets` (n,), all int32."""
        crc = 0
        for table in (cdf, lengths, offsets):
            crc = zlib.crc32(table.tobytes(), crc)
        self.digest = crc.to_bytes(4, "little")
        # Rows end at their length: what pads them to the longest is four fifths of the whole.
        self._rows = [row[:length].tolist() for row, length in zip(cdf, lengths, strict=True)]
        self._lengths, self._offsets = lengths.tolist(), offsets.tolist()
        self._coder = coder
        self.name: str = coder.name

    @classmethod
    def of(cls, model: EntropyModel) -> Tables:
        """The tables that the model's `update()` built."""
        cdf, lengths, offsets = (
            table.detach().cpu().to(torch.int32).contiguous().numpy()
            for table in (model.quantized_cdf, model.cdf_length, model.offset)
        )
        if not cdf.size:
            raise ValueError("the model has no coding tables: call update() first")
        return cls(cdf, lengths, offsets, model.entropy_coder)

    def encode(self, symbols: Symbols, indexes: Symbols) -> bytes:
        """The string of `symbols` (n,), each coded by the table of its index; LalicError when one cannot be."""
        return self._coder.encode_with_indexes(_codable(symbols), indexes.tolist(), *self._up_to(indexes))

    def decode(self, string: bytes, indexes: Symbols) -> Symbols:
        """Inverse of `encode`; LalicError when the string holds what no encoder writes."""
        return _possible(self._coder.decode_with_indexes(string, indexes.tolist(), *self._up_to(indexes)))

    def push(self, encoder: BufferedRansEncoder, symbols: Symbols, indexes: Symbols) -> None:
        """`encode` into a string that several messages share."""
        encoder.encode_with_indexes(_codable(symbols), indexes.tolist(), *self._up_to(indexes))

    def pull(self, decoder: RansDecoder, indexes: Symbols) -> Symbols:
        """Inverse of `push`: the messages are pulled in the order in which they were pushed."""
        return _possible(decoder.decode_stream(indexes.tolist(), *self._up_to(indexes)))

    def _up_to(self, indexes: Symbols) -> tuple[list[list[int]], list[int], list[int]]:
        """Tables without those behind the last one used: the coder copies all it is given, and wide ones are rare."""
        count = int(indexes.max()) + 1
        return self._rows[:count], self._lengths[:count], self._offsets[:count]


def _codable(symbols: Symbols) -> list[int]:
    if not _in_range(symbols):
        raise LalicError("the model's latents cannot be coded: they are not finite, its training diverged")
    return symbols.tolist()


def _possible(symbols: list[int]) -> Symbols:
    values = np.array(symbols, dtype=np.int32)
    if not _in_range(values):
        raise LalicError("the file's strings are damaged: they decode to impossible values")
    return values


def _in_range(symbols: Symbols) -> bool:
    return not symbols.size or (symbols.min() >= -MAX_SYMBOL and symbols.max() <= MAX_SYMBOL)


class _Kept(NamedTuple):
    """Tables and what they were made from; the sources are kept, so that no new tensor can be taken for an old one."""

    tables: Tables
    sources: tuple[Any, ...]
    versions: tuple[int, ...]


_kept: WeakKeyDictionary[EntropyModel, dict[Callable[[EntropyModel], Tables], _Kept]] = WeakKeyDictionary()


def tables_of(model: EntropyModel) -> Tables:
    """The tables that `update()` built, made anew when it or anything else changed them."""
    return kept_tables(model, (model.quantized_cdf, model.cdf_length, model.offset), Tables.of)


def kept_tables(model: EntropyModel, sources: tuple[Tensor, ...], make: Callable[[EntropyModel], Tables]) -> Tables:
    """make(model), kept until one of the tensors that it depends on, or the coder, changes or is replaced."""
    if any(s.is_inference() for s in sources):  # changes of such tensors leave no trace
        return make(model)
    wanted, versions = (model.entropy_coder, *sources), tuple(s._version for s in sources)
    kept = _kept.setdefault(model, {}).get(make)
    if kept is None or kept.versions != versions or any(a is not b for a, b in zip(kept.sources, wanted, strict=True)):
        kept = _kept[model][make] = _Kept(make(model), wanted, versions)
    return kept.tables


class Part(NamedTuple):
    """The latents of one string: all of z where `channels` is None, else one half of one channel group of y."""

    channels: slice | None
    half: int

    def of(self, z: Tensor, y: Tensor) -> Tensor:
        """These latents: z, or (B, C, H, W/2)."""
        return z if self.channels is None else half_of(y[:, self.channels], self.half)


class Parameters(NamedTuple):
    """What codes the elements of one part: tensors of its shape.

    Attributes:
        indexes: which table codes the element, int32.
        means: what is taken from an element before it is rounded, and added to its symbol.
        steps: the means as integers, int32, where the arithmetic makes them such.
    """

    indexes: Tensor
    means: Tensor
    steps: Tensor | None = None


class Arithmetic(Protocol):
    """How the walk computes, and how it decides on tables and means."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the means, of side information and contexts, and of y_hat; None for that of the model."""

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x)."""

    def tables(self, model: EntropyModel) -> Tables:
        """The tables that code what `model` models."""

    def decide(self, model: EntropyModel, scales: Tensor, means: Tensor) -> Parameters:
        """Parameters of one part; called once for each, in the order of coding."""


class Float32:
    """CompressAI's arithmetic: tables by `update()`, the network as it is, nothing decided but the tables."""

    dtype: torch.dtype | None = None

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def tables(self, model: EntropyModel) -> Tables:
        return tables_of(model)

    def decide(self, model: EntropyModel, scales: Tensor, means: Tensor) -> Parameters:
        return Parameters(indexes_of(model, scales), means)


class Message(NamedTuple):
    """What one string of every picture of the batch holds; tensors (B, ...), on the model's device."""

    tables: Tables
    parameters: Parameters
    symbols: Tensor

    def rows(self) -> list[tuple[Symbols, Symbols]]:
        """Indexes and symbols, both (n,), of each picture."""
        return list(zip(flat(self.parameters.indexes), flat(self.symbols), strict=True))


Code = Callable[[Part, Tables, Parameters], Tensor]
"""(part, tables, parameters) -> the part's symbols, int32, of the parameters' shape: quantised, or read."""

Read = Callable[[Tables, Parameters], Symbols]
"""(tables, parameters (B, ...)) -> symbols (B, n) of the next message."""


def encode(codec: Any, y: Tensor, arithmetic: Arithmetic) -> tuple[list[Message], tuple[int, int], Tensor]:
    """All messages of y (B, M, H, W) in the order of coding, the sides of z, and y_hat (B, M, H, W).

    Nothing here waits for the device, but for what the arithmetic needs to know: strings are made from the messages
    when all are known.
    """
    z = codec["hyper"].h_a(y)
    messages: list[Message] = []

    def quantise(part: Part, tables: Tables, parameters: Parameters) -> Tensor:
        values = (part.of(z, y) - parameters.means).round_()
        # What no coder takes, NaN included, must not become an innocent integer: on some devices NaN is zero.
        symbols = torch.where(values.abs() <= MAX_SYMBOL, values, 2.0 * MAX_SYMBOL).int()
        messages.append(Message(tables, parameters, symbols))
        return symbols

    rows, columns = z.shape[-2:]
    y_hat = _walk(codec, len(z), rows, columns, quantise, arithmetic)
    return messages, (rows, columns), y_hat


def decode(codec: Any, batch: int, rows: int, columns: int, read: Read, arithmetic: Arithmetic) -> Tensor:
    """y_hat (batch, M, 4 rows, 4 columns) from the messages that `read` gives in the order of coding."""

    def fetch(part: Part, tables: Tables, parameters: Parameters) -> Tensor:
        return torch.from_numpy(read(tables, parameters)).view(parameters.indexes.shape)

    return _walk(codec, batch, rows, columns, fetch, arithmetic)


def _walk(codec: Any, batch: int, rows: int, columns: int, code: Code, arithmetic: Arithmetic) -> Tensor:
    """Hand every part to `code` as soon as its parameters are known; y_hat (B, M, H, W)."""
    bottleneck = codec["hyper"].entropy_bottleneck
    medians = bottleneck.quantiles[:, 0, 1].view(1, -1, 1, 1).expand(batch, -1, rows, columns)
    medians = medians.to(arithmetic.dtype or medians.dtype)
    channels = torch.arange(medians.shape[1], dtype=torch.int32, device=medians.device)
    parameters = Parameters(channels.view(1, -1, 1, 1).expand_as(medians), medians)
    z_hat = _dequantise(code(Part(None, 0), arithmetic.tables(bottleneck), parameters), medians)

    side = arithmetic.run(codec["hyper"].h_s, z_hat)
    side_halves = half_of(side, 0), half_of(side, 1)
    groups, contexts = codec["y"].groups, codec["y"].channel_context
    y_hat = side.new_zeros((batch, sum(groups), *side.shape[-2:]))
    start = 0
    for k, size in enumerate(groups):
        own = slice(start, start + size)
        before = [arithmetic.run(contexts[f"y{k}"], y_hat[:, :start])] if k else []
        y_hat[:, own] = _code_group(codec["y"][f"y{k}"], own, before, side_halves, code, arithmetic)
        start += size
    return y_hat


def _code_group(
    group: Any,
    own: slice,
    before: list[Tensor],
    side_halves: tuple[Tensor, Tensor],
    code: Code,
    arithmetic: Arithmetic,
) -> Tensor:
    """y_hat (B, C, H, W) of one group, with the channel context (B, 2C, H, W) `before` it, if there is any."""
    side = side_halves[0]
    batch, _, height, half_width = side.shape
    channels = own.stop - own.start
    gaussian = group["y"].gaussian_conditional
    tables = arithmetic.tables(gaussian)
    y_hat = side.new_zeros((batch, channels, height, 2 * half_width))
    for half in (0, 1):
        if half == 0:
            context = side.new_zeros((batch, 2 * channels, height, half_width))
        else:
            context = half_of(arithmetic.run(group.context_prediction, y_hat), half)
        known = torch.cat([context, *(half_of(x, half) for x in before), side_halves[half]], dim=1)
        scales, means = arithmetic.run(group.entropy_parameters, known).chunk(2, 1)
        parameters = arithmetic.decide(gaussian, scales, means)
        _put_half(y_hat, half, _dequantise(code(Part(own, half), tables, parameters), parameters.means))
    return y_hat


def indexes_of(model: GaussianConditional, scales: Tensor) -> Tensor:
    """For each scale, the table of the narrowest Gaussian that is not narrower; int32, of the shape of `scales`."""
    borders = model.scale_table[:-1].to(scales.dtype)
    return torch.bucketize(model.lower_bound_scale(scales).contiguous(), borders, out_int32=True)


def _dequantise(symbols: Tensor, means: Tensor) -> Tensor:
    """Symbols + means in one memory layout, whatever the two have: the next layer's kernel depends on it."""
    return means.new_empty(means.shape).copy_(symbols).add_(means)


def half_of(x: Tensor, half: int) -> Tensor:
    """The anchors (half 0) or the others (half 1) of x (B, C, H, W), pushed together to (B, C, H, W/2)."""
    batch, channels, height, width = x.shape
    out = x.new_empty((batch, channels, height, width // 2))
    out[..., 0::2, :] = x[..., 0::2, half::2]
    out[..., 1::2, :] = x[..., 1::2, 1 - half :: 2]
    return out


def _put_half(x: Tensor, half: int, values: Tensor) -> None:
    """Write `values` (B, C, H, W/2) to where `half_of` takes them from."""
    x[..., 0::2, half::2] = values[..., 0::2, :]
    x[..., 1::2, 1 - half :: 2] = values[..., 1::2, :]


def flat(x: Tensor) -> Symbols:
    """(B, ...) -> (B, n) on the CPU, each row in the order of channels, rows, columns."""
    return x.flatten(1).cpu().contiguous().numpy()
