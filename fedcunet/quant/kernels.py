"""What a step does with maps over and over: codes out of memory, activation, codes into memory.

In plain torch here; on CUDA, with Triton, in kernels that go over a map once (`fused.py`).

Shapes: n samples and h rows of a chunk, C or I channels, H W the sides of a map, v bytes of a row.
Channels come last.
"""

import functools
import os
import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

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


class Kernels(Protocol):
    """The three operations.

    Both forms give the same numbers, but that a product may be rounded before a sum or not
    (`disagreement`).
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

    def pack(
        self,
        y_nHWC: Tensor,
        stored: Tensor,
        layout: Layout,
        grid: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Stores codes; of values, with the grid's middle and step (n, C), which become codes."""

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


class PlainKernels:
    """In plain torch, on every device."""

    def unpack(
        self,
        stored: Tensor,
        place_nhWC: Tensor,
        layout: Layout,
        workspace: Workspace,
        *,
        raised: bool,
    ) -> None:
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


PLAIN = PlainKernels()


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


def disagreement(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str:
    """In which operation `kernels` and plain torch differ on small examples; "" if in none.

    Their numbers are such that no order of rounding can change a result.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    for shape in ((2, 4, 6, 5), (1, 2, 1100, 5)):  # places are left over; several blocks a row
        found = _packing_disagreement(kernels, shape, like)
        found = found or _activation_disagreement(kernels, shape, like)
        if found:
            return found
    return ""


def _drawn(shape: tuple[int, ...], like: Tensor, most: int) -> Tensor:
    """Multiples of 1/2 up to `most`, the same every time."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randint(-2 * most, 2 * most + 1, shape, generator=generator) / 2).to(like)


def _packing_disagreement(kernels: Kernels, shape: tuple[int, int, int, int], like: Tensor) -> str:
    n, _, width, channels = shape
    workspace = Workspace(like)
    packed = [Layout(bits, packed=True) for bits in (2, 3, 6, 8, 10, FULL)]
    for layout in (*packed, Layout(6, packed=False)):
        middle_nC = _drawn((n, channels), like, 8)
        step_nC = _drawn((n, channels), like, 2).round_().exp2_()
        codes = _drawn(shape, like, min(layout.levels, 1000))  # half of them between two codes
        grid, values = None, codes
        if layout.bits != FULL:
            grid = middle_nC, step_nC
            values = torch.addcmul(over_pixels(middle_nC), codes, over_pixels(step_nC))
        rooms = [layout.empty(shape, like).zero_() for _ in range(2)]
        taken = [values.clone() for _ in range(2)]
        for each, room, y in zip((PLAIN, kernels), rooms, taken, strict=True):
            each.pack(y, room, layout, grid)
        if not taken[0].equal(taken[1]):
            return f"codes of {layout.bits} bits"
        if not rooms[0].equal(rooms[1]):
            return f"packed codes of {layout.bits} bits"
        for raised in (False, True):
            scale = 2 if raised else 1
            places = [like.new_zeros(n, scale, width * scale, channels + 3) for _ in range(2)]
            for each, place in zip((PLAIN, kernels), places, strict=True):
                part = rooms[0][:, 1:2]
                each.unpack(part, place[..., 2:-1], layout, workspace, raised=raised)
            if not places[0].equal(places[1]):
                return f"unpacked codes of {layout.bits} bits"
    return ""


def _activation_disagreement(
    kernels: Kernels, shape: tuple[int, int, int, int], like: Tensor
) -> str:
    n, height, width, channels = shape
    workspace = Workspace(like)
    x = _drawn(shape, like, 100)
    shift, factor = _drawn((n, channels), like, 2), _drawn((n, channels), like, 3).round_().exp2_()
    activations: tuple[Activation, ...] = ("none", "relu")
    for activation in activations:
        for above, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
            for grid in (None, InputGrid(2**-2, 4.0)):
                results = []
                for each in (PLAIN, kernels):
                    padded = like.new_ones(n, above + height + below, width, channels)
                    read = each.activate(
                        x, shift, factor, padded, above, activation, grid, workspace
                    )
                    results.append((padded, read.clone()))
                (padded, read), (other_padded, other_read) = results
                if not padded.equal(other_padded):
                    return f"activation {activation}"
                if not read.equal(other_read):
                    return "what is read"
    return ""
