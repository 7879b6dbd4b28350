"""One picture of one or several people of a video: view, poses, light, camera, and its marks."""

from dataclasses import dataclass

import cv2
import numpy as np

from .activities import CATEGORIES, SCALE_SPREAD
from .figure import figure_surfaces
from .looks import Light, sample_light
from .outfits import Outfit, sample_outfit
from .poses import FAMILIES, Family, sample_joints, sample_view
from .render import Lens, Squares, lit_squares, paint_squares, seen_joints, under_squares
from .scene import Camera
from .skeleton import HEAD_TOP, UPPER_NECK, Body, Build, pose_body, sample_build
from .stage import Stage, paint_bar, paint_front, paint_shadow, paint_stage, sample_stage

_FRAME = 720.0  # height of most of MPII's frames, in which its scales are measured
_HEIGHTS = (300, 400)  # of ours
_FORESHORTENED = 0.66  # least length of a seen head: a person's scale is measured by the head
_LEGS = (0, 1, 4, 5)
_CUT = 0.08  # share of people who would fit into the picture and yet stand half below its end


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """What all pictures of a video share."""

    category: str
    activity: str
    families: tuple[str, ...]
    stage: Stage
    light: Light
    camera: Camera
    size: tuple[int, int]  # height, width
    cast: tuple[tuple[Build, Outfit], ...]  # who appears


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mark:
    """One annotated person: places in 0-based pixels."""

    points_K2: np.ndarray
    labelled_K: np.ndarray
    seen_K: np.ndarray
    head_length: float  # upper neck to head top


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
    """A picture (H, W, 3) 8 bits (blue, green, red), and its people."""

    picture: np.ndarray
    marks: tuple[Mark, ...]
    jpeg: int


def sample_video(category: str, generator: np.random.Generator) -> Video:
    """A video of this category."""
    kind = CATEGORIES[category]
    activity, families = kind.activities[int(generator.integers(len(kind.activities)))]
    height = int(generator.integers(_HEIGHTS[0], _HEIGHTS[1] + 1))
    aspect = float(generator.choice((16 / 9, 4 / 3, 1.0, 0.75), p=(0.55, 0.27, 0.08, 0.1)))
    stage = sample_stage(kind.place, generator)
    outdoors = stage.sky is not None
    return Video(
        category=category,
        activity=activity,
        families=families,
        stage=stage,
        light=sample_light(generator, hardness=0.85 if outdoors else 0.5),
        camera=_sample_camera(generator),
        size=(height, int(height * aspect)),
        cast=tuple(
            (sample_build(generator), sample_outfit(stage.place, generator)) for _ in range(3)
        ),
    )


def take_snapshot(
    video: Video, num_people: int, bank: np.ndarray, generator: np.random.Generator
) -> Snapshot:
    """A picture of `num_people` annotated people of the video, and perhaps others behind."""
    height, width = video.size
    horizon = height * generator.uniform(0.25, 0.95)
    picture = paint_stage(video.stage, height, width, horizon, bank, generator)
    while generator.random() < 0.22:  # somebody far behind, without marks
        _add_passer(picture, video, generator)
    kind = CATEGORIES[video.category]
    scale = _torso_pixels(video, kind.scale, generator) / num_people**0.2
    shares = (np.arange(num_people) + 0.5) / num_people
    placed = []
    for number in generator.permutation(num_people):
        build, outfit = video.cast[int(number) % len(video.cast)]
        family = FAMILIES[str(generator.choice(video.families))]
        body, lens = _compose(build, family, scale, shares[number], video, generator)
        squares = _paint_person(picture, body, outfit, lens, video, generator, family)
        placed.append((int(number), body, lens, squares))
    covers = _paint_covers(picture, placed, kind.hidden, video.stage, generator)
    camera = video.camera
    developed = camera.develop(picture, bank, generator)
    marks = []
    for _, body, lens, squares in sorted(placed, key=lambda item: item[0]):
        later = [other for _, _, _, other in placed[_place_of(placed, body) + 1 :]]
        marks.append(_mark(body, lens, squares, later, covers, (height, width), generator))
    return Snapshot(
        picture=developed,
        marks=tuple(mark for mark in marks if mark is not None),
        jpeg=camera.jpeg,
    )


