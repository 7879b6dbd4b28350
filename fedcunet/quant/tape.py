"""The stages of one forward pass, in their order, over the sources between them.

Shapes: B batch, S input side, C channels, H W the sides of a map, K landmarks.
"""

from typing import Protocol

from torch import Tensor, nn

from fedcunet.models.blocks import PreActivation
from fedcunet.quant.branches import Branch
from fedcunet.quant.collector import Collector, Update
from fedcunet.quant.engine import Stage
from fedcunet.quant.kernels import FULL, Activation
from fedcunet.quant.layers import QuantSpec
from fedcunet.quant.outputs import Output
from fedcunet.quant.pieces import Input, Surroundings
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.sources import Source
from fedcunet.quant.stem import StemStage
from fedcunet.quant.sums import Sum
from fedcunet.quant.workspace import Workspace


class Step(Protocol):
    """A stage on the tape."""

    def outputs(self) -> list[Output]:
        """What it puts its results into."""

    def forward(self) -> None:
        """Computes the results."""

    def reads(self) -> list[Source]:
        """Sources whose codes its backward pass needs."""

    def needs(self) -> list[Source]:
        """Sources whose codes its results are computed from."""

    def refill(self, source: Source) -> None:
        """Computes the codes of one of its outputs again."""

    def backward(self) -> None:
        """Runs backwards, once the gradients of its outputs are whole."""


class Tape:
    """Builds a forward pass stage by stage, runs each as it is added, and then all backwards.

    Args:
        image_B3SS: the images.
        like: a tensor with the dtype and device to compute with.
        spec: of the network.
        rounding: of the network.
        packed: False keeps all codes as floats: the reference for tests.
        frugal: sources that are cheap to compute again are released early, and gradients wait
            in codes where the setting quantises gradients.
        update: of `Collector`.
    """

    def __init__(
        self,
        image_B3SS: Tensor,
        *,
        like: Tensor,
        spec: QuantSpec,
        rounding: Rounding,
        packed: bool,
        frugal: bool,
        update: Update | None,
    ) -> None:
        self.image_B3SS, self.bits, self.frugal = image_B3SS, spec.source_bits, frugal
        self.around = Surroundings(
            workspace=Workspace(like),
            rounding=rounding,
            collector=Collector(update),
            gradient_bits=spec.gradient_bits if frugal else FULL,
            packed=packed,
        )
        self.norms: dict[nn.Module, nn.BatchNorm2d] = {}  # what stands in for which BatchNorm
        self._counted: set[nn.BatchNorm2d] = set()  # whose running statistics have this batch
        self._steps: list[Step] = []
        self._producers: dict[Source, Step] = {}
        self._heads: list[Output] = []

    def stem(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, pool: bool) -> Source:
        """Conv 7x7 stride 2 -> BN -> ReLU of the image, perhaps pooled."""
        batch, _, height, width = self.image_B3SS.shape
        shape = (batch, height // 2, width // 2, conv.out_channels)
        output = self._output(shape, pool=pool)
        self._run(StemStage(self.around, self.image_B3SS, conv, norm, output))
        return output.source

    def layers(
        self, inputs: list[Input], *layers: PreActivation, pool: bool = False
    ) -> list[Source]:
        """Layers over the same inputs; with `pool`, the first one's result is pooled."""
        branches = [
            self._branch(inputs[0], layer.conv, layer.norm, pool=pool and number == 0)
            for number, layer in enumerate(layers)
        ]
        self._run(Stage(self.around, inputs, branches))
        return [branch.output.source for branch in branches]

    def convolution(
        self,
        source: Source,
        conv: nn.Conv2d,
        *,
        norm: nn.BatchNorm2d | None = None,
        activation: Activation = "none",
        added: Input | None = None,
    ) -> Source:
        """One convolution over one source; `added` is added to its result."""
        branch = self._branch(Input(source), conv, norm, activation=activation, added=added)
        self._run(Stage(self.around, [Input(source)], [branch]))
        return branch.output.source

    def head(self, source: Source, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Source:
        """A convolution whose result leaves the network as a heatmap, never quantised."""
        branch = self._branch(Input(source), conv, norm, bits=FULL)
        self._run(Stage(self.around, [Input(source)], [branch]))
        self._heads.append(branch.output)
        return branch.output.source

    def sum(self, *inputs: Input, pool: bool = False) -> Source:
        """The sum of maps, or one map, perhaps pooled."""
        source, scale = inputs[0].source, inputs[0].scale
        batch, height, width, channels = source.shape
        output = self._output((batch, height * scale, width * scale, channels), pool=pool)
        self._run(Sum(self.around, list(inputs), output))
        return output.source

    def drop(self, *sources: Source) -> None:
        """Gives up the codes of sources that no later stage reads, to compute them again."""
        for source in sources:
            source.data = None

    def drop_if_frugal(self, *sources: Source) -> None:
        """`drop` in the frugal form only."""
        if self.frugal:
            self.drop(*sources)

    def heatmaps(self) -> tuple[Tensor, ...]:
        """The heatmaps (B, K, H, W) of every head."""
        return tuple(_data(output.source).permute(0, 3, 1, 2) for output in self._heads)

    def keep_no_heatmaps(self) -> None:
        """Lets go of the heatmaps that no stage reads; they are the caller's."""
        read = {source for step in self._steps for source in step.reads()}
        for output in self._heads:
            if output.source not in read:
                output.source.data = None

    def held_bytes(self) -> int:
        """Bytes of all sources' codes and indices of maxima."""
        outputs = [output for step in self._steps for output in step.outputs()]
        held = [output.source.data for output in outputs] + [output.index for output in outputs]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def backward(self, heatmap_gradients: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        """Gradients of all parameters that nobody took; the sources are given up on the way."""
        for output, gradient_BKHW in zip(self._heads, heatmap_gradients, strict=True):
            output.outside_BHWC = gradient_BKHW.permute(0, 2, 3, 1)
        heatmap_gradients.clear()
        while self._steps:
            step = self._steps.pop()
            self._fill(step.reads())
            step.backward()
            for output in step.outputs():
                del self._producers[output.source]
        return self.around.collector.gradients

    def _fill(self, sources: list[Source]) -> None:
        for source in sources:
            if source.data is None:
                producer = self._producers[source]
                self._fill(producer.needs())
                producer.refill(source)

    def _run(self, step: Step) -> None:
        step.forward()
        self._steps.append(step)
        for output in step.outputs():
            self._producers[output.source] = step

    def _output(
        self, shape: tuple[int, int, int, int], *, bits: int | None = None, pool: bool = False
    ) -> Output:
        bits = self.bits if bits is None else bits
        around = self.around
        return Output(shape, around.workspace, bits=bits, packed=around.packed, pool=pool)

    def _branch(
        self,
        view: Input,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None,
        *,
        bits: int | None = None,
        pool: bool = False,
        activation: Activation = "none",
        added: Input | None = None,
    ) -> Branch:
        norm = None if norm is None else self.norms.get(norm, norm)
        updates_running = norm is not None and norm not in self._counted
        if norm is not None:
            self._counted.add(norm)
        batch, height, width, _ = view.source.shape
        shape = (batch, height * view.scale, width * view.scale, conv.out_channels)
        return Branch(
            conv,
            self._output(shape, bits=bits, pool=pool),
            norm=norm,
            activation=activation,
            added=added,
            updates_running=updates_running,
        )


def _data(source: Source) -> Tensor:
    assert source.data is not None
    return source.data
