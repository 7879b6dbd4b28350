"""The MPII data set: one person from every form, head sizes, splits, scores."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fedcunet.data import MPII16, load
from fedcunet.data.crops import Crops, crop_square
from fedcunet.data.mpii_files import read_json, read_release
from fedcunet.errors import UserError
from fedcunet.training.evaluation import evaluate_mean_shape, score, score_crops
from tests.mpii_files import (
    EMPTY,
    cpm_record,
    hrnet_record,
    image,
    joints,
    person,
    points,
    write_images,
    write_json,
    write_mat,
)

_MAT = "mpii_human_pose_v1_u12_1.mat"
_PLACES = np.array(list(joints().values())) - 1.0


@pytest.mark.parametrize("form", ["mat", "hrnet", "cpm"])
def test_every_form_gives_the_same_person_box_and_head(tmp_path: Path, form: str) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    if form == "cpm":
        records = [cpm_record("1.jpg"), cpm_record("2.jpg", validation=1.0)]
        write_json(root, "mpii_annotations.json", records)
    else:
        write_json(root, "valid.json", [hrnet_record("2.jpg")])
    if form == "mat":
        write_mat(root / _MAT, [image("1.jpg", person()), image("2.jpg", person())])
    elif form == "hrnet":
        write_json(root, "train.json", [hrnet_record("1.jpg")])
    for subset, photo in (("train", "mpii/1"), ("test", "mpii/2")):
        people = load("mpii", root, subset)
        (found,) = people.annotations
        assert found.photo == photo
        assert found.image == root / "images" / f"{photo[5:]}.jpg"
        np.testing.assert_allclose(found.points_K2, _PLACES)
        # Head 30×40 in the .mat; the lists have no rectangle and 25 * scale is equal here not.
        assert found.head_size == pytest.approx(30.0 if form == "mat" else 50.0)
        # The convention: centre (130, 110 + 15 * 2) - 1, side 200 * 2 * 1.25.
        assert found.box_origin == "given"
        centre_2, side = crop_square(found, people.scheme)
        assert (centre_2.tolist(), side) == ([129.0, 139.0], 500.0)


def test_head_sizes_come_from_rectangle_scale_or_joints_in_this_order(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    gone = {"x1": None, "scale": None}
    short = {"annopoints": points({k: xy for k, xy in joints().items() if k != 9})}
    people = [person(), person(x1=None), person(**gone), person(**gone, **short)]
    write_mat(root / _MAT, [image("1.jpg", *people), image("2.jpg", person())], single=[[], [1]])
    write_json(root, "valid.json", [hrnet_record("2.jpg")])
    train = load("mpii", root, "train")
    neck_to_top = np.linalg.norm(_PLACES[9] - _PLACES[8])
    expected = [30.0, 50.0, 0.75 * neck_to_top, np.nan]
    np.testing.assert_allclose([a.head_size for a in train.annotations], expected)
    assert [a.box_origin for a in train.annotations] == ["given"] * 2 + ["landmarks"] * 2
    assert train.problems == (
        "mpii: 2 of 4 people have no centre or scale; the box of their joints is used",
        "mpii: 3 of 4 people have no head rectangle; head sizes come from their scale",
        "mpii: 1 of 4 people have no head size; PCKh leaves them out",
    )


def test_head_rectangles_of_hrnets_ground_truth_are_used_when_they_belong(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    write_json(root, "valid.json", [hrnet_record("1.jpg"), hrnet_record("2.jpg")])
    boxes = np.array([[90, 20, 120, 60], [1, 1, 7, 9]], dtype=float)
    truth = {
        "headboxes_src": boxes.reshape(2, 2, 2).transpose(1, 2, 0),
        "pos_gt_src": np.stack([_PLACES + 1] * 2, axis=2),
        "jnt_missing": np.zeros((16, 2), dtype=np.uint8),
    }
    savemat(root / "annot" / "gt_valid.mat", truth)
    found = [a.head_size for a in load("mpii", root, "test").annotations]
    np.testing.assert_allclose(found, [30.0, 6.0])
    savemat(root / "annot" / "gt_valid.mat", truth | {"pos_gt_src": truth["pos_gt_src"] + 2})
    with pytest.raises(UserError, match=r"expected the joints of 1\.jpg, found others"):
        load("mpii", root, "test")


def test_other_people_of_a_validation_image_are_in_no_subset(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    far = person(objpos={"x": 300.0, "y": 90.0})
    write_mat(root / _MAT, [image("1.jpg", far, person()), image("2.jpg", person(), far)])
    write_json(root, "valid.json", [hrnet_record("1.jpg")])
    test, train = load("mpii", root, "test"), load("mpii", root, "train")
    assert [a.photo for a in test.annotations] == ["mpii/1"]
    assert crop_square(test.annotations[0], MPII16)[0].tolist() == [129.0, 139.0]
    assert [a.photo for a in train.annotations] == ["mpii/2"] * 2
    assert train.problems == ("mpii: 1 other people of validation images; left out of training",)
    (root / _MAT).unlink()
    # CPM's own list keeps them in training.
    (root / "annot" / "valid.json").unlink()
    records = [cpm_record(name, validation=v) for name, v in (("1.jpg", 1), ("1.jpg", 0))]
    write_json(root, "mpii_annotations.json", [*records, cpm_record("2.jpg")])
    assert [a.photo for a in load("mpii", root, "train").annotations] == ["mpii/2"]


def test_a_listed_person_who_is_not_in_the_mat_still_keeps_the_image_from_training(
    tmp_path: Path,
) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    write_mat(root / _MAT, [image("1.jpg", person()), image("2.jpg", person())])
    lists = [hrnet_record("1.jpg", center=[9.0, 9.0]), hrnet_record("2.jpg", scale=2.0004)]
    write_json(root, "valid.json", lists)
    test = load("mpii", root, "test")
    assert [a.photo for a in test.annotations] == ["mpii/2"]
    assert test.problems == (
        "mpii: 1 of 2 listed validation people are not in mpii_human_pose_v1_u12_1.mat",
    )
    with pytest.raises(UserError, match="1 other people of validation images"):
        load("mpii", root, "train")


def test_indices_of_tompsons_predictions_count_from_1(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    images = [image(f"{k}.jpg", person(), person(scale=1.0)) for k in (1, 2, 3)]
    write_mat(root / _MAT, images)
    savemat(root / "detections.mat", {"RELEASE_img_index": [2, 3], "RELEASE_person_index": [1, 2]})
    test = load("mpii", root, "test").annotations
    assert [(a.photo, a.box_xywh[2]) for a in test] == [("mpii/2", 400), ("mpii/3", 200)]
    assert [a.photo for a in load("mpii", root, "train").annotations] == ["mpii/1"] * 2


def test_without_a_list_a_tenth_of_the_images_is_held_back_whole(tmp_path: Path) -> None:
    names = [f"{k:03d}.jpg" for k in range(40)]
    root = write_images(tmp_path, names[:30])
    images = [image(name, person(), person()) for name in names]
    write_mat(root / _MAT, images, single=[[2] if k % 2 else [] for k in range(40)])
    test, train = load("mpii", root, "test"), load("mpii", root, "train")
    photos = [{a.photo for a in people.annotations} for people in (train, test)]
    assert not photos[0] & photos[1]
    assert len(test.annotations) == 2  # a tenth of the 15 images with somebody standing apart
    assert len(train.annotations) == 56
    assert any("the split is this project's own" in line for line in test.problems)
    again = load("mpii", root, "test").annotations
    assert [a.photo for a in again] == [a.photo for a in test.annotations]


def test_a_data_set_in_part_is_used_as_far_as_it_is(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg"])
    people = [image(f"{k}.jpg", person(), person(annopoints=EMPTY)) for k in (1, 2, 3)]
    write_mat(root / "mpii_human_pose_v1_u12_2" / _MAT, [*people, image("9.jpg", person())])
    write_json(root, "valid.json", [hrnet_record("9.jpg")])
    train = load("mpii", root, "train")
    assert [a.photo for a in train.annotations] == ["mpii/1"]
    assert train.problems == (
        "mpii: 2 of 6 people in 2 images that are not there; left out",
        "mpii: 3 of 6 people have no joints or no place; left out",
    )
    with pytest.raises(UserError, match=r"expected people with images in .*images, found mpii: 1"):
        load("mpii", root, "test")


def test_wrong_use_is_said_in_one_line(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg"])
    with pytest.raises(UserError, match=r"expected mpii_human_pose_v1_u12_1\.mat, annot/train"):
        load("mpii", root, "train")
    write_json(root, "valid.json", [hrnet_record("1.jpg")])
    assert len(load("mpii", root, "test").annotations) == 1
    with pytest.raises(UserError, match=r"subset 'train': expected train\.json"):
        load("mpii", root, "train")
    with pytest.raises(UserError, match="expected subset train, test, valid, all, found 'val'"):
        load("mpii", root, "val")
    with pytest.raises(UserError, match="expected boxes 'given'"):
        load("mpii", root, "test", boxes="ground-truth")
    with pytest.raises(UserError, match="is not a folder"):
        load("mpii", root / "nowhere", "test")


def test_flip_pairs_exchange_right_and_left() -> None:
    middle = ["pelvis", "thorax", "neck", "top"]
    names = ["RA", "RK", "RH", "LH", "LK", "LA", *middle, "RW", "RE", "RS", "LS", "LE", "LW"]
    mirrored = [names[k].translate(str.maketrans("RL", "LR")) for k in MPII16.flip_order]
    assert mirrored == names
    for line in MPII16.lines:
        assert all({names[a][0], names[b][0]} != {"R", "L"} for a, b in pairwise(line))


def test_pckh_in_crop_pixels_counts_errors_up_to_half_a_head(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    gone = {"x1": None, "scale": None, "annopoints": points({0: (5, 5), 1: (90, 90)})}
    images = [image("1.jpg", person()), image("2.jpg", person(scale=4.0))]
    write_mat(root / _MAT, [*images, image("3.jpg", person(**gone))])
    write_json(root, "valid.json", [hrnet_record("9.jpg")])
    crops = Crops(load("mpii", root, "train").annotations, MPII16, size=64)
    heads_N = crops.head_sizes()
    np.testing.assert_allclose(heads_N[:2], [30 * 64 / 500, 30 * 64 / 1000])
    target_NK2, labelled_NK = crops.targets()
    predicted_NK2 = target_NK2.copy()
    predicted_NK2[:, 0, 0] += 0.49 * np.nan_to_num(heads_N, nan=1e3)
    predicted_NK2[:, 5, 1] += 0.51 * np.nan_to_num(heads_N, nan=1e3)
    predicted_NK2[:, 6] += 1000  # the pelvis takes no part in the mean
    found = score_crops(predicted_NK2, crops, "pckh")
    assert found.metric_name == "pckh_percent"
    assert found.per_landmark_K[[0, 5, 6]].tolist() == [100, 0, 0]
    assert found.percent == pytest.approx(100 * 13 / 14)
    assert found.joint_mean_percent == pytest.approx(100 * 13 / 14)
    assert found.error_N[0] == pytest.approx(
        (49 + 51 + 100 * np.hypot(1000, 1000) / heads_N[0]) / 16
    )
    assert np.isnan(found.error_N[2])
    with pytest.raises(ValueError, match="expected the head sizes"):
        score(predicted_NK2, target_NK2, labelled_NK, "pckh")


def test_real_people_are_read_from_mat_and_json_alike(data_root: Path) -> None:
    root = data_root / "mpii"
    if not root.is_dir():
        pytest.skip("no MPII images")
    test, train = load("mpii", root, "test"), load("mpii", root, "train")
    assert [a.photo for a in test.annotations] == ["mpii/005808361", "mpii/051423444"]
    assert [a.photo for a in train.annotations] == ["mpii/005880453"]
    assert [a.category for a in test.annotations] == ["sports", "occupation"]
    assert [a.labelled_K.sum() for a in test.annotations] == [16, 14]
    assert train.problems == ("mpii: 1 other people of validation images; left out of training",)
    listed = read_json(root / "annot" / "valid.json")
    for annotation, listed_person in zip(test.annotations, listed, strict=True):
        assert (annotation.labelled_K == listed_person.labelled_K).all()
        np.testing.assert_allclose(annotation.points_K2, listed_person.points_K2, atol=1e-3)
        # Measured on all 2958 people: 0.6 * diagonal of the head rectangle = 25 * scale.
        assert annotation.head_size == pytest.approx(25 * listed_person.scale, rel=2e-5)
    assert len(read_release(root / _MAT)) == 4


def test_real_crops_hold_their_people(data_root: Path) -> None:
    root = data_root / "mpii"
    if not root.is_dir():
        pytest.skip("no MPII images")
    people = load("mpii", root, "all")
    crops = Crops(people.annotations, people.scheme, size=128)
    batch = crops.batch([0, 1, 2])
    inside = ((batch.points_BK2 > 0) & (batch.points_BK2 < 127)).all(dim=2)
    assert inside[batch.labelled_BK].float().mean() > 0.97
    assert torch.isfinite(batch.images_B3HW).all()
    found = evaluate_mean_shape(crops, people, crops)
    assert 0 < found.percent < 100
