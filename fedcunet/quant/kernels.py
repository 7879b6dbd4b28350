"""What a step does with maps over and over: codes out of memory, activation, codes into memory.

In plain torch here; on CUDA, with Triton, in kernels that go over a map once (`fused.py`).

Shapes: n samples and h rows of a chunk, C or I channels, H W the sides of a map, v bytes of a row.
Channels come last.
"""

import functools
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcunet.quant.packing import pack_rows, packed_row, unpack_rows, width_of
from fedcunet.quant.workspace import Workspace

FULL = 32  # bits of what is not quantised
Activation = Literal["none", "relu", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the codes of a source lie in memory.

    Args:
        bits: of a code; 32: values as they are.
        packed: False keeps whole numbers as floats: the reference for tests.
    """

    bits: int
    packed: bool

    @property
    def levels(self) -> int:
        """L: codes are whole numbers from -L to L."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def width(self) -> int:
        """Bits that a code takes; below 8 they share bytes; 32: a float of the network's kind."""
        return width_of(self.bits) if self.packed and self.bits != FULL else FULL

    def empty(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        """Room for the codes of a map (B, H, W, C), on the device of `like`."""
        dtype = {FULL: like.dtype, 16: torch.int16, 8: torch.int8}.get(self.width, torch.uint8)
        if dtype == torch.uint8:
            shape = (*shape[:2], packed_row(shape[2] * shape[3], self.width))  # type: ignore[assignment]
        return torch.empty(shape, dtype=dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class InputGrid:
    """Eq. 6 of Tang et al., ECCV 2018, over a range: steps, and where it clips."""

    step: float
    range: float


def over_pixels(values_nC: Tensor) -> Tensor:
    """Values for all pixels of a sample and channel: (n, 1, 1, C)."""
    return values_nC[:, None, None]


def encode(x: Tensor, middle: Tensor, step: Tensor, *, out: Tensor) -> Tensor:
    """The codes c of values, put into `out`, which may be `x` itself."""
    inverse = step.reciprocal()
    return torch.addcmul(-middle * inverse, x, inverse, out=out).round_()


def raise_into(place_nHWC: Tensor, x_nhwC: Tensor) -> None:
    """Puts every pixel into a square of four."""
    n, height, width, channels = x_nhwC.shape
    # Part of a wider buffer, perhaps, but its rows and columns divide as those of any map.
    squares = place_nHWC.view(n, height, 2, width, 2, channels)
    squares.copy_(x_nhwC[:, :, None, :, None].expand(n, height, 2, width, 2, channels))


class Kernels:
    """The three operations in plain torch, on every device.

    The fused ones that override them give the same numbers, but that a product may be rounded
    before a sum or not.
    """

    def unpack(
        self,
        stored: Tensor,
        place_nhWC: Tensor,
        layout: Layout,
        workspace: Workspace,
        *,
        raised: bool,
    ) -> None:
        """Puts stored codes into a map, perhaps part of a wider one.

        Args:
            stored: rows of what `pack` wrote; of half the height and width where `raised`.
            place_nhWC: floats.
            layout: of the codes.
            workspace: of the step.
            raised: every code goes into a square of four pixels.
        """
        n, height, width, channels = place_nhWC.shape
        if raised:
            small_nhwC = workspace.take("small", n, height // 2, width // 2, channels)
            self.unpack(stored, small_nhwC, layout, workspace, raised=False)
            raise_into(place_nhWC, small_nhwC)
            return
        if stored.dtype == torch.uint8:
            unsigned_nhv = unpack_rows(stored, layout.width, width * channels)
            # Modulo 256 this is the signed code.
            stored = unsigned_nhv.sub_(layout.levels).view(torch.int8).reshape(place_nhWC.shape)
        place_nhWC.copy_(stored)

    def pack(
        self,
        y_nHWC: Tensor,
        stored: Tensor,
        layout: Layout,
        grid: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Stores codes; of values, with the grid's middle and step (n, C), which become codes."""
        if grid is not None:
            encode(y_nHWC, *map(over_pixels, grid), out=y_nHWC)
        if stored.dtype == torch.uint8:
            unsigned = y_nHWC.to(torch.int8).add_(layout.levels).view(torch.uint8)
            stored.copy_(pack_rows(unsigned, layout.width))
        else:
            stored.copy_(y_nHWC)

    def activate(
        self,
        x_nhWI: Tensor,
        shift_nI: Tensor,
        factor_nI: Tensor,
        padded_nhWI: Tensor,
        above: int,
        activation: Activation,
        grid: InputGrid | None,
        workspace: Workspace,
    ) -> Tensor:
        """The activation of factor * x + shift, with rows of zeros around, and what is read of it.

        Args:
            x_nhWI: codes.
            shift_nI: contiguous, as `factor_nI`.
            factor_nI: by which a code is multiplied.
            padded_nhWI: where the result goes, between `above` rows of zeros and those below.
            above: number of rows.
            activation: what comes after the factor and the shift.
            grid: of the convolution's input quantiser.
            workspace: of the step.

        Returns:
            `padded_nhWI`, or that on the grid.
        """
        r_nhWI = inner_rows(padded_nhWI, above, x_nhWI.shape[1])
        torch.addcmul(over_pixels(shift_nI), x_nhWI, over_pixels(factor_nI), out=r_nhWI)
        if activation == "relu":
            r_nhWI.relu_()
        elif activation == "sigmoid":
            r_nhWI.sigmoid_()
        if grid is None:
            return padded_nhWI
        read_nhWI = workspace.take("read", *padded_nhWI.shape)
        torch.mul(padded_nhWI, 1 / grid.step, out=read_nhWI).round_().mul_(grid.step)
        return read_nhWI.clamp_(grid.step - grid.range, grid.range - grid.step)


def inner_rows(padded_nhWI: Tensor, above: int, height: int) -> Tensor:
    """The rows between those of zeros, which are set to zero."""
    if padded_nhWI.shape[1] == height:
        return padded_nhWI
    padded_nhWI[:, :above].zero_()
    padded_nhWI[:, above + height :].zero_()
    return padded_nhWI[:, above : above + height]


PLAIN = Kernels()


def kernels_for(like: Tensor) -> Kernels:
    """The kernels for a network's dtype and device: fused ones where they are to be had."""
    return _kernels_for(like.device, like.dtype)


@functools.cache
def _kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return PLAIN
    try:
        from fedcunet.quant import fused
        from fedcunet.quant.agreement import disagreement

        kernels: Kernels = fused.FusedKernels()
        found = disagreement(kernels, device, dtype)
    except ImportError:  # no Triton
        return PLAIN
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    if not found:
        return kernels
    warnings.warn(
        f"{device}: plain torch in place of fused kernels, which do not work here ({found})",
        stacklevel=2,
    )
    return PLAIN
