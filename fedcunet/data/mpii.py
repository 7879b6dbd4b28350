"""Reader of MPII Human Pose (Andriluka et al., CVPR 2014): people with 16 joints.

    images/*.jpg
    mpii_human_pose_v1_u12_1.mat     the official annotations; also below annot/ or its own folder
    annot/train.json, valid.json     HRNet's lists; gt_valid.mat beside them gives head rectangles
    mpii_annotations.json            the list of CPM and of the paper's code
    detections.mat                   Tompson's predictions, whose indices name the validation people

The official test joints are withheld: as in the literature, "test" here is the validation split of
Tompson et al. ("Efficient object localization using convolutional networks", CVPR 2015), 2958
people of the training images. It is read from the first of these that is there: valid.json, a
CPM list, detections.mat. With the `.mat` alone the split is this project's own: of the training
images that are there, a tenth, chosen by the hash of their names, and a score on it compares runs
of this project only. In every case other people of a validation image take part in nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedcunet.data.annotations import (
    MPII16,
    Annotation,
    AnnotationSet,
    BoxOrigin,
    square_landmark_box,
)
from fedcunet.data.mpii_files import (
    Person,
    read_head_boxes,
    read_json,
    read_places,
    read_release,
)
from fedcunet.errors import UserError

SUBSETS = ("train", "test", "valid", "all")
# People of the usual lists, for `fedcunet data check`.
OFFICIAL_COUNTS = {"train": 22246, "test": 2958}
_MAT = "mpii_human_pose_v1_u12_1.mat"
_CPM_JSON = "mpii_annotations.json"
_FOLDERS = (".", "annot", "annotations", "mpii_human_pose_v1_u12_2", "mpii_human_pose_v1_u12_1")
_OWN_TEST_SHARE = 0.1
_UPPER_NECK, _HEAD_TOP = 8, 9
# The box of the joints lies inside the body's outline: 1.2 times the scheme's crop factor 1.25 is
# the crop of LSP's people.
_LANDMARK_BOX_GROWTH = 1.2


def load_mpii(
    root: Path, subset: str, *, boxes: str = "landmarks", name: str = "mpii"
) -> AnnotationSet:
    """People of one subset of MPII below `root`.

    A person's box is the usual one: the centre 15 * scale lower than annotated and sides of
    200 * scale, of which the scheme's crop takes 1.25 times as much (HRNet, pytorch-pose, the
    paper's code). Without centre or scale it is the box of the joints.

    The head size of PCKh is 0.6 times the diagonal of the head rectangle; without one 25 * scale,
    which is equal on all 2958 validation people, or else 0.75 times the distance from upper neck
    to head top.

    Args:
        root: the folder with images and one of the annotation files above.
        subset: "train", "test" or "valid" (the same), or "all".
        boxes: "landmarks", the default of every data set, and "given" both mean the box above:
            MPII's people come with their own.
        name: the data set's name in the result.

    Raises:
        UserError: no usable annotation file or no image is there, or a file is damaged.
    """
    root = Path(root)
    if boxes not in ("landmarks", "given"):
        raise UserError(f"{name}: expected boxes 'given', found {boxes!r}")
    if subset not in SUBSETS:
        raise UserError(f"{name}: expected subset {', '.join(SUBSETS)}, found {subset!r}")
    if not root.is_dir():
        raise UserError(f"{name}: {root} is not a folder: expected the folder that holds images")
    problems: list[str] = []
    people = _split_people(root, subset, name, problems)
    annotations = _annotations(root / "images", people, name, problems)
    if not annotations:
        raise UserError(
            f"{name} subset {subset!r}: expected people with images in {root / 'images'}, "
            f"found {'; '.join(problems[-2:]) or 'none'}"
        )
    return AnnotationSet(
        name=name,
        subset=subset,
        scheme=MPII16,
        annotations=tuple(annotations),
        problems=tuple(problems),
    )


def has_annotations(root: Path) -> bool:
    """Whether one of the annotation files is there."""
    return any(_find(root, name) for name in (_MAT, _CPM_JSON, "train.json", "valid.json"))


def _split_people(root: Path, subset: str, name: str, problems: list[str]) -> list[Person]:
    """The people of the subset, whether or not their images are there."""
    mat = _find(root, _MAT)
    listed = _read_lists(root, name, problems, subset)
    if mat is None and listed is None:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{name}: expected {_MAT}, annot/train.json and valid.json, or {_CPM_JSON} "
            f"in {root}, found {found}"
        )
    if mat is not None:
        train, test, held_back = _split_release(root, read_release(mat), listed, name, problems)
    else:
        assert listed is not None
        train, test = listed
        held_back = {person.image for person in test}
    alone = [person for person in train if person.image not in held_back]
    if len(alone) < len(train) and subset in ("train", "all"):
        problems.append(
            f"{name}: {len(train) - len(alone)} other people of validation images; "
            "left out of training"
        )
    return {"train": alone, "all": alone + test}.get(subset, test)


def _split_release(
    root: Path,
    people: list[Person],
    listed: tuple[list[Person], list[Person]] | None,
    name: str,
    problems: list[str],
) -> tuple[list[Person], list[Person], set[str]]:
    """Everybody else, the validation people, and the images that training must not see."""
    detections = _find(root, "detections.mat")
    if listed is not None and listed[1]:
        chosen = _matched(people, listed[1])
        held_back = {person.image for person in listed[1]}
        lost = len(listed[1]) - len(chosen)
        if lost:
            problems.append(
                f"{name}: {lost} of {len(listed[1])} listed validation people are not in {_MAT}"
            )
    elif detections is not None:
        places = read_places(detections)
        chosen = {index for index, person in enumerate(people) if person.place in places}
        numbers = {image for image, _ in places}
        held_back = {person.image for person in people if person.place[0] in numbers}
        if len(chosen) < len(places):
            problems.append(
                f"{name}: {len(places) - len(chosen)} of {len(places)} validation people "
                f"of detections.mat are not in {_MAT}"
            )
    else:
        chosen = _own_split(people, root / "images")
        held_back = {people[index].image for index in chosen}
        problems.append(
            f"{name}: no valid.json, {_CPM_JSON} or detections.mat: "
            f"the split is this project's own, by image"
        )
    rest = [person for index, person in enumerate(people) if index not in chosen]
    return rest, [people[index] for index in sorted(chosen)], held_back


def _own_split(people: list[Person], images: Path) -> set[int]:
    """Indices of the people who stand apart in a tenth of the images that are there."""
    alone: dict[str, list[int]] = {}
    for index, person in enumerate(people):
        if person.labelled_K.any() and person.is_single is not False:
            alone.setdefault(person.image, []).append(index)
    there = sorted(
        (image for image in alone if (images / image).is_file()),
        key=lambda image: hashlib.sha256(image.encode()).digest(),
    )
    count = max(1, round(_OWN_TEST_SHARE * len(there))) if len(there) > 1 else 0
    return {index for image in there[:count] for index in alone[image]}


def _matched(people: list[Person], listed: list[Person]) -> set[int]:
    """Indices of the people who have image, position and scale of a listed one.

    CPM's lists round to three digits, hence the tolerance.
    """
    of_image: dict[str, list[int]] = {}
    for index, person in enumerate(people):
        of_image.setdefault(person.image, []).append(index)
    chosen: set[int] = set()
    for wanted in listed:
        for index in of_image.get(wanted.image, []):
            person = people[index]
            if (
                index not in chosen
                and person.centre is not None
                and wanted.centre is not None
                and math.dist(person.centre, wanted.centre) < 0.01
                and abs(person.scale - wanted.scale) < 0.001
            ):
                chosen.add(index)
                break
    return chosen


def _read_lists(
    root: Path, name: str, problems: list[str], subset: str
) -> tuple[list[Person], list[Person]] | None:
    """People for training and for validation from json lists; None if there is no list."""
    train, valid, cpm = (_find(root, file) for file in ("train.json", "valid.json", _CPM_JSON))
    has_mat = _find(root, _MAT) is not None
    if valid is not None or (train is not None and cpm is None):
        test = read_json(valid) if valid is not None else []
        if valid is not None and not has_mat:
            test = _with_head_boxes(valid.with_name("gt_valid.mat"), test)
        missing = [f for f, path in (("train.json", train), ("valid.json", valid)) if path is None]
        if missing and not has_mat:
            if (missing[0] == "train.json") == (subset == "train"):
                raise UserError(
                    f"{name} subset {subset!r}: expected {missing[0]} or {_MAT} in {root}, "
                    "found neither"
                )
            problems.append(f"{name}: no {missing[0]}")
        return (read_json(train) if train is not None and not has_mat else []), test
    if cpm is None:
        return None
    people = read_json(cpm)
    return (
        [person for person in people if not person.is_validation],
        [person for person in people if person.is_validation],
    )


def _with_head_boxes(path: Path, people: list[Person]) -> list[Person]:
    if not path.is_file() or not people:
        return people
    boxes = read_head_boxes(path, people)
    return [replace(person, head_box=box) for person, box in zip(people, boxes, strict=True)]


def _find(root: Path, name: str) -> Path | None:
    paths = (root / folder / name for folder in _FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _annotations(
    images: Path, people: Sequence[Person], name: str, problems: list[str]
) -> list[Annotation]:
    """What can be used of the people; `problems` counts what cannot."""
    annotations: list[Annotation] = []
    absent: set[str] = set()
    people_absent = unlabelled = without_box = without_rectangle = unscored = 0
    there: dict[str, bool] = {}
    for person in people:
        if not person.labelled_K.any():
            unlabelled += 1
            continue
        image = images / person.image
        if not there.setdefault(person.image, image.is_file()):
            absent.add(person.image)
            people_absent += 1
            continue
        box, origin = _box(person)
        if not box[2] > 0:
            unlabelled += 1
            continue
        head = _head_size(person)
        without_box += origin == "landmarks"
        without_rectangle += person.head_box is None
        unscored += not head > 0
        annotations.append(
            Annotation(
                image=image,
                points_K2=person.points_K2,
                labelled_K=person.labelled_K,
                box_xywh=box,
                box_origin=origin,
                source=name,
                photo=f"{name}/{image.stem}",
                head_size=head,
                activity=person.activity,
                category=person.category,
                video=person.video,
            )
        )
    counts = (
        (people_absent, f"people in {len(absent)} images that are not there; left out"),
        (unlabelled, "people have no joints or no place; left out"),
        (without_box, "people have no centre or scale; the box of their joints is used"),
        (without_rectangle, "people have no head rectangle; head sizes come from their scale"),
        (unscored, "people have no head size; PCKh leaves them out"),
    )
    total = len(people)
    problems.extend(f"{name}: {count} of {total} {what}" for count, what in counts if count)
    return annotations


def _box(person: Person) -> tuple[tuple[float, float, float, float], BoxOrigin]:
    """Square box (x, y, w, h) in 0-based pixels; side 0 where there is nothing to tell it by."""
    if person.centre is not None and math.isfinite(person.scale):
        side = 200 * person.scale
        x, y = person.centre
        return (x - side / 2, y + 15 * person.scale - side / 2, side, side), "given"
    x, y, side, _ = square_landmark_box(person.points_K2, person.labelled_K)
    margin = side * (_LANDMARK_BOX_GROWTH - 1) / 2
    return (x - margin, y - margin, side + 2 * margin, side + 2 * margin), "landmarks"


def _head_size(person: Person) -> float:
    """Head size of PCKh in image pixels; NaN where nothing gives it."""
    if person.head_box is not None:
        x1, y1, x2, y2 = person.head_box
        size = 0.6 * math.hypot(x2 - x1, y2 - y1)
        if size > 0:
            return size
    if math.isfinite(person.scale):
        return 25 * person.scale
    if person.labelled_K[[_UPPER_NECK, _HEAD_TOP]].all():
        head_2 = person.points_K2[_HEAD_TOP] - person.points_K2[_UPPER_NECK]
        return 0.75 * float(np.linalg.norm(head_2)) or math.nan
    return math.nan
