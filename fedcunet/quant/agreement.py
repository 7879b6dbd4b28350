"""Whether kernels give the numbers of plain torch: asked before fused ones are used on a device."""

import torch
from torch import Tensor

from fedcunet.quant.kernels import FULL, PLAIN, Activation, InputGrid, Kernels, Layout, over_pixels
from fedcunet.quant.workspace import Workspace


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
