"""MPII's files as they are: what scipy squeezes, what records lack, 1-based numbers, json forms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from fedcunet.data import load
from fedcunet.data.mpii_files import read_json, read_release
from fedcunet.errors import UserError
from tests.mpii_files import (
    EMPTY,
    cpm_record,
    hrnet_record,
    image,
    joints,
    person,
    points,
    struct_array,
    write_images,
    write_json,
    write_mat,
)

_MAT = "mpii_human_pose_v1_u12_1.mat"
_PLACES = np.array(list(joints().values())) - 1.0


def _release(tmp_path: Path, *people: dict[str, Any], **fields: Any) -> list[Any]:
    return read_release(write_mat(tmp_path / _MAT, [image("1.jpg", *people)], **fields))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_one_and_several_people_of_an_image_are_read_alike(tmp_path: Path, number: int) -> None:
    people = _release(tmp_path, *[person()] * number, single=[list(range(1, number + 1))])
    assert [p.place for p in people] == [(1, k + 1) for k in range(number)]
    for found in people:
        np.testing.assert_allclose(found.points_K2, _PLACES)
        assert found.labelled_K.all()
        assert (found.centre, found.scale) == ((129.0, 109.0), 2.0)
        assert found.is_single


def test_points_are_placed_by_their_id_and_one_alone_is_kept(tmp_path: Path) -> None:
    some = {9: (7.5, -3.0), 2: (4.0, 5.0), 15: (1.0, 1.0)}
    people = _release(
        tmp_path, person(annopoints=points(some, order=-1)), person(annopoints=points({4: (8, 9)}))
    )
    for found, expected in zip(people, (some, {4: (8, 9)}), strict=True):
        assert set(np.flatnonzero(found.labelled_K)) == set(expected)
        for joint, (x, y) in expected.items():
            assert found.points_K2[joint].tolist() == [x - 1, y - 1]
        assert (found.points_K2[~found.labelled_K] == 0).all()


@pytest.mark.parametrize("visible", [None, EMPTY, 0, 1, "0", "1"])
def test_occluded_joints_are_labelled_however_visibility_is_written(
    tmp_path: Path, visible: Any
) -> None:
    (found,) = _release(tmp_path, person(annopoints=points(joints(), visible=visible)))
    assert found.labelled_K.all()


def test_people_may_lack_every_field(tmp_path: Path) -> None:
    names = ("annopoints", "objpos", "scale", "x1")
    people = _release(
        tmp_path,
        *(person(**{name: None}) for name in names),
        person(annopoints=EMPTY, objpos=EMPTY),
        {"scale": 3.0, "objpos": {"x": 6.0, "y": 3.0}},
    )
    assert [bool(p.labelled_K.any()) for p in people] == [False, True, True, True, False, False]
    assert [p.centre is None for p in people] == [False, True, False, False, True, False]
    assert [bool(np.isnan(p.scale)) for p in people] == [False, False, True, False, False, False]
    assert [p.head_box is None for p in people] == [False, False, False, True, False, True]


def test_test_images_and_images_without_annorect_have_no_people(tmp_path: Path) -> None:
    bare = {"image": {"name": "3.jpg"}, "annorect": EMPTY}
    path = write_mat(
        tmp_path / _MAT, [image("1.jpg", person()), image("2.jpg", person()), bare], train=[0, 1, 1]
    )
    assert [p.image for p in read_release(path)] == ["2.jpg"]


def test_single_person_counts_from_1(tmp_path: Path) -> None:
    cells = [[2], [], [1, 2]]
    images = [image(f"{k}.jpg", person(), person()) for k in range(3)]
    people = read_release(write_mat(tmp_path / _MAT, images, single=cells))
    assert [p.is_single for p in people] == [False, True, False, False, True, True]


def test_activities_and_videos_are_those_of_the_image(tmp_path: Path) -> None:
    acts = [
        {"cat_name": "sports", "act_name": "curling", "act_id": 1.0},
        {"cat_name": EMPTY, "act_name": EMPTY, "act_id": -1.0},
    ]
    root = write_images(tmp_path, ["1.jpg", "2.jpg"])
    images = [image("1.jpg", person(), person(), vidx=7.0), image("2.jpg", person(), vidx=EMPTY)]
    write_mat(root / _MAT, images, acts=acts)
    everybody = load("mpii", root, "all").annotations
    found = {(a.photo, a.category, a.activity, a.video) for a in everybody}
    assert found <= {("mpii/1", "sports", "curling", 7), ("mpii/2", "", "", -1)}
    assert len(found) == 2


def test_a_joint_in_two_places_is_not_labelled(tmp_path: Path) -> None:
    records = [{"x": x, "y": 5.0, "id": joint} for x, joint in ((1.0, 3), (2.0, 3), (4.0, 6))]
    (found,) = _release(tmp_path, person(annopoints={"point": struct_array(records)}))
    assert np.flatnonzero(found.labelled_K).tolist() == [6]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"annopoints": points({16: (1, 1)})}, r"expected joint ids 0 to 15, found 16"),
        ({"annopoints": points({3: (np.nan, 1)})}, r"point\.x: expected a finite number"),
        ({"annopoints": points({3: (1, 2e7)})}, r"expected coordinates within 100000 pixels"),
        ({"annopoints": 5.0}, r"annopoints: expected structs, found"),
        ({"scale": "large"}, r"scale: expected a finite number, found 'large'"),
        ({"objpos": {"x": np.arange(2.0), "y": 3.0}}, r"objpos\.x: expected a finite number"),
    ],
)
def test_odd_values_are_refused_with_their_place(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=rf"annolist\(1\)\.annorect\(2\).*{text}"):
        _release(tmp_path, person(), person(**changes))


def test_other_mat_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / _MAT
    path.write_bytes(b"not MATLAB at all")
    with pytest.raises(UserError, match=r"expected a little-endian \.mat file of version 5 to 7"):
        read_release(path)
    savemat(path, {"joints": np.zeros(3)})
    with pytest.raises(UserError, match="expected a variable named RELEASE, found none"):
        read_release(path)
    savemat(path, {"RELEASE": np.zeros(3)})
    with pytest.raises(UserError, match="RELEASE: expected structs, found"):
        read_release(path)
    with pytest.raises(UserError, match=r"img_train for each of 2 images"):
        read_release(write_mat(path, [image("1.jpg"), image("2.jpg")], train=[1]))


def test_json_flags_say_what_is_labelled_and_never_the_sign(tmp_path: Path) -> None:
    places = hrnet_record("1.jpg")["joints"]
    places[3], places[5] = [-20.0, 30.0], [-1.0, -1.0]
    record = hrnet_record("1.jpg", joints=places, joints_vis=[int(k != 5) for k in range(16)])
    (found,) = read_json(write_json(tmp_path, "valid.json", [record]))
    assert np.flatnonzero(~found.labelled_K).tolist() == [5]
    assert found.points_K2[3].tolist() == [-21.0, 29.0]
    assert found.points_K2[5].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found.points_K2[6:], _PLACES[6:])
    assert found.centre == (129.0, 109.0)


def test_cpm_json_marks_missing_joints_by_zeros_and_occluded_ones_by_the_flag(
    tmp_path: Path,
) -> None:
    rows = cpm_record("1.jpg")["joint_self"]
    rows[0], rows[1] = [0.0, -0.0, 0.0], [*rows[1][:2], 0.0]
    records = [
        cpm_record("1.jpg", validation=1.0, joint_self=rows),
        cpm_record("im0001.jpg", dataset="LEEDS"),
        cpm_record("2.jpg", dataset="MPII"),
    ]
    found = read_json(write_json(tmp_path, "mpii_annotations.json", records))
    assert [(p.image, p.is_validation) for p in found] == [("1.jpg", True), ("2.jpg", False)]
    assert np.flatnonzero(~found[0].labelled_K).tolist() == [0]
    np.testing.assert_allclose(found[0].points_K2[1:], _PLACES[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"joints": [[1.0, 2.0]] * 15},
        {"joints": [["1", 2.0]] * 16},
        {"joints": [[1.0, True]] * 16},
        {"joints": [[1.0, None]] * 16},
        {"joints": [[1.0, 2.0], *[[3.0]] * 15]},
        {"joints": [[1.0, float("nan")]] * 16},
        {"joints": [[1.0, 10**400]] * 16},
        {"joints": [[1e9, 1.0]] * 16},
        {"joints_vis": [2] * 16},
        {"joints_vis": 1},
        {"center": [1.0]},
        {"scale": "2"},
        {"scale": None},
        {"image": "../1.jpg"},
        {"image": ""},
        {"image": 3},
    ],
)
def test_odd_json_values_are_refused_with_their_person(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    records = [hrnet_record("1.jpg"), hrnet_record("2.jpg", **changes)]
    with pytest.raises(UserError, match=r"valid\.json: person 1: expected"):
        read_json(write_json(tmp_path, "valid.json", records))


@pytest.mark.parametrize("text", ["", "[{]", '{"a": 1}', "[3]", "[" * 100_000, "[1" + "0" * 5000])
def test_what_is_no_list_of_people_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "valid.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"valid\.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
