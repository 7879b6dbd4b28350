"""DU-Net(n) with order-K connectivity and intermediate supervision.

Source: Tang et al., ECCV 2018, sections 3.1 and 3.2 (arXiv 1808.02194).

Shapes: B batch, S input side, K landmarks in heatmap_BKHW (H = W = S / 4), C channels.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.errors import UserError
from fedcunet.models.blocks import (
    DEPTH,
    PreActivation,
    SemanticBlock,
    Stem,
    Supervision,
    check_sides,
    checked_supervised,
)


class DUNet(nn.Module):
    """`num_unets` stacked U-Nets whose blocks are linked to the same blocks of the last K.

    Args:
        num_unets: n >= 1.
        order: K of the order-K connectivity, 0 to n - 1. 0 gives stacked dense U-Nets without
            links across, n - 1 the fully dense network.
        num_landmarks: heatmaps put out by every head.
        num_supervisions: number of U-Nets with a head, 1 to n; all of them where None.
        supervision: what the heads learn.
        width: channels between blocks (paper: 128).
        growth: new features a block makes (paper: 32).

    Attributes:
        supervisions: of each heatmap of the output.

    Raises:
        UserError: if a value is outside its range.
    """

    def __init__(
        self,
        num_unets: int,
        order: int,
        num_landmarks: int,
        *,
        num_supervisions: int | None = None,
        supervision: Supervision = "regression",
        width: int = 128,
        growth: int = 32,
    ) -> None:
        super().__init__()
        self.supervised = checked_supervised(num_unets, num_landmarks, num_supervisions)
        if not 0 <= order < num_unets:
            raise UserError(
                f"order of a DU-Net with {num_unets} U-Nets: expected 0 to {num_unets - 1}, "
                f"found {order}"
            )
        self.num_unets, self.order, self.num_landmarks = num_unets, order, num_landmarks
        self.width = width
        self.supervisions: tuple[Supervision, ...] = (supervision,) * len(self.supervised)
        self.stem = Stem(width)
        self.unets = nn.ModuleList(
            UNet(links=min(i, order), width=width, growth=growth) for i in range(num_unets)
        )
        # The input of U-Net i >= 1: the output of U-Net i - 1 and the inputs of the last K.
        self.links = nn.ModuleList(
            PreActivation(width + min(i, order) * width, width) for i in range(1, num_unets)
        )
        self.heads = self.make_heads(supervision)

    def make_heads(self, supervision: Supervision) -> nn.ModuleDict:
        """A group of heads, one for each supervised U-Net; they are the same for both kinds."""
        return nn.ModuleDict(
            {str(i): PreActivation(self.width, self.num_landmarks) for i in self.supervised}
        )

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        """Heatmaps (B, K, S/4, S/4) of every supervised U-Net, the final ones last.

        Raises:
            UserError: if the sides of the image are not multiples of 64.
        """
        check_sides(image_B3SS)
        return self.run_unets(self.stem(image_B3SS), self.heads)[0]

    def run_unets(
        self, output_BCHW: Tensor, heads: nn.ModuleDict
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The heatmaps of `heads`, and the inputs of all U-Nets.

        Args:
            output_BCHW: the input of the first U-Net.
            heads: a group of `make_heads`.
        """
        inputs: list[Tensor] = [output_BCHW]
        features: list[list[Tensor]] = []
        heatmaps: list[Tensor] = []
        for i, unet in enumerate(self.unets):
            if i > 0:
                linked = inputs[len(inputs) - min(i, self.order) :]
                inputs.append(self.links[i - 1](output_BCHW, *linked))
            linked_features = features[len(features) - min(i, self.order) :]
            output_BCHW, new_features = unet(inputs[-1], linked_features)
            features.append(new_features)
            if str(i) in heads:
                heatmaps.append(heads[str(i)](output_BCHW))
        return heatmaps, inputs

    def end_layers(self) -> tuple[str, ...]:
        """Names of the first and last convolutions, which are never quantised (section 4)."""
        return ("stem.conv", *(f"heads.{i}.conv" for i in self.supervised))


class UNet(nn.Module):
    """One U-Net: DEPTH top-down blocks, a neck, DEPTH bottom-up blocks (Eq. 2)."""

    def __init__(self, *, links: int, width: int, growth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            SemanticBlock(width, links=links, width=width, growth=growth, with_skip=True)
            for _ in range(DEPTH)
        )
        self.neck = SemanticBlock(width, links=links, width=width, growth=growth)
        self.up = nn.ModuleList(
            SemanticBlock(2 * width, links=links, width=width, growth=growth) for _ in range(DEPTH)
        )

    def forward(
        self, x_BCHW: Tensor, linked_features: list[list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the output (as large as the input) and the new features of the 9 blocks.

        Args:
            x_BCHW: the U-Net's input.
            linked_features: the new features of each linked U-Net, in the order of the blocks.
        """

        def linked(position: int) -> list[Tensor]:
            return [features[position] for features in linked_features]

        new_features: list[Tensor] = []
        skips: list[Tensor] = []
        for position, block in enumerate(self.down):
            x_BCHW, new_BCHW, skip_BCHW = block([x_BCHW], linked(position))
            new_features.append(new_BCHW)
            skips.append(skip_BCHW)
            x_BCHW = F.max_pool2d(x_BCHW, 2)
        x_BCHW, new_BCHW, _ = self.neck([x_BCHW], linked(DEPTH))
        new_features.append(new_BCHW)
        for position, block in enumerate(self.up, start=DEPTH + 1):
            raised_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
            x_BCHW, new_BCHW, _ = block([raised_BCHW, skips.pop()], linked(position))
            new_features.append(new_BCHW)
        return x_BCHW, new_features


def convolution_parameters(model: nn.Module) -> int:
    """Number of weights of all convolutions, the figure that the paper's tables give."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))
