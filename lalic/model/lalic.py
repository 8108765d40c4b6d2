"""LALIC: Linear Attention Modeling for Learned Image Compression (CVPR 2025, arXiv 2502.05741).

         ┌───┐  y   ┌─────────────────────────────────────────────┐ y_hat  ┌───┐
    x ─►─┤g_a├─►──┬─┤ y: channel groups x checkerboard (ELIC)     ├──►─────┤g_s├─►─ x_hat
         └───┘    │ └──────────────────────▲──────────────────────┘        └───┘
                  │ ┌───┐  z  ┌────┐ z_hat │ ┌───┐
                  └─┤h_a├──►──┤ EB ├───────┴─┤h_s├  side information
                    └───┘     └────┘         └───┘

Transforms are convolutions and Bi-RWKV blocks; the entropy model is CompressAI's codec structure for ELIC with
Bi-RWKV channel contexts. Names of modules and parameters are those of the published checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from compressai.latent_codecs import (
    ChannelGroupsLatentCodec,
    GaussianConditionalLatentCodec,
    HyperLatentCodec,
    HyperpriorLatentCodec,
)
from compressai.layers import conv1x1, conv3x3, sequential_channel_ramp
from compressai.models.base import SimpleVAECompressionModel
from compressai.models.utils import conv, deconv
from compressai.registry import register_model
from torch import Tensor, nn

from lalic.model import coding, compact, weights
from lalic.model.blocks import BiRWKVBlock, CheckerboardConv, EntropyParameters, EntropyParametersBlock, run_layers
from lalic.model.entropy import Bottleneck, Checkerboard
from lalic.model.rates import PREFIX, Quality, Rates, check_rungs

STRIDE = 64
"""Image sides must be multiples of this: 16 for y, 4 more for z."""


class ChannelsLast(nn.Sequential):
    """Layers that see their input channels-last, whatever layout the caller has.

    Blocks then need no copies. And a convolution takes another kernel, with other rounding, for another layout:
    the encoder's latents come from g_a and the decoder's from a string, and both must give the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return run_layers(self, x)


class Transform(ChannelsLast):
    """One of g_a, g_s, h_a, h_s. With a `compute_dtype`, all but the last layer run in that precision.

    The last layer stays in float32 because what leaves a transform is quantised, parametrises a distribution or
    is the picture: bfloat16 resolves a latent of magnitude 40 to 0.25 and caps the PSNR of x_hat at 61 dB.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W') in the precision of the parameters."""
        if self.compute_dtype is None:
            return super().forward(x)
        *body, last = self
        with torch.autocast(x.device.type, dtype=self.compute_dtype):
            x = run_layers(body, x)
        return run_layers([last], x.float())


