"""Sources: the feature maps that carry information, quantised where they are produced.

A source is what a convolution puts out (after the pooling that follows it), the stem's output, or
a sum of maps. Everything else in the network is recomputed from sources. A source is stored once,
as k-bit codes with a grid of its own for every sample and channel, from the map's least value to
its greatest, and every consumer reads the same codes. This differs from Tang et al., ECCV 2018,
section 3.5, where the inputs of convolutions are quantised after BatchNorm and ReLU, with a fixed
range. Maxima of a pooling, sums and what went through a ReLU are not symmetric: a grid around zero
would have 4 dB more noise.

Shapes: B batch, n some of its samples, C channels, H W the sides of a map, h some of its rows.
Channels come last wherever maps are stored.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedcunet.quant.kernels import FULL, Layout, encode, kernels_for, over_pixels
from fedcunet.quant.waiting import WaitingGradient
from fedcunet.quant.workspace import Workspace


def source_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Middle m and step s of maps with these least and greatest values: m + c s, c in [-L, L].

    L = 2^(k-1) - 1. A step is at least 2^-20 of the middle, so that `encode` cannot leave the
    range; that of a map of zeros, or so small that it has no inverse, is 1. Values that are not
    finite make the grid so.
    """
    middle = low * 0.5 + high * 0.5
    step = (high * 0.5 - low * 0.5) / (2 ** (bits - 1) - 1)
    step = torch.maximum(step, middle.abs() * 2.0**-20)
    step = torch.where(step < torch.finfo(step.dtype).tiny, torch.ones_like(step), step)
    return middle, step


