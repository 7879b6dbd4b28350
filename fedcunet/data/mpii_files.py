"""The annotation files of MPII Human Pose, each as a list of people with 0-based coordinates.

All of them are 1-based (MATLAB). A joint is labelled when the file holds a place for it: an
occluded joint counts as ground truth, so `is_visible` is never read, and labelled joints outside
the image may be negative, so no sign is read either.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcunet.data.matlab import MatStruct, number, one_struct, read_mat, short, structs, text
from fedcunet.errors import UserError

_NUM_JOINTS = 16
# Farther out than any image reaches: such a number is damage, not a joint outside the picture.
_MAX_COORDINATE = 1e5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Person:
    """One annotated person.

    Attributes:
        image: the image's file name.
        points_K2: float64, 0-based pixels; 0 where not labelled.
        labelled_K: bool.
        centre: the rough position, 0-based pixels, None where not given.
        scale: height over 200 pixels, NaN where not given.
        head_box: x1, y1, x2, y2 of the head rectangle, None where not given.
        activity: name of the activity, "" if unknown.
        category: its category, "" if unknown.
        video: number of the video in the file's list (1 is the first), -1 if unknown.
        is_validation: None where the file does not say.
        place: 1-based numbers of image and person in the `.mat`, (0, 0) in other files.
        is_single: stands apart from other people; None where the file does not say.
    """

    image: str
    points_K2: np.ndarray
    labelled_K: np.ndarray
    centre: tuple[float, float] | None
    scale: float
    head_box: tuple[float, float, float, float] | None = None
    activity: str = ""
    category: str = ""
    video: int = -1
    is_validation: bool | None = None
    place: tuple[int, int] = (0, 0)
    is_single: bool | None = None


def read_release(path: Path) -> list[Person]:
    """People of the training images (`img_train` 1) of the official `.mat`, in its order.

    People without any joint are among them.

    Raises:
        UserError: the file is damaged, or is not MPII's RELEASE.
    """
    release = one_struct(read_mat(path, "RELEASE"), f"{path}: RELEASE")
    if release is None:
        raise UserError(f"{path}: expected RELEASE to be a struct, found it empty")
    images = structs(release.get("annolist"), f"{path}: annolist")
    is_train = np.ravel(release.get("img_train"))
    if len(is_train) != len(images) or is_train.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: expected img_train for each of {len(images)} images, "
            f"found {short(release.get('img_train'))}"
        )
    activities = structs(release.get("act"), f"{path}: act")
    singles = release.get("single_person")
    for name, cells in (("act", activities), ("single_person", singles)):
        if cells and not (isinstance(cells, list) and len(cells) == len(images)):
            raise UserError(f"{path}: expected {name} for each of {len(images)} images")
    people = []
    for index, image in enumerate(images):
        if is_train[index] != 1:
            continue
        where = f"{path}: annolist({index + 1})"
        picture = one_struct(image.get("image"), f"{where}.image")
        name = _file_name(text(picture, "name", f"{where}.image"), where)
        act = activities[index] if activities else None
        video = number(image, "vidx", where)
        single = _whole_numbers(singles[index], where) if singles else None
        for number_of, rectangle in enumerate(structs(image.get("annorect"), where), start=1):
            person_at = f"{where}.annorect({number_of})"
            points_K2, labelled_K = _mat_joints(rectangle, person_at)
            people.append(
                Person(
                    image=name,
                    points_K2=points_K2,
                    labelled_K=labelled_K,
                    centre=_mat_centre(rectangle, person_at),
                    scale=_positive(number(rectangle, "scale", person_at)),
                    head_box=_mat_head_box(rectangle, person_at),
                    activity=text(act, "act_name", where),
                    category=text(act, "cat_name", where),
                    video=-1 if video is None else int(video),
                    place=(index + 1, number_of),
                    is_single=None if single is None else number_of in single,
                )
            )
    return people


def read_places(path: Path) -> set[tuple[int, int]]:
    """Places (image, person; 1-based) of Tompson's validation people, from his `detections.mat`."""
    images, people = (
        np.ravel(read_mat(path, name)) for name in ("RELEASE_img_index", "RELEASE_person_index")
    )
    if len(images) != len(people) or not all(a.dtype.kind in "iuf" for a in (images, people)):
        raise UserError(
            f"{path}: expected as many person as image numbers, found {len(people)}, {len(images)}"
        )
    return {(int(image), int(person)) for image, person in zip(images, people, strict=True)}


