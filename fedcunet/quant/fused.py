"""The operations of `kernels.py` as Triton kernels, each of which goes over a map once.

With TRITON_INTERPRET=1 Triton runs them on the CPU, slowly: how they are tested without a GPU.

A program works on a row of a map and a block of its values. Offsets within a row are those of
`packing.py`: the codes of a row lie in as many equal groups as share bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedcunet.quant.kernels import Activation, InputGrid, Kernels, Layout, inner_rows
from fedcunet.quant.workspace import Workspace

_BLOCK = 1024
_OPTIONS = {"enable_fp_fusion": False}  # a product is rounded before something is added to it
# A float's nearest whole number, the even one of two, is what is left after this is added and
# taken away again (up to 2^22 in float32).
_ROUND = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}


@triton.jit
def _load_code(row, at, inside, quarter, levels, WIDTH: tl.constexpr):
    """The codes at places `at` of a stored row."""
    if WIDTH == 6:
        first = at - 3 * quarter
        byte = tl.load(row + at, mask=inside & (first < 0), other=0).to(tl.int32)
        fourth = inside & (first >= 0)
        low = tl.load(row + first, mask=fourth, other=0).to(tl.int32) >> 6
        middle = tl.load(row + quarter + first, mask=fourth, other=0).to(tl.int32) >> 6
        high = tl.load(row + 2 * quarter + first, mask=fourth, other=0).to(tl.int32) >> 6
        code = tl.where(first < 0, byte & 63, low + 4 * middle + 16 * high) - levels
    elif WIDTH < 6:
        byte = tl.load(row + at % quarter, mask=inside, other=0).to(tl.int32)
        code = ((byte >> (WIDTH * (at // quarter))) & (2**WIDTH - 1)) - levels
    else:
        code = tl.load(row + at, mask=inside, other=0)
    return code


@triton.jit
def _unpack(
    stored, place, height, values, channels, quarter, levels,
    stored_n, stored_h, place_n, place_h, place_w,
    RAISED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n, h = (row // height).to(tl.int64), row % height
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < values
    column, channel = value // channels, value % channels
    at = value
    stored_row = h
    if RAISED:
        stored_row = h // 2
        at = (column // 2) * channels + channel
    code = _load_code(
        stored + n * stored_n + stored_row * stored_h, at, inside, quarter, levels, WIDTH
    )
    target = place + n * place_n + h * place_h + column * place_w + channel
    tl.store(target, code.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _nearest(x, ROUND: tl.constexpr):
    return (x + ROUND) - ROUND


@triton.jit
def _take_code(y, shift, inverse, at, inside, channels, ENCODED: tl.constexpr, ROUND: tl.constexpr):
    """The value at places `at` of a row, made a code and written back where it is none yet."""
    code = tl.load(y + at, mask=inside, other=0)
    if not ENCODED:
        by = tl.load(inverse + at % channels, mask=inside, other=0)
        code = _nearest(code * by + tl.load(shift + at % channels, mask=inside, other=0), ROUND)
        tl.store(y + at, code, mask=inside)
    return code


@triton.jit
def _pack(
    y, shift, inverse, stored, height, values, channels, quarter, levels, stored_n, stored_h,
    ENCODED: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n, h = (row // height).to(tl.int64), row % height
    y += row.to(tl.int64) * values
    shift += n * channels
    inverse += n * channels
    target = stored + n * stored_n + h * stored_h
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WIDTH >= 8:
        inside = i < values
        code = _take_code(y, shift, inverse, i, inside, channels, ENCODED, ROUND)
        tl.store(target + i, code.to(stored.dtype.element_ty), mask=inside)
    else:
        in_group = i < quarter
        total = tl.zeros([BLOCK], tl.int32)
        last = tl.zeros([BLOCK], tl.int32)
        GROUPS: tl.constexpr = 2 if WIDTH == 4 else 4
        if WIDTH == 6:
            at = i + 3 * quarter
            inside = in_group & (at < values)
            code = _take_code(y, shift, inverse, at, inside, channels, ENCODED, ROUND)
            last = tl.where(inside, code.to(tl.int32) + levels, 0)
        for group in tl.static_range(3 if WIDTH == 6 else GROUPS):
            at = i + group * quarter
            inside = in_group & (at < values)
            code = _take_code(y, shift, inverse, at, inside, channels, ENCODED, ROUND)
            unsigned = tl.where(inside, code.to(tl.int32) + levels, 0)
            if WIDTH == 6:
                byte = unsigned | (((last >> (2 * group)) & 3) << 6)
                tl.store(target + at, byte.to(tl.uint8), mask=in_group)
            else:
                total |= unsigned << (WIDTH * group)
        if WIDTH != 6:
            tl.store(target + i, total.to(tl.uint8), mask=in_group)


@triton.jit
def _activate(
    x, shift, factor, r, read, height, values, channels, r_n, inverse_step, step, most,
    RELU: tl.constexpr, READ: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n, h = (row // height).to(tl.int64), row % height
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < values
    at_channel = n * channels + value % channels
    code = tl.load(x + row.to(tl.int64) * values + value, mask=inside, other=0)
    z = code * tl.load(factor + at_channel, mask=inside, other=0)
    z += tl.load(shift + at_channel, mask=inside, other=0)
    if RELU:
        z = tl.where(z < 0, 0.0, z)  # what is not a number stays so
    at = n * r_n + h * values + value
    tl.store(r + at, z, mask=inside)
    if READ:
        scaled = z * inverse_step
        scaled = tl.where(scaled > most, most, tl.where(scaled < -most, -most, scaled))
        tl.store(read + at, _nearest(scaled, ROUND) * step, mask=inside)


class FusedKernels(Kernels):
    """The operations of `Kernels`, each one kernel."""

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
        place_n, place_h, place_w, _ = place_nhWC.stride()
        values = width * channels
        stored_nhv = stored.flatten(2)
        with torch.cuda.device_of(place_nhWC):  # Triton launches on the current device
            _unpack[_grid(n * height, values)](
                stored_nhv, place_nhWC, height, values, channels,
                _group(values // 2 if raised else values, layout), layout.levels,
                *stored_nhv.stride()[:2], place_n, place_h, place_w,
                RAISED=raised, WIDTH=layout.width, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip

    def pack(
        self,
        y_nHWC: Tensor,
        stored: Tensor,
        layout: Layout,
        grid: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        n, height, width, channels = y_nHWC.shape
        shift_nC = inverse_nC = y_nHWC  # not read
        if grid is not None:
            middle_nC, step_nC = grid
            inverse_nC = step_nC.reciprocal()
            shift_nC = -middle_nC * inverse_nC
        stored_nHv, values = stored.flatten(2), width * channels
        group = _group(values, layout)
        with torch.cuda.device_of(y_nHWC):  # Triton launches on the current device
            _pack[_grid(n * height, group)](
                y_nHWC, shift_nC, inverse_nC, stored_nHv, height, values, channels, group,
                layout.levels, *stored_nHv.stride()[:2],
                ENCODED=grid is None, WIDTH=layout.width, ROUND=_ROUND[y_nHWC.dtype], BLOCK=_BLOCK,
                **_OPTIONS,
            )  # fmt: skip

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
        if activation == "sigmoid":
            return super().activate(
                x_nhWI, shift_nI, factor_nI, padded_nhWI, above, activation, grid, workspace
            )
        n, height, width, channels = x_nhWI.shape
        r_nhWI = inner_rows(padded_nhWI, above, height)
        padded_read = read_nhWI = padded_nhWI
        step, most = 1.0, 0.0
        if grid is not None:
            padded_read = workspace.take("read", *padded_nhWI.shape)
            read_nhWI = inner_rows(padded_read, above, height)
            step, most = grid.step, grid.range / grid.step - 1
        values = width * channels
        with torch.cuda.device_of(x_nhWI):  # Triton launches on the current device
            _activate[_grid(n * height, values)](
                x_nhWI, shift_nI, factor_nI, r_nhWI, read_nhWI, height, values, channels,
                r_nhWI.stride(0), 1 / step, step, most,
                RELU=activation == "relu", READ=grid is not None,
                ROUND=_ROUND[x_nhWI.dtype], BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
        return padded_read


def _grid(rows: int, values: int) -> tuple[int, int]:
    """Programs for so many rows of so many values."""
    return rows, triton.cdiv(values, _BLOCK)


def _group(values: int, layout: Layout) -> int:
    """Codes of a group of a row: half of the row's at 4 bits, a quarter at 2 and 6, or all."""
    return int(triton.cdiv(values, {2: 4, 4: 2, 6: 4}.get(layout.width, 1)))
