"""DU-Net whose training step holds packed sources and nothing else between its two passes.

The whole forward pass is one node of autograd: `loss.backward()` on the heatmaps runs the stages
backwards (`engine.py`) and gives every parameter its gradient, so optimisers and hooks on
parameters work as ever. Evaluation goes through the plain layers.

Shapes: B batch, S input side, C channels, H W the sides of a map, K landmarks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedcunet.errors import UserError
from fedcunet.models.blocks import DEPTH, PreActivation, SemanticBlock, check_sides
from fedcunet.models.dunet import DUNet, UNet
from fedcunet.quant.engine import Input, Stage
from fedcunet.quant.layers import QuantConv2d, QuantSpec
from fedcunet.quant.normalise import Gradients
from fedcunet.quant.outputs import Output
from fedcunet.quant.sources import Source
from fedcunet.quant.stem import StemStage


class StoredDUNet(DUNet):
    """A DU-Net that stores only its sources from the forward to the backward pass.

    With sources quantised (`input_quantizer = "source"`) they are packed codes; otherwise they
    are floats, and only the recomputation saves memory. No gradient is given to the image.
    """

    packed: bool

    @classmethod
    def from_plain(cls, model: DUNet, *, packed: bool = True) -> "StoredDUNet":
        """A network that shares everything with `model`, quantised or not.

        Args:
            model: its layers and parameters are used as they are.
            packed: False stores the same codes as floats: the reference for tests.
        """
        stored = cls.__new__(cls)
        stored.__dict__.update(model.__dict__)
        stored.packed = packed
        return stored

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        """As `DUNet.forward`."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(image_B3SS)
        check_sides(image_B3SS)
        if image_B3SS.requires_grad:
            raise UserError("packed storage: gradients of the image are not computed")
        return list(StoredPass.apply(self, image_B3SS, *self.parameters()))  # type: ignore[no-untyped-call]


class StoredPass(torch.autograd.Function):
    """All of a `StoredDUNet`, from image and parameters to heatmaps."""

    @staticmethod
    def forward(
        ctx: Any, model: StoredDUNet, image_B3SS: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.tape, ctx.parameters = Tape(model, image_B3SS), parameters
        return ctx.tape.take_heatmaps()  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *heatmap_gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.tape is None:
            raise RuntimeError("packed storage: the backward pass of a step can run only once")
        tape, ctx.tape = ctx.tape, None
        gradients: Gradients = tape.backward(list(heatmap_gradients))
        return None, None, *(gradients.pop(parameter) for parameter in ctx.parameters)


class Tape:
    """The stages of one forward pass, in their order, over the sources between them."""

    def __init__(self, model: StoredDUNet, image_B3SS: Tensor) -> None:
        self.model = model
        specs = [module.spec for module in model.modules() if isinstance(module, QuantConv2d)]
        self.source_bits = (specs[0] if specs else QuantSpec()).source_bits
        self.like = model.stem.conv.weight.detach()
        self.stages: list[Stage] = []
        self.heads: list[Output] = []
        self._forward(image_B3SS.detach())

    def take_heatmaps(self) -> tuple[Tensor, ...]:
        """The heatmaps of every head; they are the caller's from here on."""
        heatmaps = []
        for output in self.heads:
            assert output.map_BCHW is not None
            heatmaps.append(output.map_BCHW)
            output.map_BCHW = None
        return tuple(heatmaps)

    def backward(self, heatmap_gradients: list[Tensor]) -> Gradients:
        """Gradients of all parameters; the sources are given up on the way."""
        gradients: Gradients = {}
        while self.stages:
            stage = self.stages.pop()
            outside = heatmap_gradients.pop() if stage.output.source is None else None
            stage.backward(outside, gradients)
        self.stem.backward(gradients)
        return gradients

    def _forward(self, image_B3SS: Tensor) -> None:
        """Mirrors `DUNet.forward`."""
        model = self.model
        batch, _, height, width = image_B3SS.shape
        shape = (batch, model.stem.conv.out_channels, height // 2, width // 2)
        self.stem = StemStage(model.stem, image_B3SS, self._output(shape, pool=True))
        self.stem.forward()
        output = _source(self.stem.output)
        inputs = [output]
        features: list[list[Source]] = []
        for i, unet in enumerate(model.unets):
            if i > 0:
                linked = inputs[len(inputs) - min(i, model.order) :]
                joined = [Input(each) for each in (output, *linked)]
                inputs.append(self._stage(model.links[i - 1], joined))
            linked_features = features[len(features) - min(i, model.order) :]
            assert isinstance(unet, UNet)
            output, new_features = self._unet(unet, inputs[-1], linked_features)
            features.append(new_features)
            if str(i) in model.heads:
                self._head(model.heads[str(i)], output)

    def _unet(
        self, unet: UNet, source: Source, linked_features: list[list[Source]]
    ) -> tuple[Source, list[Source]]:
        """Mirrors `UNet.forward`."""
        new_features: list[Source] = []
        skips: list[Source] = []
        below = source
        for position, block in enumerate([*unet.down, unet.neck, *unet.up]):
            assert isinstance(block, SemanticBlock)
            linked = [Input(features[position]) for features in linked_features]
            if position <= DEPTH:
                own = [Input(below)]
            else:
                own = [Input(below, raised=True), Input(skips.pop())]
            below, new, skip = self._block(block, [*own, *linked], pool=position < DEPTH)
            new_features.append(new)
            if skip is not None:
                skips.append(skip)
        return below, new_features

    def _block(
        self, block: SemanticBlock, inputs: list[Input], *, pool: bool
    ) -> tuple[Source, Source, Source | None]:
        """Mirrors `SemanticBlock.forward`, and the pooling after it."""
        reduced = self._stage(block.reduce, inputs)
        new = self._stage(block.grow, [Input(reduced)])
        joined = [*inputs, Input(new)]
        skip = None if block.skip is None else self._stage(block.skip, joined)
        return self._stage(block.adapt, joined, pool=pool), new, skip

    def _stage(self, layer: nn.Module, inputs: list[Input], *, pool: bool = False) -> Source:
        assert isinstance(layer, PreActivation)
        stage = Stage(layer, inputs, self._output(_shape(layer, inputs[0]), pool=pool))
        stage.forward()
        self.stages.append(stage)
        return _source(stage.output)

    def _head(self, layer: nn.Module, source: Source) -> None:
        assert isinstance(layer, PreActivation)
        inputs = [Input(source)]
        output = Output(_shape(layer, inputs[0]), self.like, bits=None, packed=self.model.packed)
        stage = Stage(layer, inputs, output)
        stage.forward()
        self.stages.append(stage)
        self.heads.append(output)

    def _output(self, shape: tuple[int, int, int, int], *, pool: bool) -> Output:
        packed = self.model.packed
        return Output(shape, self.like, bits=self.source_bits, packed=packed, pool=pool)


def _shape(layer: PreActivation, view: Input) -> tuple[int, int, int, int]:
    """The shape of a layer's output, from one of its inputs."""
    batch, _, height, width = view.source.shape
    return batch, layer.conv.out_channels, height * view.scale, width * view.scale


def _source(output: Output) -> Source:
    assert output.source is not None
    return output.source
