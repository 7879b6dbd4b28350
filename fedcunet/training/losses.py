"""Losses on heatmaps. B batch, K landmarks, S heatmap side."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
        ((predicted_BKSS - target_BKSS).square() * weight_BK11).sum() / count
        for predicted_BKSS in heatmaps_BKSS
    ]
    return torch.stack(losses).sum()
