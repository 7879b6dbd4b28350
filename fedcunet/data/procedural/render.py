"""Draws the surfaces of a figure: perspective, light, far squares first."""

from dataclasses import dataclass

import cv2
import numpy as np

from . import draw
from .figure import Surface
from .looks import Light


@dataclass(frozen=True, kw_only=True, slots=True)
class Lens:
    """A pinhole camera that looks at the body's pelvis from `distance` torsos away."""

    distance: float
    scale: float  # pixels per torso at the pelvis
    offset: np.ndarray  # (2,) pixels: where the pelvis is

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) of points (..., 3) in camera axes."""
        nearer = self.distance / (self.distance - points[..., 2:3])
        return np.asarray(points[..., :2] * nearer * self.scale + self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Squares:
    """The squares of a figure that face the camera, from far to near."""

    corners: np.ndarray  # (N, 4, 2) pixels
    depth: np.ndarray  # (N,) z of the middle, torsos
    colour: np.ndarray  # (N, 3) lit


def lit_squares(
    surfaces: list[Surface], lens: Lens, light: Light, generator: np.random.Generator
) -> Squares:
    """What of the surfaces can be seen, in drawing order."""
    four = np.concatenate([_corners(surface.mesh) for surface in surfaces])
    colour = np.concatenate([surface.colour.reshape(-1, 3) for surface in surfaces])
    lift = np.concatenate(
        [
            np.full(surface.colour.shape[0] * surface.colour.shape[1], surface.lift)
            for surface in surfaces
        ]
    )
    # Outward where y points down: (diagonal up to the right) x (diagonal down to the right).
    normal = np.cross(four[:, 1] - four[:, 3], four[:, 2] - four[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    middle = four.mean(axis=1)
    facing = (normal * (np.array([0.0, 0.0, lens.distance]) - middle)).sum(axis=1) > 0
    order = np.flatnonzero(facing)
    depth = middle[:, 2] + lift
    order = order[np.argsort(depth[order], kind="stable")]
    toward = (normal[order] @ light.direction).clip(0.0)
    value = light.ambient * (0.86 - 0.16 * normal[order, 1]) + light.key * toward
    value = value * (1.0 + 0.03 * generator.standard_normal(len(order)))
    return Squares(
        corners=lens.project(four[order]),
        depth=depth[order],
        colour=colour[order] * value[:, None] * light.tint,
    )


def paint_squares(view: np.ndarray, squares: Squares, *, soften: float) -> None:
    """Draw the squares on `view` (in place), their outline softened by `soften` pixels."""
    low = np.floor(squares.corners.min(axis=(0, 1))).astype(int) - 4
    high = np.ceil(squares.corners.max(axis=(0, 1))).astype(int) + 5
    low = np.maximum(low, 0)
    high = np.minimum(high, (view.shape[1], view.shape[0]))
    if (high <= low).any():
        return
    part = view[low[1] : high[1], low[0] : high[0]]
    canvas = np.zeros((*part.shape[:2], 4), np.uint8)
    polygons = draw.fixed(squares.corners - low)
    paint = np.concatenate([squares.colour.clip(0, 255), np.full((len(polygons), 1), 255.0)], 1)
    for polygon, value in zip(polygons, paint.tolist(), strict=True):
        cv2.fillConvexPoly(canvas, polygon, value, cv2.LINE_8, 4)
    # Colours and cover are softened together, so that the outside does not darken the edge.
    soft = cv2.GaussianBlur(canvas, (0, 0), soften)
    cover = soft[..., 3:4].astype(np.float32) / 255.0
    part[:] = np.clip(part * (1.0 - cover) + soft[..., :3], 0, 255).astype(np.uint8)


def seen_joints(points_K3: np.ndarray, squares: Squares, lens: Lens) -> np.ndarray:
    """Which of the points (K, 3) no square hides that lies clearly in front of them, bool (K,)."""
    inside = under_squares(lens.project(points_K3), squares)
    nearer = squares.depth[None] > points_K3[:, 2:3] + 0.26
    return np.asarray(~(inside & nearer).any(axis=1))


def under_squares(points_K2: np.ndarray, squares: Squares) -> np.ndarray:
    """Which points (pixels) lie in which square, bool (K, N)."""
    start = squares.corners[None]  # (1, N, 4, 2)
    edge = np.roll(squares.corners, -1, axis=1)[None] - start
    to_point = points_K2[:, None, None] - start
    cross = edge[..., 0] * to_point[..., 1] - edge[..., 1] * to_point[..., 0]
    return np.asarray((cross >= 0).all(axis=2) | (cross <= 0).all(axis=2))


def _corners(mesh: np.ndarray) -> np.ndarray:
    four = [mesh[:-1, :-1], mesh[:-1, 1:], mesh[1:, 1:], mesh[1:, :-1]]
    return np.stack(four, axis=2).reshape(-1, 4, 3)
