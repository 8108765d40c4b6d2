"""Large pictures in bounded memory: layers and Bi-RWKV blocks computed row strip by row strip, with the same result.

A picture of 8192 x 8192 has 6.4 GB in one tensor of the first stage, and a block computed whole holds a dozen of them
at once. Here a block holds one, its residual stream, which it updates in place. Nothing is cut into tiles: a strip
sees all that the whole picture shows it, so no border appears and no bit is added.

    convolutions   a strip's window has the rows that reach into it; what misses rows at the window's edge is left out
    pointwise      any rows
    BiWKV          the tokens before a strip reach its tokens t >= t0 only through the two decayed sums

                       sum_{i < t0} exp(k_i - (t0 - 1 - i) w),    sum_{i < t0} exp(k_i - (t0 - 1 - i) w) v_i

                   So one token at t0 - 1 stands for all of them: its key is the logarithm of the first sum, its value
                   the second over the first. One more stands for the tokens behind the strip. BiWKV of the strip
                   between these two tokens is BiWKV of the whole picture there.

A block goes over its strips three times: for the sums of each strip's keys and values; for the spatial mix; for the
channel mix. The strips' height follows from shapes alone, so encoder and decoder round alike.

Legend: B batch, C channels, H x W grid, T = H * W tokens of the picture, n tokens of a strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lalic.ops import biwkv

if TYPE_CHECKING:
    from lalic.model.blocks import BiRWKVBlock, OmniShift

WHOLE_BYTES = 1 << 30
"""Without gradients, what needs no larger tensor than this is computed whole: pictures up to 2048 x 1088 are."""

STRIP_BYTES = 64 << 20
"""Of the largest tensor of a strip: near the caches, but not so low that the two rows above and below cost much."""

CACHED_TOKENS = 2048
"""Tokens whose sums are made at once on a CPU, in its caches."""

Rows = slice


def too_large(nbytes: int) -> bool:
    """Whether what has a tensor of `nbytes` inside is computed in strips: never where gradients are asked for."""
    return not torch.is_grad_enabled() and nbytes > WHOLE_BYTES


def convolve(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), which computes `layer`: (B, C, H, W) -> (B, C', H', W').

    The layer keeps the sides, or divides or multiplies them by its stride, as all of LALIC's do. Sides that its stride
    does not divide are computed whole.
    """
    size, stride = layer.kernel_size[0], layer.stride[0]
    up = isinstance(layer, nn.ConvTranspose2d)
    # Rows of the input and of the output that make one step, and the steps around that reach into it.
    rows_in, rows_out = (1, stride) if up else (stride, 1)
    halo = -(-(size // 2) // rows_in)
    batch, _, height, width = x.shape
    steps, across = height // rows_in, width // rows_in
    channels = [layer.in_channels * rows_in**2, layer.out_channels * rows_out**2]
    if x.dtype == torch.float64 and x.device.type == "cpu":  # torch writes the patches out
        channels.append(size * size * (layer.out_channels if up else layer.in_channels))
    step_bytes = across * max(channels) * x.element_size()
    if height % rows_in or width % rows_in or not too_large(batch * steps * step_bytes):
        return function(x)
    out: Tensor | None = None
    for image, strip in _strips(batch, steps, step_bytes):
        first, last = max(strip.start - halo, 0), min(strip.stop + halo, steps)
        y = function(x[image : image + 1, :, first * rows_in : last * rows_in])
        if out is None:
            out = _channels_last(y, batch, steps * rows_out)
        own = slice((strip.start - first) * rows_out, (strip.stop - first) * rows_out)
        out[image, :, strip.start * rows_out : strip.stop * rows_out] = y[0, :, own]
    assert out is not None
    return out


def pointwise(function: Callable[[Tensor], Tensor], x: Tensor, channels: int) -> Tensor:
    """function(x), x (B, C, H, W) -> (B, C', H, W), where every pixel of the result depends on that pixel of x alone.

    `channels`: of the widest tensor inside, which tells whether strips are worth it, and their height.
    """
    batch, _, height, width = x.shape
    row_bytes = width * channels * x.element_size()
    if not too_large(batch * height * row_bytes):
        return function(x)
    out: Tensor | None = None
    for image, rows in _strips(batch, height, row_bytes):
        y = function(x[image : image + 1, :, rows])
        if out is None:
            out = _channels_last(y, batch, height)
        out[image, :, rows] = y[0]
    assert out is not None
    return out


def _channels_last(like: Tensor, batch: int, height: int) -> Tensor:
    """Room for results like `like`, (1, C, rows, W), of all rows of all images."""
    shape = (batch, like.shape[1], height, like.shape[3])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def row_bytes(block: BiRWKVBlock, width: int) -> int:
    """Bytes that the block's widest tensor, the hidden layer of its channel mix, has in each row."""
    return width * block.ffn.key.out_features * block.gamma1.element_size()


def mix_in_place(block: BiRWKVBlock, x: Tensor) -> None:
    """Put block(x) into x (B, H, W, C), contiguous, of the parameters' dtype."""
    strips = [rows for _, rows in _strips(1, x.shape[1], row_bytes(block, x.shape[2]))]
    for image in x:
        _mix_tokens(block, image, strips)
        for rows, shifted in _shifted(block.ffn.omni_shift, block.ln2, image, strips):
            image[rows] += block.ffn.mix(shifted, block.gamma2)[0]


def _mix_tokens(block: BiRWKVBlock, image: Tensor, strips: list[Rows]) -> None:
    """Add the spatial mix of an image (H, W, C) to it."""
    mix = block.att
    tokens = image.shape[0] * image.shape[1]
    dtype = torch.promote_types(image.dtype, torch.float32)
    w, u = (mix.decay / tokens).to(dtype), (mix.boost / tokens).to(dtype)

    def keys_and_values(shifted: Tensor) -> tuple[Tensor, Tensor]:
        return mix.key(shifted)[0].flatten(0, 1).to(dtype), mix.value(shifted)[0].flatten(0, 1).to(dtype)

    found = [summaries(w, *keys_and_values(s)) for _, s in _shifted(mix.omni_shift, block.ln1, image, strips)]
    before, behind = _arriving(found, [(rows.stop - rows.start) * image.shape[1] * _wide(w) for rows in strips])
    shifted_strips = _shifted(mix.omni_shift, block.ln1, image, strips)
    for (rows, shifted), left, right in zip(shifted_strips, before, behind, strict=True):
        attended = _attend(w, u, *keys_and_values(shifted), left, right)
        image[rows] += mix.gate(shifted, attended.view(shifted.shape), block.gamma1)[0]


def _attend(w: Tensor, u: Tensor, k: Tensor, v: Tensor, left: Token | None, right: Token | None) -> Tensor:
    """BiWKV of the tokens k, v (n, C) between the two that stand for all others -> (n, C)."""
    sequence = [*([left] if left else []), Token(k, v), *([right] if right else [])]
    keys, values = (
        torch.cat([x.view(-1, k.shape[1]).to(k.dtype) for x in xs])[None] for xs in zip(*sequence, strict=True)
    )
    start = 1 if left else 0
    return biwkv(w, u, keys, values)[0, start : start + len(k)]


def _shifted(
    omni_shift: OmniShift, norm: nn.LayerNorm, image: Tensor, strips: list[Rows]
) -> Iterator[tuple[Rows, Tensor]]:
    """Rows and omni_shift(image, norm) (1, rows, W, C) of each strip of an image (H, W, C).

    The rows of a strip, and of those before it, may be overwritten when it has been given: it sees none of that.
    """
    halo = omni_shift.conv5x5.kernel_size[0] // 2
    above = image[:0]
    for rows in strips:
        window = torch.cat([above, image[rows.start : rows.stop + halo]])
        own = slice(len(above), len(above) + rows.stop - rows.start)
        above = window[max(own.stop - halo, 0) : own.stop].clone()
        shifted = omni_shift(window[None], norm)[:, own]
        del window
        yield rows, shifted


def _strips(batch: int, height: int, row_bytes: int) -> Iterator[tuple[int, Rows]]:
    """Every image of the batch with every strip of its rows, in order."""
    count = max(1, STRIP_BYTES // row_bytes)
    for image in range(batch):
        for start in range(0, height, count):
            yield image, slice(start, min(start + count, height))


def _wide(x: Tensor) -> Tensor:
    """x in float64, where its device has that."""
    return x if x.device.type == "mps" else x.double()


class Token(NamedTuple):
    """One token that stands for many: key and value (C,), in float64 (see `_wide`)."""

    key: Tensor
    value: Tensor

    def moved(self, distance: Tensor) -> Token:
        """Seen from `distance` = tokens * w farther away."""
        return Token(self.key - distance, self.value)


def joined(a: Token | None, b: Token) -> Token:
    """One token for two at one place; None is no token."""
    if a is None:
        return b
    top = torch.maximum(a.key, b.key)
    weight_a, weight_b = torch.exp(a.key - top), torch.exp(b.key - top)
    total = weight_a + weight_b
    return Token(top + total.log(), (weight_a * a.value + weight_b * b.value) / total)


def summaries(w: Tensor, keys: Tensor, values: Tensor) -> tuple[Token, Token]:
    """The tokens that stand for keys and values (n, C): one in the place of the last, one in that of the first.

    w: decay per token (C,), of the dtype of keys and values, float32 or float64.
    """
    count = len(keys)
    size = min(count, CACHED_TOKENS if keys.device.type == "cpu" else count)
    from_first = torch.arange(size, dtype=w.dtype, device=w.device)[:, None] * w
    from_last = from_first.flip(0)
    wide = _wide(w)
    as_last: Token | None = None
    for start in range(0, count, size):
        k, v = keys[start : start + size], values[start : start + size]
        own = _weighted_mean(k - from_last[size - len(k) :], v)
        as_last = joined(as_last and as_last.moved(len(k) * wide), own)
    as_first: Token | None = None
    for start in reversed(range(0, count, size)):
        k, v = keys[start : start + size], values[start : start + size]
        own = _weighted_mean(k - from_first[: len(k)], v)
        as_first = joined(as_first and as_first.moved(len(k) * wide), own)
    assert as_last is not None and as_first is not None
    return as_last, as_first


def _weighted_mean(exponents: Tensor, values: Tensor) -> Token:
    """Of values (n, C) with the weights exp(exponents) (n, C), which is overwritten; and the weights' sum."""
    top = exponents.amax(0)
    weights = exponents.sub_(top).exp_()
    total = _wide(weights.sum(0))
    return Token(_wide(top) + total.log(), _wide(weights.mul_(values).sum(0)) / total)


def _arriving(found: list[tuple[Token, Token]], lengths: list[Tensor]) -> tuple[list[Token | None], list[Token | None]]:
    """What stands, for each strip, for all tokens before it and for all behind it.

    `found`: each strip's `summaries`; `lengths`: its tokens times w, (C,).
    """
    before: list[Token | None] = [None]
    for (as_last, _), length in zip(found[:-1], lengths[:-1], strict=True):
        before.append(joined(before[-1] and before[-1].moved(length), as_last))
    behind: list[Token | None] = [None]
    for (_, as_first), length in zip(found[:0:-1], lengths[:0:-1], strict=True):
        behind.append(joined(behind[-1] and behind[-1].moved(length), as_first))
    return before, behind[::-1]
