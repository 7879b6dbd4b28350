"""Gradients of sources that wait until all consumers have added to them.

Shapes: B batch, n some of its samples, C channels, H W the sides of a map, h some of its rows.
"""

from typing import Protocol

import torch
from torch import Tensor

from fedcunet.quant.rounding import Rounding
from fedcunet.quant.workspace import Workspace

# A scale is kept in bfloat16, whose rounding must not push the largest code over the edge.
_MARGIN = 1 + 2.0**-7


class WaitingGradient(Protocol):
    """What consumers add to, and the producer takes."""

    def add(
        self,
        samples: slice,
        rows: slice,
        gradient_nhWC: Tensor,
        workspace: Workspace,
        *,
        first: bool,
    ) -> None:
        """Adds to some samples and rows; with `first`, nothing waits for them yet."""

    def add_to(self, place_nHWC: Tensor, samples: slice, workspace: Workspace) -> None:
        """Adds what waits for some samples to `place_nHWC`."""


class FloatGradient:
    """Waits as it is. Args: shape (B, H, W, C), and a tensor with its dtype and device."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.data = like.new_empty(shape)

    def add(
        self,
        samples: slice,
        rows: slice,
        gradient_nhWC: Tensor,
        workspace: Workspace,
        *,
        first: bool,
    ) -> None:
        """Adds to some samples and rows; with `first`, nothing waits for them yet."""
        if first:
            self.data[samples, rows] = gradient_nhWC
        else:
            self.data[samples, rows] += gradient_nhWC

    def add_to(self, place_nHWC: Tensor, samples: slice, workspace: Workspace) -> None:
        """Adds what waits for some samples to `place_nHWC`."""
        place_nHWC += self.data[samples]


class CodedGradient:
    """Waits as whole numbers of 8 bits (16 for more than 8), rounded stochastically.

    Every row of a sample and channel has a scale of its own, in bfloat16: a consumer adds some
    rows at a time. Adding rounds again, without bias.

    Args:
        shape: (B, H, W, C).
        like: a tensor with the dtype and device to compute with.
        bits: of the setting's gradients, 2 to 16.
        packed: False keeps codes and scales as floats: the reference for tests.
        rounding: the source of randomness.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        like: Tensor,
        *,
        bits: int,
        packed: bool,
        rounding: Rounding,
    ) -> None:
        batch, height, _, channels = shape
        self.levels, dtype = (127, torch.int8) if bits <= 8 else (32767, torch.int16)
        self.rounding = rounding
        self.data = torch.empty(shape, dtype=dtype if packed else like.dtype, device=like.device)
        self.step_BH1C = torch.empty(
            (batch, height, 1, channels),
            dtype=torch.bfloat16 if packed else like.dtype,
            device=like.device,
        )

    def add(
        self,
        samples: slice,
        rows: slice,
        gradient_nhWC: Tensor,
        workspace: Workspace,
        *,
        first: bool,
    ) -> None:
        """Adds to some samples and rows; with `first`, nothing waits for them yet."""
        codes_nhWC, step_nh1C = self.data[samples, rows], self.step_BH1C[samples, rows]
        total_nhWC = workspace.take("waiting", *gradient_nhWC.shape)
        if first:
            total_nhWC.copy_(gradient_nhWC)
        else:
            total_nhWC.copy_(codes_nhWC)
            step = step_nh1C.to(total_nhWC.dtype)
            torch.addcmul(gradient_nhWC, total_nhWC, step, out=total_nhWC)
        peak_nh1C = torch.maximum(total_nhWC.amax(2, True), -total_nhWC.amin(2, True))
        step = (peak_nh1C * (_MARGIN / self.levels)).bfloat16()
        # Smaller ones have no inverse.
        step = torch.where(step < 2.0**-120, 1.0, step)
        step_nh1C.copy_(step)
        inverse = step.to(total_nhWC.dtype).reciprocal_()
        codes_nhWC.copy_(self.rounding.scale_and_round_(total_nhWC, inverse))

    def add_to(self, place_nHWC: Tensor, samples: slice, workspace: Workspace) -> None:
        """Adds what waits for some samples to `place_nHWC`."""
        waiting_nHWC = workspace.take("waiting", *place_nHWC.shape)
        waiting_nHWC.copy_(self.data[samples])
        place_nHWC.addcmul_(waiting_nHWC, self.step_BH1C[samples].to(place_nHWC.dtype))
