"""BatchNorm over a whole batch whose values come by in pieces. C channels."""

import torch
from torch import Tensor, nn

from fedcunet.errors import UserError
from fedcunet.quant.collector import Collector

SMALLEST_ALPHA = 1e-12


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, float]:
    """The running mean and variance, and their momentum."""
    if norm.running_mean is None or norm.running_var is None or norm.momentum is None:
        raise UserError("packed storage: expected BatchNorm with running statistics and momentum")
    return norm.running_mean, norm.running_var, norm.momentum


def update_running(norm: nn.BatchNorm2d, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
    """BatchNorm's running statistics after a batch with `count` values a channel.

    In evaluation mode they stay.
    """
    if not norm.training:
        return
    if count == 1:
        raise UserError("training: BatchNorm needs more than one value a channel: a larger batch")
    running_mean_C, running_variance_C, momentum = _running(norm)
    running_mean_C.lerp_(mean_C, momentum)
    running_variance_C.lerp_(variance_C * (count / (count - 1)), momentum)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


class Normaliser:
    """BatchNorm over a batch as alpha * x + shift, and its backward pass.

    One in evaluation mode has its running statistics in place of the batch's, of which the batch's
    values know nothing: by_value and constant are zero.

    The gradient of x is alpha * dz + by_value * x + constant. What is summed up is alpha * dz,
    for it comes out of the convolution's backward pass at no cost; where alpha is zero or nearly
    so, `scale_C` has a tiny number in its place, by which the sums can be divided.
    """

    def __init__(
        self, norm: nn.BatchNorm2d, mean_C: Tensor, variance_C: Tensor, count: int
    ) -> None:
        if not norm.training:
            mean_C, variance_C, _ = _running(norm)
        self.norm, self.mean_C, self.count = norm, mean_C, count
        self.inverse_C = torch.rsqrt(variance_C + norm.eps)
        self.alpha_C = norm.weight.detach() * self.inverse_C
        self.shift_C = norm.bias.detach() - mean_C * self.alpha_C
        tiny = torch.full_like(mean_C, SMALLEST_ALPHA)
        self.scale_C = torch.where(self.alpha_C.abs() < SMALLEST_ALPHA, tiny, self.alpha_C)
        self.sum_C = torch.zeros_like(mean_C)  # of scale * dz
        self.sum_x_C = torch.zeros_like(mean_C)  # of scale * dz * x

    def coefficients(self, collector: Collector) -> tuple[Tensor, Tensor]:
        """by_value_C and constant_C, after the sums; hands over the parameters' gradients."""
        gradient_beta_C = self.sum_C / self.scale_C
        centred_C = self.sum_x_C - self.mean_C * self.sum_C
        gradient_gamma_C = self.inverse_C * centred_C / self.scale_C
        collector.add(self.norm.weight, gradient_gamma_C)
        collector.add(self.norm.bias, gradient_beta_C)
        if not self.norm.training:
            return torch.zeros_like(self.alpha_C), torch.zeros_like(self.alpha_C)
        by_value_C = -self.alpha_C * self.inverse_C * gradient_gamma_C / self.count
        constant_C = -self.alpha_C * gradient_beta_C / self.count - by_value_C * self.mean_C
        return by_value_C, constant_C
