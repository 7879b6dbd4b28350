"""Nose, mouth, folds and ears, and with eyes.py all features, through the projected points."""

import cv2
import numpy as np

from . import draw
from .draw import mix
from .eyes import paint_brow, paint_eye
from .head import Pose
from .looks import FaceLook
from .shape import EAR_Y, FaceShape

_BRIGHTNESS = [
    (255 - share * np.arange(256)).clip(0, 255).astype(np.uint8) for share in (1.05, 1.0, 0.85)
]


def paint_features(
    albedo: np.ndarray,
    points_K2: np.ndarray,
    shape: FaceShape,
    look: FaceLook,
    pose: Pose,
    generator: np.random.Generator,
) -> None:
    """Paint all features of one face on `albedo` (8 bits, in place); `points_K2` in its pixels."""
    _soft_shades(albedo, points_K2, shape, look, pose)
    _nostrils(albedo, points_K2, look, pose)
    _mouth(albedo, points_K2, shape, look, pose, generator)
    for left in (True, False):
        paint_eye(albedo, points_K2, shape, look, pose, left=left)
        paint_brow(albedo, points_K2, look, pose, generator, left=left)
    if look.freckles > 0.55:
        spots = points_K2[30] + generator.normal(0, 0.3, (16, 2)) * pose.scale * (1, 0.7)
        for spot in draw.fixed(spots).tolist():
            cv2.circle(
                albedo,
                spot,
                10,
                mix(look.skin, look.skin * 0.6, look.freckles).tolist(),
                -1,
                cv2.LINE_AA,
                4,
            )


def _soft_shades(
    albedo: np.ndarray, points_K2: np.ndarray, shape: FaceShape, look: FaceLook, pose: Pose
) -> None:
    """Soft dark lines and hollows, drawn together on one map and blurred once."""
    unit, down, right = pose.scale, pose.direction(0, 1), pose.direction(1, 0)
    low = np.maximum((points_K2.min(axis=0) - 0.45 * unit).astype(int), 0)
    high = np.maximum((points_K2.max(axis=0) + 0.1 * unit).astype(int), low + 1)
    region = albedo[low[1] : high[1], low[0] : high[0]]
    shade: np.ndarray = np.zeros(region.shape[:2], np.uint8)
    points = points_K2 - low
    smile = max(shape.smile, 0.0)
    if look.age > 0.55:
        between = points[[19, 21, 22, 24]]
        draw.stroke(
            shade,
            [draw.curve(between - height * down) for height in (0.14, 0.24)],
            70 * look.age,
            1,
        )
    fold_depth = 100 * min(1.0, 0.15 + 0.45 * look.age + 0.45 * smile)
    for side, wing, corner in ((-1.0, 31, 48), (1.0, 35, 54)):
        out = side * right
        fold = [
            points[wing] - 0.1 * down + 0.08 * out,
            0.5 * (points[wing] + points[corner]) + 0.14 * out,
            points[corner] + (0.08 + 0.05 * smile) * out - 0.02 * down,
        ]
        draw.stroke(shade, [draw.curve(np.stack(fold))], fold_depth, 0.045 * unit)
        start = points[wing]
        crease = [
            start - 0.17 * down - 0.01 * out,
            start - 0.12 * down + 0.04 * out,
            start - 0.05 * down + 0.045 * out,
            start,
        ]
        draw.stroke(shade, [draw.curve(np.stack(crease))], 105, 0.035 * unit)
        small = 0.03 * unit
        draw.fill(
            shade, draw.ellipse(points[corner], np.array([small, 0.0]), np.array([0.0, small])), 110
        )
    base = draw.curve(points[31:36])
    draw.fill(shade, np.concatenate([base, base[::-1] - 0.045 * down]), 90)
    bottom = draw.curve(points[54:60])
    draw.stroke(shade, [bottom[3:-2] + 0.055 * down], 75, 0.06 * unit)
    for eye in (points[36:42], points[42:48]):
        lid = draw.curve(eye[:4])
        band = np.concatenate([lid, (lid - 0.09 * down)[::-1]])
        draw.fill(shade, band, 45 + 75 * look.makeup)
        crease = eye[:4] - down * np.array([0.03, 0.06, 0.06, 0.03])[:, None]
        draw.stroke(shade, [draw.curve(crease)], 95 + 30 * look.makeup, 1)
        bag = eye[[3, 4, 5, 0]] + down * np.array([0.05, 0.09, 0.08, 0.04])[:, None]
        draw.stroke(shade, [draw.curve(bag)], 30 + 50 * look.age, 0.03 * unit)
    shade = cv2.GaussianBlur(shade, (0, 0), 0.02 * unit)
    # Blue is lost first: shades on skin are warm.
    bright = cv2.merge([cv2.LUT(shade, table) for table in _BRIGHTNESS])
    region[:] = cv2.multiply(region, bright, scale=1 / 255)


