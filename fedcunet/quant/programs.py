"""The forward passes of the networks as stages on a tape: each mirrors its network's `forward`."""

from collections.abc import Callable

from torch import nn

from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.models.blocks import DEPTH, PreActivation, SemanticBlock
from fedcunet.models.dunet import UNet
from fedcunet.models.hourglass import Hourglass, HourglassHead, HourglassStem, Residual
from fedcunet.models.refinement import DenseMerge
from fedcunet.quant.pieces import Input
from fedcunet.quant.sources import Source
from fedcunet.quant.tape import Tape


def run(tape: Tape, model: nn.Module) -> None:
    """Puts the whole forward pass of a network on the tape."""
    if isinstance(model, IterativeRefinement):
        _refinement(tape, model)
        return
    stem, unets = _parts(model)
    unets(tape, stem(tape), model.heads)  # type: ignore[arg-type]


Stem = Callable[[Tape], Source]
UNets = Callable[[Tape, Source, nn.ModuleDict], list[Source]]


def _parts(model: nn.Module) -> tuple[Stem, UNets]:
    """The stem of a network, and its U-Nets: they return the inputs of all U-Nets."""
    if isinstance(model, DUNet):
        dunet = model
        return (
            lambda tape: tape.stem(dunet.stem.conv, dunet.stem.norm, pool=True),
            lambda tape, source, heads: _dunet(tape, dunet, source, heads),
        )
    assert isinstance(model, StackedHourglass)
    hourglass = model
    return (
        lambda tape: _hourglass_stem(tape, hourglass.stem),
        lambda tape, source, heads: _hourglasses(tape, hourglass, source, heads),
    )


def _dunet(tape: Tape, model: DUNet, output: Source, heads: nn.ModuleDict) -> list[Source]:
    inputs = [output]
    features: list[list[Source]] = []
    for i, unet in enumerate(model.unets):
        if i > 0:
            linked = inputs[len(inputs) - min(i, model.order) :]
            joined = [Input(each) for each in (output, *linked)]
            inputs += tape.layers(joined, _layer(model.links[i - 1]))
        linked_features = features[len(features) - min(i, model.order) :]
        assert isinstance(unet, UNet)
        output, new_features = _unet(tape, unet, inputs[-1], linked_features)
        features.append(new_features)
        if str(i) in heads:
            head = _layer(heads[str(i)])
            tape.head(output, head.conv, head.norm)
    return inputs


def _unet(
    tape: Tape, unet: UNet, below: Source, linked_features: list[list[Source]]
) -> tuple[Source, list[Source]]:
    new_features: list[Source] = []
    skips: list[Source] = []
    for position, block in enumerate([*unet.down, unet.neck, *unet.up]):
        assert isinstance(block, SemanticBlock)
        linked = [Input(features[position]) for features in linked_features]
        raised = position > DEPTH
        own = [Input(below, raised=raised), *(Input(skip) for skip in skips[-1:] if raised)]
        inputs = [*own, *linked]
        (reduced,) = tape.layers(inputs, block.reduce)
        (new,) = tape.layers([Input(reduced)], block.grow)
        tape.drop_if_frugal(reduced)
        new_features.append(new)
        adapters = [block.adapt] if block.skip is None else [block.adapt, block.skip]
        below, *skip = tape.layers([*inputs, Input(new)], *adapters, pool=position < DEPTH)
        if position > DEPTH:
            tape.drop_if_frugal(skips.pop())
        skips += skip
    return below, new_features


def _hourglass_stem(tape: Tape, stem: HourglassStem) -> Source:
    wide = _residual(tape, stem.wide, tape.stem(stem.conv, stem.norm, pool=False))
    x = tape.sum(Input(wide), pool=True)
    # A sum's gradient needs nothing of what was summed, and pooling's only where maxima were.
    tape.drop(wide)
    for residual in stem.pooled:
        x = _residual(tape, residual, x)
    return x


def _hourglasses(
    tape: Tape, model: StackedHourglass, x: Source, heads: nn.ModuleDict
) -> list[Source]:
    inputs = [x]
    for i, unet in enumerate(model.unets):
        assert isinstance(unet, Hourglass)
        features = _hourglass(tape, unet, inputs[-1])
        head: HourglassHead | None = None
        if str(i) in heads:
            head = _head(heads[str(i)])
            heatmap = tape.head(features, head.predict, unet.norm)
        if i < len(model.links):
            link = _conv(model.links[i])
            x = tape.convolution(features, link, norm=unet.norm, added=Input(inputs[-1]))
            if head is not None:
                with_heatmap = tape.convolution(
                    heatmap,
                    _conv(head.remap),
                    activation="sigmoid" if head.supervision == "detection" else "none",
                    added=Input(x),
                )
                tape.drop(x)
                x = with_heatmap
            inputs.append(x)
    return inputs


def _hourglass(tape: Tape, unet: Hourglass, x: Source) -> Source:
    """What the features are made of by BatchNorm and ReLU."""
    skips: list[Source] = []
    for skip, block in zip(unet.skips, unet.down, strict=True):
        skips.append(_residual(tape, skip, x))
        pooled = tape.sum(Input(x), pool=True)
        x = _residual(tape, block, pooled)
        tape.drop_if_frugal(pooled)
    x = _residual(tape, unet.neck, x)
    for block in unet.up:
        below, beside = _residual(tape, block, x), skips.pop()
        x = tape.sum(Input(below, raised=True), Input(beside))
        tape.drop(below, beside)
    return tape.convolution(_residual(tape, unet.after, x), unet.conv)


def _residual(tape: Tape, residual: nn.Module, x: Source) -> Source:
    assert isinstance(residual, Residual)
    own = x if residual.skip is None else tape.convolution(x, residual.skip)
    (reduced,) = tape.layers([Input(x)], residual.reduce)
    (middle,) = tape.layers([Input(reduced)], residual.middle)
    expand = residual.expand
    result = tape.convolution(middle, expand.conv, norm=expand.norm, added=Input(own))
    tape.drop_if_frugal(reduced, middle)
    if own is not x:
        tape.drop(own)
    return result


def _refinement(tape: Tape, model: IterativeRefinement) -> None:
    stem, unets = _parts(model.network)
    inputs = unets(tape, stem(tape), model.network.heads)
    refined = _merge(tape, model.merge, [inputs[0], inputs[-1]])
    # The second pass has its own BatchNorms.
    tape.norms = model.second_norms()
    unets(tape, refined, model.heads)
    tape.norms = {}


def _merge(tape: Tape, merge: DenseMerge, sources: list[Source]) -> Source:
    features = [Input(each) for each in sources]
    for reduce, grow in zip(merge.reduce, merge.grow, strict=True):
        (reduced,) = tape.layers(features, _layer(reduce))
        (new,) = tape.layers([Input(reduced)], _layer(grow))
        tape.drop_if_frugal(reduced)
        features.append(Input(new))
    (merged,) = tape.layers(features, merge.adapt)
    return merged


def _layer(module: nn.Module) -> PreActivation:
    assert isinstance(module, PreActivation)
    return module


def _head(module: nn.Module) -> HourglassHead:
    assert isinstance(module, HourglassHead)
    return module


def _conv(module: nn.Module | None) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module
