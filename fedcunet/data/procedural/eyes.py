"""Eyes and brows, painted exactly through the projected points 17 to 26 and 36 to 47."""

import cv2
import numpy as np

from . import draw
from .draw import mix
from .head import Pose
from .looks import FaceLook
from .shape import FaceShape

_BLACK = np.array([14.0, 12.0, 14.0])


def paint_eye(
    albedo: np.ndarray,
    points_K2: np.ndarray,
    shape: FaceShape,
    look: FaceLook,
    pose: Pose,
    *,
    left: bool,
) -> None:
    first = 36 if left else 42
    eye = points_K2[first : first + 6]
    unit, down, right = pose.scale, pose.direction(0, 1), pose.direction(1, 0)
    upper, lower = draw.curve(eye[:4]), draw.curve(eye[[3, 4, 5, 0]])
    if shape.eyes_open[0 if left else 1] > 0.2:
        _eyeball(albedo, np.concatenate([upper, lower[1:-1]]), eye.mean(axis=0), look, pose)
    draw.stroke(
        albedo, [lower + 0.012 * down], mix(look.skin, look.skin * 0.4, 0.35 + 0.4 * look.makeup), 1
    )
    dark = mix(look.skin * 0.6, np.minimum(look.skin * 0.25, 45), 0.7 + 0.3 * look.makeup)
    outer, near = (eye[0], eye[1]) if left else (eye[3], eye[2])
    lash = outer + (-right if left else right) * 0.035 - down * 0.02 * (1 + look.makeup)
    above = 0.012 * down
    draw.stroke(
        albedo,
        [upper - above, np.stack([near, outer, lash]) - above],
        dark,
        (0.024 + 0.02 * look.makeup) * unit,
    )


def _eyeball(
    albedo: np.ndarray, outline: np.ndarray, middle: np.ndarray, look: FaceLook, pose: Pose
) -> None:
    height, width = albedo.shape[:2]
    low = np.clip(np.floor(outline.min(axis=0)).astype(int) - 2, 0, (width - 1, height - 1))
    high = np.clip(np.ceil(outline.max(axis=0)).astype(int) + 3, low + 1, (width, height))
    region = albedo[low[1] : high[1], low[0] : high[0]]
    ball = np.empty_like(region)
    ball[:] = mix(np.array([212.0, 216.0, 226.0]), look.skin, 0.22)
    radius = 0.085 * pose.scale
    wide = radius * max(0.6, abs(float(pose.rotation[2, 2])) ** 0.5)
    centre = middle - low - pose.direction(0, 0.012) + pose.direction(*look.gaze)
    iris = draw.ellipse(centre, np.array([wide, 0.0]), np.array([0.0, radius]))
    draw.fill(ball, iris, look.iris * 0.6)
    draw.fill(ball, centre + 0.75 * (iris - centre), look.iris)
    draw.fill(ball, centre + 0.45 * (iris - centre), _BLACK)
    # The upper lid shades the ball; a light is reflected beside the pupil.
    ball[: 1 + int(0.35 * len(ball))] = ball[: 1 + int(0.35 * len(ball))] * np.float32(0.84)
    draw.fill(
        ball, centre + np.array([0.3, -0.35]) * radius + 0.22 * (iris - centre), (240, 240, 240)
    )
    mask = np.zeros(region.shape[:2], np.uint8)
    cv2.fillPoly(mask, [draw.fixed(outline - low)], 255, cv2.LINE_AA, 4)
    weight = mask[..., None] / np.float32(255)
    region[:] = region + weight * (ball.astype(np.float32) - region) + np.float32(0.5)


def paint_brow(
    albedo: np.ndarray,
    points_K2: np.ndarray,
    look: FaceLook,
    pose: Pose,
    generator: np.random.Generator,
    *,
    left: bool,
) -> None:
    line = draw.curve(points_K2[17:22] if left else points_K2[26:21:-1])  # outer to inner
    along = np.linspace(0.0, 1.0, len(line))[:, None]
    thick = (
        look.brow_thickness
        * np.minimum(1.0, 0.3 + 2.2 * along)
        * np.minimum(1.0, 1.7 - along)
        * pose.direction(0, 1)
    )
    # 300-W's points run along the upper half of the hair.
    colour = look.hair * 0.6 if look.style not in ("cap", "scarf") else np.array([30.0, 34.0, 40.0])
    colour = np.minimum(colour, look.skin * 0.6)
    draw.fill(
        albedo,
        np.concatenate([line - 0.3 * thick, (line + 0.6 * thick)[::-1]]),
        mix(look.skin, colour, look.brow),
    )
    start = line[::2] + generator.uniform(0.0, 0.8, (len(line[::2]), 1)) * thick[::2]
    hairs = start[:, None] + np.stack([np.zeros(2), pose.direction(-0.07 if left else 0.07, -0.03)])
    draw.stroke(albedo, list(hairs), mix(look.skin, colour * 0.75, look.brow), 1)
