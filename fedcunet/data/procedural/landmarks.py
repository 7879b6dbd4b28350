"""The 68 points of a face: on its surface, and as a camera sees them.

Points follow the iBUG-68 order; point 36 (right eye of the person) is on the left of the image.
Jaw points that the head hides when it turns slide along the face to the visible contour, which is
what 300-W's two-dimensional annotations show (Zhu et al. 2015, "High-Fidelity Pose and Expression
Normalization for Face Recognition in the Wild", section 3.2, calls it landmark marching).
"""

import numpy as np

from .shape import EAR_Y, MOUTH_Y, FaceShape
from .surface import JAW_SPACING, front_depth, section

_MARCH_STEPS = np.linspace(0.0, 0.72, 19)


def frontal_points(shape: FaceShape) -> np.ndarray:
    """The 68 points of the unturned face, (68, 2)."""
    points_K2 = np.zeros((68, 2))
    # Jaw: a superellipse, equal steps of the angle.
    angle = np.linspace(0.0, np.pi / 2, 9)
    y = EAR_Y + (shape.chin_y - EAR_Y) * np.sin(angle) ** JAW_SPACING
    x = section(shape, y).half_width
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
    depth = _depth(shape, points_K2)
    return np.concatenate([points_K2, depth[:, None]], axis=1)


def _depth(shape: FaceShape, points: np.ndarray) -> np.ndarray:
    y = points[..., 1]
    return front_depth(shape, points[..., 0], y, section(shape, y))


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
    depth = _depth(shape, line)
    line = np.concatenate([line, depth[..., None]], axis=2)
    seen = (line @ rotation(yaw, pitch, 0.0).T)[..., :2]
    outward = np.einsum("ksc,kc->ks", seen, jaw - target)
    points_K3[:17] = line[np.arange(17), outward.argmax(axis=1)]
    return points_K3


def _mouth(shape: FaceShape) -> np.ndarray:
    """Points 48 to 67 of the unturned face, (20, 2)."""
    smile, gap = shape.smile, shape.mouth_open
    reach = shape.width * shape.mouth_width * (1.0 + 0.26 * smile) * (1.0 - 0.4 * shape.pucker)
    reach *= 1.0 - 0.25 * min(gap, 0.4)
    line = MOUTH_Y + shape.mouth_drop
    thin = 1.0 - 0.3 * max(smile, 0.0) + 0.3 * shape.pucker
    upper, lower = shape.upper_lip * thin, shape.lower_lip * thin
    above, below = line - 0.2 * gap - 0.035 * smile, line + 0.8 * gap - 0.035 * smile
    corner = line + 0.2 * gap - 0.12 * smile + 0.01
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
        (-0.29, above + 0.002),
        (0.0, above + 0.004),
        (0.29, above + 0.002),
        (0.85, corner + 0.1 * (line - corner)),
        (0.29, below + 0.006),
        (0.0, below + 0.01),
        (-0.29, below + 0.006),
    ]
    points = np.array(rows) * (reach, 1.0)
    points[:, 0] += shape.mouth_shift
    return points
