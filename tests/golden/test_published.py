"""Published predictions give the figures that their authors printed, to the digit.

The predictions are no part of this repository. PCKh of pytorch-pose's hourglasses on the 2958 MPII
validation people: its README prints the mean over joints, HRNet's code the mean over instances of
joints. PCK@0.2 on LSP's 1000 test people, person-centric: convolutional pose machines without and
with MPII's training people, and Yang et al. (CVPR 2016).
"""

from pathlib import Path

import numpy as np
import pytest

from fedcunet.metrics import LSP_GROUPS, MPII_GROUPS, head_size, pck, pckh

_ROWS = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        pytest.skip(f"no golden file {path.name}")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("name", "joint_mean", "weighted", "rows"),
    [
        (
            "bearpaw_hg_s2_b1",
            86.76,
            None,
            (95.80, 94.57, 88.12, 83.31, 86.24, 80.88, 77.44),
        ),
        (
            "bearpaw_hg_s8_b1",
            88.64,
            89.09,
            (96.79, 95.19, 90.08, 85.32, 87.48, 84.26, 80.73),
        ),
    ],
)
def test_pckh_of_published_hourglasses_is_the_printed_one(
    golden_root: Path, name: str, joint_mean: float, weighted: float | None, rows: tuple[float, ...]
) -> None:
    arrays = _arrays(golden_root / "mpii_val_published.npz")
    heads_B = head_size(arrays["headboxes"].reshape(-1, 4))
    rates = pckh(arrays[name], arrays["gt"], arrays["missing"] == 0, heads_B)
    assert round(rates.joint_mean, 2) == joint_mean
    assert weighted is None or round(rates.weighted, 2) == weighted
    found = rates.groups(MPII_GROUPS)
    assert [found[row] for row in _ROWS] == pytest.approx(rows, abs=0.00501)


@pytest.mark.parametrize(
    ("name", "mean", "rows"),
    [
        ("cpm_lsp", 84.3, None),
        ("cpm_mpii_lsp", 90.5, None),
        ("yang16_pc", 73.6, (90.6, 78.1, 73.9, 68.8, 74.8, 70.0, 59.0)),
    ],
)
def test_pck_of_published_poses_is_the_printed_one(
    golden_root: Path, name: str, mean: float, rows: tuple[float, ...] | None
) -> None:
    arrays = _arrays(golden_root / "lsp_test_published.npz")
    rates = pck(arrays[name].transpose(2, 1, 0), arrays["gt_pc"].transpose(2, 1, 0))
    assert round(rates.weighted, 1) == mean
    found = rates.groups(LSP_GROUPS)
    if rows is not None:
        assert [found[row] for row in _ROWS] == pytest.approx(rows, abs=0.0501)


def test_head_sizes_of_people_without_rectangle_can_be_told_from_neck_and_head(
    golden_root: Path,
) -> None:
    arrays = _arrays(golden_root / "mpii_val_published.npz")
    heads_B = head_size(arrays["headboxes"].reshape(-1, 4))
    labelled_B = (arrays["missing"][:, [8, 9]] == 0).all(axis=1)
    told_B = 0.75 * np.linalg.norm(arrays["gt"][:, 9] - arrays["gt"][:, 8], axis=1)
    error_B = np.abs(told_B / heads_B - 1)[labelled_B]
    assert np.mean(error_B < 0.002) > 0.9
    assert np.mean(error_B < 0.03) > 0.99
