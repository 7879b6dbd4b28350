"""The head as a shaded mesh: skin and hair drawn from far to near, colour and light apart."""

from dataclasses import dataclass

import cv2
import numpy as np

from . import draw
from .looks import HAIR_ANGLES, FaceLook, Light
from .shape import EAR_Y, MOUTH_Y, FaceShape
from .surface import CROWN, around_depth, section

# Fine where the nose is, coarse at the back; degrees around the head.
_FRONT = np.concatenate(
    [np.arange(-90, -29, 10.0), np.arange(-24, 25, 4.0), np.arange(30, 91, 10.0)]
)
_AROUND = np.radians(
    np.concatenate([np.arange(-150, -99, 25.0), _FRONT, np.arange(100, 151, 25.0)])
)
_HAIR_AROUND = np.concatenate(
    [
        np.arange(-170, -101, 17.0),
        np.arange(-96, -55, 6.0),
        np.arange(-50, 51, 10.0),
        np.arange(56, 97, 6.0),
        np.arange(102, 171, 17.0),
    ]
)
_SHADE_UNIT = 110.0  # the mesh's fourth channel holds light x this
LIGHT_UNIT = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Weak perspective: pixels = (rotation @ point)[:2] * scale + offset."""

    rotation: np.ndarray  # (3, 3)
    scale: float  # pixels per unit
    offset: np.ndarray  # (2,)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Image points (..., 2) of 3-D points (..., 3)."""
        return np.asarray((points @ self.rotation[:2].T) * self.scale + self.offset)

    def direction(self, x: float, y: float, z: float = 0.0) -> np.ndarray:
        """The image vector of a 3-D vector, (2,)."""
        return np.asarray(self.rotation[:2] @ (x, y, z)) * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayer:
    """A drawn head: colours without light and light x LIGHT_UNIT, both (H, W, 3) 8 bits."""

    albedo: np.ndarray
    light: np.ndarray
    cover: np.ndarray  # (H, W) float32, 0..1

    def compose(self, view: np.ndarray) -> None:
        """Put the lit head on `view`, in place."""
        lit = cv2.multiply(self.albedo, self.light, scale=1.0 / LIGHT_UNIT)
        view[:] = cv2.blendLinear(lit, np.ascontiguousarray(view), self.cover, 1.0 - self.cover)


def head_mesh(shape: FaceShape) -> np.ndarray:
    """Vertices of the skin (rows, columns, 3): rows from crown to chin, columns around the head."""
    nose, chin = -0.55 + shape.nose_length, shape.chin_y
    y = np.concatenate(
        [
            EAR_Y - CROWN * np.array([0.999, 0.95, 0.84, 0.68, 0.5, 0.38]),
            np.linspace(-0.92, nose - 0.17, 11)[:-1],
            np.linspace(nose - 0.17, nose + 0.05, 5)[:-1],
            np.linspace(nose + 0.05, chin - 0.04, 11)[:-1],
            [chin - 0.04, chin - 0.005],
        ]
    )[:, None]
    cut = section(shape, y)
    x = cut.half_width * np.sin(_AROUND)
    z = around_depth(shape, x, y, _AROUND, cut)
    return np.stack([x, np.broadcast_to(y, x.shape), z], axis=2)


def hair_mesh(shape: FaceShape, look: FaceLook, generator: np.random.Generator) -> np.ndarray:
    """Vertices of the hair (or hat) from the crown to its lower edge: (rows, columns, 3)."""
    angle = np.radians(_HAIR_AROUND)
    edge = np.interp(np.abs(_HAIR_AROUND), HAIR_ANGLES, look.hairline)
    front = np.cos(angle).clip(0)
    ragged = 0.0 if look.style in ("cap", "scarf") else 0.035
    edge = (
        edge + look.parting * np.sin(angle) * front + ragged * generator.standard_normal(edge.size)
    )
    crown = EAR_Y - 0.998 * CROWN
    step = np.array([0.0, 0.04, 0.12, 0.26, 0.45, 0.65, 0.85, 1.0])[:, None]
    y = crown + step * np.maximum(edge - crown, 0.0)
    hang = np.minimum(y, EAR_Y + 0.25)  # below the ears hair hangs straight down
    cut = section(shape, hang)
    x = cut.half_width * np.sin(angle)
    z = around_depth(shape, x, hang, angle, cut)
    points = np.stack([x, y, z], axis=2)
    outward = points - np.array([0.0, EAR_Y - 0.2, -1.0])
    outward[..., 1] = np.minimum(outward[..., 1], 0.0)
    outward /= np.linalg.norm(outward, axis=2, keepdims=True) + 1e-6
    uneven = 1.0 + ragged * 7.0 * np.convolve(
        generator.standard_normal(angle.size), [0.5, 0.7, 0.5], "same"
    )
    volume = look.hair_volume * (1.0 - 0.75 * step**2 * front) * uneven.clip(0.3) + 0.03
    return np.asarray(points + outward * volume[..., None])