@register_model("LALIC")
class LALIC(SimpleVAECompressionModel):
    """The published architecture; smaller `dims` and `depths` give models of the same structure.

    Args:
        N: floor (2 N) of the widths inside the parameter aggregation.
        M: channels of y; must equal `dims[3]` when given.
        dims: channels of the three stages of g_a, of y, of the hyper transforms, and of z.
        depths: Bi-RWKV blocks in the three stages of g_a (and g_s), and in h_a (and h_s).
        groups: channels of y coded together, first to last; they sum to M. Default: ELIC's
            16, 16, 32, 64, M - 128.
        context_rate: widths of the hidden layers in the channel contexts, in channels of y.
        aggregation_rate: widths of the hidden layers in the parameter aggregation, in the layer's own width.
        rungs: qualities that one model serves, such as 1 to 6 (lalic.model.rates); None: one rate, without gains. With
            rungs, every call that codes or reconstructs takes a `quality`: a number, or a tensor (B,) of them.

    Raises ValueError for sizes that do not fit together.
    """

    rates: Rates | None

    def __init__(
        self,
        N: int = 128,
        M: int | None = None,
        dims: Sequence[int] = (96, 144, 256, 320, 256, 192),
        depths: Sequence[int] = (2, 4, 6, 6),
        groups: Sequence[int] | None = None,
        context_rate: int = weights.CONTEXT_RATE,
        aggregation_rate: int = weights.AGGREGATION_RATE,
        rungs: Sequence[int] | None = None,
    ):
        super().__init__()
        M = dims[3] if M is None and len(dims) == 6 else M
        groups = (16, 16, 32, 64, (M or 0) - 128) if groups is None else groups
        self.config = check_architecture(N, M, dims, depths, groups, context_rate, aggregation_rate, rungs)
        N1, N2, N3, M, N5, N6 = self.config["dims"]
        L1, L2, L3, L4 = self.config["depths"]

        self.g_a = Transform(
            conv(3, N1, kernel_size=5),
            *_blocks(N1, L1),
            conv(N1, N2, kernel_size=3),
            *_blocks(N2, L2),
            conv(N2, N3, kernel_size=3),
            *_blocks(N3, L3),
            conv(N3, M, kernel_size=3),
        )
        self.g_s = Transform(
            deconv(M, N3, kernel_size=3),
            *_blocks(N3, L3),
            deconv(N3, N2, kernel_size=3),
            *_blocks(N2, L2),
            deconv(N2, N1, kernel_size=3),
            *_blocks(N1, L1),
            deconv(N1, 3, kernel_size=5),
        )
        h_a = Transform(conv(M, N5), *_blocks(N5, L4), conv(N5, N6))
        h_s = Transform(deconv(N6, N5), *_blocks(N5, L4), deconv(N5, M))
        self.latent_codec = HyperpriorLatentCodec(
            latent_codec={
                "y": _latent_codec_y(N, M, self.config["groups"], self.config["context_rate"], aggregation_rate),
                "hyper": HyperLatentCodec(Bottleneck(N6), h_a=h_a, h_s=h_s, quantizer="ste"),
            }
        )
        # Published checkpoints hold the hyper transforms under both names.
        self.h_a, self.h_s = h_a, h_s
        self.rates = Rates(self.config["rungs"], M) if "rungs" in self.config else None

    def forward(self, x: Tensor, quality: Quality | None = None) -> dict[str, Any]:
        """Training and estimation: x (B, 3, H, W) in [0, 1], H and W multiples of 64.

        Returns `x_hat` (B, 3, H, W), not clamped, and `likelihoods` {"y": (B, M, H/16, W/16),
        "z": (B, N6, H/64, W/64)}. Adds uniform noise to what the likelihoods see in training mode.
        """
        _check_sides(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.reconstruct(self.g_a(x), quality)

    def reconstruct(self, y: Tensor, quality: Quality | None = None) -> dict[str, Any]:
        """What `forward` returns, from g_a(x) (B, M, H/16, W/16), which all qualities share."""
        coded = self.latent_codec(self._scaled(y, quality))
        return {"x_hat": self.g_s(self._unscaled(coded["y_hat"], quality)), "likelihoods": coded["likelihoods"]}

    def scaled_latents(self, x: Tensor, quality: Quality | None = None) -> Tensor:
        """y (B, M, H/16, W/16) of pictures x (B, 3, H, W), as the entropy model sees it."""
        return self._scaled(self.g_a(x), quality)

    def _scaled(self, y: Tensor, quality: Quality | None) -> Tensor:
        rates = self._gains(quality)
        return y if rates is None or quality is None else rates.scale(y, quality)

    def _unscaled(self, y_hat: Tensor, quality: Quality | None) -> Tensor:
        """y_hat as g_s sees it."""
        rates = self._gains(quality)
        return y_hat if rates is None or quality is None else rates.unscale(y_hat, quality)

    def _gains(self, quality: Quality | None) -> Rates | None:
        if (self.rates is None) != (quality is None):
            what = "has one rate and takes no quality" if self.rates is None else "has several rates: give a quality"
            raise ValueError(f"this model {what}")
        return self.rates

    @torch.no_grad()
    def at(self, quality: float) -> LALIC:
        """A model of one rate in the published layout, on the CPU: the gains of `quality` are in two convolutions.

        Raises LalicError for a quality outside the range, and ValueError when this model has one rate already.
        """
        rates = self._gains(quality)
        assert rates is not None
        model = type(self)(**{name: value for name, value in self.config.items() if name != "rungs"})
        state = {n: t for n, t in self.state_dict().items() if not n.startswith(PREFIX)}
        model.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
        last, first = model.g_a[-1], model.g_s[0]
        assert isinstance(last, nn.Conv2d) and isinstance(first, nn.ConvTranspose2d)
        copy.deepcopy(rates).cpu().fold(quality, last, first)
        return model.train(self.training)

    @torch.no_grad()
    def compress(self, x: Tensor, quality: Quality | None = None) -> dict[str, Any]:
        """Entropy-code x (B, 3, H, W) in [0, 1]: {"strings": [[bytes] * B, ...], "shape": ..., "y_hat": ...}.

        The strings are those of CompressAI: two for each channel group, then one for z. Needs `update()` once.
        """
        messages, grid, y_hat = self.messages(x, quality=quality)
        z_strings, *y_strings = [[m.tables.encode(symbols, indexes) for indexes, symbols in m.rows()] for m in messages]
        return {
            "strings": [*y_strings, z_strings],
            "shape": {"y": self._group_shapes(grid), "hyper": grid},
            "y_hat": y_hat,
        }

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: Any, quality: Quality | None = None) -> dict[str, Tensor]:
        """Inverse of `compress`: {"x_hat": (B, 3, H, W) in [0, 1]}."""
        *y_strings, z_strings = strings
        batch = len(z_strings)
        rows, columns = shape["hyper"]
        expected = self._group_shapes((rows, columns))
        if len(y_strings) != 2 * len(expected) or any(len(s) != batch for s in y_strings):
            raise ValueError(f"strings must be {2 * len(expected) + 1} lists of one length: two for each group, then z")
        if [tuple(s) for s in shape["y"]] != expected:
            raise ValueError(f"for z of {rows} x {columns} the shapes of y are {expected}, not {shape['y']}")
        remaining = iter([z_strings, *y_strings])

        def read(tables: coding.Tables, parameters: coding.Parameters) -> coding.Symbols:
            pairs = zip(next(remaining), coding.flat(parameters.indexes), strict=True)
            return np.stack([tables.decode(*pair) for pair in pairs])

        return {"x_hat": self.paint(self.latents(batch, (rows, columns), read), quality)}

    @torch.no_grad()
    def messages(
        self, x: Tensor, arithmetic: coding.Arithmetic | None = None, quality: Quality | None = None
    ) -> tuple[list[coding.Message], tuple[int, int], Tensor]:
        """What `compress` makes strings of: all messages in the order of coding (z first), sides of z, y_hat.

        `arithmetic` is that of the entropy path, float32 by default; that of g_a and h_a is the model's own.
        """
        _check_sides(x)
        with torch.autocast(x.device.type, enabled=False):
            y = self.scaled_latents(x, quality)
            return coding.encode(self.latent_codec, y, arithmetic or coding.Float32())

    @torch.no_grad()
    def latents(
        self, batch: int, grid: tuple[int, int], read: coding.Read, arithmetic: coding.Arithmetic | None = None
    ) -> Tensor:
        """y_hat (batch, M, 4 rows, 4 columns), z having the sides `grid`; `read` gives the messages."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return coding.decode(self.latent_codec, batch, *grid, read, arithmetic or coding.Float32())

    @torch.no_grad()
    def paint(self, y_hat: Tensor, quality: Quality | None = None) -> Tensor:
        """x_hat (B, 3, 16 H, 16 W) in [0, 1] of latents y_hat (B, M, H, W)."""
        with torch.autocast(y_hat.device.type, enabled=False):
            return self.g_s(self._unscaled(y_hat.to(next(self.parameters()).dtype), quality)).clamp_(0, 1)

    def _group_shapes(self, grid: tuple[int, int]) -> list[tuple[int, int, int]]:
        """(C, H, W) of each channel group of y, z having the sides `grid`."""
        return [(c, grid[0] * 4, grid[1] * 4) for c in self.config["groups"]]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load any LALIC state dict of this architecture (see `lalic.model.weights.normalise`).

        Coding tables are derived and never read from a file; call `update()` before coding. Float16 tensors become
        float32, and may be those of a compact file alone (lalic.model.compact).
        """
        state_dict = weights.normalise(state_dict)
        if compact.is_compact(state_dict):
            state_dict = weights.normalise(compact.with_constants(state_dict, self))
        return nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)

    @classmethod
    def from_state_dict(cls, state_dict: Any, strict: bool = True) -> LALIC:
        """A model of the architecture that the tensors' shapes tell, with these weights."""
        state_dict = weights.normalise(state_dict)
        model = cls(**weights.infer_architecture(state_dict))
        model.load_state_dict(state_dict, strict=strict)
        return model

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute every Bi-RWKV block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, BiRWKVBlock):
                module.gradient_checkpointing = enabled

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Precision of the transforms: torch.bfloat16, torch.float16, or None for that of the parameters.

        Latents, entropy models, likelihoods and x_hat stay in float32.
        """
        for module in self.modules():
            if isinstance(module, Transform):
                module.compute_dtype = dtype

    def quantiles(self) -> list[nn.Parameter]:
        """The entropy bottleneck's quantiles: trained by the auxiliary loss alone."""
        return [p for name, p in self.named_parameters() if name.endswith(".quantiles")]

    def main_parameters(self) -> list[nn.Parameter]:
        """Everything that the rate-distortion loss trains, in the order of `named_parameters`."""
        return [p for name, p in self.named_parameters() if not name.endswith(".quantiles")]


