"""The Bi-RWKV block and its parts (LALIC, arXiv 2502.05741, figure 2).

    x ──┬─► LN ─► SpatialMix ─► * gamma1 ─► + ──┬─► LN ─► ChannelMix ─► * gamma2 ─► + ──►
        └──────────────────────────────────►┘   └──────────────────────────────────►┘

Legend: B batch, C channels, H x W grid, T = H * W tokens. Inside a block everything is (B, H, W, C), which is
the channels-last view of (B, C, H, W) and, seen as (B, T, C), the token sequence: no step copies between them.
The gammas are multiplied into the last linear layer of their branch, which has no bias: that is the same sum, and
spares a pass over the whole tensor. Fourteen tensors of B * T * C elements are kept for the backward pass, where the
plain formulation keeps twenty-nine (see `functions.py`). Under bfloat16 autocast the residual stream stays in
float32: in bfloat16 the errors of y and of the gradients of g_a grow by a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from compressai.layers import CheckerboardMaskedConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lalic.model import strips
from lalic.model.depthwise import depthwise_conv
from lalic.model.functions import gated_linear, normed_depthwise, squared_relu_mlp
from lalic.ops import biwkv


class OmniShift(nn.Module):
    """Depthwise 5x5 convolution made of four branches (Restore-RWKV, arXiv 2407.11087).

    Identity, 1x1, 3x3 and 5x5 branches weighted by `alpha` are linear, so they are one 5x5 kernel. It is built
    from the parameters at every call, differentiably, in training and evaluation alike: that costs 50 microseconds
    on a CPU, under a tenth of the smallest block, is exact, and leaves no cache that could go stale.

    Checkpoints of the published layout hold the merged kernel as `conv5x5_reparam.weight`. It is derived: written
    by `state_dict()`, and ignored by `load_state_dict()`, since files in the wild hold stale ones.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(4))
        self.conv1x1 = nn.Conv2d(dim, dim, 1, groups=dim, bias=False)
        self.conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.conv5x5 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, bias=False)
        self.register_state_dict_post_hook(_write_merged_kernel)
        self.register_load_state_dict_pre_hook(_drop_merged_kernel)

    def merged_kernel(self) -> Tensor:
        """The 5x5 kernel (C, 1, 5, 5) that equals the weighted sum of the four branches."""
        identity, one, three, five = self.alpha.unbind()
        centre = identity + one * self.conv1x1.weight
        kernel = F.pad(three * self.conv3x3.weight + F.pad(centre, (1, 1, 1, 1)), (1, 1, 1, 1))
        return kernel + five * self.conv5x5.weight

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The convolution of x, or of norm(x), which is then not kept: x (B, H, W, C) -> (B, H, W, C)."""
        if norm is None:
            return depthwise_conv(x, self.merged_kernel())
        return normed_depthwise(x, norm.weight, norm.bias, norm.eps, self.merged_kernel())


def _write_merged_kernel(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    assert isinstance(module, OmniShift)
    state[f"{prefix}conv5x5_reparam.weight"] = module.merged_kernel().detach()


def _drop_merged_kernel(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}conv5x5_reparam.weight", None)


class SpatialMix(nn.Module):
    """Linear attention over all pixels: BiWKV gated by a receptance."""

    def __init__(self, dim: int):
        super().__init__()
        self.decay = nn.Parameter(torch.randn(dim))
        self.boost = nn.Parameter(torch.randn(dim))
        self.omni_shift = OmniShift(dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, gamma: Tensor) -> Tensor:
        """gamma * mix(norm(x)), x (B, H, W, C), gamma (C,) -> (B, H, W, C).

        The decay is divided by T, so it adapts to the size of the image.
        """
        shifted = self.omni_shift(x, norm)
        keys, values = self.key(shifted).flatten(1, 2), self.value(shifted).flatten(1, 2)
        tokens = keys.shape[1]
        attended = biwkv(self.decay / tokens, self.boost / tokens, keys, values)
        return self.gate(shifted, attended.view(x.shape), gamma)

    def gate(self, shifted: Tensor, attended: Tensor, gamma: Tensor) -> Tensor:
        """What is pointwise behind BiWKV: shifted and attended (B, H, W, C) -> (B, H, W, C)."""
        weight = gamma[:, None] * self.output.weight
        return gated_linear(self.receptance(shifted), attended.to(shifted.dtype), weight)


class ChannelMix(nn.Module):
    """Gated feed-forward over channels with a squared ReLU; `hidden_rate` widens its hidden layer."""

    def __init__(self, dim: int, hidden_rate: int = 4):
        super().__init__()
        self.omni_shift = OmniShift(dim)
        self.key = nn.Linear(dim, hidden_rate * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_rate * dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, gamma: Tensor) -> Tensor:
        """gamma * mix(norm(x)), x (B, H, W, C), gamma (C,) -> (B, H, W, C)."""
        return self.mix(self.omni_shift(x, norm), gamma)

    def mix(self, shifted: Tensor, gamma: Tensor) -> Tensor:
        """What is pointwise behind the shift: (B, H, W, C) -> (B, H, W, C)."""
        mixed = squared_relu_mlp(shifted, self.key.weight, gamma[:, None] * self.value.weight)
        return torch.sigmoid(self.receptance(shifted)) * mixed


class BiRWKVBlock(nn.Module):
    """One Bi-RWKV block on (B, C, H, W).

    In training, `gradient_checkpointing` recomputes it whole in the backward pass, and `compiled_mix` takes the place
    of its function: lalic.training.compiling.
    """

    compiled_mix: Callable[[BiRWKVBlock, Tensor], Tensor] | None

    def __init__(self, dim: int, hidden_rate: int = 4):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.att = SpatialMix(dim)
        self.ffn = ChannelMix(dim, hidden_rate)
        self.gradient_checkpointing = False
        self.compiled_mix = None

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W), channels-last in memory.

        Without gradients, a large x is mixed in strips; with `in_place` the result may then stand where x stood.
        """
        if self.takes_strips(x):
            return self._mix_in_strips(x, in_place)
        if not (self.training and torch.is_grad_enabled()):
            return self._mix(x)
        mix = self.compiled_mix or BiRWKVBlock._mix
        if self.gradient_checkpointing:
            # Nothing in a block draws random numbers, so their state needs no stash.
            return checkpoint(mix, self, x, use_reentrant=False, preserve_rng_state=False)
        return mix(self, x)

    def takes_strips(self, x: Tensor) -> bool:
        """Whether x (B, C, H, W) is so large that it is mixed in strips."""
        return strips.too_large(x.shape[0] * x.shape[2] * strips.row_bytes(self, x.shape[3]))

    def _mix(self, x: Tensor) -> Tensor:
        # No copy where x is channels-last already. The residual stream has the parameters' precision.
        x = x.permute(0, 2, 3, 1).contiguous().to(self.gamma1.dtype)
        x = x + self.att(x, self.ln1, self.gamma1)
        x = x + self.ffn(x, self.ln2, self.gamma2)
        return x.permute(0, 3, 1, 2)

    def _mix_in_strips(self, x: Tensor, in_place: bool) -> Tensor:
        stream = x.permute(0, 2, 3, 1).contiguous().to(self.gamma1.dtype)
        if not in_place and stream.data_ptr() == x.data_ptr():
            stream = stream.clone()
        strips.mix_in_place(self, stream)
        return stream.permute(0, 3, 1, 2)