def _nostrils(albedo: np.ndarray, points_K2: np.ndarray, look: FaceLook, pose: Pose) -> None:
    down = pose.direction(0, 1)
    base = points_K2[31:36]
    open_up = float(np.clip(1.0 - 1.2 * pose.rotation[1, 2], 0.5, 1.5))
    for side, points in ((-1.0, base[:3]), (1.0, base[:1:-1])):
        hidden = side * float(pose.rotation[0, 2]) > 0.45
        nostril = points[1] + 0.3 * (points[0] - points[1]) - 0.025 * down
        hole = draw.ellipse(nostril, 0.32 * (points[2] - points[0]), 0.03 * down * open_up)
        draw.fill(albedo, hole, mix(look.skin, look.skin * 0.25, 0.3 if hidden else 0.8))


def _mouth(
    albedo: np.ndarray,
    points_K2: np.ndarray,
    shape: FaceShape,
    look: FaceLook,
    pose: Pose,
    generator: np.random.Generator,
) -> None:
    unit, down = pose.scale, pose.direction(0, 1)
    top, bottom = draw.curve(points_K2[48:55]), draw.curve(points_K2[[54, 55, 56, 57, 58, 59, 48]])
    inner_top = draw.curve(points_K2[[48, 60, 61, 62, 63, 64, 54]])
    inner_bottom = draw.curve(points_K2[[54, 64, 65, 66, 67, 60, 48]])
    draw.fill(albedo, np.concatenate([top, inner_top[::-1]]), look.lips * 0.86)
    draw.fill(albedo, np.concatenate([bottom, inner_bottom[::-1]]), look.lips)
    shine = (0.5 * (bottom + inner_bottom))[8:-8]
    draw.stroke(albedo, [shine], look.lips * 1.08 + 8 + 10 * look.makeup, 0.04 * unit)
    gap = shape.mouth_open
    if gap > 0.03:
        draw.fill(albedo, np.concatenate([inner_top, inner_bottom[1:-1]]), (34, 26, 62))
        if gap > 0.16:
            wide = 0.3 * (points_K2[64] - points_K2[60])
            tongue = draw.ellipse(points_K2[66], wide, 0.35 * gap * down, first=180, last=360)
            draw.fill(albedo, tongue, look.lips * 0.8)
        if shape.smile > 0.15 or generator.random() < 0.6:
            _teeth(albedo, inner_top, inner_bottom, down, generator)
    dark = np.minimum(look.lips * 0.42, 75)
    draw.stroke(albedo, [inner_top], dark, 0.02 * unit)


def _teeth(
    albedo: np.ndarray,
    top: np.ndarray,
    bottom: np.ndarray,
    down: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Teeth under the upper lip, within the opening; the corners of the mouth stay dark."""
    white = np.array([196.0, 214.0, 224.0]) * generator.uniform(0.8, 1.0)
    tall = np.linalg.norm(down)
    room = np.linalg.norm(bottom[::-1] - top, axis=1) / tall
    depth = np.minimum(0.11, 0.75 * room)
    part = slice(4, len(top) - 4)
    draw.fill(albedo, np.concatenate([top[part], (top + depth[:, None] * down)[part][::-1]]), white)
    ticks = [np.stack([top[i], top[i] + depth[i] * down]) for i in range(6, len(top) - 5, 3)]
    draw.stroke(albedo, ticks, white * 0.9, 1)
    if room.max() > 0.12 and generator.random() < 0.5:
        low = (bottom - 0.4 * depth[::-1, None] * down)[part]
        draw.fill(albedo, np.concatenate([bottom[part], low[::-1]]), white * 0.88)


def paint_ear(
    image: np.ndarray, shape: FaceShape, look: FaceLook, pose: Pose, side: float, light: np.ndarray
) -> None:
    """Paint the ear at image-left (`side` -1) or image-right (1) on a lit picture.

    `light` is what the skin's colour there is multiplied by, (3,).
    """
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)[:, None]
    middle = np.array([side * 1.03 * shape.width, EAR_Y + 0.24, -1.22])
    up, out = np.array([0.0, -0.33, -0.06]), np.array([side * 0.14, 0.0, -0.15])
    lobe = 1.0 + 0.35 * np.minimum(np.sin(angle), 0.0)  # narrower below
    outline = pose.project(middle + np.sin(angle) * up + lobe * np.cos(angle) * out)
    skin = look.skin * (0.94, 0.9, 1.0) * light
    draw.fill(image, outline, skin)
    draw.stroke(image, [np.concatenate([outline, outline[:1]])], skin * 0.8, 1)
    inner = outline.mean(axis=0) + 0.55 * (outline - outline.mean(axis=0))
    draw.blend(image, inner, skin * 0.65, 0.7, soften=0.03 * pose.scale)
