"""The published formulation of the network: the baseline of `block.py` and `train_step.py`."""

from __future__ import annotations

import types
from typing import Any


def use_plain_formulation(model: Any) -> None:
    """Make a LALIC, or a block, compute as the published code does: same parameters, same result, other steps.

    OmniShift in separate branches, (B, C, H, W) memory with rearranging around every mix, gamma multiplied. BiWKV
    is the operator that the process has.
    """
    from torch import nn

    from lalic.model.blocks import BiRWKVBlock, ChannelMix, OmniShift, SpatialMix
    from lalic.model.lalic import Transform
    from lalic.ops import biwkv

    def shift(self: Any, x: Any) -> Any:
        alpha = self.alpha
        return alpha[0] * x + alpha[1] * self.conv1x1(x) + alpha[2] * self.conv3x3(x) + alpha[3] * self.conv5x5(x)

    def shifted(self: Any, tokens: Any, grid: tuple[int, int]) -> Any:
        batch, _, channels = tokens.shape
        image = tokens.transpose(1, 2).reshape(batch, channels, *grid)
        return self.omni_shift(image).flatten(2).transpose(1, 2)

    def spatial(self: Any, tokens: Any, grid: tuple[int, int]) -> Any:
        x = shifted(self, tokens, grid)
        count = x.shape[1]
        attended = biwkv(self.decay / count, self.boost / count, self.key(x), self.value(x))
        return self.output(self.receptance(x).sigmoid() * attended)

    def channel(self: Any, tokens: Any, grid: tuple[int, int]) -> Any:
        x = shifted(self, tokens, grid)
        return self.receptance(x).sigmoid() * self.value(self.key(x).relu().square())

    def block(self: Any, x: Any) -> Any:
        grid = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.gamma1 * self.att(self.ln1(tokens), grid)
        tokens = tokens + self.gamma2 * self.ffn(self.ln2(tokens), grid)
        return tokens.transpose(1, 2).reshape(x.shape)

    plain = {OmniShift: shift, SpatialMix: spatial, ChannelMix: channel, BiRWKVBlock: block}
    for module in model.modules():
        if isinstance(module, Transform):
            module.forward = types.MethodType(nn.Sequential.forward, module)
        elif type(module) in plain:
            module.forward = types.MethodType(plain[type(module)], module)
