"""One photo of one or several people: scene, faces, camera; and the crop around each face."""

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np

from .accessories import paint_glasses, paint_occluder
from .features import paint_ear, paint_features
from .head import Pose, draw_head, hair_mesh, head_mesh
from .landmarks import posed_points, rotation
from .looks import FaceLook, Light, sample_light, sample_look
from .scene import Camera, ears_shown, paint_background, paint_body
from .shape import FaceShape, sample_shape
from .sources import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """One crop: picture (side, side, 3) 8 bits (blue, green, red), points (68, 2) from 0 on."""

    picture: np.ndarray
    points: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """All faces of one photo."""

    faces: tuple[Face, ...]
    jpeg: int


_LIMITS = np.radians([46.0, 28.0, 40.0])


def make_photo(
    source: Source, num_faces: int, bank: np.ndarray, generator: np.random.Generator
) -> Photo:
    """A photo of `num_faces` people side by side, cropped around each."""
    side = int(generator.integers(source.side[0], source.side[1] + 1))
    face_pixels = side * generator.uniform(*source.face)
    spacing = int(1.35 * face_pixels)
    canvas = paint_background(
        side, side + spacing * (num_faces - 1), bank, generator, clutter=source.clutter
    )
    light = sample_light(generator, hardness=source.hardness)
    everyone = []
    for index in generator.permutation(num_faces):  # who stands in front
        left = int(index) * spacing
        points = _add_person(canvas[:, left : left + side], source, light, face_pixels, generator)
        everyone.append((left, points))
    camera = _sample_camera(source, generator)
    picture = camera.develop(canvas, bank, generator)
    faces = [
        Face(picture=np.ascontiguousarray(picture[:, left : left + side]), points=points)
        for left, points in sorted(everyone, key=lambda item: item[0])
    ]
    return Photo(faces=tuple(faces), jpeg=camera.jpeg)


def _add_person(
    view: np.ndarray,
    source: Source,
    light: Light,
    face_pixels: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Paint one person on `view` (in place); returns the 68 points in its pixels."""
    shape = sample_shape(generator, expression=source.expression)
    look = sample_look(generator, occluders=source.occluders, glasses=source.glasses)
    spread = np.radians([source.yaw, source.pitch, source.roll])
    yaw, pitch, roll = (generator.standard_normal(3) * spread).clip(-_LIMITS, _LIMITS)
    seen_K3 = posed_points(shape, yaw, pitch)
    turn = rotation(yaw, pitch, roll)
    flat = (seen_K3 @ turn.T)[:, :2]
    box = np.ptp(flat, axis=0)
    scale = face_pixels / float(box.max()) * generator.uniform(0.92, 1.08)
    side = view.shape[0]
    middle = side * (0.5 + generator.normal(0, 0.025, 2).clip(-0.06, 0.06))
    offset = middle - scale * (flat.min(axis=0) + box / 2)
    pose = Pose(rotation=turn, scale=scale, offset=offset)
    points = pose.project(seen_K3)
    paint_person(view, points, shape, look, light, pose, generator)
    return points


def paint_person(
    view: np.ndarray,
    points: np.ndarray,
    shape: FaceShape,
    look: FaceLook,
    light: Light,
    pose: Pose,
    generator: np.random.Generator,
) -> None:
    """Paint a whole person on `view` (in place), from what is farthest to what is nearest."""
    skin_KL3, hair_KL3 = head_mesh(shape), hair_mesh(shape, look, generator)
    paint_body(view, shape, look, light, pose, hair_KL3, generator)
    turn = float(pose.rotation[0, 2])
    ear_light = {
        side: (light.ambient + light.key * max(0.1, side * float(light.direction[0]) + 0.5))
        * light.tint
        * 0.9
        for side in (-1.0, 1.0)
    }
    # Turned to the right (turn > 0) the ear on the left comes to the front.
    for side in (-1.0, 1.0):
        if ears_shown(look) and side * turn > -0.12:
            paint_ear(view, shape, look, pose, side, ear_light[side])
    # The head is drawn on a canvas of its own, no larger than it must be.
    extent = pose.project(np.concatenate([skin_KL3.reshape(-1, 3), hair_KL3.reshape(-1, 3)]))
    low = np.maximum(extent.min(axis=0).astype(int) - 3, 0)
    part = view[low[1] : int(extent[:, 1].max()) + 4, low[0] : int(extent[:, 0].max()) + 4]
    inner = dataclasses.replace(pose, offset=pose.offset - low)
    layer = draw_head(part.shape[:2], shape, look, light, inner, skin_KL3, hair_KL3, generator)
    paint_features(layer.albedo, points - low, shape, look, inner, generator)
    cv2.GaussianBlur(layer.albedo, (3, 3), 0.5, dst=layer.albedo)  # as soft as the skin around
    layer.compose(part)
    for side in (-1.0, 1.0):
        if ears_shown(look) and side * turn <= -0.12:
            paint_ear(view, shape, look, pose, side, ear_light[side])
    paint_glasses(view, points, look, pose, generator)
    paint_occluder(view, points, look, light, pose, generator)


def _sample_camera(source: Source, generator: np.random.Generator) -> Camera:
    warm = generator.normal(source.warmth, 0.06)
    grey = generator.random() < source.grey
    return Camera(
        gain=float(generator.uniform(*source.gain)),
        gamma=float(generator.uniform(0.85, 1.3)),
        saturation=0.0 if grey else float(generator.uniform(*source.saturation)),
        cast=np.array([1 - warm, 1 + generator.normal(0, 0.02), 1 + warm]),
        blur=float(generator.uniform(*source.blur)),
        motion=float(generator.uniform(2, 5)) if generator.random() < source.motion else 0.0,
        noise=float(generator.uniform(*source.noise)),
        jpeg=int(generator.integers(source.jpeg[0], source.jpeg[1] + 1)),
    )


def jpeg_again(picture: np.ndarray, quality: int) -> np.ndarray:
    """The picture after one lossy storage, for sources that are kept losslessly afterwards."""
    _, coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
