"""One layer of a stage: normalisation, activation, input quantiser, convolution, and back.

Shapes: n samples and h rows of a chunk, I and O inputs and outputs of a convolution, H W the sides
of a map, P pixels. Channels come last.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.quant.collector import Collector
from fedcunet.quant.functions import quantise_weight
from fedcunet.quant.kernels import FULL, Activation, InputGrid
from fedcunet.quant.layers import QuantConv2d, QuantSpec
from fedcunet.quant.normalise import Normaliser
from fedcunet.quant.outputs import Output
from fedcunet.quant.pieces import Input
from fedcunet.quant.workspace import Workspace

_MASK = torch.ops.aten.threshold_backward.grad_input


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
        activation: Activation = "none",
        added: Input | None = None,
        updates_running: bool = True,
    ) -> None:
        self.conv, self.output, self.norm = conv, output, norm
        self.activation = activation if norm is None else "relu"
        self.added, self.updates_running = added, updates_running
        self.pointwise = conv.kernel_size == (1, 1)
        self.spec = conv.spec if isinstance(conv, QuantConv2d) else QuantSpec()

    def weight(self) -> Tensor:
        """The quantised weight, dense: (O, I, k, k)."""
        weight = self.conv.weight.detach()
        if weight.dtype == torch.bfloat16:
            weight = weight.float()
        if self.spec.weight_bits != FULL:
            spec = self.spec
            weight = quantise_weight(
                weight, spec.weight_bits, scaled=spec.alpha, share=spec.weight_share
            )
        return weight

    def input_grid(self) -> InputGrid | None:
        """Of the input quantiser, Eq. 6 (as in `QuantiseInput`); None where there is none."""
        if self.spec.input_bits == FULL or self.spec.source_bits != FULL:
            return None
        most = 1.0 if self.spec.input_quantizer == "paper" else self.spec.input_range
        return InputGrid(2.0 ** (1 - self.spec.input_bits) * most, most)


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
        self,
        padded_nhWI: Tensor,
        read_nhWI: Tensor,
        x_nhWI: Tensor,
        dy_nhWO: Tensor,
        middle_nI: Tensor,
        step_nI: Tensor,
        above: int,
    ) -> Tensor:
        """The gradient of what the sources' values give here, but for BatchNorm's late terms.

        Args:
            padded_nhWI: what was activated, with rows of zeros beyond the map's edges.
            read_nhWI: what the convolution read of it.
            x_nhWI: the sources' codes.
            dy_nhWO: the gradient of the convolution's output.
            middle_nI: what a code of zero stands for.
            step_nI: of the codes.
            above: how many of the rows of zeros are above.
        """
        branch, grid = self.branch, self.branch.input_grid()
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
            if grid is not None:
                dz_nhWI.mul_(r_nhWI.abs() < grid.range)
            if branch.activation == "sigmoid":
                dz_nhWI.mul_(r_nhWI).mul_(1 - r_nhWI)
            return dz_nhWI
        # Zero where the ReLU was, and where the input quantiser clipped.
        _MASK(dz_nhWI, r_nhWI, 0, grad_input=dz_nhWI)
        if grid is not None:
            dz_nhWI.mul_(r_nhWI < grid.range)
        assert self.normaliser is not None
        sum_nI = dz_nhWI.sum((1, 2))
        # r is not needed any more.
        by_code_nI = torch.mul(dz_nhWI, x_nhWI, out=r_nhWI).sum((1, 2))
        self.normaliser.sum_C += sum_nI.sum(0)
        self.normaliser.sum_x_C += (by_code_nI * step_nI).addcmul_(sum_nI, middle_nI).sum(0)
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


def convolve(x_nhWI: Tensor, weight: Tensor, place_nhWO: Tensor) -> None:
    if weight.shape[-1] == 1:
        flat_PI = x_nhWI.flatten(0, 2)
        torch.mm(flat_PI, weight.flatten(1).t(), out=place_nhWO.view(len(flat_PI), -1))
    else:
        y_nOhW = F.conv2d(x_nhWI.permute(0, 3, 1, 2), weight, padding=(0, 1))
        place_nhWO.copy_(y_nOhW.permute(0, 2, 3, 1))
