"""Readers of Leeds Sports Pose (Johnson and Everingham, 2010) and its extended training set (2011).

    lsp_dataset/images/im0001.jpg …     joints.mat 3×14×2000, third row 1 = occluded
    lspet_dataset/images/im00001.jpg …  joints.mat 14×3×10000, third column 1 = labelled

Axes and the meaning of the flag differ between the two. `lsp_dataset_original` has the files of
`lsp_dataset` at the photos' own size, with a `joints.mat` of its own; either folder is read as it
is, and the joints of one never fit the images of the other (scale and crop differ by image).

`joints.mat` is the person-centric labelling: left is the person's left. `joints_OC.mat` (2012) is
the observer-centric one: left is the picture's left wherever the person faces; scores on the two
cannot be compared. It is read under the name "lsp-oc" only, so that whatever is printed says it.
MATLAB made the files, so their coordinates are taken as 1-based.
"""

from pathlib import Path

import numpy as np

from fedcunet.data.annotations import LSP14, Annotation, AnnotationSet, square_landmark_box
from fedcunet.data.matlab import read_mat, short
from fedcunet.errors import UserError

_NUM_LSP_TRAIN = 1000
_LSPET_TRAIN_SHARE = 0.9
# Below this the box of the labelled joints says nothing about where the person is.
_MIN_LABELLED = 4


def load_lsp(
    root: Path, subset: str, *, boxes: str = "landmarks", name: str = "lsp"
) -> AnnotationSet:
    """People of LSP: "train" is the first 1000 images, "test" the last 1000, "all" both.

    Every joint is labelled, occluded or not: PCK on LSP counts all 14 whatever the flag.

    Args:
        root: `lsp_dataset` or `lsp_dataset_original`.
        subset: "train", "test" or "all".
        boxes: "landmarks"; none are given.
        name: "lsp" (person-centric) or "lsp-oc" (observer-centric joints).

    Raises:
        UserError: as `load_lspet`.
    """
    points_NK2 = np.transpose(_read_joints(Path(root), name), (2, 1, 0))[:, :, :2]
    labelled_NK = np.isfinite(points_NK2).all(axis=2)
    numbers = np.arange(len(points_NK2))
    chosen = _subset(numbers, subset, name, num_train=_NUM_LSP_TRAIN)
    return _annotation_set(Path(root), name, subset, boxes, points_NK2, labelled_NK, chosen, 4)


def load_lspet(root: Path, subset: str, *, boxes: str = "landmarks") -> AnnotationSet:
    """People of LSP extended: "train", "test" or "all".

    All of LSPET is training data by its authors' definition, so the split is this project's own:
    of the images that are there, in order of their number, the first 90 % are "train" and the last
    10 % are "test". A score on it compares runs of this project and nothing else.

    Raises:
        UserError: the folder, its `joints.mat` or all images are missing, the array has another
            shape, or the subset or the boxes are unknown.
    """
    joints_NK3 = np.transpose(_read_joints(Path(root), "lspet"), (2, 0, 1))
    points_NK2 = joints_NK3[:, :, :2]
    # A missing joint has one coordinate 0 and the other <= 0 under a cleared flag. The sign alone
    # says nothing: some labelled joints lie outside the image.
    labelled_NK = (joints_NK3[:, :, 2] == 1) & np.isfinite(points_NK2).all(axis=2)
    root = Path(root)
    there = np.array(
        [n for n in range(len(points_NK2)) if _image_path(root, n, 5).is_file()], dtype=int
    )
    num_train = round(_LSPET_TRAIN_SHARE * len(there))
    chosen = _subset(there, subset, "lspet", num_train=num_train)
    absent = len(points_NK2) - len(there)
    return _annotation_set(
        root, "lspet", subset, boxes, points_NK2, labelled_NK, chosen, 5, absent_of_all=absent
    )


def _subset(numbers: np.ndarray, subset: str, name: str, *, num_train: int) -> np.ndarray:
    if subset == "train":
        return numbers[:num_train]
    if subset == "test":
        return numbers[num_train:]
    if subset == "all":
        return numbers
    raise UserError(f"{name}: expected subset train, test or all, found {subset!r}")


def _image_path(root: Path, number: int, digits: int) -> Path:
    return root / "images" / f"im{number + 1:0{digits}d}.jpg"


def _read_joints(root: Path, name: str) -> np.ndarray:
    """The float64 array `joints` as the file holds it, its axes checked."""
    path = root / ("joints_OC.mat" if name == "lsp-oc" else "joints.mat")
    if not path.is_file():
        raise UserError(f"{name}: {path} is not there: expected the data set's folder with images/")
    joints = read_mat(path, "joints")
    if not isinstance(joints, np.ndarray):
        raise UserError(f"{path}: expected joints to be an array of numbers, found {short(joints)}")
    joints = joints.astype(np.float64)
    expected = (14, 3) if name == "lspet" else (3, 14)
    if joints.ndim != 3 or joints.shape[:2] != expected:
        raise UserError(
            f"{path}: expected joints of {expected[0]}×{expected[1]}×N for {name}, "
            f"found {'×'.join(map(str, joints.shape))}"
        )
    return joints


def _annotation_set(
    root: Path,
    name: str,
    subset: str,
    boxes: str,
    points_NK2: np.ndarray,
    labelled_NK: np.ndarray,
    chosen: np.ndarray,
    digits: int,
    *,
    absent_of_all: int = 0,
) -> AnnotationSet:
    if boxes != "landmarks":
        raise UserError(f"{name}: expected boxes 'landmarks' (none are given), found {boxes!r}")
    annotations: list[Annotation] = []
    few = absent = 0
    for number in chosen:
        image = _image_path(root, int(number), digits)
        labelled_K = labelled_NK[number]
        if not image.is_file():
            absent += 1
            continue
        if labelled_K.sum() < _MIN_LABELLED:
            few += 1
            continue
        # Missing joints are stored as (0, -26.1) and the like: nothing should ever read them.
        points_K2 = np.where(labelled_K[:, None], points_NK2[number] - 1.0, 0.0)
        annotations.append(
            Annotation(
                image=image,
                points_K2=points_K2,
                labelled_K=labelled_K.copy(),
                box_xywh=square_landmark_box(points_K2, labelled_K),
                box_origin="landmarks",
                source=name,
                photo=f"{name}/{image.stem}",
            )
        )
    problems = []
    if name == "lsp-oc":
        problems.append(f"{name}: joints are observer-centric (joints_OC.mat), not the usual PC")
    total = len(chosen)
    if absent_of_all:
        absent, total = absent_of_all, len(points_NK2)
    if absent:
        problems.append(f"{name}: {absent} of {total} images are not there")
    if few:
        problems.append(f"{name}: {few} people have fewer than {_MIN_LABELLED} joints; left out")
    if not annotations:
        raise UserError(
            f"{name} subset {subset!r}: expected images im{1:0{digits}d}.jpg … "
            f"in {root / 'images'}, found none of {total}"
        )
    return AnnotationSet(
        name=name,
        subset=subset,
        scheme=LSP14,
        annotations=tuple(annotations),
        problems=tuple(problems),
    )
