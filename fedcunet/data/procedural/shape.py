"""Three-dimensional 68-point faces: identity, expression, surface and pose.

Axes as in an image: x to the right, y down, z towards the viewer. The unit is half the width of a
mean face at the ears, so a mean face spans x from -1 to 1 and its outer eye corners are 1.23 apart.
All proportions are our own round numbers; no statistics of annotated photographs are in here.

Points follow the iBUG-68 order; point 36 (right eye of the person) is on the left of the image.
Jaw points that the head hides when it turns slide along the face to the visible contour, which is
what 300-W's two-dimensional annotations show (Zhu et al. 2015, "High-Fidelity Pose and Expression
Normalization for Face Recognition in the Wild", section 3.2, calls it landmark marching).
"""

from dataclasses import dataclass

import numpy as np

EAR_Y = -0.5  # height of the first and last jaw point
EAR_DEPTH = 1.1  # how far these lie behind the bridge of the nose
CROWN = 1.38  # height of the skull above EAR_Y
MOUTH_Y = 0.385  # line where closed lips meet, before identity moves it
_JAW_SPACING = 1.2  # of the jaw points along the outline, by eye
_MARCH_STEPS = np.linspace(0.0, 0.75, 31)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceShape:
    """One face: identity first, then expression. Lengths in half face widths, the rest relative."""

    width: float = 1.0
    length: float = 1.53  # ear level to chin, mouth closed
    jaw_square: float = 0.6  # exponent of the jaw outline: small is square, large is pointed
    eye_distance: float = 0.425  # middle of the face to the middle of an eye
    eye_width: float = 0.185  # half of an eye's width
    eye_slant: float = 0.0  # outer corner above (+) or below (-) the inner one
    brow_gap: float = 0.21  # eye corner to brow
    brow_arch: float = 0.11
    brow_slant: float = -0.025
    nose_length: float = 0.66  # bridge (point 27) to base (point 33)
    nose_width: float = 0.2
    nose_height: float = 0.4
    mouth_drop: float = 0.0  # the whole mouth lower (+) or higher (-)
    mouth_width: float = 0.37
    upper_lip: float = 0.085
    lower_lip: float = 0.15
    chin: float = 0.1
    cheek: float = 0.08
    mouth_open: float = 0.02  # gap between the lips
    smile: float = 0.0  # 1 is a broad smile, -0.5 a frown
    pucker: float = 0.0  # 1 rounds the lips
    eyes_open: tuple[float, float] = (1.0, 1.0)  # image-left, image-right; 0 is closed
    brow_raise: tuple[float, float] = (0.0, 0.0)
    mouth_shift: float = 0.0  # mouth to one side

    @property
    def chin_y(self) -> float:
        """Height of the chin; opening the mouth lowers the jaw."""
        return EAR_Y + self.length + 0.75 * self.mouth_open


def sample_shape(generator: np.random.Generator, *, expression: float = 1.0) -> FaceShape:
    """A random face; `expression` 0 is neutral, 1 everyday photographs, 1.6 strong faces."""

    def around(mean: float, sd: float) -> float:
        return mean + sd * float(np.clip(generator.standard_normal(), -2.5, 2.5))

    smile = float(generator.choice([0.0, 0.35, 0.8], p=[0.4, 0.2, 0.4]))
    smile = expression * (smile + around(0.0, 0.15))
    wide = 0.0
    if generator.random() < 0.14 * expression:  # shouting, surprise
        wide = float(generator.uniform(0.1, 0.42))
    gap = max(0.0, around(0.015, 0.012)) + wide
    if smile > 0.3 and generator.random() < 0.75:
        gap += float(generator.uniform(0.03, 0.15)) * min(smile, 1.0)
    pucker = generator.uniform(0.2, 1.0) if generator.random() < 0.06 * expression else 0.0
    openness = max(0.1, around(1.0, 0.2) - 0.3 * max(smile, 0.0) + 0.4 * wide)
    if generator.random() < 0.05 * expression:
        openness = float(generator.uniform(0.03, 0.15))
    wink = around(0.0, 0.05) * expression
    raised, uneven = around(0.0, 0.04) * expression + 0.15 * wide, around(0.0, 0.015) * expression
    return FaceShape(
        width=around(1.0, 0.055),
        length=around(1.53, 0.115),
        jaw_square=around(0.6, 0.09),
        eye_distance=around(0.42, 0.021),
        eye_width=around(0.185, 0.013),
        eye_slant=around(0.01, 0.02),
        brow_gap=around(0.215, 0.045),
        brow_arch=around(0.11, 0.03),
        brow_slant=around(-0.025, 0.04),
        nose_length=around(0.66, 0.06),
        nose_width=around(0.2, 0.024),
        nose_height=around(0.4, 0.05),
        mouth_drop=around(0.01, 0.05),
        mouth_width=around(0.365, 0.028),
        upper_lip=max(0.03, around(0.08, 0.02)),
        lower_lip=max(0.05, around(0.15, 0.028)),
        chin=around(0.1, 0.04),
        cheek=around(0.08, 0.04),
        mouth_open=gap,
        smile=smile,
        pucker=float(pucker),
        eyes_open=(max(0.03, openness + wink), max(0.03, openness - wink)),
        brow_raise=(raised + uneven, raised - uneven),
        mouth_shift=around(0.0, 0.012) * expression,
    )