def read_json(path: Path) -> list[Person]:
    """People of a json list, in its order: HRNet's form or that of CPM and the paper's code.

    HRNet's: image, center, scale, joints 16×2, joints_vis 16. CPM's: img_paths, objpos,
    scale_provided, joint_self 16×3, isValidation; a joint at exactly (0, 0) with a cleared flag is
    missing there, and people of the dataset LEEDS (LSP) in the same list are skipped.

    Raises:
        UserError: the file is damaged or has another form.
    """
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as json: {str(error)[:120]}") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of people, found {type(records).__name__}")
    people = []
    for index, record in enumerate(records):
        where = f"{path}: person {index}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {short(record)}")
        if "joint_self" in record:
            if record.get("dataset", "MPII") in ("MPI", "MPII"):
                people.append(_cpm_person(record, where))
            elif record["dataset"] != "LEEDS":
                raise UserError(
                    f"{where}: expected dataset MPI, MPII or LEEDS, "
                    f"found {short(record['dataset'])}"
                )
        else:
            people.append(_hrnet_person(record, where))
    return people


def read_head_boxes(path: Path, people: list[Person]) -> list[tuple[float, float, float, float]]:
    """Head rectangles of HRNet's gt_valid.mat for the people of its valid.json, in their order.

    Raises:
        UserError: the file is damaged, or its joints are not those of `people`.
    """
    boxes_22N, points_K2N, missing_KN = (
        np.asarray(read_mat(path, name)) for name in ("headboxes_src", "pos_gt_src", "jnt_missing")
    )
    count = len(people)
    try:
        boxes_N4 = boxes_22N.reshape(4, count).T.astype(np.float64)
        points_NK2 = points_K2N.reshape(_NUM_JOINTS, 2, count).transpose(2, 0, 1) - 1.0
        labelled_NK = missing_KN.reshape(_NUM_JOINTS, count).T == 0
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: expected the arrays of {count} people, found {error}") from error
    for person, box, points_K2, labelled_K in zip(
        people, boxes_N4, points_NK2, labelled_NK, strict=True
    ):
        both_K = labelled_K & person.labelled_K
        off = np.abs(points_K2 - person.points_K2)[both_K]
        if not np.isfinite(box).all() or (off.size and not off.max() < 1):
            raise UserError(f"{path}: expected the joints of {person.image}, found others")
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in boxes_N4]


def _mat_joints(rectangle: MatStruct, where: str) -> tuple[np.ndarray, np.ndarray]:
    points_K2, labelled_K = np.zeros((_NUM_JOINTS, 2)), np.zeros(_NUM_JOINTS, dtype=bool)
    twice_K = np.zeros(_NUM_JOINTS, dtype=bool)
    for holder in structs(rectangle.get("annopoints"), f"{where}.annopoints"):
        for point in structs(holder.get("point"), f"{where}.point"):
            joint, x, y = (number(point, key, f"{where}.point") for key in ("id", "x", "y"))
            if joint is None or x is None or y is None:
                continue
            if joint not in range(_NUM_JOINTS):
                raise UserError(f"{where}: expected joint ids 0 to 15, found {joint:g}")
            place_2 = _place((x, y), where)
            joint_id = int(joint)
            # Two places for one joint: which is right cannot be known, so neither is used.
            twice_K[joint_id] |= labelled_K[joint_id] and (points_K2[joint_id] != place_2).any()
            points_K2[joint_id], labelled_K[joint_id] = place_2, True
    labelled_K &= ~twice_K
    points_K2[~labelled_K] = 0.0
    return points_K2, labelled_K


def _mat_centre(rectangle: MatStruct, where: str) -> tuple[float, float] | None:
    position = one_struct(rectangle.get("objpos"), f"{where}.objpos")
    x, y = (number(position, key, f"{where}.objpos") for key in ("x", "y"))
    return None if x is None or y is None else _centre((x, y), where)


