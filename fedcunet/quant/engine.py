"""Stages of a network that keep sources only, and recompute the rest in their backward passes.

A stage is Concat -> BatchNorm -> ReLU -> (input quantiser) -> convolution. It reads sources
(`sources.py`) in chunks of a few samples or rows, in work space that does not grow with the batch
or with the depth of the network, forward and again backward (Tang et al., ECCV 2018, section 3.3;
Pleiss et al., "Memory-efficient implementation of DenseNets", 2017, hold whole maps instead).

BatchNorm's statistics belong to the source: concatenation does not mix channels, and nearest
upsampling changes neither mean nor biased variance.

Shapes: B batch, n samples and h rows of a chunk, C channels, I and O inputs and outputs of a
convolution, H W the sides of a map.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedcunet.models.blocks import PreActivation
from fedcunet.quant.functions import binarise, ternarise
from fedcunet.quant.layers import QuantConv2d, QuantSpec, Rounding
from fedcunet.quant.normalise import Gradients, Normaliser, update_running
from fedcunet.quant.outputs import Output, OutputGradient
from fedcunet.quant.sources import FULL, Source

CHUNK_VALUES = 2**18  # the most values in one buffer of a stage, where a chunk can be that small


def chunks(batch: int, channels: int, height: int, width: int) -> Iterator[tuple[slice, int]]:
    """Samples to take together, and the rows of a strip: the height, or an even part of it."""
    samples = max(1, min(batch, CHUNK_VALUES // (channels * height * width)))
    rows = height
    while samples == 1 and channels * rows * width > CHUNK_VALUES and rows % 4 == 0:
        rows //= 2
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), rows


def strips(height: int, rows: int) -> Iterator[slice]:
    """The rows 0 to `height` in strips of `rows`."""
    for start in range(0, height, rows):
        yield slice(start, start + rows)


def double(x_nChw: Tensor) -> Tensor:
    """A view in which every pixel stands in a square of four: (n, C, h, 2, w, 2)."""
    n, channels, height, width = x_nChw.shape
    return x_nChw[:, :, :, None, :, None].expand(n, channels, height, 2, width, 2)


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


class Stage:
    """A `PreActivation` layer over sources. `forward` once, then `backward` once."""

    def __init__(self, layer: PreActivation, inputs: list[Input], output: Output) -> None:
        self.layer, self.inputs, self.output = layer, inputs, output
        source, scale = inputs[0].source, inputs[0].scale
        batch, _, height, width = source.shape
        self.batch, self.height, self.width = batch, height * scale, width * scale
        self.channels = layer.conv.in_channels
        self.pointwise = layer.conv.kernel_size == (1, 1)
        self.spec = layer.conv.spec if isinstance(layer.conv, QuantConv2d) else QuantSpec()

    def _normaliser(self) -> Normaliser:
        mean_C = torch.cat([each.source.mean_C for each in self.inputs])
        variance_C = torch.cat([each.source.variance_C for each in self.inputs])
        count = self.batch * self.height * self.width
        return Normaliser(self.layer.norm, mean_C, variance_C, count)

    def _chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        for samples, rows in chunks(self.batch, self.channels, self.height, self.width):
            # A 3x3 convolution needs its neighbours: whole samples.
            yield samples, list(strips(self.height, rows if self.pointwise else self.height))

    def _weight(self) -> Tensor:
        """The quantised weight, dense."""
        weight = self.layer.conv.weight.detach()
        if self.spec.weight_bits != FULL:
            quantiser = binarise if self.spec.weight_bits == 1 else ternarise
            weight = quantiser(weight, scaled=self.spec.alpha)
        return weight.contiguous()

    def _rectified(
        self, normaliser: Normaliser, samples: slice, rows: slice
    ) -> tuple[Tensor, list[Tensor]]:
        """relu(alpha * x + shift) of all inputs (n, I, h, W), and the codes of each."""
        num_samples = samples.stop - samples.start
        r_nIhW = normaliser.alpha_C.new_empty(
            num_samples, self.channels, rows.stop - rows.start, self.width
        )
        codes, start = [], 0
        for each in self.inputs:
            part = slice(start, start + each.source.shape[1])
            start = part.stop
            codes_nChw = each.source.load(samples, each.rows(rows))
            factor_nC11 = (normaliser.alpha_C[part] * each.source.step_BC[samples])[
                :, :, None, None
            ]
            shift_C11 = normaliser.shift_C[part, None, None]
            place = r_nIhW[:, part]
            if each.raised:
                small = torch.mul(codes_nChw, factor_nC11).add_(shift_C11).relu_()
                n, channels, height, width = small.shape
                place.view(n, channels, height, 2, width, 2).copy_(double(small))
            else:
                # Faster than addcmul, which does not vectorise over what it broadcasts.
                torch.mul(codes_nChw, factor_nC11, out=place).add_(shift_C11).relu_()
            codes.append(codes_nChw)
        return r_nIhW, codes

    def _quantised_input(self, r_nIhW: Tensor) -> Tensor:
        """What the convolution reads: `r_nIhW` itself, or Eq. 6 of it (as in `QuantiseInput`)."""
        spec = self.spec
        if spec.input_bits == FULL or spec.source_bits != FULL:
            return r_nIhW
        input_range = self._input_range()
        step = 2.0 ** (1 - spec.input_bits) * input_range
        return r_nIhW.mul(1 / step).round_().mul_(step).clamp_(max=input_range - step)

    def _input_range(self) -> float:
        return 1.0 if self.spec.input_quantizer == "paper" else self.spec.input_range

    def forward(self) -> None:
        """Puts the stage's result into its output and updates the running statistics."""
        normaliser = self._normaliser()
        variance_C = torch.cat([each.source.variance_C for each in self.inputs])
        update_running(self.layer.norm, normaliser.mean_C, variance_C, normaliser.count)
        weight_OIkk = self._weight()
        num_outputs = weight_OIkk.shape[0]
        for samples, all_rows in self._chunks():
            num_samples = samples.stop - samples.start
            if not self.pointwise:
                r_nIhW, _ = self._rectified(normaliser, samples, all_rows[0])
                y_nOHW = F.conv2d(self._quantised_input(r_nIhW), weight_OIkk, padding=1)
            else:
                y_nOHW = weight_OIkk.new_empty(num_samples, num_outputs, self.height, self.width)
                for rows in all_rows:
                    r_nIhW, _ = self._rectified(normaliser, samples, rows)
                    flat_nIP = self._quantised_input(r_nIhW).flatten(2)
                    result_nOP = torch.bmm(
                        weight_OIkk.flatten(1).expand(num_samples, -1, -1), flat_nIP
                    )
                    y_nOHW[:, :, rows] = result_nOP.view(num_samples, num_outputs, -1, self.width)
            self.output.put(samples, y_nOHW)
        if self.output.source is not None:
            self.output.source.finish()

    def backward(self, gradient_BOHW: Tensor | None, gradients: Gradients) -> None:
        """Adds to the waiting gradients of the inputs; puts in the parameters' gradients.

        Args:
            gradient_BOHW: of the output, where it leaves the network; else the source has it.
            gradients: of all parameters.
        """
        normaliser = self._normaliser()
        weight_OIkk = self._weight()
        gradient_weight = torch.zeros_like(weight_OIkk)
        first = [each.source.gradient is None for each in self.inputs]
        incoming = OutputGradient(self.output, gradient_BOHW, self.spec, self._rounding())
        for samples, all_rows in self._chunks():
            dy_nOHW = incoming.take(samples)
            for rows in all_rows:
                r_nIhW, codes = self._rectified(normaliser, samples, rows)
                dy_nOhW = dy_nOHW[:, :, rows]
                dz_nIhW = self._convolution_backward(r_nIhW, dy_nOhW, weight_OIkk, gradient_weight)
                # Zero where the ReLU was, and where the input quantiser clipped.
                torch.ops.aten.threshold_backward.grad_input(dz_nIhW, r_nIhW, 0, grad_input=dz_nIhW)
                if self.spec.input_bits != FULL and self.spec.source_bits == FULL:
                    dz_nIhW.mul_(r_nIhW < self._input_range())
                self._spread(normaliser, samples, rows, dz_nIhW, codes, first)
        incoming.release()
        by_value_C, constant_C = normaliser.coefficients(gradients)
        start = 0
        for each in self.inputs:
            part = slice(start, start + each.source.shape[1])
            start = part.stop
            # A raised pixel is read four times.
            each.source.by_value_C.add_(by_value_C[part], alpha=each.scale**2)
            each.source.constant_C.add_(constant_C[part], alpha=each.scale**2)
        weight = self.layer.conv.weight
        if self.spec.weight_bits != FULL:
            gradient_weight.mul_(weight.detach().abs() <= 1)
        gradients[weight] = gradient_weight  # type: ignore[index]

    def _rounding(self) -> Rounding | None:
        conv = self.layer.conv
        return conv.rounding if isinstance(conv, QuantConv2d) else None

    def _convolution_backward(
        self, r_nIhW: Tensor, dy_nOhW: Tensor, weight_OIkk: Tensor, gradient_weight: Tensor
    ) -> Tensor:
        """The gradient of the convolution's input; adds to that of its weight."""
        read_nIhW = self._quantised_input(r_nIhW)
        if not self.pointwise:
            dz_nIhW, addition, _ = torch.ops.aten.convolution_backward(
                dy_nOhW.contiguous(), read_nIhW, weight_OIkk, None,
                [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False],
            )  # fmt: skip
            gradient_weight += addition
            result: Tensor = dz_nIhW.contiguous()
            return result
        dy_nOP = dy_nOhW.flatten(2)
        addition_nOI = torch.bmm(dy_nOP, read_nIhW.flatten(2).transpose(1, 2))
        gradient_weight.view(addition_nOI.shape[1:]).add_(addition_nOI.sum(0))
        weight_nIO = weight_OIkk.flatten(1).t().expand(len(dy_nOP), -1, -1)
        return torch.bmm(weight_nIO, dy_nOP).view(r_nIhW.shape)

    def _spread(
        self,
        normaliser: Normaliser,
        samples: slice,
        rows: slice,
        dz_nIhW: Tensor,
        codes: list[Tensor],
        first: list[bool],
    ) -> None:
        """Gives each input its part of BatchNorm's output gradient."""
        start = 0
        for each, codes_nChw, is_first in zip(self.inputs, codes, first, strict=True):
            part = slice(start, start + each.source.shape[1])
            start = part.stop
            dz_nChw = dz_nIhW[:, part]
            if each.raised:
                rows_nChW = dz_nChw[:, :, 0::2] + dz_nChw[:, :, 1::2]
                dz_nChw = rows_nChW[..., 0::2] + rows_nChW[..., 1::2]
            normaliser.sum_dz_C[part] += dz_nChw.sum((0, 2, 3))
            by_code_nC = (dz_nChw * codes_nChw).sum((2, 3))
            normaliser.sum_dz_x_C[part] += (by_code_nC * each.source.step_BC[samples]).sum(0)
            alpha_C11 = normaliser.alpha_C[part, None, None]
            each.source.add_gradient(samples, each.rows(rows), alpha_C11, dz_nChw, is_first)
