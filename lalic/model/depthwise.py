"""Gradients of the depthwise 5x5 convolution in channels-last memory.

On a CPU, oneDNN computes the gradient of a depthwise kernel with a routine for dense groups of sixteen channels:
it takes ten times as long as the convolution itself, and a hundred times in bfloat16. The same gradient is a
depthwise convolution of the input by the output's gradient, for which oneDNN has a fast routine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_TOKENS = 2048
"""Tokens convolved at once: few enough to stay in cache and to keep float32 sums short."""


SHIFTED_ELEMENTS = 1 << 18
"""Elements that `_shifted_sum` works on at once."""


def depthwise_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """x (B, H, W, C) by kernel (C, 1, K, K), K odd, zeros outside -> (B, H, W, C)."""
    C, _, K, _ = kernel.shape
    if x.dtype == torch.float64 and x.device.type == "cpu":
        return _shifted_sum(x, kernel)
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=K // 2, groups=C).permute(0, 2, 3, 1)


def _shifted_sum(x: Tensor, kernel: Tensor) -> Tensor:
    """`depthwise_conv` tap by tap: oneDNN has no float64, and torch's own code takes 15 times as long.

    The taps are added in their order, whatever the number of threads.
    """
    _, H, W, C = x.shape
    K = kernel.shape[-1]
    margin = K // 2
    taps = kernel.reshape(C, K * K).t().contiguous()
    padded = F.pad(x, (0, 0, margin, margin, margin, margin))
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    rows = max(1, SHIFTED_ELEMENTS // (W * C))
    for top in range(0, H, rows):
        part = out[:, top : top + rows]
        for tap, weight in enumerate(taps):
            i, j = divmod(tap, K)
            part.addcmul_(padded[:, top + i : top + i + part.shape[1], j : j + W], weight)
    return out


def depthwise_gradients(gradient: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `depthwise_conv` for x, in its dtype, and for the kernel, in float32 (float64).

    gradient and x (B, H, W, C), kernel (C, 1, K, K), all of one dtype.
    """
    by_strips = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    gx, gk, _ = torch.ops.aten.convolution_backward(
        gradient.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        kernel,
        None,
        stride=[1, 1],
        padding=[kernel.shape[-1] // 2] * 2,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=kernel.shape[0],
        output_mask=[True, not by_strips, False],
    )
    if by_strips:
        gk = _kernel_gradient(gradient, x, kernel.shape[-1])
    return gx.permute(0, 2, 3, 1), gk.to(torch.promote_types(gk.dtype, torch.float32))


def kernel_gradient_by_strips(gradient: Tensor, x: Tensor, size: int, strip_tokens: int = STRIP_TOKENS) -> Tensor:
    """The kernel's gradient, (C, 1, size, size) in at least float32, as convolutions by the output's gradient.

    gradient and x (B, H, W, C). Every strip of rows of an image is one convolution, whose filter is the gradient
    there; the strips are added in their order, so the result does not depend on the machine's load.
    """
    B, H, W, C = x.shape
    margin = size // 2
    images, filters = x.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    rows = max(1, strip_tokens // W)
    total = x.new_zeros(1, C, size, size, dtype=torch.promote_types(x.dtype, torch.float32))
    for image in range(B):
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            first, last = max(top - margin, 0), min(bottom + margin, H)
            # At the border zeros are added above and below, though only one side may need them: the results of the
            # other side are left out. So no strip is copied into a larger one.
            zeros = margin if (first, last) != (top - margin, bottom + margin) else 0
            shifts = F.conv2d(
                images[image : image + 1, :, first:last],
                filters[image, :, top:bottom].unsqueeze(1),
                padding=(zeros, margin),
                groups=C,
            )
            total += shifts.narrow(2, top - margin - first + zeros, size)
    return total.view(C, 1, size, size)


# One operator for torch.compile, whatever the number of strips.
@torch.library.custom_op("lalic::depthwise_kernel_gradient", mutates_args=())
def _kernel_gradient(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return kernel_gradient_by_strips(gradient, x, size)


@_kernel_gradient.register_fake
def _(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    return x.new_empty((x.shape[3], 1, size, size), dtype=torch.promote_types(x.dtype, torch.float32))