def _mat_head_box(rectangle: MatStruct, where: str) -> tuple[float, float, float, float] | None:
    x1, y1, x2, y2 = (number(rectangle, key, where) for key in ("x1", "y1", "x2", "y2"))
    if x1 is None or y1 is None or x2 is None or y2 is None:
        return None
    return x1, y1, x2, y2


def _hrnet_person(record: dict[str, Any], where: str) -> Person:
    joints_K2 = _numbers(record, "joints", (_NUM_JOINTS, 2), where)
    flags_K = _numbers(record, "joints_vis", (_NUM_JOINTS,), where)
    if not np.isin(flags_K, (0, 1)).all():
        raise UserError(f"{where}: expected joints_vis of 0 and 1, found {flags_K.tolist()}")
    return _json_person(record, where, joints_K2, flags_K == 1, "image", "center", "scale")


def _cpm_person(record: dict[str, Any], where: str) -> Person:
    joints_K3 = _numbers(record, "joint_self", (_NUM_JOINTS, 3), where)
    # The flag says occluded or not; a missing joint is a row of zeros.
    labelled_K = (joints_K3 != 0).any(axis=1)
    keys = ("img_paths", "objpos", "scale_provided")
    flag = record.get("isValidation")
    if flag not in (0, 1):
        raise UserError(f"{where}: expected isValidation 0 or 1, found {short(flag)}")
    return _json_person(record, where, joints_K3[:, :2], labelled_K, *keys, bool(flag))


def _json_person(
    record: dict[str, Any],
    where: str,
    points_K2: np.ndarray,
    labelled_K: np.ndarray,
    image_key: str,
    centre_key: str,
    scale_key: str,
    is_validation: bool | None = None,
) -> Person:
    centre = _numbers(record, centre_key, (2,), where)
    for point_2 in points_K2[labelled_K]:
        _place(point_2, where)
    return Person(
        image=_file_name(record.get(image_key), where),
        points_K2=np.where(labelled_K[:, None], points_K2 - 1.0, 0.0),
        labelled_K=labelled_K,
        centre=_centre((float(centre[0]), float(centre[1])), where),
        scale=_positive(float(_numbers(record, scale_key, (), where))),
        is_validation=is_validation,
    )


def _numbers(record: dict[str, Any], key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Finite float64 of the given shape from nested lists; texts and truth values are refused."""
    value = record.get(key)
    sizes = "×".join(map(str, shape)) or "one"
    try:
        array = np.asarray(value)
        usable = array.shape == shape and array.dtype.kind in "iuf" and np.isfinite(array).all()
    except (ValueError, TypeError, OverflowError):
        usable = False
    # numpy makes a number of a truth value among numbers.
    if not usable or _holds_bool(value):
        raise UserError(f"{where}: expected {key} of {sizes} finite numbers, found {short(value)}")
    return array.astype(np.float64)


def _holds_bool(value: Any) -> bool:
    return any(map(_holds_bool, value)) if isinstance(value, list) else isinstance(value, bool)


def _file_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value or Path(value).name != value:
        raise UserError(f"{where}: expected the file name of an image, found {short(value)}")
    return value


def _place(xy: Any, where: str) -> np.ndarray:
    """0-based."""
    if max(abs(xy[0]), abs(xy[1])) > _MAX_COORDINATE:
        raise UserError(
            f"{where}: expected coordinates within {_MAX_COORDINATE:g} pixels, "
            f"found {xy[0]:g}, {xy[1]:g}"
        )
    return np.asarray(xy, dtype=np.float64) - 1.0


def _centre(xy: tuple[float, float], where: str) -> tuple[float, float] | None:
    """0-based; (-1, -1) stands for none."""
    x, y = _place(xy, where)
    return None if xy == (-1.0, -1.0) else (float(x), float(y))


def _positive(value: float | None) -> float:
    """NaN unless above 0: HRNet's lists write -1 for no scale."""
    return value if value is not None and 0 < value < _MAX_COORDINATE else math.nan


def _whole_numbers(cell: Any, where: str) -> set[int]:
    array = np.ravel(cell)
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise UserError(f"{where}: expected numbers in single_person, found {short(cell)}")
    return {int(value) for value in array}
