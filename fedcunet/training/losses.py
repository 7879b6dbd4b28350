"""Targets and losses of the two supervisions. B batch, K landmarks, S heatmap side.

Regression is the mean squared error to Gaussians. Detection tells pixel by pixel whether it lies
within a disc around the landmark (Bulat and Tzimiropoulos, "Human pose estimation via
Convolutional Part Heatmap Regression", ECCV 2016, arXiv 1609.01743).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.data.heatmaps import gaussian_heatmaps
from fedcunet.models import Supervision

# A disc's radius over the Gaussians' sigma: 2 heatmap pixels, 8 crop pixels, at the default sigma
# of 1. Bulat and Tzimiropoulos take 10 crop pixels, for a body of about 200. A disc of 2.5 heatmap
# pixels is flat over the whole window of `decode_heatmaps`: of ideal probabilities, for a landmark
# that is known to 0.3 heatmap pixel, the mean decoding error is 0.20 with 2.5, and 0.06 with 2.
DISC_RADIUS_IN_SIGMAS = 2.0


def supervisions_of(model: nn.Module) -> tuple[Supervision, ...]:
    """The supervision of each heatmap that `model` puts out."""
    return model.supervisions  # type: ignore[return-value]


def disc_heatmaps(
    points_BK2: Tensor, labelled_BK: Tensor, *, side: int, stride: int, radius: float
) -> Tensor:
    """1 in the pixels whose centre is at most `radius` from the point, else 0, (B, K, side, side).

    Args:
        points_BK2: crop pixels, 0-based.
        labelled_BK: bool; the map of an unlabelled point is zero, and so is that of a point outside
            the area of the map, as in `gaussian_heatmaps`.
        side: rows and columns of a map.
        stride: crop pixels per heatmap pixel.
        radius: in heatmap pixels; from 0.71 on every disc has a pixel.
    """
    # exp(-d² / 2) >= exp(-r² / 2) is d <= r, and the two have the same rule of what is outside.
    # A part in a million leaves a pixel that lies on the circle within it.
    near_BKSS = gaussian_heatmaps(points_BK2, labelled_BK, side=side, stride=stride, sigma=radius)
    threshold = torch.exp(torch.tensor(-0.5)) * (1 - 1e-6)
    return (near_BKSS >= threshold.to(near_BKSS.device)).to(near_BKSS.dtype)


def make_targets(
    supervisions: Sequence[Supervision],
    points_BK2: Tensor,
    labelled_BK: Tensor,
    *,
    side: int,
    stride: int,
    sigma: float,
) -> dict[Supervision, Tensor]:
    """The target (B, K, side, side) of each supervision that occurs in `supervisions`.

    Args:
        supervisions: of the heatmaps of a network.
        points_BK2: crop pixels, 0-based.
        labelled_BK: bool.
        side: rows and columns of a map.
        stride: crop pixels per heatmap pixel.
        sigma: of the Gaussians in heatmap pixels; the discs' radius is 2 sigma.
    """
    targets: dict[Supervision, Tensor] = {}
    if "regression" in supervisions:
        targets["regression"] = gaussian_heatmaps(
            points_BK2, labelled_BK, side=side, stride=stride, sigma=sigma
        )
    if "detection" in supervisions:
        targets["detection"] = disc_heatmaps(
            points_BK2, labelled_BK, side=side, stride=stride, radius=DISC_RADIUS_IN_SIGMAS * sigma
        )
    return targets


def regression_loss(
    heatmaps_BKSS: Sequence[Tensor], target_BKSS: Tensor, labelled_BK: Tensor
) -> Tensor:
    """Mean squared error to Gaussian heatmaps, summed over the supervised U-Nets.

    Args:
        heatmaps_BKSS: output of each supervised U-Net.
        target_BKSS: Gaussians with peak 1.
        labelled_BK: bool; maps of landmarks without annotation do not count.

    Returns:
        A scalar; 0 if no landmark of the batch is labelled.
    """
    weight_BK11 = labelled_BK[:, :, None, None].to(target_BKSS.dtype)
    count = (weight_BK11.sum() * target_BKSS.shape[-2] * target_BKSS.shape[-1]).clamp(min=1)
    losses = [
        _SquaredError.apply(predicted_BKSS, target_BKSS, weight_BK11) / count  # type: ignore[no-untyped-call]
        for predicted_BKSS in heatmaps_BKSS
    ]
    return torch.stack(losses).sum()


class _SquaredError(torch.autograd.Function):
    """Sum of weighted squared errors; keeps the heatmaps, and makes the errors again for gradients.

    Autograd would keep the errors of all U-Nets beside their heatmaps. Values and gradients are the
    same to the bit.
    """

    @staticmethod
    def forward(
        ctx: Any, predicted_BKSS: Tensor, target_BKSS: Tensor, weight_BK11: Tensor
    ) -> Tensor:
        ctx.save_for_backward(predicted_BKSS, target_BKSS, weight_BK11)
        return (predicted_BKSS - target_BKSS).square_().mul_(weight_BK11).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        predicted_BKSS, target_BKSS, weight_BK11 = ctx.saved_tensors
        return (predicted_BKSS - target_BKSS).mul_(2).mul_(gradient * weight_BK11), None, None


def detection_loss(
    logits_BKSS: Sequence[Tensor], target_BKSS: Tensor, labelled_BK: Tensor
) -> Tensor:
    """Mean sigmoid cross entropy of the pixels, summed over the supervised U-Nets.

    Args:
        logits_BKSS: output of each supervised U-Net.
        target_BKSS: discs of ones.
        labelled_BK: bool; maps of landmarks without annotation do not count.

    Returns:
        A scalar; 0 if no landmark of the batch is labelled.
    """
    weight_BKSS = labelled_BK[:, :, None, None].to(target_BKSS.dtype).expand_as(target_BKSS)
    count = weight_BKSS.sum().clamp(min=1)
    losses = [
        F.binary_cross_entropy_with_logits(
            predicted_BKSS, target_BKSS, weight_BKSS, reduction="sum"
        )
        / count
        for predicted_BKSS in logits_BKSS
    ]
    return torch.stack(losses).sum()


LOSSES = {"regression": regression_loss, "detection": detection_loss}


def supervised_loss(
    heatmaps_BKSS: Sequence[Tensor],
    supervisions: Sequence[Supervision],
    targets: Mapping[Supervision, Tensor],
    labelled_BK: Tensor,
) -> Tensor:
    """The sum of every heatmap's loss, without weights.

    The gradients of the two losses on a pixel, 2 (h - t) and p - t over the same count, are of
    one size although their values are not.

    Args:
        heatmaps_BKSS: the network's outputs.
        supervisions: of each output.
        targets: of `make_targets`.
        labelled_BK: bool.
    """
    total: Tensor | None = None
    for supervision, target_BKSS in targets.items():
        own = [
            heatmap_BKSS
            for heatmap_BKSS, kind in zip(heatmaps_BKSS, supervisions, strict=True)
            if kind == supervision
        ]
        loss = LOSSES[supervision](own, target_BKSS, labelled_BK)
        total = loss if total is None else total + loss
    assert total is not None, "a network without heads"
    return total
