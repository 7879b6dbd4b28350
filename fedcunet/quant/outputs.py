"""Results of stages on their way to sources, and the gradients on their way back.

Shapes: B batch, n samples of a chunk, C channels, H W the sides of a map, h w those after pooling.
"""

import torch
from torch import Tensor

from fedcunet.quant.functions import gradient_step
from fedcunet.quant.kernels import FULL, encode
from fedcunet.quant.packing import pack_rows, packed_row, unpack_rows
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.sources import Source, map_grid
from fedcunet.quant.workspace import Workspace


class Output:
    """Where a stage's result goes: to a source, quantised and perhaps pooled.

    Args:
        shape: (B, H, W, C) of what the stage puts out, before pooling.
        workspace: of the step; its dtype and device are computed with.
        bits: of the source.
        packed: False keeps codes and indices unpacked: the reference for tests.
        pool: whether 2x2 maxima are kept, and of which pixel in 2 bits.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        workspace: Workspace,
        *,
        bits: int,
        packed: bool,
        pool: bool = False,
    ) -> None:
        batch, height, width, channels = shape
        self.workspace, self.pool, self.packed = workspace, pool, packed
        kept = (batch, height // 2, width // 2, channels) if pool else shape
        self.source = Source(kept, bits=bits, packed=packed, like=workspace.like)
        self.index: Tensor | None = None
        # The gradient of a heatmap from outside of the network.
        self.outside_BHWC: Tensor | None = None

    def put(self, samples: slice, y_nHWC: Tensor, *, again: bool = False) -> None:
        """Takes a stage's result for some samples, and may overwrite it.

        Args:
            samples: which they are.
            y_nHWC: a contiguous map.
            again: the result was put before, and its codes were given up since.
        """
        quantises = self.source.bits != FULL
        if quantises and not again:
            self._set_grid(samples, y_nHWC)
        if self.pool:
            if quantises:
                encode(y_nHWC, *self.source.grid(samples), out=y_nHWC)
            y_nHWC, index = (pool_codes if quantises else pool_values)(y_nHWC, self.workspace)
            self._keep_index(samples, index)
        self.source.store(samples, y_nHWC, encoded=self.pool or not quantises)
        if not again:
            self.source.measure(samples, y_nHWC, self.workspace)

    def put_pooled(self, samples: slice, y_nhwC: Tensor, index: Tensor) -> None:
        """Takes maxima for some samples, and where they come from: pooled, then quantised."""
        quantises = self.source.bits != FULL
        if quantises:
            self._set_grid(samples, y_nhwC)
        self._keep_index(samples, index)
        self.source.store(samples, y_nhwC, encoded=not quantises)
        self.source.measure(samples, y_nhwC, self.workspace)

    def _set_grid(self, samples: slice, y_nHWC: Tensor) -> None:
        middle_nC, step_nC = map_grid(y_nHWC, self.source.bits)
        self.source.middle_BC[samples], self.source.step_BC[samples] = middle_nC, step_nC

    def _keep_index(self, samples: slice, index: Tensor) -> None:
        if self.index is None:
            batch, height, width, channels = self.source.shape
            values = width * channels
            kept = packed_row(values, 2) if self.packed else values
            shape = (batch, height, kept)
            self.index = torch.empty(shape, dtype=torch.uint8, device=index.device)
        self.index[samples] = pack_rows(index, 2) if self.packed else index.flatten(2)

    def pooled_from(self, samples: slice, rows: slice) -> Tensor:
        """Which of the four pixels (0 to 3, row by row) each maximum came from: uint8."""
        assert self.index is not None
        index_nhv = self.index[samples, rows]
        _, _, width, channels = self.source.shape
        if self.packed:
            index_nhv = unpack_rows(index_nhv, 2, width * channels)
        return index_nhv.reshape(*index_nhv.shape[:2], width, channels)

    def gradient(self, samples: slice, name: str = "gradient") -> Tensor:
        """The gradient of the source for some samples, in work space of that name."""
        shape = (samples.stop - samples.start, *self.source.shape[1:])
        place_nhwC = self.workspace.take(name, *shape)
        if self.outside_BHWC is not None:
            place_nhwC.copy_(self.outside_BHWC[samples])
            if self.source.waiting is not None:
                self.source.waiting.add_to(place_nhwC, samples, self.workspace)
            return place_nhwC
        return self.source.gradient(samples, place_nhwC, self.workspace)

    def release(self) -> None:
        """Gives up the output's source."""
        self.source.release()
        self.index = self.outside_BHWC = None


