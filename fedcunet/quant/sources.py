"""Sources: the feature maps that carry information, quantised where they are produced.

A source is what a convolution between two blocks puts out (after the pooling that follows it) or
the output of the stem. Everything else in the network is recomputed from sources. A source is
stored once, as k-bit codes with one max-abs scale for every sample and channel, and every
consumer reads the same codes. This differs from Tang et al., ECCV 2018, section 3.5, where the
inputs of convolutions are quantised after BatchNorm and ReLU, with a fixed range.

Shapes: B batch, n some of its samples, C channels, H W the sides of a map.
"""

from typing import Any

import torch
from torch import Tensor

from fedcunet.models.blocks import Stem

FULL = 32  # bits of what is not quantised
WIDTHS = (2, 4, 6, 8)  # bits per code when packed; others are stored in the next width, or in 16


def source_codes(x_BCHW: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers c in [-L, L], L = 2^(k-1) - 1, and the steps of c * step ~ x.

    Args:
        x_BCHW: float map.
        bits: k >= 2.

    Returns:
        The codes, in the dtype of `x_BCHW`, and step_BC11 = max|x| / L of each sample and
        channel. The step of a map of zeros is 1; values that are not finite make the step so.
    """
    levels = 2 ** (bits - 1) - 1
    peak_BC11 = torch.maximum(x_BCHW.amax((2, 3), keepdim=True), -x_BCHW.amin((2, 3), keepdim=True))
    step_BC11 = peak_BC11 / levels
    step_BC11 = torch.where(step_BC11 == 0, torch.ones_like(step_BC11), step_BC11)
    return (x_BCHW / step_BC11).round_().clamp_(-levels, levels), step_BC11


class QuantiseSource(torch.autograd.Function):
    """A map on its grid of k bits; nothing is clipped, the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, bits: int) -> Tensor:
        codes_BCHW, step_BC11 = source_codes(x_BCHW, bits)
        return codes_BCHW.mul_(step_BC11)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class QuantStem(Stem):
    """A stem whose output is quantised as a source."""

    source_bits: int

    @classmethod
    def from_float(cls, stem: Stem, source_bits: int) -> "QuantStem":
        """A quantised stem that shares everything with `stem`."""
        quantised = cls.__new__(cls)
        quantised.__dict__.update(stem.__dict__)
        quantised.source_bits = source_bits
        return quantised

    def forward(self, image_B3HW: Tensor) -> Tensor:
        output: Tensor = QuantiseSource.apply(  # type: ignore[no-untyped-call]
            super().forward(image_B3HW), self.source_bits
        )
        return output