def _in_channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.contiguous(memory_format=torch.channels_last))


def run_layers(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """`nn.Sequential` of convolutions and blocks, channels-last: x (B, C, H, W), not changed -> (B, C', H', W')."""
    owned = False  # whether x is what a layer returned, and nobody else holds
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            x = strips.convolve(layer, x, partial(_in_channels_last, layer))
        elif owned and isinstance(layer, BiRWKVBlock) and layer.takes_strips(x):
            x = layer(x, in_place=True)
        else:
            x = layer(x)
        owned = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | BiRWKVBlock)
    return x


class CheckerboardConv(CheckerboardMaskedConv2d):
    """The context of a channel group's anchors: CompressAI's, in strips where the picture is large."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return strips.convolve(self, x, super().forward)


class EntropyParametersBlock(nn.Module):
    """1x1 convolution followed by a gated channel mix: a pointwise stage of the parameter aggregation."""

    def __init__(self, dim: int, out_dim: int, expansion_factor: int = 2, **_unused: Any):
        # CompressAI's `sequential_channel_ramp` hands every layer the arguments of a convolution.
        super().__init__()
        self.mix = nn.Conv2d(dim, out_dim, 1)
        self.norm = nn.LayerNorm(out_dim)
        self.key = nn.Linear(out_dim, expansion_factor * out_dim, bias=False)
        self.value = nn.Linear(expansion_factor * out_dim, out_dim, bias=False)
        self.receptance = nn.Linear(out_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, out_dim, H, W)."""
        mixed = self.mix(x)
        normed = self.norm(mixed.permute(0, 2, 3, 1))
        gated = torch.sigmoid(self.receptance(normed)) * squared_relu_mlp(normed, self.key.weight, self.value.weight)
        return mixed + gated.permute(0, 3, 1, 2)


class EntropyParameters(nn.Sequential):
    """The parameter aggregation: blocks of a pointwise network, in strips where the picture is large."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, known, H, W) -> scales and means (B, 2 C, H, W)."""
        widths = [n for m in self.modules() if isinstance(m, nn.Linear) for n in (m.in_features, m.out_features)]
        return strips.pointwise(super().forward, x, max(x.shape[1], *widths))
