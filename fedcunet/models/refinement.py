"""Iterative refinement: the same U-Nets forward a second time, from a refined input.

Source: Tang et al., ECCV 2018, section 3.4 (arXiv 1808.02194), which fixes what is merged and
about how large the merging block is (DU-Net(4) grows from 3.9 to 4.1 million parameters).

Shapes: B batch, S input side, K landmarks, C channels, H W a map's sides.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedcunet.models.blocks import PreActivation, Supervision, check_sides
from fedcunet.models.dunet import DUNet
from fedcunet.models.hourglass import StackedHourglass


class IterativeRefinement(nn.Module):
    """Two passes through the U-Nets of `network`, each with its own group of heads.

    The inputs of the first and the last U-Net in the first pass, merged, are the first U-Net's
    input in the second.

    All convolutions of the U-Nets serve both passes. Their BatchNorm layers do not: the inputs of
    the two passes are distributed differently, and one mean over both fits neither when the
    network is evaluated. The second pass has its own in `norms`; Jastrzebski et al., "Residual
    Connections Encourage Iterative Inference", ICLR 2018 (arXiv 1710.04773), found that layers
    used more than once need it. The paper does not say what it does.

    Args:
        network: with the stem, the U-Nets and the heads of the first pass.
        supervision: what the heads of the second pass learn.

    Attributes:
        supervisions: of each heatmap of the output, the first pass's before the second's.
    """

    def __init__(
        self, network: DUNet | StackedHourglass, supervision: Supervision = "regression"
    ) -> None:
        super().__init__()
        self.network = network
        self.supervisions: tuple[Supervision, ...] = (
            *network.supervisions,
            *(supervision for _ in network.supervised),
        )
        self.merge = DenseMerge(2 * network.width, network.width)
        self.heads = network.make_heads(supervision)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(getattr(parent, name).num_features)
            for parent, name in self._places_of_norms()
        )

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        """Heatmaps (B, K, S/4, S/4) of the heads of both passes, the final ones last.

        Raises:
            UserError: if the sides of the image are not multiples of 64.
        """
        check_sides(image_B3SS)
        network = self.network
        first, inputs = network.run_unets(network.stem(image_B3SS), network.heads)
        refined_BCHW = self.merge(inputs[0], inputs[-1])
        with self._own_norms():
            second, _ = network.run_unets(refined_BCHW, self.heads)
        return first + second

    def end_layers(self) -> tuple[str, ...]:
        """Names of the first and last convolutions, which are never quantised."""
        stem, *heads = self.network.end_layers()
        return (f"network.{stem}", *(f"network.{head}" for head in heads), *heads)

    def second_norms(self) -> dict[nn.Module, nn.BatchNorm2d]:
        """For each BatchNorm of the U-Nets, the one that the second pass has in its place."""
        return {
            getattr(parent, name): second  # type: ignore[misc]
            for (parent, name), second in zip(self._places_of_norms(), self.norms, strict=True)
        }

    def _places_of_norms(self) -> list[tuple[nn.Module, str]]:
        """Where the BatchNorm layers sit that both passes would share: module and attribute."""
        return [
            (parent, name)
            for part in (self.network.unets, self.network.links)
            for parent in part.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.BatchNorm2d)
        ]

    @contextmanager
    def _own_norms(self) -> Iterator[None]:
        """Within, the second pass's BatchNorm layers sit in the U-Nets."""
        self._swap_norms()
        try:
            yield
        finally:
            self._swap_norms()

    def _swap_norms(self) -> None:
        for i, (parent, name) in enumerate(self._places_of_norms()):
            first, second = getattr(parent, name), self.norms[i]
            setattr(parent, name, second)
            self.norms[i] = first


class DenseMerge(nn.Module):
    """A small dense block: two layers of `growth` new features each, and an adapter to `width`.

    A layer is the bottleneck of DU-Net's blocks (1x1 to 4 x growth, 3x3 to growth); it and the
    adapter (1x1) read the block's inputs and all new features before them. From 256 to 128
    channels it has 184,320 convolution weights.
    """

    def __init__(self, in_channels: int, width: int, *, growth: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            PreActivation(in_channels + i * growth, 4 * growth) for i in range(layers)
        )
        self.grow = nn.ModuleList(
            PreActivation(4 * growth, growth, kernel_size=3) for _ in range(layers)
        )
        self.adapt = PreActivation(in_channels + layers * growth, width)

    def forward(self, *inputs_BCHW: Tensor) -> Tensor:
        features = list(inputs_BCHW)
        for reduce, grow in zip(self.reduce, self.grow, strict=True):
            features.append(grow(reduce(*features)))
        merged_BCHW: Tensor = self.adapt(*features)
        return merged_BCHW
