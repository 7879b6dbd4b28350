"""The stem as a stage: only the image and the pooled output are kept.

Shapes: B batch, S the image's side, C channels, h W rows and width of a strip, P parts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fedcunet.models.blocks import Stem
from fedcunet.quant.layers import QuantSpec
from fedcunet.quant.normalise import Gradients, Normaliser, update_running
from fedcunet.quant.outputs import Output, OutputGradient, gather, pool_with_index, unpool

STRIPS = 4  # parts in which the rows of a sample go through the stem


class StemStage:
    """The stem, in strips of rows: only the image and the pooled output stay."""

    def __init__(self, stem: Stem, image_B3SS: Tensor, output: Output) -> None:
        self.stem, self.output = stem, output
        self.image_B3SS = image_B3SS
        _, self.channels, self.height, _ = self._shape(image_B3SS)
        self.mean_C = self.variance_C = image_B3SS.new_empty(0)

    def _shape(self, image_B3SS: Tensor) -> tuple[int, int, int, int]:
        batch, _, height, width = image_B3SS.shape
        return batch, self.stem.conv.out_channels, height // 2, width // 2

    def _convolved(self, sample: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows of the convolution's output (1, C, h, W), and the padded image rows under them."""
        image_13SS = F.pad(self.image_B3SS[sample : sample + 1], (3, 3, 3, 3))
        under = image_13SS[:, :, 2 * rows.start : 2 * rows.stop + 5].contiguous()
        weight = self.stem.conv.weight.detach().contiguous()
        return F.conv2d(under, weight, stride=2), under

    def _parts(self) -> Iterator[tuple[int, slice]]:
        for sample in range(len(self.image_B3SS)):
            for rows in _strips(self.height):
                yield sample, rows

    def _normaliser(self) -> Normaliser:
        batch, _, height, width = self._shape(self.image_B3SS)
        count = batch * height * width
        return Normaliser(self.stem.norm, self.mean_C, self.variance_C, count)

    def forward(self) -> None:
        """Two passes over the convolution: BatchNorm's statistics, then the output."""
        parts = [
            torch.var_mean(self._convolved(sample, rows)[0].flatten(2)[0], dim=1, correction=0)
            for sample, rows in self._parts()
        ]
        variance_PC = torch.stack([variance for variance, _ in parts])
        mean_PC = torch.stack([mean for _, mean in parts])
        self.mean_C = mean_PC.mean(0)
        self.variance_C = (variance_PC + (mean_PC - self.mean_C).square()).mean(0)
        normaliser = self._normaliser()
        update_running(self.stem.norm, self.mean_C, self.variance_C, normaliser.count)
        maxima: list[Tensor] = []
        indices: list[Tensor] = []
        for sample, rows in self._parts():
            y_1ChW, _ = self._convolved(sample, rows)
            y_1ChW.mul_(normaliser.alpha_C[:, None, None]).add_(normaliser.shift_C[:, None, None])
            best, index = pool_with_index(y_1ChW.relu_())
            maxima.append(best)
            indices.append(index)
            if rows.stop == self.height:
                self.output.put_pooled(
                    slice(sample, sample + 1), torch.cat(maxima, 2), torch.cat(indices, 2)
                )
                maxima, indices = [], []
        assert self.output.source is not None
        self.output.source.finish()

    def backward(self, gradients: Gradients) -> None:
        """Two passes again: the sums of BatchNorm's backward pass, then the weight's gradient."""
        normaliser = self._normaliser()
        incoming = OutputGradient(self.output, None, QuantSpec(), None)
        alpha_C11 = normaliser.alpha_C[:, None, None]
        shift_C11 = normaliser.shift_C[:, None, None]
        kept: list[Tensor] = []
        for sample, rows in self._parts():
            place = slice(sample, sample + 1)
            half = slice(rows.start // 2, rows.stop // 2)
            if rows.start == 0:
                kept.append(incoming.finish(place))
            y_1ChW, _ = self._convolved(sample, rows)
            chosen = gather(y_1ChW, self.output.pooled_from(place, half))
            dz = kept[sample][:, :, half]
            dz.mul_(torch.addcmul(shift_C11, chosen, alpha_C11) > 0)
            normaliser.sum_dz_C += dz.sum((0, 2, 3))
            normaliser.sum_dz_x_C += (dz * chosen).sum((0, 2, 3))
        by_value_C, constant_C = normaliser.coefficients(gradients)
        weight = self.stem.conv.weight.detach().contiguous()
        gradient_weight = torch.zeros_like(weight)
        for sample, rows in self._parts():
            place = slice(sample, sample + 1)
            half = slice(rows.start // 2, rows.stop // 2)
            y_1ChW, under = self._convolved(sample, rows)
            y_1ChW.mul_(by_value_C[:, None, None]).add_(constant_C[:, None, None])
            dz = kept[sample][:, :, half] * alpha_C11
            y_1ChW += unpool(dz, self.output.pooled_from(place, half))
            gradient_weight += torch.ops.aten.convolution_backward(
                y_1ChW, under, weight, None,
                [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
            )[1]  # fmt: skip
        incoming.release()
        gradients[self.stem.conv.weight] = gradient_weight  # type: ignore[index]


def _strips(height: int) -> Iterator[slice]:
    """The rows 0 to `height`, a multiple of 32, in equal strips."""
    for start in range(0, height, height // STRIPS):
        yield slice(start, start + height // STRIPS)
