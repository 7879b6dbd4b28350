"""The LSP and LSPET readers: axes, the inverted flag, missing joints, absent images."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedcunet.data import LSP14, load
from fedcunet.data.matlab import read_mat
from fedcunet.errors import UserError


def _joints(generator: np.random.Generator, people: int) -> np.ndarray:
    """(14, 3, people) in LSPET's order, 1-based, every joint labelled."""
    joints = generator.uniform(20, 90, (14, 3, people))
    joints[:, 2] = 1
    return joints


def _write(root: Path, joints: np.ndarray, names: list[str]) -> Path:
    (root / "images").mkdir(parents=True)
    savemat(root / "joints.mat", {"joints": joints})
    for name in names:
        (root / "images" / name).write_bytes(b"not decoded by the reader")
    return root


def test_lspet_flag_1_is_labelled_and_missing_joints_are_never_used(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    joints = _joints(generator, 2)
    joints[3, :, 1] = (0, -26.1, 0)
    joints[4, :2, 1] = (-2.0, 30.0)  # labelled, left of the image
    root = _write(tmp_path / "lspet", joints, ["im00001.jpg", "im00002.jpg"])
    person = load("lspet", root, "all").annotations[1]
    assert person.labelled_K.tolist() == [k != 3 for k in range(14)]
    np.testing.assert_allclose(person.points_K2[4], (-3.0, 29.0))
    np.testing.assert_allclose(person.points_K2[0], joints[0, :2, 1] - 1)
    assert person.box_xywh[1] > 0  # the missing joint would have pulled it to -27


def test_lsp_has_other_axes_and_its_flag_leaves_every_joint_labelled(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    joints = _joints(generator, 2000)
    joints[5, 2] = 0
    root = _write(tmp_path / "lsp", joints.transpose(1, 0, 2), ["im0007.jpg", "im1010.jpg"])
    train, test = load("lsp", root, "train"), load("lsp", root, "test")
    assert [a.photo for a in train.annotations] == ["lsp/im0007"]
    assert [a.photo for a in test.annotations] == ["lsp/im1010"]
    assert test.annotations[0].labelled_K.all()
    np.testing.assert_allclose(test.annotations[0].points_K2, joints[:, :2, 1009] - 1)
    assert test.problems == ("lsp: 999 of 1000 images are not there",)
    assert test.scheme is LSP14


def test_lsp_is_read_at_either_scale_with_the_joints_of_its_own_folder(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    small = _joints(generator, 2000).transpose(1, 0, 2)
    # At original size: another scale and another corner of the photo for each image.
    original = small.copy()
    original[:2] = small[:2] * generator.uniform(2, 5, 2000) + generator.uniform(
        0, 300, (2, 1, 2000)
    )
    for name, joints in (("lsp_dataset", small), ("lsp_dataset_original", original)):
        root = _write(tmp_path / name, joints, ["im1010.jpg"])
        person = load("lsp", root, "test").annotations[0]
        np.testing.assert_allclose(person.points_K2, joints[:2, :, 1009].T - 1)


def test_observer_centric_joints_are_read_by_their_own_name_only_and_said(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    person_centric = _joints(generator, 2000).transpose(1, 0, 2)
    observer_centric = person_centric[:, list(LSP14.flip_order)]
    root = _write(tmp_path / "lsp", person_centric, ["im1010.jpg"])
    with pytest.raises(UserError, match=r"lsp-oc: .*joints_OC\.mat is not there"):
        load("lsp-oc", root, "test")
    savemat(root / "joints_OC.mat", {"joints": observer_centric})
    usual, other = load("lsp", root, "test"), load("lsp-oc", root, "test")
    np.testing.assert_allclose(usual.annotations[0].points_K2, person_centric[:2, :, 1009].T - 1)
    np.testing.assert_allclose(other.annotations[0].points_K2, observer_centric[:2, :, 1009].T - 1)
    assert (usual.name, other.name) == ("lsp", "lsp-oc")
    assert usual.problems == ("lsp: 999 of 1000 images are not there",)
    assert other.problems[0].startswith("lsp-oc: joints are observer-centric (joints_OC.mat)")


def test_lspet_splits_what_is_there_nine_to_one_and_counts_the_absent(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    names = [f"im{number:05d}.jpg" for number in range(1, 41, 2)]
    root = _write(tmp_path / "lspet", _joints(generator, 40), names)
    train, test = load("lspet", root, "train"), load("lspet", root, "test")
    assert [a.image.name for a in train.annotations] == names[:18]
    assert [a.image.name for a in test.annotations] == names[18:]
    assert train.problems == ("lspet: 20 of 40 images are not there",)


def test_people_with_almost_no_joints_are_left_out(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    joints = _joints(generator, 2)
    joints[3:, 2, 0] = 0
    root = _write(tmp_path / "lspet", joints, ["im00001.jpg", "im00002.jpg"])
    people = load("lspet", root, "all")
    assert [a.image.name for a in people.annotations] == ["im00002.jpg"]
    assert people.problems == ("lspet: 1 people have fewer than 4 joints; left out",)


def test_the_wrong_data_set_and_missing_files_are_refused(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    root = _write(tmp_path / "lspet", _joints(generator, 30), ["im00001.jpg"])
    with pytest.raises(UserError, match=r"expected joints of 3×14×N for lsp, found 14×3×30"):
        load("lsp", root, "train")
    with pytest.raises(UserError, match="expected subset train, test or all, found 'val'"):
        load("lspet", root, "val")
    with pytest.raises(UserError, match="boxes 'landmarks'"):
        load("lspet", root, "train", boxes="given")
    with pytest.raises(UserError, match=r"joints\.mat is not there"):
        load("lspet", tmp_path, "train")
    (root / "images" / "im00001.jpg").unlink()
    with pytest.raises(UserError, match="found none of 30"):
        load("lspet", root, "train")


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of 300w, faces, lsp"):
        load("coco", tmp_path, "train")


def test_flip_pairs_exchange_right_and_left() -> None:
    names = ["RA", "RK", "RH", "LH", "LK", "LA", "RW", "RE", "RS", "LS", "LE", "LW", "neck", "head"]
    mirrored = [names[k].translate(str.maketrans("RL", "LR")) for k in LSP14.flip_order]
    assert mirrored == names


def test_real_people_are_all_read(data_root: Path) -> None:
    train = load("lspet", data_root / "lspet_dataset", "train")
    test = load("lspet", data_root / "lspet_dataset", "test")
    assert (len(train.annotations), len(test.annotations)) == (900, 100)
    labelled = np.mean([a.labelled_K.sum() for a in train.annotations + test.annotations])
    assert labelled == pytest.approx(12.3, abs=0.05)
    lsp = load("lsp", data_root / "lsp_dataset", "test")
    assert lsp.problems == ("lsp: 997 of 1000 images are not there",)


def test_real_observer_centric_joints_differ_in_38_percent_of_the_images(data_root: Path) -> None:
    root = data_root / "lsp_dataset"
    both = [read_mat(root / name, "joints")[:2] for name in ("joints.mat", "joints_OC.mat")]
    moved_N = (np.abs(both[0] - both[1]) > 1e-6).any(axis=(0, 1))
    assert 100 * moved_N.mean() == pytest.approx(37.8, abs=0.1)
    people = load("lsp-oc", root, "test")
    for person in people.annotations:
        number = int(person.image.stem[2:]) - 1
        np.testing.assert_allclose(person.points_K2, both[1][:, :, number].T - 1)


def test_real_flags_mean_occluded_in_lsp_and_labelled_in_lspet(data_root: Path) -> None:
    lsp = read_mat(data_root / "lsp_dataset" / "joints.mat", "joints")
    assert 100 * lsp[2].mean() == pytest.approx(7.3, abs=0.1)
    # im1010: the joints under flag 1 are the hidden right shoulder, elbow and wrist.
    assert np.flatnonzero(lsp[2, :, 1009]).tolist() == [6, 7, 8]
    lspet = read_mat(data_root / "lspet_dataset" / "joints.mat", "joints")
    missing = lspet[:, 2, :] == 0
    xy = lspet[:, :2, :].transpose(0, 2, 1)[missing]
    assert (xy == 0).any(axis=1).all()
    assert (xy <= 0).all()