def map_grid(y_nHWC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`source_grid` of each sample and channel: middles and steps (n, C)."""
    flat_nPC = y_nHWC.flatten(1, 2)
    return source_grid(flat_nPC.amin(1), flat_nPC.amax(1), bits)


class QuantiseSource(torch.autograd.Function):
    """A map on its grid of k bits, `source_grid` for each sample and channel.

    Nothing is clipped, the gradient passes straight through.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, bits: int) -> Tensor:
        low_BC11, high_BC11 = x_BCHW.amin((2, 3), True), x_BCHW.amax((2, 3), True)
        middle_BC11, step_BC11 = source_grid(low_BC11, high_BC11, bits)
        y_BCHW = encode(x_BCHW, middle_BC11, step_BC11, out=torch.empty_like(x_BCHW))
        return torch.addcmul(middle_BC11, y_BCHW, step_BC11, out=y_BCHW)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class QuantiseFeature(nn.Module):
    """Stands in for a network's `Feature`: its map is quantised as a source."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x_BCHW: Tensor) -> Tensor:
        output: Tensor = QuantiseSource.apply(x_BCHW, self.bits)  # type: ignore[no-untyped-call]
        return output


class Source:
    """One feature map between its producer and its consumers, with what they share.

    The producer stores it chunk by chunk and then calls `finish`; consumers load chunks, add to
    the waiting gradient, and the producer takes the gradient and releases everything.

    BatchNorm's gradient contains the map itself: alpha * dZ + by_value * x + constant with
    coefficients that are known only after the whole batch. So only alpha * dZ is added up in
    the map; the coefficients of all consumers are added up in a number for each channel and
    applied once, by `gradient`.

    Args:
        shape: (B, H, W, C).
        bits: k of the codes; 32 keeps the values as they are.
        packed: False keeps the codes as floats: the reference for tests.
        like: a tensor with the dtype and device to compute with.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], *, bits: int, packed: bool, like: Tensor
    ) -> None:
        batch, channels = shape[0], shape[3]
        self.shape, self.bits, self._like = shape, bits, like
        self.layout, self.kernels = Layout(bits, packed), kernels_for(like)
        self.data: Tensor | None = None
        # A value is middle + step * code.
        self.middle_BC, self.step_BC = (
            like.new_zeros(batch, channels),
            like.new_ones(batch, channels),
        )
        # Mean and variance of each sample and channel, and of each channel.
        self.moments_2BC = like.new_empty(2, batch, channels)
        self.mean_C = self.variance_C = like.new_empty(0)
        self.waiting: WaitingGradient | None = None
        self.by_value_C = like.new_zeros(channels)
        self.constant_C = like.new_zeros(channels)
        self.is_normalised = False  # whether a consumer's BatchNorm had a gradient

    def grid(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Middles and steps of some samples, (n, 1, 1, C)."""
        return over_pixels(self.middle_BC[samples]), over_pixels(self.step_BC[samples])

    def store(self, samples: slice, y_nHWC: Tensor, *, encoded: bool) -> None:
        """Takes some samples: codes, or values, which become codes in place on their grid."""
        if self.data is None:
            self.data = self.layout.empty(self.shape, self._like)
        grid = None if encoded else (self.middle_BC[samples], self.step_BC[samples])
        self.kernels.pack(y_nHWC, self.data[samples], self.layout, grid)

    def measure(self, samples: slice, codes_nHWC: Tensor, workspace: Workspace) -> None:
        """Notes the moments of the codes of some samples."""
        codes_nPC = codes_nHWC.flatten(1, 2)
        mean_nC = codes_nPC.mean(1)
        squares_nPC = workspace.take("scratch", *codes_nPC.shape)
        if self.bits == FULL:
            torch.sub(codes_nPC, mean_nC[:, None], out=squares_nPC).square_()
            variance_nC = squares_nPC.mean(1)
        else:
            # Codes reach from -L to L: their mean square is not far from their variance, and the
            # difference loses little.
            torch.mul(codes_nPC, codes_nPC, out=squares_nPC)
            variance_nC = (squares_nPC.mean(1) - mean_nC.square()).clamp_(min=0)
        step_nC = self.step_BC[samples]
        self.moments_2BC[0, samples] = torch.addcmul(self.middle_BC[samples], mean_nC, step_nC)
        self.moments_2BC[1, samples] = variance_nC * step_nC.square()

    def finish(self) -> None:
        """Joins the samples' moments: mean and biased variance of each channel."""
        means_BC, variances_BC = self.moments_2BC
        self.mean_C = means_BC.mean(0)
        self.variance_C = (variances_BC + (means_BC - self.mean_C).square()).mean(0)

    def load(
        self,
        samples: slice,
        rows: slice,
        place_nhWC: Tensor,
        workspace: Workspace,
        *,
        raised: bool = False,
    ) -> Tensor:
        """Puts the codes of some samples and rows into `place_nhWC`, and returns it.

        `raised`: each into a square of four pixels.
        """
        assert self.data is not None, "a source was read after its release"
        part = self.data[samples, rows]
        self.kernels.unpack(part, place_nhWC, self.layout, workspace, raised=raised)
        return place_nhWC

    def add_late(self, by_value_C: Tensor, constant_C: Tensor, times: int) -> None:
        """Adds a consumer's coefficients, of a map that reads every value so many times."""
        self.by_value_C.add_(by_value_C, alpha=times)
        self.constant_C.add_(constant_C, alpha=times)
        self.is_normalised = True

    def gradient(self, samples: slice, place_nHWC: Tensor, workspace: Workspace) -> Tensor:
        """Puts the whole gradient of some samples into `place_nHWC`, and returns it."""
        if self.is_normalised:
            by_code_n11C = over_pixels(self.by_value_C * self.step_BC[samples])
            constant_nC = torch.addcmul(self.constant_C, self.middle_BC[samples], self.by_value_C)
            self.load(samples, slice(None), place_nHWC, workspace)
            torch.addcmul(over_pixels(constant_nC), place_nHWC, by_code_n11C, out=place_nHWC)
        else:
            place_nHWC.zero_()
        if self.waiting is not None:
            self.waiting.add_to(place_nHWC, samples, workspace)
        return place_nHWC

    def release(self) -> None:
        """Gives up the codes and the gradient."""
        self.data = self.waiting = None
