"""What a data reader hands on: images by path, their landmarks and their boxes.

Letters in array names: K landmarks, 2 = (x, y). Coordinates are 0-based pixels: (0, 0) is the
centre of the first pixel, so an image W wide covers x from -0.5 to W - 0.5.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

BoxOrigin = Literal["given", "landmarks", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandmarkScheme:
    """The meaning of the K landmarks of a data set.

    Attributes:
        name: "face68", "lsp14" or "mpii16".
        num_landmarks: K.
        flip_pairs: pairs of landmarks that change places in a mirrored image; the first of each is
            on the person's right.
        metric: the error measure of the scheme.
        lines: polylines of landmark indices, for drawing.
        crop_factor: side of the crop = longer side of the box times this (boxes of origin "image"
            are taken as they are).
        groups: names of the face's parts or the body's joints, with their landmarks.
    """

    name: str
    num_landmarks: int
    flip_pairs: tuple[tuple[int, int], ...]
    metric: Literal["nme", "pck", "pckh"]
    lines: tuple[tuple[int, ...], ...]
    crop_factor: float = 1.25
    groups: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def is_face(self) -> bool:
        """Faces have an error to make small, people a share of correct joints to make large."""
        return self.metric == "nme"

    @property
    def flip_order(self) -> tuple[int, ...]:
        """Index k of the result is the landmark that stands at k after mirroring."""
        order = list(range(self.num_landmarks))
        for left, right in self.flip_pairs:
            order[left], order[right] = right, left
        return tuple(order)


# The 29 pairs of the iBUG-68 scheme, as in mmpose and HRNet (there 1-based).
# fmt: off
_FACE68_PAIRS = (
    (0, 16), (1, 15), (2, 14), (3, 13), (4, 12), (5, 11), (6, 10), (7, 9),
    (17, 26), (18, 25), (19, 24), (20, 23), (21, 22),
    (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46),
    (31, 35), (32, 34),
    (48, 54), (49, 53), (50, 52), (55, 59), (56, 58), (60, 64), (61, 63), (65, 67),
)
# fmt: on

FACE68 = LandmarkScheme(
    name="face68",
    num_landmarks=68,
    flip_pairs=_FACE68_PAIRS,
    metric="nme",
    lines=(
        tuple(range(17)),
        tuple(range(17, 22)),
        tuple(range(22, 27)),
        tuple(range(27, 31)),
        tuple(range(31, 36)),
        (*range(36, 42), 36),
        (*range(42, 48), 42),
        (*range(48, 60), 48),
        (*range(60, 68), 60),
    ),
    groups=(
        ("jaw", tuple(range(17))),
        ("brows", tuple(range(17, 27))),
        ("nose", tuple(range(27, 36))),
        ("eyes", tuple(range(36, 48))),
        ("mouth", tuple(range(48, 68))),
    ),
)

# Order: right ankle, knee, hip, left hip, knee, ankle, right wrist, elbow, shoulder, left shoulder,
# elbow, wrist, neck, head top. The box of the joints lies inside the body's outline (hands, feet
# and hair stick out), hence the wider crop.
LSP14 = LandmarkScheme(
    name="lsp14",
    num_landmarks=14,
    flip_pairs=((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9)),
    metric="pck",
    lines=((0, 1, 2, 3, 4, 5), (6, 7, 8, 12, 9, 10, 11), (12, 13), (8, 2), (9, 3)),
    crop_factor=1.5,
    groups=(
        ("ankles", (0, 5)),
        ("knees", (1, 4)),
        ("hips", (2, 3)),
        ("wrists", (6, 11)),
        ("elbows", (7, 10)),
        ("shoulders", (8, 9)),
        ("head", (12, 13)),
    ),
)

# Order: right ankle, knee, hip, left hip, knee, ankle, pelvis, thorax, upper neck, head top, right
# wrist, elbow, shoulder, left shoulder, elbow, wrist. (The official README skips id 11.)
MPII16 = LandmarkScheme(
    name="mpii16",
    num_landmarks=16,
    flip_pairs=((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)),
    metric="pckh",
    lines=((0, 1, 2, 6, 3, 4, 5), (10, 11, 12, 7, 13, 14, 15), (6, 7, 8, 9)),
    groups=(
        ("ankles", (0, 5)),
        ("knees", (1, 4)),
        ("hips", (2, 3)),
        ("wrists", (10, 15)),
        ("elbows", (11, 14)),
        ("shoulders", (12, 13)),
        ("trunk", (6, 7)),
        ("head", (8, 9)),
    ),
)

SCHEMES = {scheme.name: scheme for scheme in (FACE68, LSP14, MPII16)}

# LSP's joints as MPII ids (HMR, Kanazawa et al., CVPR 2018, src/datasets/lsp_to_tfrecords.py): LSP
# has neither pelvis nor thorax, and its neck is MPII's upper neck.
LSP14_IN_MPII16 = (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9)


def landmarks_in(source: LandmarkScheme, target: LandmarkScheme) -> tuple[int, ...] | None:
    """For each landmark of `target` the index of the same one in `source`; None if some lack."""
    if source.name == target.name:
        return tuple(range(target.num_landmarks))
    known = {(MPII16.name, LSP14.name): LSP14_IN_MPII16}
    return known.get((source.name, target.name))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Annotation:
    """One face or person of one image.

    Attributes:
        image: the image file; readers check that it exists and do not decode it.
        points_K2: float64 (x, y) in 0-based image pixels.
        labelled_K: bool; False = no annotation: never trained on, never scored (except where the
            metric's convention says so).
        box_xywh: left, top, width, height in the same coordinates as the points.
        box_origin: where the box comes from.
        source: the part of the data set, such as "helen/trainset".
        photo: all crops of one photo share it; partitions and splits keep a photo whole.
        head_size: the length that PCKh divides by, in image pixels; NaN where unknown.
        activity: what the person does, "" where unknown.
        category: the kind of activity, "" where unknown.
        video: number of the video that the photo was taken from, -1 where unknown.
    """

    image: Path
    points_K2: np.ndarray
    labelled_K: np.ndarray
    box_xywh: tuple[float, float, float, float]
    box_origin: BoxOrigin
    source: str
    photo: str
    head_size: float = math.nan
    activity: str = ""
    category: str = ""
    video: int = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AnnotationSet:
    """One subset of one data set.

    Attributes:
        name: the data set's name in `fedcunet.data.DATASETS`.
        subset: the subset's name, as asked for.
        scheme: what the landmarks mean.
        annotations: in a fixed order (folder, then file name).
        problems: one line each: what was left out and why.
    """

    name: str
    subset: str
    scheme: LandmarkScheme
    annotations: tuple[Annotation, ...]
    problems: tuple[str, ...]


def square_landmark_box(
    points_K2: np.ndarray, labelled_K: np.ndarray
) -> tuple[float, float, float, float]:
    """Square (x, y, w, h) around the labelled points: their tight box with its longer side twice.

    The points must include two different labelled ones, else the side is 0.
    """
    points = points_K2[labelled_K]
    low, high = points.min(axis=0), points.max(axis=0)
    side = float((high - low).max())
    left, top = (low + high) / 2 - side / 2
    return float(left), float(top), side, side
