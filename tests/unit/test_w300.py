"""The 300-W reader: every oddity known from files in circulation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedcunet.data import FACE68, load
from fedcunet.data.w300 import photo_key, read_pts
from fedcunet.errors import UserError

_POINTS = [(10 + k, 200 - 2 * k) for k in range(68)]
_LINES = [f"{x} {y}" for x, y in _POINTS]


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nn_points:  68\n{\n" + "\n".join(_LINES) + "\n}\n",
        "version: 1\nn_points: 68\n{\n" + "\n".join(_LINES) + "\n}",
        "\n".join(_LINES),
        "\n".join(_LINES) + "\n\n",
        "\r\n".join(["version: 1", "n_points: 68", "{", *_LINES, "}"]) + "\r\n",
        "\n".join(f"  {x:.6f}\t{y:.2e} " for x, y in _POINTS),
        "\ufeffversion: 1\n{\n" + "\n".join(_LINES) + "\n}",
    ],
    ids=["official", "no final newline", "no header", "blank end", "crlf", "spaces", "bom"],
)
def test_points_are_read_in_every_spelling_and_become_0_based(tmp_path: Path, text: str) -> None:
    points_K2 = read_pts(_write(tmp_path / "a.pts", text))
    np.testing.assert_allclose(points_K2, np.array(_POINTS) - 1.0)
    assert points_K2.dtype == np.float64


def test_integers_and_minus_signs_are_kept(tmp_path: Path) -> None:
    lines = ["-3 -4.5", "7 +0.25", *_LINES[2:]]
    points_K2 = read_pts(_write(tmp_path / "a.pts", "\n".join(lines)))
    np.testing.assert_array_equal(points_K2[:2], [[-4, -5.5], [6, -0.75]])


@pytest.mark.parametrize("count", [0, 67, 69])
def test_another_number_of_points_is_refused_with_file_and_both_numbers(
    tmp_path: Path, count: int
) -> None:
    path = _write(tmp_path / "face.pts", "\n".join((_LINES + _LINES)[:count]))
    with pytest.raises(UserError, match=rf"face\.pts: expected 68 points, found {count}"):
        read_pts(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_points_that_are_not_finite_are_refused(tmp_path: Path, value: str) -> None:
    path = _write(tmp_path / "face.pts", "\n".join([f"{value} 3", *_LINES[1:]]))
    with pytest.raises(UserError, match=r"face\.pts: expected two numbers in a line"):
        read_pts(path)


@pytest.mark.parametrize("line", ["12.3 4x.5", "12_3 45", "12.3", "٣ 4", "1 2 3", "12.3 4e9"])
def test_a_damaged_point_line_is_refused_and_not_skipped(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path / "face.pts", "\n".join([line, *_LINES[1:]]))
    with pytest.raises(UserError, match=r"expected (two numbers in a line|coordinates within)"):
        read_pts(path)


def test_a_number_broken_in_two_lines_is_refused_though_the_count_is_right(tmp_path: Path) -> None:
    path = _write(tmp_path / "face.pts", "\n".join(["12.3", "45 67.8", *_LINES[1:]]))
    with pytest.raises(UserError, match=r"expected two numbers in a line, found '12\.3'"):
        read_pts(path)


@pytest.mark.parametrize(
    ("folder", "stem", "photo"),
    [
        ("helen/trainset", "296814969_1", "helen/296814969"),
        ("helen/testset", "296814969_3", "helen/296814969"),
        ("afw", "18489332_11", "afw/18489332"),
        ("lfpw/trainset", "image_0001", "lfpw/trainset/image_0001"),
        ("lfpw/testset", "image_0001", "lfpw/testset/image_0001"),
        ("ibug", "image_092", "ibug/image_092"),
        ("ibug", "image_092 _01", "ibug/image_092"),
        ("300W/01_Indoor", "indoor_001", "300W/01_Indoor/indoor_001"),
    ],
)
def test_photo_is_told_from_face_number_by_folder(folder: str, stem: str, photo: str) -> None:
    assert photo_key(folder, stem) == photo


def test_subsets_take_their_folders(make_300w) -> None:
    root = make_300w(
        {
            "afw": ["1_1.jpg"],
            "helen/trainset": ["2_1.jpg", "2_2.jpg"],
            "lfpw/trainset": ["image_0001.png"],
            "helen/testset": ["3_1.jpg"],
            "lfpw/testset": ["image_0001.png"],
            "ibug": ["image_092 _01.jpg"],
            "300W/01_Indoor": ["indoor_001.png"],
        }
    )
    sizes = {
        subset: len(load("300w", root, subset).annotations)
        for subset in ("train", "common", "challenge", "test", "full", "private", "helen/testset")
    }
    assert sizes == {
        "train": 4,
        "common": 2,
        "challenge": 1,
        "test": 3,
        "full": 3,
        "private": 1,
        "helen/testset": 1,
    }
    train = load("300w", root, "train")
    assert train.scheme is FACE68
    assert train.problems == ()
    assert [a.source for a in train.annotations] == [
        "afw",
        "helen/trainset",
        "helen/trainset",
        "lfpw/trainset",
    ]
    assert all(a.labelled_K.all() and a.box_origin == "landmarks" for a in train.annotations)


def test_box_is_the_square_around_the_points(make_300w) -> None:
    annotation = load("300w", make_300w({"afw": ["1_1.jpg"]}), "afw").annotations[0]
    low, high = annotation.points_K2.min(axis=0), annotation.points_K2.max(axis=0)
    x, y, width, height = annotation.box_xywh
    assert width == height == pytest.approx((high - low).max())
    np.testing.assert_allclose([x + width / 2, y + height / 2], (low + high) / 2)


def test_faces_whose_photo_is_in_the_test_set_are_left_out_of_training(make_300w) -> None:
    root = make_300w({"helen/trainset": ["7_1.jpg", "8_1.jpg"], "helen/testset": ["7_3.jpg"]})
    train = load("300w", root, "train")
    assert [a.photo for a in train.annotations] == ["helen/8"]
    assert any("7_1.jpg" in line and "7_3.pts" in line for line in train.problems)
    assert len(load("300w", root, "helen/testset").annotations) == 1


def test_extensions_in_capitals_and_mirrored_copies_are_dealt_with(make_300w) -> None:
    root = make_300w({"afw": ["1_1.JPG", "1_1_mirror.jpg", "2_1.Png"]})
    faces = load("300w", root, "afw")
    assert [a.image.name for a in faces.annotations] == ["1_1.JPG", "2_1.Png"]
    assert faces.problems == ("afw: 2 _mirror files (not part of 300-W) are ignored",)


def test_points_in_capitals_keep_their_photo_out_of_training(make_300w) -> None:
    root = make_300w({"helen/trainset": ["7_1.jpg", "8_1.jpg"], "helen/testset": ["7_3.jpg"]})
    points = root / "helen/testset" / "7_3.pts"
    points.rename(points.with_suffix(".PTS"))
    assert [a.photo for a in load("300w", root, "train").annotations] == ["helen/8"]


def test_faces_whose_eye_corners_coincide_are_counted_and_named(make_300w) -> None:
    root = make_300w({"ibug": ["image_1.jpg", "image_2.jpg"]})
    lines = (root / "ibug" / "image_2.pts").read_text().splitlines()
    lines[3 + 45] = lines[3 + 36]
    (root / "ibug" / "image_2.pts").write_text("\n".join(lines))
    faces = load("300w", root, "ibug")
    assert len(faces.annotations) == 2
    assert faces.problems == (
        "ibug: the outer eye corners of 1 of 2 faces coincide (image_2.jpg); NME leaves them out",
    )


def test_files_without_partner_are_named(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg", "2_1.jpg", "3_1.jpg"]})
    (root / "afw" / "1_1.jpg").unlink()
    (root / "afw" / "2_1.pts").unlink()
    faces = load("300w", root, "afw")
    assert [a.photo for a in faces.annotations] == ["afw/3"]
    assert faces.problems == (
        "afw: no image to 1_1.pts; left out",
        "afw: no .pts to 2_1.jpg; left out",
    )


def test_missing_folders_are_refused_in_one_line(make_300w, tmp_path: Path) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    (root / "ibug").mkdir()
    for path, subset, text in (
        (tmp_path / "nowhere", "train", "is not a folder"),
        (root, "common", "expected helen/testset or lfpw/testset"),
        (root, "challenge", "expected images and .pts files"),
        (root, "trian", r"found afw, ibug \(subsets: train"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            load("300w", path, subset)
        assert "\n" not in str(caught.value)


def _write_boxes(root: Path, names: list[str]) -> None:
    (root / "Bounding_Boxes").mkdir()
    kinds = [("imgName", object), ("bb_detector", object), ("bb_ground_truth", object)]
    cells = np.empty((1, len(names)), dtype=object)
    for index, name in enumerate(names):
        record = np.empty((1, 1), dtype=kinds)
        record[0, 0] = (name, np.array([[11.0, 21, 41, 61]]), np.array([[2.0, 3, 5, 7]]))
        cells[0, index] = record
    savemat(root / "Bounding_Boxes" / "bounding_boxes_ibug.mat", {"bounding_boxes": cells})


def test_given_boxes_are_matched_without_spaces_and_become_0_based(make_300w) -> None:
    root = make_300w({"ibug": ["image_092 _01.jpg", "image_093.jpg"]})
    _write_boxes(root, ["image_092_01.jpg"])
    given = load("300w", root, "challenge", boxes="given")
    assert given.annotations[0].box_xywh == (10, 20, 30, 40)
    assert [a.box_origin for a in given.annotations] == ["given", "landmarks"]
    assert given.problems == ("ibug: 1 of 2 faces have no given box; their landmark box is used",)
    tight = load("300w", root, "challenge", boxes="ground-truth")
    assert tight.annotations[0].box_xywh == (1, 2, 3, 4)


def test_boxes_that_do_not_exist_are_refused(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    with pytest.raises(UserError, match=r"bounding_boxes_afw\.mat: not there"):
        load("300w", root, "afw", boxes="given")
    with pytest.raises(UserError, match="boxes must be one of landmarks"):
        load("300w", root, "afw", boxes="tight")


def test_real_faces_are_all_read(data_root: Path) -> None:
    train = load("300w", data_root / "300w", "train")
    test = load("300w", data_root / "300w", "test")
    photos = {a.photo for a in train.annotations}
    assert len(train.annotations) == 1159
    assert len(test.annotations) == 312
    assert not photos & {a.photo for a in test.annotations}


def test_real_given_boxes_lie_around_the_face(data_root: Path) -> None:
    faces = load("300w", data_root / "300w_originals", "afw", boxes="ground-truth")
    for face in faces.annotations:
        x, y, width, height = face.box_xywh
        np.testing.assert_allclose([x, y], face.points_K2.min(axis=0), atol=1.5)
        np.testing.assert_allclose([x + width, y + height], face.points_K2.max(axis=0), atol=1.5)


@pytest.mark.parametrize("top", ["300W", "Test"])
def test_the_private_test_is_read_in_both_spellings(make_300w, top: str) -> None:
    root = make_300w(
        {f"{top}/01_Indoor": ["indoor_001.png"], f"{top}/02_Outdoor": ["outdoor_001.png"]}
    )
    private = load("300w", root, "private")
    assert [a.image.name for a in private.annotations] == ["indoor_001.png", "outdoor_001.png"]
    assert [a.source for a in private.annotations] == [f"{top}/01_Indoor", f"{top}/02_Outdoor"]
    assert private.problems == ()


def test_the_private_test_in_two_spellings_at_once_counts_once(make_300w) -> None:
    names = ["indoor_001.png", "indoor_002.png"]
    root = make_300w({"300W/01_Indoor": names, "Test/01_Indoor": names})
    private = load("300w", root, "private")
    assert [a.source for a in private.annotations] == ["300W/01_Indoor"] * 2
    assert private.problems == ("Test/01_Indoor: the private test under its other name; left out",)


def test_names_with_spaces_are_faces_of_their_photo(make_300w) -> None:
    root = make_300w({"ibug": ["image_092 _01.jpg", "image_092_02.jpg"]})
    (root / "ibug" / "image_092 _01.pts").rename(root / "ibug" / "image_092_01.pts")
    challenge = load("300w", root, "challenge")
    assert {a.photo for a in challenge.annotations} == {"ibug/image_092"}
    assert len(challenge.annotations) == 2
    assert challenge.problems == ()


def test_numbers_with_gaps_are_never_counted_through(make_300w) -> None:
    names = ["image_0001.png", "image_0004.png", "image_0871.png"]
    root = make_300w({"lfpw/trainset": names})
    assert [a.image.name for a in load("300w", root, "lfpw/trainset").annotations] == names


def test_dlibs_repackaged_lists_are_not_read_and_said(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    (root / "labels_ibug_300W_train.xml").write_text("<dataset/>")
    train = load("300w", root, "train")
    assert len(train.annotations) == 1
    assert "labels_ibug_300W_train.xml: of dlib's repackaged set" in train.problems[0]


def test_a_photo_of_training_and_test_is_named_in_both(make_300w) -> None:
    # As HELEN has it: faces 1 and 2 of a photo in training, face 3 in the test set.
    root = make_300w(
        {
            "helen/trainset": ["296814969_1.jpg", "296814969_2.jpg", "3_1.jpg"],
            "helen/testset": ["296814969_3.jpg"],
        }
    )
    train = load("300w", root, "train")
    assert [a.image.name for a in train.annotations] == ["3_1.jpg"]
    assert (
        sum("296814969" in line and "left out of training" in line for line in train.problems) == 2
    )
    assert [a.image.name for a in load("300w", root, "common").annotations] == ["296814969_3.jpg"]


def test_real_originals_are_read_with_their_private_folder(data_root: Path) -> None:
    root = data_root / "300w_originals"
    if not root.is_dir():
        pytest.skip(f"no untouched originals: {root}")
    private = load("300w", root, "private")
    assert [a.source for a in private.annotations] == ["Test/01_Indoor"]
    train = load("300w", root, "train")
    assert {a.photo for a in train.annotations if a.source == "afw"} == {
        "afw/2339510439",
        "afw/3858593140",
    }


def test_the_flip_table_is_the_reflection_of_real_faces(data_root: Path) -> None:
    faces = load("300w", data_root / "300w", "train").annotations
    points_NK2 = np.stack([face.points_K2 for face in faces])
    points_NK2 -= points_NK2.mean(axis=1, keepdims=True)
    points_NK2 /= np.linalg.norm(points_NK2, axis=(1, 2), keepdims=True)
    mean_K2 = points_NK2.mean(axis=0)
    away_KK = np.linalg.norm(mean_K2[:, None] - mean_K2 * (-1, 1), axis=2)
    assert away_KK.argmin(axis=1).tolist() == list(FACE68.flip_order)


def test_the_lower_lip_changes_places_as_it_stands() -> None:
    # A table in circulation has (59, 57) and (58, 56) here.
    assert [FACE68.flip_order[k] for k in range(54, 61)] == [48, 59, 58, 57, 56, 55, 64]


def test_all_damaged_points_of_a_folder_are_named_at_once(make_300w: Callable[..., Path]) -> None:
    root = make_300w({"helen/trainset": [f"{number}_1.jpg" for number in range(9)]})
    for number in range(7):
        (root / f"helen/trainset/{number}_1.pts").write_text("1 2")
    with pytest.raises(UserError) as refusal:
        load("300w", root, "train")
    text = str(refusal.value)
    named = [f"{number}_1.pts: expected 68 points, found 1" in text for number in range(7)]
    assert named == [True] * 5 + [False] * 2
    assert text.endswith("; and 2 more")


def test_each_of_several_data_sets_must_be_one_whatever_is_read_of_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of .*, found 'foo'"):
        load("300w+foo", f"{tmp_path},{tmp_path}", "test")
