"""Errors of predicted landmarks: NME for faces, PCKh and PCK for people, and the balance index.

Letters in array names: B images or people, K landmarks, 2 = (x, y). Everything is numpy float64.
Published evaluation codes disagree in details; each function says which reading it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Rows of the usual tables: the joints whose rates are averaged (plain mean of left and right).
MPII_GROUPS: dict[str, tuple[int, ...]] = {
    "head": (9,),
    "shoulder": (12, 13),
    "elbow": (11, 14),
    "wrist": (10, 15),
    "hip": (2, 3),
    "knee": (1, 4),
    "ankle": (0, 5),
}
LSP_GROUPS: dict[str, tuple[int, ...]] = {
    "head": (12, 13),
    "shoulder": (8, 9),
    "elbow": (7, 10),
    "wrist": (6, 11),
    "hip": (2, 3),
    "knee": (1, 4),
    "ankle": (0, 5),
}
# Pelvis and thorax are easy and take no part in PCKh means.
MPII_LEFT_OUT = (6, 7)


@dataclass(frozen=True, kw_only=True, slots=True)
class JointRates:
    """Shares of correct joints, in percent.

    Attributes:
        weighted: pooled over joint instances: every labelled joint counts once.
        joint_mean: plain mean of the joints' own rates; a joint never labelled is left out.
        per_joint: rate of each of the K joints; NaN where none is labelled.
        counts: labelled instances of each joint.
    """

    weighted: float
    joint_mean: float
    per_joint: tuple[float, ...]
    counts: tuple[int, ...]

    def groups(self, joints_by_name: dict[str, tuple[int, ...]]) -> dict[str, float]:
        """Rows of a table, such as `MPII_GROUPS`: the mean rate of each group's joints."""
        return {
            name: float(np.mean([self.per_joint[joint] for joint in joints]))
            for name, joints in joints_by_name.items()
        }