def _place_of(placed: list[tuple[int, Body, Lens, Squares]], body: Body) -> int:
    return next(index for index, item in enumerate(placed) if item[1] is body)


def _torso_pixels(video: Video, median: float, generator: np.random.Generator) -> float:
    """Pixels per torso: MPII's scale x 200 is 6 times upper neck to head top, 0.6 torsos long."""
    scale = median * np.exp(SCALE_SPREAD * generator.normal())
    return float(scale * 200 / _FRAME * video.size[0] / 3.6)


def _compose(
    build: Build,
    family: Family,
    scale: float,
    share: float,
    video: Video,
    generator: np.random.Generator,
) -> tuple[Body, Lens]:
    """A pose whose head is not seen from above or below, and where it stands in the picture."""
    for _ in range(20):
        body = pose_body(build, sample_joints(family, sample_view(generator), generator))
        distance = float(generator.uniform(5.0, 18.0))
        flat = Lens(distance=distance, scale=1.0, offset=np.zeros(2)).project(body.points_K3)
        seen = float(np.linalg.norm(flat[HEAD_TOP] - flat[UPPER_NECK])) / build.head
        if _FORESHORTENED <= seen <= 1.5:
            break
    height, width = video.size
    low, high = flat.min(axis=0) - 0.12, flat.max(axis=0) + 0.12
    extent = high - low
    upright = flat[HEAD_TOP, 1] < flat[:, 1].mean() - 0.6
    if not upright or generator.random() < 0.2:  # such people are mostly shown whole
        scale = min(
            scale, generator.uniform(0.8, 1.02) * float(np.min((height, width) / extent[::-1]))
        )
    offset = np.empty(2)
    for axis, size in ((0, width), (1, height)):
        room = size - scale * extent[axis]
        if axis == 0:
            wish = size * (share + generator.normal(0, 0.07)) - scale * (low + high)[0] / 2
            least, most = -scale * low[0], size - scale * high[0]
            offset[0] = np.clip(wish, min(least, most), max(least, most))
        elif room >= 0 and upright and generator.random() < _CUT:
            offset[1] = size - scale * (low[1] + extent[1] * generator.uniform(0.62, 0.95))
        elif room >= 0:
            offset[1] = -scale * low[1] + room * generator.beta(2.0, 1.6)
        else:  # the head is in the picture, the legs are not
            offset[1] = -scale * low[1] + size * generator.uniform(0.0, 0.12)
            if flat[HEAD_TOP, 1] > flat[:, 1].mean():
                offset[1] = size - scale * high[1] - size * generator.uniform(0.0, 0.12)
    return body, Lens(distance=distance, scale=scale, offset=offset)


def _paint_person(
    picture: np.ndarray,
    body: Body,
    outfit: Outfit,
    lens: Lens,
    video: Video,
    generator: np.random.Generator,
    family: Family,
) -> Squares:
    squares = lit_squares(figure_surfaces(body, outfit), lens, video.light, generator)
    if family.grounded and generator.random() < 0.7:
        flat = lens.project(body.points_K3)
        foot = np.array([flat[[0, 5], 0].mean(), squares.corners[..., 1].max()])
        paint_shadow(picture, foot, lens.scale, generator)
    paint_squares(picture, squares, soften=max(0.5, 0.012 * lens.scale))
    return squares


def _add_passer(picture: np.ndarray, video: Video, generator: np.random.Generator) -> None:
    """A smaller person somewhere behind, in everyday poses."""
    outfit, build = sample_outfit(video.stage.place, generator), sample_build(generator)
    family = FAMILIES[str(generator.choice(("stand", "walk", "sit", "work")))]
    body = pose_body(build, sample_joints(family, sample_view(generator), generator))
    height, width = video.size
    lens = Lens(
        distance=14.0,
        scale=height * float(generator.uniform(0.04, 0.16)),
        offset=generator.uniform((0.0, 0.3 * height), (width, 0.75 * height)),
    )
    _paint_person(picture, body, outfit, lens, video, generator, family)


