"""Writer of MPII's annotation file, in the nesting of the official one.

`mpii_human_pose_v1_u12_1.mat` holds RELEASE: annolist (image.name, annorect, vidx, frame_sec),
img_train, single_person, act, video_list; annorect holds the head rectangle x1, y1, x2, y2, scale,
objpos and annopoints.point with x, y, id, is_visible. Coordinates there are 1-based. The split is
written as in Tompson's `detections.mat`: the numbers of image and person of the validation people.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from fedcunet.data.mpii_files import Person
from fedcunet.files import write_atomically

_EMPTY = np.zeros((0, 0))
# The official file tells nothing of the visibility of upper neck and head top.
_WITHOUT_VISIBILITY = (8, 9)
# scipy writes the time here: the same people should give the same bytes.
_HEADER = b"MATLAB 5.0 MAT-file, written by fedcunet".ljust(116)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReleaseImage:
    """One image of the file.

    Attributes:
        name: file name.
        people: its people, with centre, scale and head rectangle; activity, category and video are
            those of the first.
        visible_PK: bool, whether each joint of each person can be seen.
        frame_seconds: where in its video the image was taken.
    """

    name: str
    people: Sequence[Person]
    visible_PK: np.ndarray
    frame_seconds: float = 0.0


def struct_array(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """A MATLAB struct array: one set of fields, `[]` where a record lacks one."""
    names = list(dict.fromkeys(name for record in records for name in record))
    array = np.empty(len(records), dtype=[(name, object) for name in names])
    for row, record in enumerate(records):
        for name in names:
            array[row][name] = record.get(name, _EMPTY)
    return array


def write_release(
    path: Path, images: Sequence[ReleaseImage], *, videos: Sequence[str], activities: Sequence[str]
) -> None:
    """Write the annotations of `images`, all of them training images of MPII (`img_train` 1).

    Args:
        path: the `.mat` file.
        images: in the order of the file.
        videos: their names; a person's video number 1 is the first.
        activities: names of all activities; the place of one, from 1 on, is its act_id.
    """
    act_ids = {name: float(number) for number, name in enumerate(activities, start=1)}
    acts, singles = [], np.empty(len(images), dtype=object)
    for index, image in enumerate(images):
        first = image.people[0]
        acts.append(
            {
                "cat_name": first.category,
                "act_name": first.activity,
                "act_id": act_ids[first.activity],
            }
        )
        singles[index] = np.arange(1.0, len(image.people) + 1)
    video_list = np.empty(len(videos), dtype=object)
    video_list[:] = list(videos)
    release = {
        "annolist": struct_array([_image(image) for image in images]),
        "img_train": np.ones(len(images), dtype=np.uint8),
        "version": "12",
        "single_person": singles,
        "act": struct_array(acts),
        "video_list": video_list,
    }
    _save(path, {"RELEASE": release})


def write_places(path: Path, places: Sequence[tuple[int, int]]) -> None:
    """Write the validation people, 1-based (image, person), as `detections.mat` names them."""
    images, people = np.array(places, dtype=np.float64).reshape(-1, 2).T
    _save(path, {"RELEASE_img_index": images[None], "RELEASE_person_index": people[None]})


def _image(image: ReleaseImage) -> dict[str, Any]:
    return {
        "image": {"name": image.name},
        "annorect": struct_array(
            [
                _person(person, visible_K)
                for person, visible_K in zip(image.people, image.visible_PK, strict=True)
            ]
        ),
        "frame_sec": float(image.frame_seconds),
        "vidx": float(image.people[0].video),
    }


def _person(person: Person, visible_K: np.ndarray) -> dict[str, Any]:
    assert person.head_box is not None
    assert person.centre is not None
    points = [
        {
            "x": float(person.points_K2[joint, 0] + 1.0),
            "y": float(person.points_K2[joint, 1] + 1.0),
            "id": float(joint),
            "is_visible": _EMPTY if joint in _WITHOUT_VISIBILITY else str(int(visible_K[joint])),
        }
        for joint in np.flatnonzero(person.labelled_K).tolist()
    ]
    corners = dict(zip(("x1", "y1", "x2", "y2"), person.head_box, strict=True))
    return corners | {
        "annopoints": {"point": struct_array(points)},
        "scale": float(person.scale),
        "objpos": {"x": person.centre[0] + 1.0, "y": person.centre[1] + 1.0},
    }


def _save(path: Path, variables: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True, oned_as="row")
    coded = bytearray(buffer.getvalue())
    coded[: len(_HEADER)] = _HEADER
    write_atomically(path, bytes(coded))
