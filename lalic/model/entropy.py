"""CompressAI's entropy models as they run in training: same parameters, same values, less work.

    y (B, C, H, W) ─► anchors ■ (row + column even) from side information alone
                   └► the others □ from side information and the 5x5 context of the quantised anchors

Coding (`compress`, `update`, the tables) is CompressAI's. `forward` is written anew because theirs computes what it
throws away, in training and in evaluation: a context of all pixels that is then set to zero, the parameters of both
halves for all pixels, copies in which every second pixel is overwritten, a second y_hat. And it asks the device for
the order of dimensions, and waits for the answer.

Legend: B batch, C channels of one group, H x W the grid of y, S channels of side information.
"""

from __future__ import annotations

from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.latent_codecs import CheckerboardLatentCodec
from compressai.ops import quantize_ste
from torch import Tensor


class Bottleneck(EntropyBottleneck):
    """The factorised model of z."""

    def forward(self, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> quantised, or with noise in training, and likelihoods, both (B, C, H, W)."""
        training = self.training if training is None else training
        per_channel = x.transpose(0, 1).contiguous()
        values = per_channel.view(x.shape[1], 1, -1)
        values = self.quantize(values, "noise" if training else "dequantize", self._get_medians())
        likelihood, _, _ = self._likelihood(values)
        if self.use_likelihood_bound:
            likelihood = self.likelihood_lower_bound(likelihood)
        outputs, likelihood = (t.view(per_channel.shape).transpose(0, 1).contiguous() for t in (values, likelihood))
        return outputs, likelihood


class Checkerboard(CheckerboardLatentCodec):
    """One channel group of y: two passes, each over the half of the pixels that it is for."""

    def forward(self, y: Tensor, side_params: Tensor) -> dict[str, Any]:
        """y (B, C, H, W), side_params (B, S, H, W), W even -> {"likelihoods": {"y": ...}, "y_hat": ...}."""
        codec = self.latent_codec["y"]
        y_anchors, y_others = halves(y)
        side_anchors, side_others = halves(side_params)

        no_context = y.new_zeros(y.shape[0], 2 * y.shape[1], y.shape[2], y.shape[3] // 2)
        params_anchors = self.entropy_parameters(self.merge(no_context, side_anchors))
        _, means = codec._chunk(params_anchors)
        y_hat_anchors = quantize_ste(y_anchors - means) + means

        context = self.context_prediction(whole(y_hat_anchors, torch.zeros_like(y_hat_anchors)))
        params_others = self.entropy_parameters(self.merge(halves(context)[1], side_others))
        _, means = codec._chunk(params_others)
        y_hat_others = quantize_ste(y_others - means) + means

        scales, means = codec._chunk(whole(params_anchors, params_others))
        _, likelihoods = codec.gaussian_conditional(y, scales, means=means)
        return {"likelihoods": {"y": likelihoods}, "y_hat": whole(y_hat_anchors, y_hat_others)}


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and the others of x (B, C, H, W), H and W even: (B, C, H, W/2) each, channels-last in memory."""
    return _Halves.apply(x)


def whole(anchors: Tensor, others: Tensor) -> Tensor:
    """Inverse of `halves`: two (B, C, H, W/2) -> (B, C, H, W), channels-last in memory."""
    return _Whole.apply(anchors, others)


# A permutation's gradient is the inverse permutation; autograd would write a zeroed copy for every slice.
class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = x.shape
        anchors, others = (_channels_last(x, batch, channels, height, width // 2) for _ in range(2))
        for half, first in ((anchors, 0), (others, 1)):
            half[..., 0::2, :] = x[..., 0::2, first::2]
            half[..., 1::2, :] = x[..., 1::2, 1 - first :: 2]
        return anchors, others

    @staticmethod
    def backward(ctx: Any, anchors: Tensor, others: Tensor) -> Tensor:
        return whole(anchors, others)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor) -> Tensor:
        batch, channels, height, half_width = anchors.shape
        x = _channels_last(anchors, batch, channels, height, 2 * half_width)
        for half, first in ((anchors, 0), (others, 1)):
            x[..., 0::2, first::2] = half[..., 0::2, :]
            x[..., 1::2, 1 - first :: 2] = half[..., 1::2, :]
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return halves(gradient)


def _channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
