"""What people wear and hold in front of their faces; the landmarks stay where they are."""

import numpy as np

from . import draw
from .head import Pose
from .looks import FaceLook, Light


def paint_glasses(
    image: np.ndarray,
    points_K2: np.ndarray,
    look: FaceLook,
    pose: Pose,
    generator: np.random.Generator,
) -> None:
    """Frames with clear or dark lenses in front of the eyes, arms towards the ears."""
    if not look.glasses:
        return
    unit, right, down = pose.scale, pose.direction(1, 0), pose.direction(0, 1)
    dark = generator.random() < 0.7
    frame = np.full(3, generator.uniform(8, 50)) if dark else generator.uniform(60, 190, 3)
    width = unit * generator.uniform(0.02, 0.06)
    tall, squareness = generator.uniform(0.19, 0.25), generator.uniform(0.55, 1.0)
    angle = np.linspace(0, 2 * np.pi, 33)[:, None]
    across, along = (np.sign(c) * np.abs(c) ** squareness for c in (np.cos(angle), np.sin(angle)))
    lenses = []
    for eye in (points_K2[36:42], points_K2[42:48]):
        reach = np.linalg.norm(eye[3] - eye[0]) + 1e-6
        half = (eye[3] - eye[0]) / reach * max(0.75 * reach, 0.2 * unit)
        lenses.append(eye.mean(axis=0) + 0.03 * down + across * half + along * tall * down)
    ground = generator.uniform(5, 45, 3)
    for lens in lenses:
        if look.glasses == "sun":
            draw.blend(image, lens, ground, 0.93)
        elif generator.random() < 0.5:
            draw.blend(image, lens, (225, 220, 215), generator.uniform(0.0, 0.16))
    bridge = np.stack(
        [lenses[0][0], 0.5 * (lenses[0][0] + lenses[1][16]) - 0.05 * down, lenses[1][16]]
    )
    lines = [*lenses, bridge]
    for side, lens, ear in ((-1.0, lenses[0][16], 0), (1.0, lenses[1][0], 16)):
        if side * float(pose.rotation[0, 2]) < 0.25:
            lines.append(np.stack([lens, points_K2[ear] - 0.08 * down + 0.02 * side * right]))
    draw.stroke(image, lines, frame, width)


def paint_occluder(
    image: np.ndarray,
    points_K2: np.ndarray,
    look: FaceLook,
    light: Light,
    pose: Pose,
    generator: np.random.Generator,
) -> None:
    """A hand, bar, cup or microphone over part of the face."""
    unit = pose.scale
    if look.occluder == "hand":
        _hand(
            image,
            points_K2,
            look.skin * (light.ambient + 0.6 * light.key) * light.tint,
            unit,
            generator,
        )
    elif look.occluder == "bar":
        middle = points_K2[int(generator.integers(0, 68))]
        angle = generator.uniform(0, np.pi)
        along = 6 * unit * np.array([np.cos(angle), np.sin(angle)])
        colour = generator.uniform(10, 200) * generator.uniform(0.7, 1.2, 3)
        draw.stroke(
            image,
            [np.stack([middle - along, middle + along])],
            colour,
            unit * generator.uniform(0.15, 0.45),
        )
    elif look.occluder:
        mouth = points_K2[48:].mean(axis=0) + generator.normal(0, 0.15, 2) * unit + (0, 0.3 * unit)
        cup = look.occluder == "cup"
        side = np.array([unit * (0.38 if cup else 0.22), 0.0])
        colour = generator.uniform(20, 245, 3) if cup else np.full(3, 40.0)
        low = mouth + np.array([generator.normal(0, 0.4) * unit, 2.2 * unit])
        draw.fill(
            image,
            np.stack([mouth - side, mouth + side, low + 0.7 * side, low - 0.7 * side]),
            colour,
        )
        draw.fill(image, draw.ellipse(mouth, side, 0.4 * side[::-1]), colour * 0.75)


def _hand(
    image: np.ndarray,
    points_K2: np.ndarray,
    skin: np.ndarray,
    unit: float,
    generator: np.random.Generator,
) -> None:
    anchor = points_K2[int(generator.choice([1, 4, 6, 8, 10, 12, 15, 48, 54, 19, 24]))]
    # Fingers point upwards; at the forehead they come from the side.
    tilt = 0.0 if anchor[1] > points_K2[30, 1] else 0.4
    angle = generator.uniform(-2.3, -0.8) + generator.normal(0, tilt)
    along = np.array([np.cos(angle), np.sin(angle)])
    aside = np.array([-along[1], along[0]])
    skin = skin * generator.uniform(0.85, 1.08)
    length = generator.uniform(0.55, 0.9) * unit
    centre = anchor - 0.45 * unit * along
    arm = np.stack([centre, centre - 3 * unit * along + (0, unit)])
    draw.stroke(image, [arm], skin * 0.92, 0.55 * unit)
    draw.fill(image, draw.ellipse(centre, 0.42 * unit * aside, 0.42 * unit * along), skin * 0.96)
    for place, part in zip((-0.33, -0.11, 0.11, 0.33), (0.85, 1.0, 0.95, 0.75), strict=True):
        start = anchor + place * unit * aside - 0.3 * unit * along
        finger = np.stack([start, start + (along + 0.25 * place * aside) * length * part])
        draw.stroke(image, [finger + 0.03 * unit], skin * 0.66, 0.2 * unit)
        draw.stroke(image, [finger], skin, 0.18 * unit)
