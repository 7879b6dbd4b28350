"""Results of stages on their way to sources, and the gradients on their way back.

Shapes: B batch, n samples of a chunk, C channels, H W the sides of a map, h w those after pooling.
"""

import torch
from torch import Tensor

from fedcunet.quant.functions import quantise_gradient
from fedcunet.quant.layers import QuantSpec, Rounding
from fedcunet.quant.sources import FULL, Source, pack_channels, source_codes, unpack_channels


class Output:
    """Where a stage's result goes: to a source, perhaps pooled, or out of the network.

    Args:
        shape: (B, C, H, W) of what the stage puts out, before pooling.
        bits: of the source; None for a map that leaves the network.
        pool: whether 2x2 maxima are kept, and of which pixel in 2 bits.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        like: Tensor,
        *,
        bits: int | None,
        packed: bool,
        pool: bool = False,
    ) -> None:
        batch, channels, height, width = shape
        self.pool, self.packed = pool, packed
        self.channels = channels
        self.map_BCHW: Tensor | None = None
        self.source: Source | None = None
        if bits is None:
            self.map_BCHW = like.new_empty(shape)
            return
        kept = (batch, channels, height // 2, width // 2) if pool else shape
        self.source = Source(kept, bits=bits, packed=packed, like=like)
        if pool:
            quarter = -(-channels // 4) if packed else channels
            self.index = torch.empty(
                (batch, quarter, *kept[2:]), dtype=torch.uint8, device=like.device
            )

    def put(self, samples: slice, y_nCHW: Tensor) -> None:
        """Takes a convolution's result for some samples: quantised, then pooled."""
        if self.map_BCHW is not None:
            self.map_BCHW[samples] = y_nCHW
            return
        assert self.source is not None
        step_nC11 = None
        if self.source.bits != FULL:
            y_nCHW, step_nC11 = source_codes(y_nCHW, self.source.bits)
        if self.pool:
            y_nCHW, index = pool_with_index(y_nCHW)
            self._keep_index(samples, index)
        self.source.store(samples, y_nCHW, step_nC11)

    def put_pooled(self, samples: slice, y_nChw: Tensor, index: Tensor) -> None:
        """Takes maxima for some samples, and where they come from: pooled, then quantised."""
        assert self.source is not None
        step_nC11 = None
        if self.source.bits != FULL:
            y_nChw, step_nC11 = source_codes(y_nChw, self.source.bits)
        self._keep_index(samples, index)
        self.source.store(samples, y_nChw, step_nC11)

    def _keep_index(self, samples: slice, index: Tensor) -> None:
        self.index[samples] = pack_channels(index, 2) if self.packed else index

    def pooled_from(self, samples: slice, rows: slice) -> Tensor:
        """Which of the four pixels (0 to 3, row by row) each maximum came from: uint8."""
        index = self.index[samples, :, rows]
        return unpack_channels(index, 2, self.channels) if self.packed else index


def pool_with_index(y_nCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of 2x2 squares, and which pixel each is (uint8, 0 to 3); the first of equal ones."""
    upper = y_nCHW[:, :, 0::2, 0::2], y_nCHW[:, :, 0::2, 1::2]
    lower = y_nCHW[:, :, 1::2, 0::2], y_nCHW[:, :, 1::2, 1::2]
    upper_best, lower_best = torch.maximum(*upper), torch.maximum(*lower)
    # Logic on bytes: many times faster than masked operations.
    below = lower_best > upper_best
    right = ((upper[1] > upper[0]) & ~below) | ((lower[1] > lower[0]) & below)
    index = (below.view(torch.uint8) << 1) | right.view(torch.uint8)
    return torch.maximum(upper_best, lower_best), index


def unpool(gradient_nChw: Tensor, index: Tensor) -> Tensor:
    """Puts each value at its pixel of a 2x2 square, zeros elsewhere: (n, C, 2h, 2w)."""
    n, channels, height, width = gradient_nChw.shape
    spread = gradient_nChw.new_empty(n, channels, 2 * height, 2 * width)
    for number in range(4):
        place = spread[:, :, number // 2 :: 2, number % 2 :: 2]
        torch.mul(gradient_nChw, index == number, out=place)
    return spread


def gather(y_nCHW: Tensor, index: Tensor) -> Tensor:
    """The pixel of each 2x2 square that `index` (uint8, 0 to 3) names: (n, C, H/2, W/2)."""
    chosen = y_nCHW[:, :, 0::2, 0::2]
    for number in (1, 2, 3):
        other = y_nCHW[:, :, number // 2 :: 2, number % 2 :: 2]
        chosen = torch.where(index == number, other, chosen)
    return chosen


class OutputGradient:
    """The gradient of a stage's output, chunk by chunk: finished, quantised, unpooled.

    The gradient of a pooled map is quantised before it is spread over four pixels, three of which
    are zero; stochastic rounding leaves zeros as they are, so this is the same quantiser.
    """

    def __init__(
        self,
        output: Output,
        gradient_BOHW: Tensor | None,
        spec: QuantSpec,
        rounding: Rounding | None,
    ) -> None:
        self.output, self.gradient_BOHW = output, gradient_BOHW
        self.spec, self.rounding = spec, rounding
        self.whole_BChw: Tensor | None = None
        source = output.source
        if source is not None and source.gradient is None:
            # Nobody read it: as autograd would have it.
            source.gradient = source.step_BC.new_zeros(source.shape)
        if spec.gradient_bits != FULL and spec.gradient_scale == "tensor" and source is not None:
            finished = source.finished_gradient(slice(0, source.shape[0]))
            self.whole_BChw = self._quantised(finished, per_channel=False)
            source.gradient = None

    def _quantised(self, gradient: Tensor, *, per_channel: bool) -> Tensor:
        assert self.rounding is not None
        generator = self.rounding.generator(gradient.device)
        return quantise_gradient(
            gradient, self.spec.gradient_bits, per_channel=per_channel, generator=generator
        )

    def finish(self, samples: slice) -> Tensor:
        """The gradient of some samples as their source has it; every sample once."""
        source = self.output.source
        assert source is not None
        if self.whole_BChw is not None:
            return self.whole_BChw[samples]
        gradient = source.finished_gradient(samples)
        if self.spec.gradient_bits != FULL:
            gradient = self._quantised(gradient, per_channel=True)
        return gradient

    def take(self, samples: slice) -> Tensor:
        """The gradient of the stage's result for some samples; every sample once."""
        if self.output.source is None:
            assert self.gradient_BOHW is not None
            return self.gradient_BOHW[samples].contiguous()
        gradient = self.finish(samples)
        if self.output.pool:
            gradient = unpool(gradient, self.output.pooled_from(samples, slice(None)))
        return gradient

    def release(self) -> None:
        """Gives up the output's source."""
        self.whole_BChw = None
        if self.output.source is not None:
            self.output.source.release()
            if self.output.pool:
                del self.output.index
