"""Affine maps of points, a 2x3 matrix a row. B maps, K points."""

import numpy as np


def apply_affine(affine_B23: np.ndarray, points_BK2: np.ndarray) -> np.ndarray:
    """Points (B, K, 2) mapped by their row's affine matrix."""
    mapped_BK2: np.ndarray = points_BK2 @ affine_B23[:, :, :2].transpose(0, 2, 1)
    mapped_BK2 += affine_B23[:, None, :, 2]
    return mapped_BK2


def invert_affine(affine_B23: np.ndarray) -> np.ndarray:
    """The inverse maps, (B, 2, 3)."""
    inverse_B22 = np.linalg.inv(affine_B23[:, :, :2])
    return np.concatenate([inverse_B22, -inverse_B22 @ affine_B23[:, :, 2:]], axis=2)
