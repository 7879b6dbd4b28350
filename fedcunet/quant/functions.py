"""Quantisers with straight-through gradients. Quantised values are kept as float32 here.

Sources: Tang et al., ECCV 2018, section 3.5, Eqs. 5 and 6 (arXiv 1808.02194); Rastegari et al.,
"XNOR-Net", ECCV 2016, section 3.1 (the scale alpha); Li et al., "Ternary weight networks", 2016,
section 2.1 (the threshold); Wu et al., "WAGE", ICLR 2018, section 3.3 (power-of-two scales).

Shapes: O output channels (filters), I input channels, B batch, C channels, H W a map's sides.
"""

from typing import Any

import torch
from torch import Tensor

from fedcunet.bits import covering_scale, linear_quantise, sigma

TERNARY_THRESHOLD = 0.7  # delta = 0.7 mean|w| of a filter


def binarise(weight_OIHW: Tensor, *, scaled: bool) -> Tensor:
    """sign(w) with sign(0) = +1, times alpha = mean|w| of the filter if `scaled` (Eq. 5)."""
    # Adding 0.0 turns -0.0 into +0.0, whose sign is +1.
    positive_OIHW = weight_OIHW + 0.0
    if not scaled:
        return torch.copysign(torch.ones_like(positive_OIHW), positive_OIHW)
    alpha_O111 = weight_OIHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return torch.copysign(alpha_O111, positive_OIHW)


def ternarise(weight_OIHW: Tensor, *, scaled: bool) -> Tensor:
    """-1, 0 or +1 with the threshold 0.7 mean|w| of the filter.

    With `scaled`, each filter is multiplied by the mean magnitude of its weights beyond the
    threshold (ternary weight networks, Eq. 5); a filter of zeros stays zero.
    """
    dtype = weight_OIHW.dtype
    magnitude_OIHW = weight_OIHW.abs()
    threshold_O111 = TERNARY_THRESHOLD * magnitude_OIHW.mean(dim=(1, 2, 3), keepdim=True)
    ternary_OIHW = (weight_OIHW > threshold_O111).to(dtype)
    ternary_OIHW -= (weight_OIHW < -threshold_O111).to(dtype)
    if not scaled:
        return ternary_OIHW
    count_O111 = ternary_OIHW.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_(min=1)
    total_O111 = (weight_OIHW * ternary_OIHW).sum(dim=(1, 2, 3), keepdim=True)
    return ternary_OIHW * (total_O111 / count_O111)


def quantise_weight(weight_OIHW: Tensor, bits: int, *, scaled: bool, share: float = 1.0) -> Tensor:
    """Weights at 1 or 2 bits, or on the way there: (1 - share) w + share q.

    The way is Liu and Mattina's alpha-blending (IJCAI 2019); w is brought to the size of an
    unscaled q first, filter by filter.
    """
    quantised_OIHW = (binarise if bits == 1 else ternarise)(weight_OIHW, scaled=scaled)
    if share == 1:
        return quantised_OIHW
    if not scaled:
        count_O111 = quantised_OIHW.square().sum(dim=(1, 2, 3), keepdim=True)
        total_O111 = (weight_OIHW * quantised_OIHW).sum(dim=(1, 2, 3), keepdim=True)
        scale_O111 = torch.where(total_O111 > 0, total_O111 / count_O111, 1.0)
        weight_OIHW = weight_OIHW / scale_O111
    return torch.lerp(weight_OIHW, quantised_OIHW, share)


class QuantiseWeight(torch.autograd.Function):
    """`quantise_weight`; the gradient passes straight through, zero where |w| > 1."""

    @staticmethod
    def forward(ctx: Any, weight_OIHW: Tensor, bits: int, scaled: bool, share: float) -> Tensor:
        low, high = torch.aminmax(weight_OIHW)
        # Clamped latent weights, which is what training has, need no mask.
        ctx.all_inside = bool(low >= -1) and bool(high <= 1)
        if not ctx.all_inside:
            ctx.save_for_backward(weight_OIHW.abs() <= 1)
        return quantise_weight(weight_OIHW, bits, scaled=scaled, share=share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.all_inside:
            return gradients[0], None, None, None
        (inside_OIHW,) = ctx.saved_tensors
        return gradients[0] * inside_OIHW, None, None, None


class QuantiseInput(torch.autograd.Function):
    """q(x / range, k) * range (Eq. 6); the gradient passes straight through, zero where clipped.

    With range = 1 this is the paper's literal form. The zero region is |x| >= range, as in the
    authors' code, not |x| > range (1 - sigma).
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, bits: int, input_range: float) -> Tensor:
        ctx.save_for_backward(x_BCHW.abs() < input_range)
        return linear_quantise(x_BCHW, bits, scale=input_range)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside_BCHW,) = ctx.saved_tensors
        return gradients[0] * inside_BCHW, None, None


def quantise_gradient(
    gradient_BCHW: Tensor, bits: int, *, per_channel: bool, generator: torch.Generator
) -> Tensor:
    """The gradient at k bits: q(g / s, k) * s with stochastic rounding, unbiased inside the range.

    Args:
        gradient_BCHW: float gradient of a map.
        bits: k >= 2.
        per_channel: one power-of-two scale a sample and channel; else one for the whole tensor
            (WAGE's form).
        generator: source of the rounding's randomness, on the gradient's device.

    s is the power of two at or above max|g| / (1 - sigma): nothing is clipped.
    """
    if not (
        gradient_BCHW.is_contiguous()
        or gradient_BCHW.is_contiguous(memory_format=torch.channels_last)
    ):
        gradient_BCHW = gradient_BCHW.contiguous()
    if per_channel:
        peak = gradient_BCHW.abs().amax(dim=(2, 3), keepdim=True)
    else:
        peak = gradient_BCHW.abs().amax()
    step = gradient_step(peak, bits)
    # floor(g / step + u) with u = (i + 0.5) / 256, in as few passes over memory as there may be.
    scaled_BCHW = _random_bytes(gradient_BCHW, generator).add_(0.5)
    scaled_BCHW.addcmul_(gradient_BCHW, 256 / step)
    return scaled_BCHW.mul_(1 / 256).floor_().mul_(step)


def gradient_step(peak: Tensor, bits: int) -> Tensor:
    """The step s * sigma of gradients of which `peak` is the largest, s as in `quantise_gradient`.

    Where it would be so small that it has hardly an inverse it is 1: such gradients become 0.
    """
    step = covering_scale(peak, bits) * sigma(bits)
    return torch.where(step < 2.0**-110, 1.0, step)


def _random_bytes(like: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers i, uniform on 0 to 255, shaped as the dense tensor `like`.

    Four come from one draw of 32 bits: a quarter of the time of `torch.rand`, and rounding with
    them is unbiased to 1/512 of a step.
    """
    count = like.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int32, device=like.device)
    words.random_(-(2**31), None, generator=generator)
    numbers = words.view(torch.uint8)[:count].as_strided(like.shape, like.stride())
    return numbers.to(like.dtype)


class QuantiseGradient(torch.autograd.Function):
    """Identity forward; quantises the gradient that comes back."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, bits: int, per_channel: bool, generator: torch.Generator
    ) -> Tensor:
        ctx.bits, ctx.per_channel, ctx.generator = bits, per_channel, generator
        return x_BCHW.view_as(x_BCHW)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        quantised = quantise_gradient(
            gradients[0], ctx.bits, per_channel=ctx.per_channel, generator=ctx.generator
        )
        return quantised, None, None, None