def nme_per_image(
    predicted_BK2: np.ndarray, target_BK2: np.ndarray, *, left: int = 36, right: int = 45
) -> np.ndarray:
    """Mean point error of each image over its inter-ocular distance: float64 (B,), fractions.

    The distance is between the outer eye corners, landmarks 36 and 45 of the 68 (as in HRNet and
    mmpose). An image whose eye corners coincide gives infinity, or NaN without any error.
    """
    predicted_BK2, target_BK2 = _same_shape(predicted_BK2, target_BK2)
    error_BK = np.linalg.norm(predicted_BK2 - target_BK2, axis=2)
    ocular_B = np.linalg.norm(target_BK2[:, left] - target_BK2[:, right], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(error_BK.mean(axis=1) / ocular_B)


def nme_percent(
    predicted_BK2: np.ndarray, target_BK2: np.ndarray, *, left: int = 36, right: int = 45
) -> float:
    """Mean of `nme_per_image` over the images, in percent; NaN without images."""
    nme_B = nme_per_image(predicted_BK2, target_BK2, left=left, right=right)
    return float(nme_B.mean() * 100) if len(nme_B) else float("nan")


def auc(nme_B: np.ndarray, *, threshold: float = 0.08) -> float:
    """Area under the cumulative error curve from 0 to `threshold`, over `threshold`: 0 to 1.

    Computed exactly: an image of error e adds max(0, 1 - e / threshold). Codes that sample the
    curve differ in the fourth digit.
    """
    share_B = np.clip(1.0 - _usable(nme_B) / threshold, 0.0, 1.0)
    return float(share_B.mean()) if len(share_B) else float("nan")


def failure_percent(nme_B: np.ndarray, *, threshold: float = 0.08) -> float:
    """Share of images with an error above `threshold`, in percent; NaN errors are failures."""
    nme_B = _usable(nme_B)
    return float((nme_B > threshold).mean() * 100) if len(nme_B) else float("nan")


def pckh(
    predicted_BK2: np.ndarray,
    target_BK2: np.ndarray,
    labelled_BK: np.ndarray,
    head_size_B: np.ndarray,
    *,
    threshold: float = 0.5,
    left_out: Sequence[int] = MPII_LEFT_OUT,
) -> JointRates:
    """PCKh on the 16 joints of MPII: correct if the error is <= threshold * head size.

    Both conventions of the means come back: `weighted` is the MPII toolkit's and HRNet's,
    `joint_mean` that of the table in pytorch-pose and of the paper's released code.

    Args:
        predicted_BK2: predictions in the pixels of the targets.
        target_BK2: ground truth; never used where unlabelled.
        labelled_BK: bool; occluded but annotated joints are labelled.
        head_size_B: 0.6 * diagonal of the head rectangle (`head_size`), pixels.
        threshold: in head sizes.
        left_out: joints without part in the two means.
    """
    predicted_BK2, target_BK2 = _same_shape(predicted_BK2, target_BK2)
    error_BK = np.linalg.norm(predicted_BK2 - target_BK2, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Divided first, as in the toolkit: with "<=" the order decides on exact hits.
        share_BK = error_BK / np.asarray(head_size_B, dtype=np.float64)[:, None]
    return _rates(share_BK <= threshold, np.asarray(labelled_BK, dtype=bool), left_out)


def head_size(rectangle_B4: np.ndarray) -> np.ndarray:
    """0.6 * diagonal of head rectangles (x1, y1, x2, y2), float64 (B,)."""
    rectangle_B4 = np.asarray(rectangle_B4, dtype=np.float64)
    return np.asarray(0.6 * np.linalg.norm(rectangle_B4[:, 2:] - rectangle_B4[:, :2], axis=1))


def pck(
    predicted_BK2: np.ndarray,
    target_BK2: np.ndarray,
    labelled_BK: np.ndarray | None = None,
    *,
    threshold: float = 0.2,
    left_shoulder: int = 9,
    right_hip: int = 2,
) -> JointRates:
    """PCK on the 14 joints of LSP: correct if the error is <= threshold * torso.

    The torso runs from the left shoulder to the right hip. LSP counts all 14 joints whatever their
    flag (leave `labelled_BK` out); LSPET has joints without annotation, and people whose torso is
    not annotated cannot be scored: they take no part.

    Args:
        predicted_BK2: predictions in the pixels of the targets.
        target_BK2: ground truth.
        labelled_BK: bool; None = all.
        threshold: in torso lengths.
        left_shoulder: joint at one end of the torso.
        right_hip: joint at the other end.
    """
    predicted_BK2, target_BK2 = _same_shape(predicted_BK2, target_BK2)
    if labelled_BK is None:
        labelled_BK = np.ones(target_BK2.shape[:2], dtype=bool)
    torso_B = np.linalg.norm(target_BK2[:, left_shoulder] - target_BK2[:, right_hip], axis=1)
    scored_B = labelled_BK[:, left_shoulder] & labelled_BK[:, right_hip] & (torso_B > 0)
    error_BK = np.linalg.norm(predicted_BK2 - target_BK2, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share_BK = error_BK / torso_B[:, None]
    return _rates(share_BK <= threshold, labelled_BK & scored_B[:, None], ())


def balance_index(nme_percent: float, memory_ratio: float, size_ratio: float) -> float:
    """NME² * memory * size, lower is better (Tang et al., ECCV 2018, Eq. 7).

    Args:
        nme_percent: error in percent.
        memory_ratio: training memory over that of float32 training.
        size_ratio: model size over that of float32.
    """
    return nme_percent**2 * memory_ratio * size_ratio


def _rates(correct_BK: np.ndarray, labelled_BK: np.ndarray, left_out: Sequence[int]) -> JointRates:
    count_K = labelled_BK.sum(axis=0)
    hit_K = (correct_BK & labelled_BK).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_K = 100.0 * hit_K / count_K
    counted_K = np.ones(len(count_K), dtype=bool)
    counted_K[list(left_out)] = False
    counted_K &= count_K > 0
    some = bool(counted_K.any())
    return JointRates(
        weighted=float(100.0 * hit_K[counted_K].sum() / count_K[counted_K].sum())
        if some
        else float("nan"),
        joint_mean=float(rate_K[counted_K].mean()) if some else float("nan"),
        per_joint=tuple(float(rate) for rate in rate_K),
        counts=tuple(int(count) for count in count_K),
    )


def _usable(nme_B: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(nme_B, dtype=np.float64), nan=np.inf, posinf=np.inf)


def _same_shape(predicted_BK2: np.ndarray, target_BK2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted_BK2 = np.asarray(predicted_BK2, dtype=np.float64)
    target_BK2 = np.asarray(target_BK2, dtype=np.float64)
    if predicted_BK2.shape != target_BK2.shape or target_BK2.ndim != 3:
        raise ValueError(
            f"landmarks: expected two arrays of one shape (B, K, 2), "
            f"found {predicted_BK2.shape} and {target_BK2.shape}"
        )
    return predicted_BK2, target_BK2