def draw_head(
    size: tuple[int, int],
    shape: FaceShape,
    look: FaceLook,
    light: Light,
    pose: Pose,
    skin_KL3: np.ndarray,
    hair_KL3: np.ndarray,
    generator: np.random.Generator,
) -> HeadLayer:
    """Skin and hair on a canvas of (height, width); features are painted on the result's albedo."""
    skin = _quads(skin_KL3, pose, light)
    colour = _skin_colour(shape, look, skin.middle)
    hair = _quads(hair_KL3, pose, light)
    rows, columns = hair_KL3.shape[0] - 1, hair_KL3.shape[1] - 1
    streak = (
        1.0
        + 0.16 * generator.standard_normal((1, columns))
        + 0.05 * generator.standard_normal((rows, columns))
    )
    if look.style in ("cap", "scarf"):
        streak = 1.0 + 0.25 * (streak - 1.0)
    hair_colour = look.hair_cover * streak.reshape(-1, 1)
    corners = np.concatenate([skin.corners, hair.corners])
    paint = np.concatenate(
        [
            np.concatenate([colour, skin.light[:, None]], 1),
            np.concatenate([hair_colour, hair.light[:, None]], 1),
        ]
    )
    # Hair lies on the skin: a bias keeps coarse squares from mixing.
    depth = np.concatenate([skin.depth, hair.depth + 0.12])
    bare = skin.facing & ~_under_hair(skin_KL3, hair_KL3)
    keep = np.flatnonzero(np.concatenate([bare, hair.facing]))
    order = keep[np.argsort(depth[keep], kind="stable")]
    canvas = np.zeros((*size, 4), np.uint8)
    polygons = draw.fixed(corners[order])
    for polygon, value in zip(polygons, paint[order].clip(1, 255).tolist(), strict=True):
        cv2.fillConvexPoly(canvas, polygon, value, cv2.LINE_8, 4)
    if look.style not in ("cap", "scarf"):
        _strands(canvas, hair, hair_KL3.shape[:2], look, generator)
    empty = canvas[..., 3] == 0
    canvas[empty] = (*(0.5 * (look.skin + look.hair)).astype(np.uint8), int(0.8 * _SHADE_UNIT))
    smooth = cv2.GaussianBlur(canvas, (0, 0), 0.026 * pose.scale)  # hides the facets
    weights = [channel * 1.0 / _SHADE_UNIT for channel in light.tint]
    return HeadLayer(
        albedo=cv2.cvtColor(smooth, cv2.COLOR_BGRA2BGR),
        light=cv2.merge(
            [cv2.convertScaleAbs(smooth[..., 3], alpha=w * LIGHT_UNIT) for w in weights]
        ),
        cover=cv2.GaussianBlur((~empty).astype(np.float32), (0, 0), 0.6),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Quads:
    corners: np.ndarray  # (N, 4, 2) pixels
    middle: np.ndarray  # (N, 3) unturned
    depth: np.ndarray  # (N,)
    facing: np.ndarray  # (N,) bool
    light: np.ndarray  # (N,) light x _SHADE_UNIT


def _quads(mesh_KL3: np.ndarray, pose: Pose, light: Light) -> _Quads:
    turned = mesh_KL3 @ pose.rotation.T

    def corners(points: np.ndarray) -> np.ndarray:
        four = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
        return np.stack(four, axis=2).reshape(-1, 4, points.shape[2])

    four = corners(turned)
    # Outward where y points down: (diagonal up to the right) x (diagonal down to the right).
    normal = np.cross(four[:, 1] - four[:, 3], four[:, 2] - four[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    toward = (normal @ light.direction).clip(0.0)
    gloss = light.gloss * np.maximum(normal @ _halfway(light), 0.0) ** 24
    sky = 0.06 * -normal[:, 1]
    value = light.ambient * (0.92 + sky) + light.key * toward + gloss
    return _Quads(
        corners=four[..., :2] * pose.scale + pose.offset,
        middle=corners(mesh_KL3).mean(axis=1),
        depth=four[..., 2].mean(axis=1),
        facing=normal[:, 2] > 0,
        light=_SHADE_UNIT * value,
    )


def _under_hair(skin_KL3: np.ndarray, hair_KL3: np.ndarray) -> np.ndarray:
    """Which squares of the skin lie well above the lower edge of the hair, so need no drawing."""
    middle = np.degrees(0.5 * (_AROUND[1:] + _AROUND[:-1]))
    edge = np.interp(middle, _HAIR_AROUND, hair_KL3[-1, :, 1])
    return np.asarray(skin_KL3[1:, 1:, 1] < edge - 0.15).reshape(-1)


def _strands(
    canvas: np.ndarray,
    hair: "_Quads",
    size: tuple[int, int],
    look: FaceLook,
    generator: np.random.Generator,
) -> None:
    """Lines of lighter and darker hair, along the hair, on its side that is seen."""
    rows, columns = size[0] - 1, size[1] - 1
    corners = hair.corners.reshape(rows, columns, 4, 2)
    seen = np.flatnonzero(hair.facing.reshape(rows, columns)[1:-1].all(axis=0))
    light = hair.light.reshape(rows, columns)[rows // 2, seen]
    place = generator.uniform(0, 1, (2, 1, len(seen), 1))
    lines = corners[1:, seen, 0] + place * (corners[1:, seen, 1] - corners[1:, seen, 0])
    colours = look.hair_cover * generator.uniform(0.6, 1.45, (2, len(seen), 1))
    colours = np.concatenate([colours, np.broadcast_to(light[:, None], (2, len(seen), 1))], axis=2)
    values = colours.clip(1, 255).reshape(-1, 4).tolist()
    for line, value in zip(
        draw.fixed(lines).swapaxes(1, 2).reshape(-1, rows - 1, 2), values, strict=True
    ):
        cv2.polylines(canvas, [line], False, value, 1, cv2.LINE_AA, 4)


def _halfway(light: Light) -> np.ndarray:
    between = light.direction + np.array([0.0, 0.0, 1.0])
    return np.asarray(between / np.linalg.norm(between))


def _skin_colour(shape: FaceShape, look: FaceLook, at_N3: np.ndarray) -> np.ndarray:
    """Colour of the skin at places of the unturned head, (N, 3): hollows, red cheeks, beard."""
    x, y = np.abs(at_N3[:, 0]) / shape.width, at_N3[:, 1]
    front = at_N3[:, 2] > -1.0 - 0.2

    def spot(cx: float, cy: float, wx: float, wy: float) -> np.ndarray:
        return np.asarray(np.exp(-(((x - cx) / wx) ** 2) - ((y - cy) / wy) ** 2))

    base = -0.55 + shape.nose_length
    line = MOUTH_Y + shape.mouth_drop
    low = line + 0.8 * shape.mouth_open
    hollow = 0.12 * spot(shape.eye_distance - 0.02, -0.55, 0.2, 0.11)
    hollow += 0.08 * spot(0.22, -0.5, 0.07, 0.14)
    hollow += 0.2 * spot(0.08, base + 0.02, 0.15, 0.05) + 0.14 * spot(0.0, low + 0.24, 0.22, 0.05)
    hollow += 0.1 * spot(0.4, line, 0.07, 0.09)
    red = 0.06 * spot(0.5, 0.02, 0.25, 0.2) + 0.05 * spot(0.0, base - 0.15, 0.16, 0.14)
    colour = (
        look.skin * (1.0 - hollow)[:, None] * (1.0 + red[:, None] * np.array([-1.2, -1.0, 0.4]))
    )
    # Whiskers: cheeks below a line from the ear to the mouth, chin, and the upper lip.
    cheek = np.clip((y - (0.5 - 0.55 * x**2 + 0.12 * (1 - x))) / 0.12, 0.0, 1.0) * (
        y < shape.chin_y + 0.1
    )
    cheek = np.maximum(cheek, np.clip((x - 0.88) / 0.06, 0, 1) * (y > -0.45))
    lip = spot(0.0, 0.5 * (base + line) - 0.01, 0.34, 0.08)
    whiskers = np.maximum(look.beard * cheek, look.moustache * lip) * front
    return np.asarray(colour + whiskers[:, None] * 0.85 * (look.hair * 0.9 - colour))
