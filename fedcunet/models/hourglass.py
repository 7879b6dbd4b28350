"""Stacked U-Nets, the paper's baseline: stacked hourglasses with intermediate supervision.

Source: Newell, Yang and Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016,
section 3 (arXiv 1603.06937).

Shapes: B batch, S input side, K landmarks in heatmap_BKHW (H = W = S / 4), C channels.

No convolution has a bias, as in DU-Net. It would change nothing: every map that a convolution
puts out, or that a sum of maps is, goes through BatchNorm before it is used again, which takes a
channel's constant out, and the heads read rectified features whose shift BatchNorm learns. The
weights of the convolutions then come to 12.92, 25.41 and 50.38 million for 4, 8 and 16 U-Nets and
16 landmarks (Tang et al., ECCV 2018, Table 1: 12.9, 25.5, 50.5); with biases to 12.96, 25.47 and
50.51. In Newell's code the first residual after the pooling has 128 channels instead of 256: 0.16
million less.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.models.blocks import (
    DEPTH,
    Feature,
    PreActivation,
    Supervision,
    check_sides,
    checked_supervised,
)


class StackedHourglass(nn.Module):
    """`num_unets` hourglasses one after the other; features and predictions go on to the next.

    Args:
        num_unets: n >= 1.
        num_landmarks: heatmaps put out by every head.
        num_supervisions: number of U-Nets with a head, 1 to n; all of them where None. One
            without hands on its features alone.
        supervision: what the heads learn.
        width: channels between blocks (Newell et al.: 256), a multiple of 4.

    Attributes:
        supervisions: of each heatmap of the output.

    Raises:
        UserError: if a value is outside its range.
    """

    def __init__(
        self,
        num_unets: int,
        num_landmarks: int,
        *,
        num_supervisions: int | None = None,
        supervision: Supervision = "regression",
        width: int = 256,
    ) -> None:
        super().__init__()
        self.supervised = checked_supervised(num_unets, num_landmarks, num_supervisions)
        self.num_unets, self.num_landmarks, self.width = num_unets, num_landmarks, width
        self.supervisions: tuple[Supervision, ...] = (supervision,) * len(self.supervised)
        self.stem = HourglassStem(width)
        self.unets = nn.ModuleList(Hourglass(width) for _ in range(num_unets))
        # Adds the features of U-Net i to its input, which makes the input of U-Net i + 1.
        self.links = nn.ModuleList(_conv1x1(width, width) for _ in range(num_unets - 1))
        self.linked, self.joined = Feature(), Feature()
        self.heads = self.make_heads(supervision)

    def make_heads(self, supervision: Supervision) -> nn.ModuleDict:
        """A group of heads, one for each supervised U-Net, with the way back of predictions."""
        return nn.ModuleDict(
            {
                str(i): HourglassHead(
                    self.width,
                    self.num_landmarks,
                    supervision=supervision,
                    is_last=i == self.num_unets - 1,
                )
                for i in self.supervised
            }
        )

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        """Heatmaps (B, K, S/4, S/4) of every supervised U-Net, the final ones last.

        Raises:
            UserError: if the sides of the image are not multiples of 64.
        """
        check_sides(image_B3SS)
        return self.run_unets(self.stem(image_B3SS), self.heads)[0]

    def run_unets(self, x_BCHW: Tensor, heads: nn.ModuleDict) -> tuple[list[Tensor], list[Tensor]]:
        """The heatmaps of `heads`, and the inputs of all U-Nets.

        Args:
            x_BCHW: the input of the first U-Net.
            heads: a group of `make_heads`.
        """
        inputs: list[Tensor] = [x_BCHW]
        heatmaps: list[Tensor] = []
        for i, unet in enumerate(self.unets):
            features_BCHW = unet(inputs[-1])
            remapped_BCHW: Tensor | None = None
            if str(i) in heads:
                heatmap_BKHW, remapped_BCHW = heads[str(i)](features_BCHW)
                heatmaps.append(heatmap_BKHW)
            if i < len(self.links):
                next_BCHW = self.linked(inputs[-1] + self.links[i](features_BCHW))
                if remapped_BCHW is not None:
                    next_BCHW = self.joined(next_BCHW + remapped_BCHW)
                inputs.append(next_BCHW)
        return heatmaps, inputs

    def end_layers(self) -> tuple[str, ...]:
        """Names of the first and last convolutions, which are never quantised."""
        return ("stem.conv", *(f"heads.{i}.predict" for i in self.supervised))


class Residual(nn.Module):
    """Pre-activation bottleneck: 1x1 to half of the output's channels, 3x3, 1x1, plus the input.

    Where the numbers of channels differ, a 1x1 convolution brings the input to the output's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = PreActivation(in_channels, out_channels // 2)
        self.middle = PreActivation(out_channels // 2, out_channels // 2, kernel_size=3)
        self.expand = PreActivation(out_channels // 2, out_channels)
        self.skip = None if in_channels == out_channels else _conv1x1(in_channels, out_channels)
        self.feature = Feature()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        own_BCHW = x_BCHW if self.skip is None else self.skip(x_BCHW)
        output: Tensor = self.feature(own_BCHW + self.expand(self.middle(self.reduce(x_BCHW))))
        return output


class HourglassStem(nn.Module):
    """Image (B, 3, S, S) -> (B, width, S/4, S/4).

    Conv 7x7 stride 2 to a quarter of the width -> BN -> ReLU -> residual to half of it -> max
    pool 2 -> two residuals of the full width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width // 4, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width // 4)
        self.feature = Feature()
        self.wide = Residual(width // 4, width // 2)
        self.pooled = nn.ModuleList([Residual(width // 2, width), Residual(width, width)])

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW: Tensor = self.feature(F.relu(self.norm(self.conv(image_B3HW)), inplace=True))
        x_BCHW = F.max_pool2d(self.wide(x_BCHW), 2)
        for residual in self.pooled:
            x_BCHW = residual(x_BCHW)
        return x_BCHW


class Hourglass(nn.Module):
    """One U-Net with one residual a position, and the layers that make its features.

    Down: the skip's residual, max pool 2, residual, DEPTH times; a residual at the bottom; up:
    residual, nearest upsampling by 2, plus the skip. Then a residual and a 1x1 convolution with
    BN and ReLU after it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skips = nn.ModuleList(Residual(width, width) for _ in range(DEPTH))
        self.down = nn.ModuleList(Residual(width, width) for _ in range(DEPTH))
        self.neck = Residual(width, width)
        self.up = nn.ModuleList(Residual(width, width) for _ in range(DEPTH))
        self.feature = Feature()
        self.after = Residual(width, width)
        self.conv = _conv1x1(width, width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The features that heads and the next U-Net read, as large as the input."""
        skips: list[Tensor] = []
        for skip, block in zip(self.skips, self.down, strict=True):
            skips.append(skip(x_BCHW))
            x_BCHW = block(F.max_pool2d(x_BCHW, 2))
        x_BCHW = self.neck(x_BCHW)
        for block in self.up:
            raised_BCHW = F.interpolate(block(x_BCHW), scale_factor=2.0, mode="nearest")
            x_BCHW = self.feature(raised_BCHW + skips.pop())
        return F.relu(self.norm(self.conv(self.after(x_BCHW))), inplace=True)


class HourglassHead(nn.Module):
    """1x1 convolution to heatmaps, and one that brings them back for the next U-Net's input.

    What goes back is the prediction: of a detection head the probabilities, not the logits.
    """

    def __init__(
        self, width: int, num_landmarks: int, *, supervision: Supervision, is_last: bool
    ) -> None:
        super().__init__()
        self.supervision = supervision
        self.predict = _conv1x1(width, num_landmarks)
        self.remap = None if is_last else _conv1x1(num_landmarks, width)

    def forward(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the heatmaps, and what is added to the next input (None for the last U-Net)."""
        heatmap_BKHW = self.predict(features_BCHW)
        if self.remap is None:
            return heatmap_BKHW, None
        is_detection = self.supervision == "detection"
        prediction_BKHW = torch.sigmoid(heatmap_BKHW) if is_detection else heatmap_BKHW
        return heatmap_BKHW, self.remap(prediction_BKHW)


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)
