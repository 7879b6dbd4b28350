"""Metrics on cases worked out by hand; reference implementations are in tests/golden."""

import numpy as np
import pytest

from fedcunet.metrics import (
    LSP_GROUPS,
    auc,
    balance_index,
    failure_percent,
    head_size,
    nme_per_image,
    nme_percent,
    pck,
    pckh,
)


def _faces(errors: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Targets with an inter-ocular distance of 10, every point off by the given pixels."""
    target = np.zeros((len(errors), 68, 2))
    target[:, 45] = (6, 8)
    predicted = target + np.array(errors)[:, None, None] * np.array([0.6, -0.8])
    return predicted, target


def test_nme_is_the_mean_point_error_over_the_outer_eye_corners() -> None:
    predicted, target = _faces([0.5, 1.5])
    np.testing.assert_allclose(nme_per_image(predicted, target), [0.05, 0.15])
    assert nme_percent(predicted, target) == pytest.approx(10.0)
    predicted[0, 3] = target[0, 3]
    assert nme_per_image(predicted, target)[0] == pytest.approx(0.05 * 67 / 68)


def test_nme_takes_other_eye_corners() -> None:
    target = np.array([[[0.0, 0.0], [4.0, 3.0]]])
    assert nme_percent(target + 1, target, left=0, right=1) == pytest.approx(100 * np.sqrt(2) / 5)


def test_metrics_of_nothing_are_nan() -> None:
    assert np.isnan(nme_percent(np.zeros((0, 68, 2)), np.zeros((0, 68, 2))))
    assert np.isnan(auc(np.zeros(0)))
    assert np.isnan(failure_percent(np.zeros(0)))
    assert np.isnan(pck(np.zeros((0, 14, 2)), np.zeros((0, 14, 2))).weighted)


def test_failures_lie_above_the_threshold_and_not_on_it() -> None:
    errors = np.array([0.02, 0.08, 0.09, 0.2, np.nan])
    assert failure_percent(errors) == pytest.approx(60)
    assert failure_percent(errors, threshold=0.1) == pytest.approx(40)


def test_auc_is_one_without_error_and_zero_at_the_threshold() -> None:
    assert auc(np.array([0.0])) == 1.0
    assert auc(np.array([0.08, 3.0, np.inf, np.nan])) == 0.0
    assert auc(np.array([0.02, 0.06])) == pytest.approx(0.5)
    assert auc(np.array([0.05]), threshold=0.1) == pytest.approx(0.5)


def test_pckh_counts_an_error_on_the_threshold_as_correct() -> None:
    size = head_size(np.array([[0, 0, 30, 40]]))
    assert size == pytest.approx([30])
    target = np.zeros((1, 16, 2))
    predicted = target.copy()
    predicted[0, 0] = (9, 12)
    predicted[0, 1] = (9, 12.01)
    rates = pckh(predicted, target, np.ones((1, 16), dtype=bool), size)
    assert rates.per_joint[:3] == (100, 0, 100)
    assert rates.weighted == pytest.approx(100 * 13 / 14)


def test_pckh_means_differ_by_how_joints_are_weighted() -> None:
    target = np.zeros((4, 16, 2))
    predicted = target.copy()
    predicted[:, 6:8] = 1e9  # pelvis and thorax take no part
    predicted[0, 9] = 1e9
    labelled = np.ones((4, 16), dtype=bool)
    labelled[1:, 9] = False  # joint 9: one instance, wrong
    labelled[:, 0] = False  # never labelled
    rates = pckh(predicted, target, labelled, np.full(4, 30.0))
    assert rates.weighted == pytest.approx(100 * 48 / 49)
    assert rates.joint_mean == pytest.approx(100 * 12 / 13)
    assert rates.counts[:2] == (0, 4)
    assert np.isnan(rates.per_joint[0])


def test_unlabelled_targets_are_never_looked_at() -> None:
    target = np.zeros((1, 16, 2))
    labelled = np.ones((1, 16), dtype=bool)
    target[0, 3], labelled[0, 3] = np.nan, False
    rates = pckh(np.zeros((1, 16, 2)), target, labelled, np.array([30.0]))
    assert rates.weighted == rates.joint_mean == 100.0


def test_pck_measures_in_torsos_from_left_shoulder_to_right_hip() -> None:
    target = np.zeros((1, 14, 2))
    target[0, 9] = (30, 40)
    predicted = target.copy()
    predicted[0, 12] += (6, 8)  # a fifth of the torso: correct
    predicted[0, 13] += (6, 8.1)
    rates = pck(predicted, target)
    assert rates.weighted == pytest.approx(100 * 13 / 14)
    assert rates.groups(LSP_GROUPS)["head"] == 50.0
    assert rates.groups(LSP_GROUPS)["ankle"] == 100.0


def test_people_without_an_annotated_torso_are_not_scored() -> None:
    target = np.zeros((2, 14, 2))
    target[:, 9] = (30, 40)
    predicted = target.copy()
    predicted[1] += 1000
    labelled = np.ones((2, 14), dtype=bool)
    labelled[1, 2] = False
    rates = pck(predicted, target, labelled)
    assert rates.weighted == 100.0
    assert set(rates.counts) == {1}


@pytest.mark.parametrize(
    ("nme", "memory", "size", "printed"),
    [
        (3.38, 1.0, 1.0, 11.4),
        (4.30, 0.25, 0.03, 0.14),
        (3.75, 1.0, 0.03, 0.42),
        (4.13, 0.25, 0.06, 0.26),
    ],
)
def test_balance_index_gives_the_figures_of_table_5(
    nme: float, memory: float, size: float, printed: float
) -> None:
    assert balance_index(nme, memory, size) == pytest.approx(printed, abs=0.006 * max(1, printed))


def test_arrays_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \(B, K, 2\)"):
        nme_per_image(np.zeros((1, 68, 2)), np.zeros((2, 68, 2)))