def pool_codes(code_nHWC: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Maxima of 2x2 squares of whole numbers, and which pixel each is; overwrites the argument.

    Four times the code plus the pixel's rank, the first pixel's highest: the maximum of these
    numbers is that of the codes, and names the first of equal ones.
    """
    n, height, width, channels = code_nHWC.shape
    rank = torch.tensor([[3, 2], [1, 0]], dtype=code_nHWC.dtype, device=code_nHWC.device)
    square = code_nHWC.view(n, height // 2, 2, width // 2, 2, channels)
    square.mul_(4).add_(rank[:, None, :, None])
    upper_nhWC, lower_nhWC = code_nHWC[:, 0::2], code_nHWC[:, 1::2]
    rows_nhWC = workspace.take("scratch", n, height // 2, width, channels)
    torch.maximum(upper_nhWC, lower_nhWC, out=rows_nhWC)
    best_nhwC = workspace.take("pooled", n, height // 2, width // 2, channels)
    torch.maximum(rows_nhWC[:, :, 0::2], rows_nhWC[:, :, 1::2], out=best_nhwC)
    four_nhwC = workspace.take("pooled codes", *best_nhwC.shape)
    torch.mul(best_nhwC, 0.25, out=four_nhwC).floor_()
    best_nhwC.sub_(four_nhwC, alpha=4)
    return four_nhwC, best_nhwC.neg_().add_(3).to(torch.uint8)


def pool_values(y_nHWC: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Maxima of 2x2 squares, and which pixel each is (uint8, 0 to 3); the first of equal ones."""
    n, height, width, channels = y_nHWC.shape
    rows_nhWC = workspace.take("scratch", n, height // 2, width, channels)
    torch.maximum(y_nHWC[:, 0::2], y_nHWC[:, 1::2], out=rows_nhWC)
    best_nhwC = workspace.take("pooled", n, height // 2, width // 2, channels)
    torch.maximum(rows_nhWC[:, :, 0::2], rows_nhWC[:, :, 1::2], out=best_nhwC)
    others = [
        (y_nHWC[:, number // 2 :: 2, number % 2 :: 2] != best_nhwC).view(torch.uint8)
        for number in range(3)
    ]
    index = others[2].add_(1).mul_(others[1]).add_(1)
    return best_nhwC, index * others[0]


def picks(index: Tensor, like: Tensor) -> list[Tensor]:
    """For each of the four pixels, 1 where `index` (uint8, 0 to 3) names it, else 0."""
    number = index.to(like.dtype)
    lower = (number * 0.5).floor_()
    right = number.sub_(lower, alpha=2)
    both = lower * right
    lower.sub_(both)
    right.sub_(both)
    neither = (both + lower).add_(right).neg_().add_(1)
    return [neither, right, lower, both]


def unpool(gradient_nhwC: Tensor, index: Tensor, place_nHWC: Tensor) -> Tensor:
    """Puts each value at its pixel of a 2x2 square of `place_nHWC`, zeros elsewhere."""
    for number, pick in enumerate(picks(index, gradient_nhwC)):
        place = place_nHWC[:, number // 2 :: 2, number % 2 :: 2]
        torch.mul(gradient_nhwC, pick, out=place)
    return place_nHWC


def gather(y_nHWC: Tensor, index: Tensor) -> Tensor:
    """The pixel of each 2x2 square that `index` (uint8, 0 to 3) names: (n, H/2, W/2, C)."""
    first, *others = picks(index, y_nHWC)
    chosen = first.mul_(y_nHWC[:, 0::2, 0::2])
    for number, pick in enumerate(others, start=1):
        chosen.addcmul_(y_nHWC[:, number // 2 :: 2, number % 2 :: 2], pick)
    return chosen


class GradientQuantiser:
    """Gradients of a convolution's output at k bits, as `quantise_gradient` has them.

    Args:
        bits: k; 32 leaves them as they are.
        rounding: source of the rounding's randomness.
        peak: max|g| where one scale serves the whole tensor; None: each sample and channel has
            its own.
    """

    def __init__(self, bits: int, rounding: Rounding, peak: Tensor | None = None) -> None:
        self.bits, self.rounding, self.peak = bits, rounding, peak

    def __call__(self, gradient_nHWC: Tensor) -> Tensor:
        """Quantises in place."""
        if self.bits == FULL:
            return gradient_nHWC
        step = gradient_step(self._peak(gradient_nHWC), self.bits)
        self.rounding.scale_and_round_(gradient_nHWC, step.reciprocal())
        return gradient_nHWC.mul_(step)

    def _peak(self, gradient_nHWC: Tensor) -> Tensor:
        if self.peak is not None:
            return self.peak
        flat_nPC = gradient_nHWC.flatten(1, 2)
        return torch.maximum(flat_nPC.amax(1), -flat_nPC.amin(1))[:, None, None]