def half_width(shape: FaceShape, y: np.ndarray) -> np.ndarray:
    """Half the width of the head at heights `y`: jaw outline below the ears, skull above."""
    below, up = _heights(shape, y)
    jaw = (1.0 - below**2) ** (0.5 * shape.jaw_square) * (1.0 - 0.27 * below**6)
    skull = np.sqrt(1.0 - up**2.6)
    return np.asarray(shape.width * jaw * skull)


def side_depth(shape: FaceShape, y: np.ndarray) -> np.ndarray:
    """Depth z of the head's outline (its widest place) at heights `y`."""
    below, _ = _heights(shape, y)
    return np.asarray(_profile(shape, y) - EAR_DEPTH * (1.0 - below**2) ** 0.42 * _skull(shape, y))


def back_depth(shape: FaceShape, y: np.ndarray) -> np.ndarray:
    """How far the back of the head lies behind its outline at heights `y`."""
    below, _ = _heights(shape, y)
    return np.asarray(1.15 * _skull(shape, y) * np.sqrt(1.0 - below**2))


def surface_depth(shape: FaceShape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Depth z of the front of the head at (x, y); outside the outline it is the outline's."""
    side, front = side_depth(shape, y), _profile(shape, y)
    across = np.clip(np.abs(x) / np.maximum(half_width(shape, y), 1e-6), 0.0, 1.0)
    bulge = (1.0 - across**2.2) ** 0.58
    return np.asarray(
        side + (front - side) * bulge + _relief(shape, x, y) * np.minimum(1, 3 * bulge)
    )


def frontal_points(shape: FaceShape) -> np.ndarray:
    """The 68 points of the unturned face, (68, 2)."""
    points_K2 = np.zeros((68, 2))
    # Jaw: a superellipse, equal steps of the angle.
    angle = np.linspace(0.0, np.pi / 2, 9)
    y = EAR_Y + (shape.chin_y - EAR_Y) * np.sin(angle) ** _JAW_SPACING
    x = half_width(shape, y)
    points_K2[:17] = np.concatenate([np.stack([-x, y], 1), np.stack([x[-2::-1], y[-2::-1]], 1)])
    scale = shape.width
    for side, brow, eye in (
        (-1, range(17, 22), (36, 37, 38, 39, 40, 41)),
        (1, range(26, 21, -1), (45, 44, 43, 42, 47, 46)),
    ):
        which = 0 if side < 0 else 1
        along = np.linspace(0.0, 1.0, 5)  # outer end to inner end
        brow_y = -0.515 - shape.brow_gap - shape.brow_raise[which] * (0.8 + 0.4 * along)
        brow_y = (
            brow_y
            - shape.brow_arch * np.sin(np.pi * along**0.85)
            - shape.brow_slant * (1 - 2 * along)
        )
        brow_x = (0.8 + (0.165 - 0.8) * along) * (0.5 + 0.5 * shape.eye_distance / 0.425)
        points_K2[list(brow)] = np.stack([side * scale * brow_x, brow_y + 0.015], 1)
        lid = 0.062 * shape.eyes_open[which]
        off = np.array([1.0, 0.36, -0.36, -1.0, -0.36, 0.36]) * shape.eye_width
        lift = np.array([0.0, -1.0, -1.0, 0.05, 0.62, 0.62])
        eye_y = -0.515 + lift * lid - shape.eye_slant * off / shape.eye_width + 0.006
        points_K2[list(eye)] = np.stack([side * scale * (shape.eye_distance + off), eye_y], 1)
    bridge = -0.55
    points_K2[27:31, 1] = bridge + shape.nose_length * np.array([0.0, 0.25, 0.5, 0.74])
    points_K2[31:36, 0] = scale * shape.nose_width * np.array([-1.0, -0.52, 0.0, 0.52, 1.0])
    points_K2[31:36, 1] = bridge + shape.nose_length * np.array([0.92, 0.965, 1.0, 0.965, 0.92])
    points_K2[48:] = _mouth(shape)
    return points_K2


def points_3d(shape: FaceShape) -> np.ndarray:
    """The 68 points on the surface of the unturned face, (68, 3)."""
    points_K2 = frontal_points(shape)
    depth = surface_depth(shape, points_K2[:, 0], points_K2[:, 1])
    return np.concatenate([points_K2, depth[:, None]], axis=1)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation matrix (3, 3); radians. Yaw > 0 turns to the image's right, pitch > 0 looks down."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(tilt @ turn @ nod)


def posed_points(shape: FaceShape, yaw: float, pitch: float) -> np.ndarray:
    """The 3-D points (68, 3), unturned, that a camera sees as landmarks at this yaw and pitch.

    All but the jaw are `points_3d`. Each jaw point is the outermost place, as seen, of a line on
    the surface from the jaw towards the middle of the face: at zero pose the jaw point itself.
    """
    points_K3 = points_3d(shape)
    jaw = points_K3[:17, :2]
    target = np.stack([np.zeros(17), -0.45 + 0.42 * (jaw[:, 1] - EAR_Y)], axis=1)
    line = jaw[:, None] + _MARCH_STEPS[None, :, None] * (target - jaw)[:, None]
    depth = surface_depth(shape, line[..., 0], line[..., 1])
    line = np.concatenate([line, depth[..., None]], axis=2)
    seen = (line @ rotation(yaw, pitch, 0.0).T)[..., :2]
    outward = np.einsum("ksc,kc->ks", seen, jaw - target)
    points_K3[:17] = line[np.arange(17), outward.argmax(axis=1)]
    return points_K3


def _heights(shape: FaceShape, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `y` lies between ear and chin, and between ear and crown: each in [0, 1]."""
    below = np.clip((y - EAR_Y) / (shape.chin_y - EAR_Y), 0.0, 1.0) ** (1 / _JAW_SPACING)
    return below, np.clip((EAR_Y - y) / CROWN, 0.0, 1.0)


def _skull(shape: FaceShape, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(1.0 - _heights(shape, y)[1] ** 2.6))


def _profile(shape: FaceShape, y: np.ndarray) -> np.ndarray:
    """Depth of the middle of the face without relief: upright forehead, slightly receding chin."""
    below, up = _heights(shape, y)
    return np.asarray(-0.06 * below - 0.08 * below**8 - EAR_DEPTH * (1.0 - (1.0 - up**2.4) ** 0.6))


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


def _mouth(shape: FaceShape) -> np.ndarray:
    """Points 48 to 67 of the unturned face, (20, 2)."""
    smile, gap = shape.smile, shape.mouth_open
    reach = shape.width * shape.mouth_width * (1.0 + 0.26 * smile) * (1.0 - 0.4 * shape.pucker)
    reach *= 1.0 - 0.3 * min(gap, 0.4)
    line = MOUTH_Y + shape.mouth_drop
    thin = 1.0 - 0.3 * max(smile, 0.0) + 0.3 * shape.pucker
    upper, lower = shape.upper_lip * thin, shape.lower_lip * thin
    above, below = line - 0.2 * gap - 0.035 * smile, line + 0.8 * gap - 0.035 * smile
    corner = line + 0.3 * gap - 0.12 * smile + 0.01
    curve = 0.25 * (corner - line)  # the parts between middle and corners bend along
    rows: list[tuple[float, float]] = [
        (-1.0, corner),
        (-0.64, above - 0.72 * upper + 2 * curve),
        (-0.27, above - upper),
        (0.0, above - 0.83 * upper),
        (0.27, above - upper),
        (0.64, above - 0.72 * upper + 2 * curve),
        (1.0, corner),
        (0.66, below + 0.62 * lower + 2 * curve),
        (0.3, below + 0.96 * lower),
        (0.0, below + lower),
        (-0.3, below + 0.96 * lower),
        (-0.66, below + 0.62 * lower + 2 * curve),
        (-0.85, corner + 0.1 * (line - corner)),
        (-0.29, above + 0.01),
        (0.0, above + 0.014),
        (0.29, above + 0.01),
        (0.85, corner + 0.1 * (line - corner)),
        (0.29, below + 0.006),
        (0.0, below + 0.01),
        (-0.29, below + 0.006),
    ]
    points = np.array(rows) * (reach, 1.0)
    points[:, 0] += shape.mouth_shift * np.array([1.0] * 20)
    return points
