"""The parts that DU-Net is built from, and what all networks here share.

Source: Tang et al., "Quantized Densely Connected U-Nets for Efficient Landmark Localization",
ECCV 2018, section 3 (arXiv 1808.02194).

Shapes: B batch, C channels, H W the resolution of the map.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.errors import UserError

DEPTH = 4  # top-down blocks, and bottom-up blocks, of a U-Net
SIDE_MULTIPLE = 64  # the stem divides a side by 4, the U-Net by 2 ** DEPTH

# What a head learns: `regression`, Gaussians by squared error, or `detection`, discs by sigmoid
# cross entropy; a detection head puts out logits.
Supervision = Literal["regression", "detection"]


def supervised_unets(num_unets: int, num_supervisions: int) -> tuple[int, ...]:
    """Indices of the U-Nets that carry a head: spread evenly, the last one always among them."""
    return tuple((i + 1) * num_unets // num_supervisions - 1 for i in range(num_supervisions))


def checked_supervised(
    num_unets: int, num_landmarks: int, num_supervisions: int | None
) -> tuple[int, ...]:
    """`supervised_unets` of a network, all of its U-Nets where the number is None.

    Raises:
        UserError: if one of the three is outside its range.
    """
    if num_unets < 1:
        raise UserError(f"number of U-Nets: expected at least 1, found {num_unets}")
    if num_landmarks < 1:
        raise UserError(f"number of landmarks: expected at least 1, found {num_landmarks}")
    supervisions = num_unets if num_supervisions is None else num_supervisions
    if not 1 <= supervisions <= num_unets:
        raise UserError(f"number of supervisions: expected 1 to {num_unets}, found {supervisions}")
    return supervised_unets(num_unets, supervisions)


def check_sides(image_B3HW: Tensor) -> None:
    """Raises UserError if the sides of the image are not multiples of 64."""
    height, width = image_B3HW.shape[-2:]
    if height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
        raise UserError(
            f"input size: expected multiples of {SIDE_MULTIPLE}, found {height}x{width}"
        )


class Feature(nn.Identity):
    """Marks a feature map that is no convolution's result: a quantiser may take its place."""


class PreActivation(nn.Module):
    """Concat -> BN -> ReLU -> convolution without bias, of maps with the same H and W.

    Args:
        in_channels: channels of all the inputs together.
        out_channels: channels of the output.
        kernel_size: 1 or 3; the padding keeps H and W.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, *inputs_BCHW: Tensor) -> Tensor:
        joined_BCHW = inputs_BCHW[0] if len(inputs_BCHW) == 1 else torch.cat(inputs_BCHW, dim=1)
        output: Tensor = self.conv(F.relu(self.norm(joined_BCHW), inplace=True))
        return output


class SemanticBlock(nn.Module):
    """One position of a U-Net, linked to the same position of the U-Nets before it (Eq. 2).

    A bottleneck (1x1 to 4 x growth, 3x3 to growth) makes `growth` new features from the block's
    own inputs and the new features of the last K U-Nets; adapters (1x1) bring everything to the
    block's output width.

    Args:
        in_channels: channels of the block's own inputs.
        links: number of U-Nets before this one whose new features come in, min(i, K).
        width: output channels of each adapter.
        growth: new features made.
        with_skip: whether a second adapter makes the skip connection (top-down blocks).
    """

    def __init__(
        self, in_channels: int, *, links: int, width: int, growth: int, with_skip: bool = False
    ) -> None:
        super().__init__()
        linked_channels = in_channels + links * growth
        self.reduce = PreActivation(linked_channels, 4 * growth)
        self.grow = PreActivation(4 * growth, growth, kernel_size=3)
        self.adapt = PreActivation(linked_channels + growth, width)
        self.skip = PreActivation(linked_channels + growth, width) if with_skip else None

    def forward(
        self, own_BCHW: Sequence[Tensor], linked_BCHW: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the output, the new features, and the skip (None without a skip adapter)."""
        inputs = [*own_BCHW, *linked_BCHW]
        new_BCHW = self.grow(self.reduce(*inputs))
        skip_BCHW = self.skip(*inputs, new_BCHW) if self.skip is not None else None
        return self.adapt(*inputs, new_BCHW), new_BCHW, skip_BCHW


class Stem(nn.Module):
    """Conv 7x7 stride 2 -> BN -> ReLU -> max pool 2: image (B, 3, S, S) -> (B, width, S/4, S/4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.feature = Feature()

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm(self.conv(image_B3HW)), inplace=True)
        output: Tensor = self.feature(F.max_pool2d(x_BCHW, 2))
        return output
