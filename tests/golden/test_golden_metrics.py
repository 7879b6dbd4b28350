"""Metrics against values worked out by hand and against reference implementations.

The shared golden files hold real annotations with outputs of the evaluation code of HRNet, mmpose,
pytorch-pose and the LSP toolkit; they are no part of this repository.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.metrics import (
    LSP_GROUPS,
    MPII_GROUPS,
    auc,
    failure_percent,
    head_size,
    nme_per_image,
    nme_percent,
    pck,
    pckh,
)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        pytest.skip(f"no golden file {path.name}")
    return json.loads(path.read_text())


def _published(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        pytest.skip(f"no golden file {path.name}")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_face_errors_equal_those_worked_out_by_hand() -> None:
    golden = _json(Path(__file__).with_name("face_nme_by_hand.json"))
    predicted, target = np.array(golden["predicted"]), np.array(golden["target"])
    eyes = {"left": golden["left"], "right": golden["right"]}
    errors = nme_per_image(predicted, target, **eyes)
    np.testing.assert_allclose(errors, golden["nme_per_image"], rtol=1e-12)
    assert nme_percent(predicted, target, **eyes) == pytest.approx(golden["nme_percent"])
    for threshold, expected in golden["failure_percent"].items():
        assert failure_percent(errors, threshold=float(threshold)) == pytest.approx(expected)
    for threshold, expected in golden["auc"].items():
        assert auc(errors, threshold=float(threshold)) == pytest.approx(expected)


def test_face_errors_equal_the_reference(golden_root: Path) -> None:
    golden = _json(golden_root / "face_nme.json")
    rows, outputs = golden["rows"], golden["outputs"]
    predicted = np.array([row["pred_1based"] for row in rows])
    target = np.array([row["gt_1based"] for row in rows])
    errors = nme_per_image(predicted, target)
    np.testing.assert_allclose(errors, outputs["per_image_nme_interocular"], rtol=1e-12)
    challenge = np.array([row["image"].startswith("ibug") for row in rows])
    for chosen, name in (
        (challenge >= 0, "full"),
        (~challenge, "common"),
        (challenge, "challenge"),
    ):
        expected = 100 * outputs[f"mean_{name}"]
        assert nme_percent(predicted[chosen], target[chosen]) == pytest.approx(expected, rel=1e-12)
    assert failure_percent(errors) == pytest.approx(100 * outputs["failure_rate_gt_0_08"])
    assert failure_percent(errors, threshold=0.10) == pytest.approx(
        100 * outputs["failure_rate_gt_0_10"]
    )
    assert auc(errors) == pytest.approx(outputs["auc_0_08_exact"], rel=1e-12)
    assert auc(errors, threshold=0.10) == pytest.approx(outputs["auc_0_10_exact"], rel=1e-12)


@pytest.mark.parametrize("block", ["seeded", "exact_threshold"])
def test_pckh_equals_the_reference_in_both_conventions(golden_root: Path, block: str) -> None:
    golden = _json(golden_root / "mpii_pckh.json")[block]
    rows, expected = golden["rows"], golden["outputs"]["hrnet"]
    rates = {
        threshold: pckh(
            np.array([row["pred_1based"] for row in rows]),
            np.array([row["gt_1based"] for row in rows]),
            np.array([row["jnt_missing"] for row in rows]) == 0,
            head_size(np.array([row["headbox_x1y1x2y2"] for row in rows])),
            threshold=threshold,
        )
        for threshold in (0.5, 0.1)
    }
    half = rates[0.5]
    # HRNet writes 0 for pelvis and thorax of the exact block: there its predictions are far off.
    np.testing.assert_allclose(half.per_joint, expected["per_joint"], rtol=1e-12)
    assert list(half.counts) == expected["count"]
    assert half.weighted == pytest.approx(expected["mean_weighted"], rel=1e-12)
    assert half.joint_mean == pytest.approx(expected["mean_unweighted14"], rel=1e-12)
    assert rates[0.1].weighted == pytest.approx(expected["mean_at_0_10"], rel=1e-12)
    for name, rate in half.groups(MPII_GROUPS).items():
        assert rate == pytest.approx(expected[name.capitalize()], rel=1e-12)


@pytest.mark.parametrize(
    "name",
    ["bearpaw_hg_s1_b1", "bearpaw_hg_s2_b1", "bearpaw_hg_s8_b1", "newell_eccv16", "tompson_cvpr15"],
)
def test_pckh_of_published_predictions_equals_the_reference(golden_root: Path, name: str) -> None:
    published = _json(golden_root / "published.json")
    arrays = _published(golden_root / "mpii_val_published.npz")
    rates = pckh(
        arrays[name],
        arrays["gt"],
        arrays["missing"] == 0,
        head_size(arrays["headboxes"].reshape(-1, 4)),
    )
    expected = published["mpii_val"][name]["hrnet"]
    assert list(rates.counts) == expected["count"]
    np.testing.assert_allclose(rates.per_joint, expected["per_joint"], rtol=1e-9)
    assert rates.weighted == pytest.approx(expected["mean_weighted"], rel=1e-9)
    assert rates.joint_mean == pytest.approx(expected["mean_unweighted14"], rel=1e-9)
    printed = published["mpii_published"].get(name)
    if printed:
        assert rates.joint_mean == pytest.approx(printed["Mean"], abs=0.005)
        for group, rate in rates.groups(MPII_GROUPS).items():
            assert rate == pytest.approx(printed[group.capitalize()], abs=0.0051)


def test_lsp_pck_equals_the_reference(golden_root: Path) -> None:
    golden = _json(golden_root / "lsp_pck.json")
    rows, expected = golden["rows"], golden["outputs"]["eval_pose"]
    rates = pck(np.array([row["pred"] for row in rows]), np.array([row["gt"] for row in rows]))
    np.testing.assert_allclose(rates.per_joint, expected["per_joint"], rtol=1e-12)
    assert rates.weighted == pytest.approx(expected["mean"], rel=1e-12)
    for name, rate in rates.groups(LSP_GROUPS).items():
        assert rate == pytest.approx(expected["groups"][name.capitalize()], rel=1e-12)


@pytest.mark.parametrize("name", ["yang16_pc", "yang16_oc", "cpm_lsp", "cpm_mpii_lsp"])
def test_lsp_pck_of_published_predictions_equals_the_reference(
    golden_root: Path, name: str
) -> None:
    expected = _json(golden_root / "published.json")["lsp_test"][name]
    arrays = _published(golden_root / "lsp_test_published.npz")
    truth = arrays["gt_oc" if name.endswith("_oc") else "gt_pc"]
    rates = pck(arrays[name].transpose(2, 1, 0), truth.transpose(2, 1, 0))
    np.testing.assert_allclose(rates.per_joint, expected["per_joint"], rtol=1e-12)
    assert rates.weighted == pytest.approx(expected["mean"], rel=1e-12)
