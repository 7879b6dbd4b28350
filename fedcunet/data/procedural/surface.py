"""The surface of a head: an outline that widens and narrows with height, and the face's relief.

Every height y has one horizontal cut: half an ellipse-like curve in front of the widest place, half
of another behind it. Axes and unit are those of shape.py.
"""

from dataclasses import dataclass

import numpy as np

from .shape import EAR_Y, MOUTH_Y, FaceShape

EAR_DEPTH = 1.1  # how far the first and last jaw point lie behind the bridge of the nose
CROWN = 1.38  # height of the skull above the ears
JAW_SPACING = 1.2  # exponent that spaces the jaw points along the outline


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Horizontal cuts of a head, one for each height."""

    half_width: np.ndarray
    front: np.ndarray  # depth z of the middle of the face, without relief
    side: np.ndarray  # depth z of the widest place
    back: np.ndarray  # how far the back of the head lies behind the widest place


def section(shape: FaceShape, y: np.ndarray) -> Section:
    """The cuts at heights `y`, any shape."""
    # Share of the way from ear to chin, and from ear to crown.
    below = np.clip((y - EAR_Y) / (shape.chin_y - EAR_Y), 0.0, 1.0) ** (1 / JAW_SPACING)
    up = np.clip((EAR_Y - y) / CROWN, 0.0, 1.0)
    skull = np.sqrt(1.0 - up**2.6)
    round_ = 1.0 - below * below
    jaw = round_ ** (0.5 * shape.jaw_square) * (1.0 - 0.27 * below**6)
    # An upright forehead, a slightly receding chin.
    front = -0.06 * below - 0.08 * below**8 - EAR_DEPTH * (1.0 - (1.0 - up**2.4) ** 0.6)
    return Section(
        half_width=shape.width * jaw * skull,
        front=front,
        side=front - EAR_DEPTH * round_**0.42 * skull,
        back=1.15 * skull * np.sqrt(round_),
    )


def front_depth(shape: FaceShape, x: np.ndarray, y: np.ndarray, cut: Section) -> np.ndarray:
    """Depth z of the front of the head at (x, y), `cut` being `section(shape, y)`.

    Outside the outline it is the outline's.
    """
    across = np.clip(np.abs(x) / np.maximum(cut.half_width, 1e-6), 0.0, 1.0)
    bulge = (1.0 - across**2.2) ** 0.58
    flat = cut.side + (cut.front - cut.side) * bulge
    return np.asarray(flat + _relief(shape, x, y) * np.minimum(1.0, 3.0 * bulge))


def around_depth(
    shape: FaceShape, x: np.ndarray, y: np.ndarray, angle: np.ndarray, cut: Section
) -> np.ndarray:
    """Depth z all around the head: `angle` 0 is the front, pi the back."""
    turned = np.cos(angle)
    front = front_depth(shape, x, y, cut)
    return np.where(turned >= 0, front, cut.side + cut.back * turned)


def _relief(shape: FaceShape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What nose, brows, eyes, cheeks, lips and chin add to the depth at (x, y)."""
    x = np.abs(x) / shape.width

    def bump(cx: float, cy: float, wx: float, wy: float) -> np.ndarray:
        return np.asarray(np.exp(-(((x - cx) / wx) ** 2) - ((y - cy) / wy) ** 2))

    base = -0.55 + shape.nose_length
    tip = -0.55 + 0.76 * shape.nose_length
    along = np.clip((y + 0.55) / (tip + 0.55), 0.0, 1.0)
    # Rises evenly from the bridge to the tip, falls quickly to the upper lip.
    fall = np.clip((base + 0.03 - y) / (base + 0.03 - tip), 0.0, 1.0)
    rise = np.clip((y + 0.8) / 0.25, 0.0, 1.0)
    ridge = (0.08 + shape.nose_height * along) * np.sin(np.pi / 2 * fall) * rise * rise
    relief = ridge * np.exp(-((x / (0.09 + 0.055 * along)) ** 2))
    relief += 0.14 * bump(0.72 * shape.nose_width, base - 0.07, 0.075, 0.075)
    relief += 0.07 * bump(0.42, -0.72, 0.3, 0.09)
    relief += 0.06 * bump(shape.eye_distance, -0.515, 0.14, 0.08)
    relief -= 0.15 * bump(shape.eye_distance - 0.05, -0.52, 0.24, 0.15)
    relief += (shape.cheek + 0.07 * max(shape.smile, 0.0)) * bump(0.5, 0.0, 0.24, 0.24)
    line = MOUTH_Y + shape.mouth_drop
    relief += 0.13 * bump(0.0, line + 0.4 * shape.mouth_open, 0.34, 0.2 + 0.5 * shape.mouth_open)
    relief -= 0.06 * bump(0.0, line + shape.mouth_open + 0.24, 0.3, 0.06)
    relief += shape.chin * bump(0.0, shape.chin_y - 0.16, 0.24, 0.14)
    return np.asarray(relief)
