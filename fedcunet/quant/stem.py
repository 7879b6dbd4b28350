"""The stem as a stage: only the image and the output are kept.

Shapes: B batch, n samples (one), S the image's side, C channels, h W rows and width of a strip,
P parts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.quant.normalise import Normaliser, update_running
from fedcunet.quant.outputs import Output, gather, pool_values, unpool
from fedcunet.quant.pieces import Surroundings, chunks, strips
from fedcunet.quant.sources import Source


class StemStage:
    """Conv 7x7 stride 2 -> BN -> ReLU, perhaps a 2x2 max pooling, in strips of rows.

    Args:
        around: what all stages share.
        image_B3SS: the images, in any memory format.
        conv: without bias, padding 3.
        norm: after it.
        output: of the ReLU, or of the pooling after it.
    """

    def __init__(
        self,
        around: Surroundings,
        image_B3SS: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        output: Output,
    ) -> None:
        self.around, self.image_B3SS = around, image_B3SS
        self.conv, self.norm, self.output = conv, norm, output
        self.batch, self.channels = len(image_B3SS), conv.out_channels
        self.height, self.width = (side // 2 for side in image_B3SS.shape[2:])
        self.mean_C = self.variance_C = image_B3SS.new_empty(0)
        self._padded: tuple[int, Tensor] = (-1, image_B3SS)  # a sample's number and image
        _, rows = next(chunks(1, self.channels, self.height, self.width))
        self.strips = strips(self.height, rows)
        for parameter in (conv.weight, norm.weight, norm.bias):
            around.collector.expect(parameter)

    def outputs(self) -> list[Output]:
        """The one output."""
        return [self.output]

    def reads(self) -> list[Source]:
        """None: the stem reads the image."""
        return []

    def needs(self) -> list[Source]:
        """None: the stem reads the image."""
        return []

    def refill(self, source: Source) -> None:
        """The stem's output stays."""
        raise AssertionError("the stem's output is never released early")

    def _convolved(self, sample: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows of the convolution's output (1, h, W, C), and the padded image rows under them."""
        if self._padded[0] != sample:
            image_13SS = F.pad(self.image_B3SS[sample : sample + 1], (3, 3, 3, 3))
            self._padded = sample, image_13SS.contiguous(memory_format=torch.channels_last)
        under = self._padded[1][:, :, 2 * rows.start : 2 * rows.stop + 5]
        y_1ChW = F.conv2d(under, self.conv.weight.detach(), stride=2)
        return y_1ChW.permute(0, 2, 3, 1).contiguous(), under

    def _parts(self) -> Iterator[tuple[int, slice]]:
        for sample in range(self.batch):
            for rows in self.strips:
                yield sample, rows

    def _normaliser(self) -> Normaliser:
        count = self.batch * self.height * self.width
        return Normaliser(self.norm, self.mean_C, self.variance_C, count)

    def forward(self) -> None:
        """Two passes over the convolution: BatchNorm's statistics, then the output."""
        means, variances = [], []
        for sample, rows in self._parts():
            y_PC = self._convolved(sample, rows)[0].flatten(0, 2)
            means.append(y_PC.mean(0))
            variances.append(y_PC.sub_(means[-1]).square_().mean(0))
        mean_PC = torch.stack(means)
        self.mean_C = mean_PC.mean(0)
        self.variance_C = (torch.stack(variances) + (mean_PC - self.mean_C).square()).mean(0)
        normaliser = self._normaliser()
        update_running(self.norm, self.mean_C, self.variance_C, normaliser.count)
        for sample in range(self.batch):
            self._put(sample, normaliser)
        self.output.source.finish()

    def _put(self, sample: int, normaliser: Normaliser) -> None:
        """The output of one sample."""
        workspace, place = self.around.workspace, slice(sample, sample + 1)
        r_1HWC = workspace.take("y 0", 1, *self.output.source.shape[1:])
        indices = []
        for rows in self.strips:
            y_1hWC, _ = self._convolved(sample, rows)
            torch.addcmul(normaliser.shift_C, y_1hWC, normaliser.alpha_C, out=y_1hWC).relu_()
            if not self.output.pool:
                r_1HWC[:, rows] = y_1hWC
                continue
            best, index = pool_values(y_1hWC, workspace)
            r_1HWC[:, rows.start // 2 : rows.stop // 2] = best
            indices.append(index)
        if self.output.pool:
            self.output.put_pooled(place, r_1HWC, torch.cat(indices, 1))
        else:
            self.output.put(place, r_1HWC)

    def backward(self) -> None:
        """Two passes again: the sums of BatchNorm's backward pass, then the weight's gradient."""
        normaliser = self._normaliser()
        kept: list[Tensor] = []  # the gradients of the ReLU's input, at the maxima
        for sample in range(self.batch):
            gradient_1hwC = self.output.gradient(slice(sample, sample + 1)).clone()
            kept.append(gradient_1hwC)
            for rows in self.strips:
                y_1hWC, _ = self._convolved(sample, rows)
                dz = gradient_1hwC[:, self._half(rows)]
                if self.output.pool:
                    y_1hWC = gather(y_1hWC, self._index(sample, rows))
                r = torch.addcmul(normaliser.shift_C, y_1hWC, normaliser.alpha_C)
                dz.mul_(r > 0).mul_(normaliser.scale_C)
                normaliser.sum_C += dz.sum((0, 1, 2))
                normaliser.sum_x_C += y_1hWC.mul_(dz).sum((0, 1, 2))
        by_value_C, constant_C = normaliser.coefficients(self.around.collector)
        gradient_weight = torch.zeros_like(self.conv.weight)
        for sample, rows in self._parts():
            y_1hWC, under = self._convolved(sample, rows)
            torch.addcmul(constant_C, y_1hWC, by_value_C, out=y_1hWC)
            dz = kept[sample][:, self._half(rows)]
            if self.output.pool:
                place = self.around.workspace.take("y 0", *y_1hWC.shape)
                dz = unpool(dz, self._index(sample, rows), place)
            y_1hWC += dz
            gradient_weight += torch.ops.aten.convolution_backward(
                y_1hWC.permute(0, 3, 1, 2), under, self.conv.weight.detach(), None,
                [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
            )[1]  # fmt: skip
        self.output.release()
        self.around.collector.add(self.conv.weight, gradient_weight)

    def _half(self, rows: slice) -> slice:
        """The output's rows over `rows` of the convolution."""
        return slice(rows.start // 2, rows.stop // 2) if self.output.pool else rows

    def _index(self, sample: int, rows: slice) -> Tensor:
        return self.output.pooled_from(slice(sample, sample + 1), self._half(rows))