def _paint_covers(
    picture: np.ndarray,
    placed: list[tuple[int, Body, Lens, Squares]],
    hidden: float,
    stage: Stage,
    generator: np.random.Generator,
) -> list[np.ndarray]:
    """Things in front of people; outlines of what was painted."""
    covers = []
    boxes, levels = [], []
    for _, body, lens, _ in placed:
        flat = lens.project(body.points_K3)
        boxes.append(np.concatenate([flat.min(axis=0), flat.max(axis=0)]))
        hips, ankles = flat[[2, 3], 1].mean(), flat[[0, 5], 1].mean()
        levels.append(hips + generator.uniform(0.05, 0.85) * (ankles - hips))
    box_P4, level = np.array(boxes), max(levels)
    # Heads and arms stay in sight, and nobody who lies is hidden.
    low_enough = (level > box_P4[:, 1] + 0.45 * (box_P4[:, 3] - box_P4[:, 1])).all()
    low_enough &= (box_P4[:, 3] - box_P4[:, 1] > 0.8 * (box_P4[:, 2] - box_P4[:, 0])).all()
    if low_enough and generator.random() < hidden:
        around = np.concatenate([box_P4[:, :2].min(axis=0), box_P4[:, 2:].max(axis=0)])
        covers.append(paint_front(picture, around, level, stage, generator))
    for box in box_P4:
        if generator.random() < 0.08:
            covers.append(paint_bar(picture, box, stage, generator))
    return covers


def _mark(
    body: Body,
    lens: Lens,
    squares: Squares,
    later: list[Squares],
    covers: list[np.ndarray],
    size: tuple[int, int],
    generator: np.random.Generator,
) -> Mark | None:
    """The marks an annotator would set: none outside, few on legs that cannot be seen."""
    points_K2 = lens.project(body.points_K3)
    height, width = size
    labelled_K = ((points_K2 >= -0.5) & (points_K2 <= np.array([width, height]) - 0.5)).all(axis=1)
    seen_K = seen_joints(body.points_K3, squares, lens)
    covered_K = np.zeros(len(points_K2), dtype=bool)
    for outline in covers:
        polygon = outline.astype(np.float32)
        for joint, point in enumerate(points_K2):
            inside = cv2.pointPolygonTest(polygon, (float(point[0]), float(point[1])), False) >= 0
            covered_K[joint] |= inside
    guessed_K = generator.random(len(points_K2)) < 0.85
    guessed_K[list(_LEGS)] = generator.random(4) < 0.15
    labelled_K &= ~covered_K | guessed_K
    for other in later:
        cover_K = under_squares(points_K2, other).any(axis=1)
        seen_K &= ~cover_K
    if not labelled_K[[UPPER_NECK, HEAD_TOP]].all() or labelled_K.sum() < 6:
        return None
    return Mark(
        points_K2=points_K2,
        labelled_K=labelled_K,
        seen_K=seen_K & ~covered_K,
        head_length=float(np.linalg.norm(points_K2[HEAD_TOP] - points_K2[UPPER_NECK])),
    )


def _sample_camera(generator: np.random.Generator) -> Camera:
    warm = generator.normal(0.0, 0.07)
    return Camera(
        gain=float(generator.uniform(0.75, 1.2)),
        gamma=float(generator.uniform(0.8, 1.35)),
        saturation=0.0 if generator.random() < 0.04 else float(generator.uniform(0.65, 1.25)),
        cast=np.array([1 - warm, 1 + generator.normal(0, 0.025), 1 + warm]),
        blur=float(generator.uniform(0.3, 1.4)),
        motion=float(generator.uniform(2, 6)) if generator.random() < 0.12 else 0.0,
        noise=float(generator.uniform(0.5, 7.0)),
        jpeg=int(generator.integers(55, 93)),
    )