def check_architecture(
    N: int,
    M: int | None,
    dims: Sequence[int],
    depths: Sequence[int],
    groups: Sequence[int],
    context_rate: int = weights.CONTEXT_RATE,
    aggregation_rate: int = weights.AGGREGATION_RATE,
    rungs: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The architecture as a plain dict, or ValueError naming what does not fit."""
    if len(dims) != 6 or min(dims) < 1:
        raise ValueError(f"dims must be six positive numbers, got {list(dims)}")
    if len(depths) != 4 or min(depths) < 0:
        raise ValueError(f"depths must be four numbers >= 0, got {list(depths)}")
    if M != dims[3]:
        raise ValueError(f"M = {M} must equal dims[3] = {dims[3]}: both are the channels of y")
    if not groups or min(groups) < 1 or sum(groups) != M:
        raise ValueError(f"groups must be positive and sum to M = {M}, got {list(groups)}")
    for name, value in (("N", N), ("context_rate", context_rate), ("aggregation_rate", aggregation_rate)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be positive and whole, got {value!r}")
    return {
        "N": N,
        "M": M,
        "dims": list(dims),
        "depths": list(depths),
        "groups": list(groups),
        # One group has no channel context, so no weights that would tell the rate.
        "context_rate": context_rate if len(groups) > 1 else weights.CONTEXT_RATE,
        "aggregation_rate": aggregation_rate,
        **({} if rungs is None else {"rungs": check_rungs(rungs)}),
    }


def _check_sides(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % STRIDE or x.shape[3] % STRIDE or not x.numel():
        raise ValueError(f"LALIC takes images (B, 3, H, W) with H and W multiples of {STRIDE}, got {tuple(x.shape)}")


def _blocks(dim: int, depth: int) -> list[nn.Module]:
    return [BiRWKVBlock(dim) for _ in range(depth)]


def _latent_codec_y(
    N: int, M: int, groups: Sequence[int], context_rate: int, aggregation_rate: int
) -> ChannelGroupsLatentCodec:
    """Space-channel context model of ELIC (arXiv 2203.10886) with Bi-RWKV channel contexts."""
    channel_context = {
        f"y{k}": ChannelsLast(
            conv3x3(sum(groups[:k]), M),
            BiRWKVBlock(M, context_rate),
            BiRWKVBlock(M, context_rate),
            conv1x1(M, groups[k] * 2),
        )
        for k in range(1, len(groups))
    }
    latent_codec = {}
    for k, channels in enumerate(groups):
        # What is known before y_k: spatial context, channel context of the groups before, side information.
        known = channels * 2 + (channels * 2 if k > 0 else 0) + M
        latent_codec[f"y{k}"] = Checkerboard(
            latent_codec={"y": GaussianConditionalLatentCodec(quantizer="ste")},
            context_prediction=CheckerboardConv(channels, channels * 2, kernel_size=5, stride=1, padding=2),
            entropy_parameters=EntropyParameters(
                *sequential_channel_ramp(
                    known,
                    channels * 2,
                    min_ch=N * 2,
                    num_layers=3,
                    make_layer=partial(EntropyParametersBlock, expansion_factor=aggregation_rate),
                    make_act=nn.Identity,
                )
            ),
        )
    return ChannelGroupsLatentCodec(latent_codec, channel_context, groups=list(groups))
