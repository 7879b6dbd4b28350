"""Stages of a network that keep sources only, and recompute the rest in their backward passes.

A stage is Concat -> BatchNorm -> ReLU -> (input quantiser) -> convolution. It reads sources
(`sources.py`) in chunks of a few samples or rows, in work space that does not grow with the batch
or with the depth of the network, forward and again backward (Tang et al., ECCV 2018, section 3.3;
Pleiss et al., "Memory-efficient implementation of DenseNets", 2017, hold whole maps instead).
Layers that read the same sources are branches of one stage and load them once.

BatchNorm's statistics belong to the source: concatenation does not mix channels, and nearest
upsampling changes neither mean nor biased variance.

Shapes: B batch, n samples and h rows of a chunk, C channels, I and O inputs and outputs of a
convolution, H W the sides of a map, P pixels. Channels come last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.quant.collector import Collector
from fedcunet.quant.functions import binarise, ternarise
from fedcunet.quant.layers import QuantConv2d, QuantSpec
from fedcunet.quant.normalise import Normaliser, update_running
from fedcunet.quant.outputs import GradientQuantiser, Output, unpool
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.sources import FULL, Source, source_steps
from fedcunet.quant.waiting import CodedGradient, FloatGradient, WaitingGradient
from fedcunet.quant.workspace import Workspace

# The most values in one buffer of a stage, where a chunk can be that small: three such buffers
# stay within a core's cache.
CHUNK_VALUES = 2**17

_MASK = torch.ops.aten.threshold_backward.grad_input


def chunks(batch: int, channels: int, height: int, width: int) -> Iterator[tuple[slice, int]]:
    """Samples to take together, and the rows of a strip: the height, or an even part of it."""
    samples = max(1, min(batch, CHUNK_VALUES // (channels * height * width)))
    rows = height
    while samples == 1 and channels * rows * width > CHUNK_VALUES and rows % 4 == 0:
        rows //= 2
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), rows


def strips(height: int, rows: int) -> list[slice]:
    """The rows 0 to `height` in strips of `rows`."""
    return [slice(start, start + rows) for start in range(0, height, rows)]


def raise_into(place_nHWC: Tensor, x_nhwC: Tensor) -> None:
    """Puts every pixel into a square of four."""
    n, height, width, channels = x_nhwC.shape
    # Part of a wider buffer, perhaps, but its rows and columns divide as those of any map.
    squares = place_nHWC.view(n, height, 2, width, 2, channels)
    squares.copy_(x_nhwC[:, :, None, :, None].expand(n, height, 2, width, 2, channels))


def lower(gradient_nHWC: Tensor) -> Tensor:
    """The sums of squares of four pixels: the backward pass of `raise_into`."""
    rows_nhWC = gradient_nHWC[:, 0::2] + gradient_nHWC[:, 1::2]
    return rows_nhWC[:, :, 0::2] + rows_nhWC[:, :, 1::2]


@dataclass(frozen=True, slots=True)
class Input:
    """A source as a stage reads it: as it is, or raised to twice the height and width."""

    source: Source
    raised: bool = False

    @property
    def scale(self) -> int:
        return 2 if self.raised else 1

    def rows(self, rows: slice) -> slice:
        """The source's rows under `rows` of the stage."""
        return slice(rows.start // self.scale, rows.stop // self.scale)

    def load(self, samples: slice, rows: slice, place_nhWC: Tensor, workspace: Workspace) -> Tensor:
        """Puts the codes under some rows of the stage into `place_nhWC`."""
        if not self.raised:
            return self.source.load(samples, rows, place_nhWC)
        n, height, width, channels = place_nhWC.shape
        small_nhwC = workspace.take("small", n, height // 2, width // 2, channels)
        raise_into(place_nhWC, self.source.load(samples, self.rows(rows), small_nhwC))
        return place_nhWC


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the stages of one step share."""

    workspace: Workspace
    rounding: Rounding
    collector: Collector
    gradient_bits: int  # of gradients that wait; 32: they wait as they are
    packed: bool

    def open_gradients(self, inputs: Sequence[Input]) -> list[bool]:
        """Makes room for the gradients of inputs; whether each is the first of its source."""
        are_first = []
        for each in inputs:
            are_first.append(each.source.waiting is None)
            if each.source.waiting is None:
                each.source.waiting = self._room(each.source.shape)
        return are_first

    def _room(self, shape: tuple[int, int, int, int]) -> WaitingGradient:
        like = self.workspace.like
        if self.gradient_bits == FULL:
            return FloatGradient(shape, like)
        return CodedGradient(
            shape, like, bits=self.gradient_bits, packed=self.packed, rounding=self.rounding
        )

    def add_gradient(
        self, view: Input, samples: slice, rows: slice, gradient_nhWC: Tensor, *, first: bool
    ) -> None:
        """Adds the gradient of some rows of a stage's input to what waits for its source."""
        waiting = view.source.waiting
        assert waiting is not None
        if view.raised:
            gradient_nhWC = lower(gradient_nhWC)
        waiting.add(samples, view.rows(rows), gradient_nhWC, self.workspace, first=first)


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of a convolution's output, and the rows of its input that they are made from.

    Args:
        rows: of the output.
        height: of the whole map.
        reach: rows that the convolution reads above and below: 0, or 1 for 3x3.
    """

    rows: slice
    height: int
    reach: int

    @property
    def read(self) -> slice:
        """The input's rows; beyond the map's edges there are rows of zeros."""
        start, stop = self.rows.start - self.reach, self.rows.stop + self.reach
        return slice(max(0, start), min(self.height, stop))

    @property
    def above(self) -> int:
        """Rows of zeros above."""
        first: int = self.rows.start
        return max(0, self.reach - first)

    @property
    def overlap(self) -> int:
        """How many of the rows it reads the strip before has read too."""
        return 2 * self.reach if self.rows.start > 0 else 0


class Branch:
    """One layer of a stage: normalisation (or none), activation, convolution, output.

    Args:
        conv: 1x1, or 3x3 with padding 1; no bias.
        output: of the convolution.
        norm: with a ReLU after it; None: the convolution reads the sources as they are.
        activation: of a branch without normalisation.
        added: a map of the output's size that is added to the convolution's quantised result.
        updates_running: whether the forward pass counts for the norm's running statistics.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        output: Output,
        *,
        norm: nn.BatchNorm2d | None,
        activation: Literal["none", "sigmoid"] = "none",
        added: Input | None = None,
        updates_running: bool = True,
    ) -> None:
        self.conv, self.output, self.norm = conv, output, norm
        self.activation, self.added, self.updates_running = activation, added, updates_running
        self.pointwise = conv.kernel_size == (1, 1)
        self.spec = conv.spec if isinstance(conv, QuantConv2d) else QuantSpec()

    def weight(self) -> Tensor:
        """The quantised weight, dense: (O, I, k, k)."""
        weight = self.conv.weight.detach()
        if weight.dtype == torch.bfloat16:
            weight = weight.float()
        if self.spec.weight_bits != FULL:
            quantiser = binarise if self.spec.weight_bits == 1 else ternarise
            weight = quantiser(weight, scaled=self.spec.alpha)
        return weight

    def input_range(self) -> float:
        """The largest value of the input quantiser; 0 where there is none."""
        if self.spec.input_bits == FULL or self.spec.source_bits != FULL:
            return 0.0
        return 1.0 if self.spec.input_quantizer == "paper" else self.spec.input_range

    def read(self, r_nhWI: Tensor, workspace: Workspace) -> Tensor:
        """What the convolution reads: `r_nhWI` itself, or Eq. 6 of it (as in `QuantiseInput`)."""
        input_range = self.input_range()
        if not input_range:
            return r_nhWI
        step = 2.0 ** (1 - self.spec.input_bits) * input_range
        read_nhWI = workspace.take("read", *r_nhWI.shape)
        torch.mul(r_nhWI, 1 / step, out=read_nhWI).round_().mul_(step)
        return read_nhWI.clamp_(step - input_range, input_range - step)


class BranchBackward:
    """One branch's part of a backward pass: its sums, and the gradient of what it read."""

    def __init__(
        self, branch: Branch, normaliser: Normaliser | None, workspace: Workspace, name: str
    ) -> None:
        self.branch, self.normaliser, self.workspace, self.name = (
            branch,
            normaliser,
            workspace,
            name,
        )
        self.weight = branch.weight()
        self.gradient_weight = torch.zeros_like(self.weight)
        # With BatchNorm's factor in the weight, the convolution gives alpha * dz.
        scaled = self.weight
        if normaliser is not None:
            scaled = self.weight * normaliser.scale_C[:, None, None]
        self.scaled_weight = scaled

    def input_gradient(
        self, padded_nhWI: Tensor, x_nhWI: Tensor, dy_nhWO: Tensor, step_nI: Tensor, above: int
    ) -> Tensor:
        """The gradient of what the sources' values give here, but for BatchNorm's late terms.

        Args:
            padded_nhWI: what was activated, with rows of zeros beyond the map's edges.
            x_nhWI: the sources' codes.
            dy_nhWO: the gradient of the convolution's output.
            step_nI: of the codes.
            above: how many of the rows of zeros are above.
        """
        branch = self.branch
        read_nhWI = branch.read(padded_nhWI, self.workspace)
        r_nhWI = padded_nhWI[:, above : above + x_nhWI.shape[1]]
        if branch.pointwise:
            dz_nhWI = self.workspace.take(f"dz {self.name}", *x_nhWI.shape)
            dy_PO, channels = dy_nhWO.flatten(0, 2), x_nhWI.shape[3]
            self.gradient_weight.view(-1, channels).addmm_(dy_PO.t(), read_nhWI.flatten(0, 2))
            torch.mm(dy_PO, self.scaled_weight.flatten(1), out=dz_nhWI.view(-1, channels))
        else:
            dz_nhWI = self._convolution_backward(read_nhWI, dy_nhWO)
            dz_nhWI = dz_nhWI[:, above : above + x_nhWI.shape[1]]
        if branch.norm is None:
            if branch.input_range():
                dz_nhWI.mul_(r_nhWI.abs() < branch.input_range())
            if branch.activation == "sigmoid":
                dz_nhWI.mul_(r_nhWI).mul_(1 - r_nhWI)
            return dz_nhWI
        # Zero where the ReLU was, and where the input quantiser clipped.
        _MASK(dz_nhWI, r_nhWI, 0, grad_input=dz_nhWI)
        if branch.input_range():
            dz_nhWI.mul_(r_nhWI < branch.input_range())
        assert self.normaliser is not None
        self.normaliser.sum_C += dz_nhWI.sum((0, 1, 2))
        # r is not needed any more.
        by_code_nI = torch.mul(dz_nhWI, x_nhWI, out=r_nhWI).sum((1, 2))
        self.normaliser.sum_x_C += (by_code_nI * step_nI).sum(0)
        return dz_nhWI

    def _convolution_backward(self, read_nhWI: Tensor, dy_nhWO: Tensor) -> Tensor:
        dy_nOhW, read_nIhW = dy_nhWO.permute(0, 3, 1, 2), read_nhWI.permute(0, 3, 1, 2)
        self.gradient_weight += torch.ops.aten.convolution_backward(
            dy_nOhW, read_nIhW, self.weight, None,
            [1, 1], [0, 1], [1, 1], False, [0, 0], 1, [False, True, False],
        )[1]  # fmt: skip
        dz_nIhW = torch.ops.aten.convolution_backward(
            dy_nOhW, read_nIhW, self.scaled_weight, None,
            [1, 1], [0, 1], [1, 1], False, [0, 0], 1, [True, False, False],
        )[0]  # fmt: skip
        dz_nhWI: Tensor = dz_nIhW.permute(0, 2, 3, 1).contiguous()
        return dz_nhWI

    def finish(self, collector: Collector) -> tuple[Tensor, Tensor] | None:
        """Hands over the parameters' gradients; BatchNorm's late terms, where there is one."""
        late = None if self.normaliser is None else self.normaliser.coefficients(collector)
        weight = self.branch.conv.weight
        if self.branch.spec.weight_bits != FULL:
            self.gradient_weight.mul_(weight.detach().abs() <= 1)
        collector.add(weight, self.gradient_weight)
        return late


class Stage:
    """Layers over the same sources. `forward` once, then `backward` once."""

    def __init__(self, around: Surroundings, inputs: list[Input], branches: list[Branch]) -> None:
        self.around, self.inputs, self.branches = around, list(inputs), branches
        source, scale = inputs[0].source, inputs[0].scale
        batch, height, width, _ = source.shape
        self.batch, self.height, self.width = batch, height * scale, width * scale
        self.channels = sum(each.source.shape[3] for each in inputs)
        for branch in branches:
            around.collector.expect(branch.conv.weight)
            if branch.norm is not None:
                around.collector.expect(branch.norm.weight)
                around.collector.expect(branch.norm.bias)

    def outputs(self) -> list[Output]:
        """Of all branches."""
        return [branch.output for branch in self.branches]

    def reads(self) -> list[Source]:
        """The sources that the backward pass needs."""
        return [each.source for each in self.inputs]

    def needs(self) -> list[Source]:
        """The sources that the results are computed from."""
        added = [branch.added.source for branch in self.branches if branch.added is not None]
        return self.reads() + added

    def _normaliser(self, branch: Branch) -> Normaliser | None:
        if branch.norm is None:
            return None
        mean_C = torch.cat([each.source.mean_C for each in self.inputs])
        variance_C = torch.cat([each.source.variance_C for each in self.inputs])
        return Normaliser(branch.norm, mean_C, variance_C, self.batch * self.height * self.width)

    def _chunks(self) -> Iterator[tuple[slice, list[Strip]]]:
        reach = 0 if self.branches[0].pointwise else 1
        for samples, height in chunks(self.batch, self.channels, self.height, self.width):
            yield samples, [Strip(rows, self.height, reach) for rows in strips(self.height, height)]

    def _codes(self, samples: slice, rows: slice) -> Tensor:
        """The codes of all inputs, side by side, in work space: (n, h, W, I)."""
        n, height = samples.stop - samples.start, rows.stop - rows.start
        workspace = self.around.workspace
        x_nhWI = workspace.take("x", n, height, self.width, self.channels)
        start = 0
        for each in self.inputs:
            stop = start + each.source.shape[3]
            each.load(samples, rows, x_nhWI[..., start:stop], workspace)
            start = stop
        return x_nhWI

    def _activated(
        self,
        branch: Branch,
        normaliser: Normaliser | None,
        x_nhWI: Tensor,
        step_nI: Tensor,
        strip: Strip,
    ) -> Tensor:
        """relu(alpha * x + shift), or the values of x, with the strip's rows of zeros around."""
        n, height, width, channels = x_nhWI.shape
        full_height = strip.rows.stop - strip.rows.start + 2 * strip.reach
        padded_nhWI = self.around.workspace.take("r", n, full_height, width, channels)
        r_nhWI = padded_nhWI
        if full_height > height:
            r_nhWI = padded_nhWI[:, strip.above : strip.above + height]
            padded_nhWI[:, : strip.above].zero_()
            padded_nhWI[:, strip.above + height :].zero_()
        if normaliser is not None:
            factor_n11I = (step_nI * normaliser.alpha_C)[:, None, None]
            torch.addcmul(normaliser.shift_C, x_nhWI, factor_n11I, out=r_nhWI).relu_()
            return padded_nhWI
        torch.mul(x_nhWI, step_nI[:, None, None], out=r_nhWI)
        if branch.activation == "sigmoid":
            r_nhWI.sigmoid_()
        return padded_nhWI

    def _steps(self) -> Tensor:
        return torch.cat([each.source.step_BC for each in self.inputs], 1)

    def forward(self) -> None:
        """Puts the results into the outputs and updates the running statistics."""
        normalisers = [self._normaliser(branch) for branch in self.branches]
        for branch, normaliser in zip(self.branches, normalisers, strict=True):
            if branch.norm is not None and normaliser is not None and branch.updates_running:
                variance_C = torch.cat([each.source.variance_C for each in self.inputs])
                update_running(branch.norm, normaliser.mean_C, variance_C, normaliser.count)
        self._run(self.branches, normalisers, again=False)
        for branch in self.branches:
            branch.output.source.finish()

    def refill(self, source: Source) -> None:
        """Computes the codes of a released source again, to the bit."""
        (branch,) = (branch for branch in self.branches if branch.output.source is source)
        self._run([branch], [self._normaliser(branch)], again=True)

    def _run(
        self, branches: list[Branch], normalisers: list[Normaliser | None], *, again: bool
    ) -> None:
        steps_BI = self._steps()
        weights = [branch.weight() for branch in branches]
        for samples, all_strips in self._chunks():
            results = [
                self.around.workspace.take(
                    f"y {number}",
                    samples.stop - samples.start,
                    self.height,
                    self.width,
                    branch.conv.out_channels,
                )
                for number, branch in enumerate(branches)
            ]
            for strip in all_strips:
                x_nhWI = self._codes(samples, strip.read)
                for branch, normaliser, weight, y_nHWO in zip(
                    branches, normalisers, weights, results, strict=True
                ):
                    padded_nhWI = self._activated(
                        branch, normaliser, x_nhWI, steps_BI[samples], strip
                    )
                    read_nhWI = branch.read(padded_nhWI, self.around.workspace)
                    _convolve(read_nhWI, weight, y_nHWO[:, strip.rows])
            for branch, y_nHWO in zip(branches, results, strict=True):
                if branch.added is not None:
                    self._add(branch, samples, y_nHWO)
                branch.output.put(samples, y_nHWO, again=again)

    def _add(self, branch: Branch, samples: slice, y_nHWO: Tensor) -> None:
        """Quantises a convolution's result, and adds the branch's other map."""
        assert branch.added is not None
        bits = branch.spec.source_bits
        if bits != FULL:
            quantise_values(y_nHWO, bits)
        workspace = self.around.workspace
        other_nHWO = workspace.take("x", *y_nHWO.shape)
        branch.added.load(samples, slice(0, self.height), other_nHWO, workspace)
        y_nHWO.addcmul_(other_nHWO, branch.added.source.step_BC[samples][:, None, None])

    def backward(self) -> None:
        """Adds to the waiting gradients of the inputs; hands over those of the parameters."""
        around, steps_BI = self.around, self._steps()
        parts = [
            BranchBackward(branch, self._normaliser(branch), around.workspace, str(number))
            for number, branch in enumerate(self.branches)
        ]
        quantisers = [self._quantiser(branch) for branch in self.branches]
        are_first = around.open_gradients(self.inputs)
        added = [branch.added for branch in self.branches if branch.added is not None]
        added_first = around.open_gradients(added)
        for samples, all_strips in self._chunks():
            dys = [
                self._output_gradient(branch, quantiser, samples, f"y {number}", added_first)
                for number, (branch, quantiser) in enumerate(
                    zip(self.branches, quantisers, strict=True)
                )
            ]
            for strip in all_strips:
                x_nhWI = self._codes(samples, strip.read)
                total_nhWI: Tensor | None = None
                for part, dy_nHWO in zip(parts, dys, strict=True):
                    padded_nhWI = self._activated(
                        part.branch, part.normaliser, x_nhWI, steps_BI[samples], strip
                    )
                    dz_nhWI = part.input_gradient(
                        padded_nhWI,
                        x_nhWI,
                        dy_nHWO[:, strip.rows],
                        steps_BI[samples],
                        strip.above,
                    )
                    total_nhWI = dz_nhWI if total_nhWI is None else total_nhWI.add_(dz_nhWI)
                assert total_nhWI is not None
                self._spread(samples, strip, total_nhWI, are_first)
        for branch in self.branches:
            branch.output.release()
        for part in parts:
            late = part.finish(around.collector)
            if late is not None:
                self._spread_late(*late)

    def _quantiser(self, branch: Branch) -> GradientQuantiser:
        bits, peak = branch.spec.gradient_bits, None
        if bits != FULL and branch.spec.gradient_scale == "tensor":
            peak = torch.stack(
                [
                    branch.output.gradient(slice(sample, sample + 1)).abs().amax()
                    for sample in range(self.batch)
                ]
            ).amax()
        return GradientQuantiser(bits, self.around.rounding, peak)

    def _output_gradient(
        self,
        branch: Branch,
        quantiser: GradientQuantiser,
        samples: slice,
        name: str,
        added_first: list[bool],
    ) -> Tensor:
        """The gradient of a convolution's result for some samples: (n, H, W, O), in work space.

        The gradient of a pooled map is quantised before it is spread over four pixels, three of
        which are zero; stochastic rounding leaves zeros as they are, so this is the same quantiser.
        """
        pool = branch.output.pool
        gradient_nhwO = branch.output.gradient(samples, "gradient" if pool else name)
        if branch.added is not None:
            rows = slice(0, self.height)
            (first,) = added_first
            self.around.add_gradient(branch.added, samples, rows, gradient_nhwO, first=first)
        quantiser(gradient_nhwO, self.around.workspace)
        if not pool:
            return gradient_nhwO
        n, _, _, channels = gradient_nhwO.shape
        dy_nHWO = self.around.workspace.take(name, n, self.height, self.width, channels)
        return unpool(gradient_nhwO, branch.output.pooled_from(samples, slice(None)), dy_nHWO)

    def _spread(
        self, samples: slice, strip: Strip, gradient_nhWI: Tensor, are_first: list[bool]
    ) -> None:
        read, overlap, start = strip.read, strip.overlap, 0
        again, fresh = (
            slice(read.start, read.start + overlap),
            slice(read.start + overlap, read.stop),
        )
        add = self.around.add_gradient
        for each, first in zip(self.inputs, are_first, strict=True):
            stop = start + each.source.shape[3]
            part = gradient_nhWI[..., start:stop]
            if overlap:
                add(each, samples, again, part[:, :overlap], first=False)
                part = part[:, overlap:]
            add(each, samples, fresh, part, first=first)
            start = stop

    def _spread_late(self, by_value_I: Tensor, constant_I: Tensor) -> None:
        start = 0
        for each in self.inputs:
            stop = start + each.source.shape[3]
            part = slice(start, stop)
            each.source.add_late(by_value_I[part], constant_I[part], each.scale**2)
            start = stop


def _convolve(x_nhWI: Tensor, weight: Tensor, place_nhWO: Tensor) -> None:
    if weight.shape[-1] == 1:
        flat_PI = x_nhWI.flatten(0, 2)
        torch.mm(flat_PI, weight.flatten(1).t(), out=place_nhWO.view(len(flat_PI), -1))
    else:
        y_nOhW = F.conv2d(x_nhWI.permute(0, 3, 1, 2), weight, padding=(0, 1))
        place_nhWO.copy_(y_nOhW.permute(0, 2, 3, 1))


def quantise_values(y_nHWC: Tensor, bits: int) -> None:
    """`QuantiseSource` in place."""
    flat_nPC = y_nHWC.flatten(1, 2)
    step_n11C = source_steps(flat_nPC.amin(1), flat_nPC.amax(1), bits)[:, None, None]
    y_nHWC.mul_(step_n11C.reciprocal()).round_().mul_(step_n11C)


class Sum:
    """A sum of sources, or one source pooled: a stage without parameters."""

    def __init__(self, around: Surroundings, inputs: list[Input], output: Output) -> None:
        self.around, self.inputs, self.output = around, inputs, output
        source, scale = inputs[0].source, inputs[0].scale
        self.batch, height, width, self.channels = source.shape
        self.height, self.width = height * scale, width * scale

    def outputs(self) -> list[Output]:
        """The one output."""
        return [self.output]

    def reads(self) -> list[Source]:
        """None: the gradient of a sum does not depend on what was summed."""
        return []

    def needs(self) -> list[Source]:
        """The sources that the sum is computed from."""
        return [each.source for each in self.inputs]

    def forward(self) -> None:
        """Puts the sum into the output."""
        self._run(again=False)
        self.output.source.finish()

    def refill(self, source: Source) -> None:
        """Computes the codes of the released output again, to the bit."""
        assert source is self.output.source
        self._run(again=True)

    def _samples(self) -> Iterator[slice]:
        for samples, _ in chunks(self.batch, self.channels, self.height, self.width):
            yield samples

    def _run(self, *, again: bool) -> None:
        workspace = self.around.workspace
        for samples in self._samples():
            n = samples.stop - samples.start
            shape = (n, self.height, self.width, self.channels)
            total_nHWC = workspace.take("y 0", *shape)
            for number, each in enumerate(self.inputs):
                x_nHWC = workspace.take("x", *shape)
                each.load(samples, slice(0, self.height), x_nHWC, workspace)
                step_n11C = each.source.step_BC[samples][:, None, None]
                if number == 0:
                    torch.mul(x_nHWC, step_n11C, out=total_nHWC)
                else:
                    total_nHWC.addcmul_(x_nHWC, step_n11C)
            self.output.put(samples, total_nHWC, again=again)

    def backward(self) -> None:
        """Adds to the waiting gradients of the inputs."""
        rows = slice(0, self.height)
        are_first = self.around.open_gradients(self.inputs)
        for samples in self._samples():
            gradient_nhwC = self.output.gradient(samples)
            if self.output.pool:
                n = samples.stop - samples.start
                place = self.around.workspace.take("y 0", n, self.height, self.width, self.channels)
                index = self.output.pooled_from(samples, slice(None))
                gradient_nhwC = unpool(gradient_nhwC, index, place)
            for each, first in zip(self.inputs, are_first, strict=True):
                self.around.add_gradient(each, samples, rows, gradient_nhwC, first=first)
        self.output.release()