def pack_channels(codes_nCHW: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4, 6 or 8 bits (uint8) side by side in bytes, along the channels.

    Channels are taken in as many equal groups as codes share bytes, so that any rows of a map can
    be cut out of the packed form; a number of channels that does not divide is filled up.

    Returns:
        uint8 (n, packed_channels(C, bits), H, W).
    """
    if bits == 8:
        return codes_nCHW
    groups = 2 if bits == 4 else 4
    missing = -codes_nCHW.shape[1] % groups
    if missing:
        codes_nCHW = torch.nn.functional.pad(codes_nCHW, (0, 0, 0, 0, 0, missing))
    parts = codes_nCHW.chunk(groups, dim=1)
    if bits == 4:
        return parts[0] | (parts[1] << 4)
    if bits == 2:
        return parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)
    # 6 bits: each byte takes a code of the first three groups and 2 bits of one of the fourth.
    last = parts[3]
    return torch.cat(
        [parts[0] | last << 6, parts[1] | last >> 2 << 6, parts[2] | last >> 4 << 6], 1
    )


def unpack_channels(packed: Tensor, bits: int, channels: int) -> Tensor:
    """The uint8 codes (n, channels, H, W) of `pack_channels`; a new tensor."""
    if bits == 8:
        return packed.clone()
    if bits == 4:
        codes = torch.cat([packed & 15, packed >> 4], 1)
    elif bits == 2:
        codes = torch.cat([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], 1)
    else:
        high = packed >> 6
        first, second, third = high.chunk(3, dim=1)
        last = first | (second << 2) | (third << 4)
        codes = torch.cat([packed & 63, last], 1)
    return codes[:, :channels]


def packed_channels(channels: int, bits: int) -> int:
    """Bytes of `channels` codes of one pixel."""
    return {2: -(-channels // 4), 4: -(-channels // 2), 6: 3 * -(-channels // 4), 8: channels}[bits]


class Source:
    """One feature map between its producer and its consumers, with what they share.

    The producer stores it chunk by chunk and then calls `finish`; consumers load chunks, add to
    the waiting gradient, and the producer takes the gradient and releases everything.

    BatchNorm's gradient contains the map itself: alpha * dZ + by_value * x + constant with
    coefficients that are known only after the whole batch. So only alpha * dZ is added up in
    the map; the coefficients of all consumers are added up in a number for each channel and
    applied once, by `take_gradient`.

    Args:
        shape: (B, C, H, W).
        bits: k of the codes; 32 keeps the values as they are.
        packed: False keeps the codes as floats: the reference for tests.
        like: a tensor with the dtype and device to compute with.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], *, bits: int, packed: bool, like: Tensor
    ) -> None:
        batch, channels, height, width = shape
        self.shape, self.bits = shape, bits
        self.levels = 2 ** (bits - 1) - 1
        self.width = next((width for width in WIDTHS if width >= bits), 16)
        self.kind = "float" if bits == FULL or not packed else "wide" if bits > 8 else "packed"
        if self.kind == "packed" and self.width == 8:
            self.kind = "bytes"
        dtype = {
            "float": like.dtype,
            "wide": torch.int16,
            "bytes": torch.int8,
            "packed": torch.uint8,
        }[self.kind]
        stored = packed_channels(channels, self.width) if self.kind == "packed" else channels
        self.data = torch.empty((batch, stored, height, width), dtype=dtype, device=like.device)
        self.step_BC = like.new_ones(batch, channels)
        # Mean and variance of each sample and channel, and of each channel.
        self.moments_2BC = like.new_empty(2, batch, channels)
        self.mean_C = self.variance_C = like.new_empty(0)
        self.gradient: Tensor | None = None
        self.by_value_C = like.new_zeros(channels)
        self.constant_C = like.new_zeros(channels)

    def store(self, samples: slice, codes_nCHW: Tensor, step_nC11: Tensor | None) -> None:
        """Takes the codes of some samples and their steps (None: values as they are)."""
        flat_nCP = codes_nCHW.flatten(2)
        if step_nC11 is None:
            variance_nC, mean_nC = torch.var_mean(flat_nCP, dim=2, correction=0)
        else:
            # A map's codes reach to +-L: its mean square is of the size of its variance, and the
            # difference loses little. Faster than var_mean.
            step_nC = step_nC11[:, :, 0, 0]
            self.step_BC[samples] = step_nC
            mean_nC = flat_nCP.mean(2)
            square_nC = torch.linalg.vector_norm(flat_nCP, dim=2).square() / flat_nCP.shape[2]
            variance_nC = (square_nC - mean_nC.square()).clamp_(min=0) * step_nC.square()
            mean_nC = mean_nC * step_nC
        self.moments_2BC[:, samples] = torch.stack((mean_nC, variance_nC))
        if self.kind == "packed":
            unsigned = (codes_nCHW + self.levels).to(torch.uint8)
            self.data[samples] = pack_channels(unsigned, self.width)
        else:
            self.data[samples] = codes_nCHW.to(self.data.dtype)

    def finish(self) -> None:
        """Joins the samples' moments: mean and biased variance of each channel."""
        means_BC, variances_BC = self.moments_2BC
        self.mean_C = means_BC.mean(0)
        self.variance_C = (variances_BC + (means_BC - self.mean_C).square()).mean(0)

    def load(self, samples: slice, rows: slice) -> Tensor:
        """The codes (n, C, h, W) of some samples and rows, as a new float tensor."""
        part = self.data[samples, :, rows]
        if self.kind != "packed":
            # Contiguous, and never a view of what is stored.
            codes = self.step_BC.new_empty(part.shape)
            return codes.copy_(part)
        unsigned = unpack_channels(part, self.width, self.shape[1])
        # Modulo 256 this is the signed code.
        signed = unsigned.sub_(self.levels).view(torch.int8)
        return self.step_BC.new_empty(signed.shape).copy_(signed)

    def add_gradient(
        self, samples: slice, rows: slice, alpha_C11: Tensor, gradient_nChw: Tensor, first: bool
    ) -> None:
        """Adds alpha * gradient to the waiting gradient; the `first` consumer sets it."""
        if self.gradient is None:
            self.gradient = self.step_BC.new_empty(self.shape)
        place = self.gradient[samples, :, rows]
        if first:
            torch.mul(gradient_nChw, alpha_C11, out=place)
        else:
            place.addcmul_(gradient_nChw, alpha_C11)

    def finished_gradient(self, samples: slice) -> Tensor:
        """The whole gradient of some samples (n, C, H, W), finished in place; once per sample."""
        assert self.gradient is not None
        by_code_nC11 = (self.by_value_C * self.step_BC[samples])[:, :, None, None]
        gradient = self.gradient[samples]
        gradient.addcmul_(self.load(samples, slice(None)), by_code_nC11)
        return gradient.add_(self.constant_C[:, None, None])

    def release(self) -> None:
        """Gives up the codes and the gradient."""
        self.data = self.step_BC.new_empty(0)
        self.gradient = None
