"""A clothed body as a mesh: tubes around the bones, each with the colours of its squares.

Every surface has rows that go down its bone and columns around it, from the back (-180 degrees)
over the right side of the body, its front (0) and its left side to the back again. Widths are in
torsos, set by eye on pictures of people.
"""

from dataclasses import dataclass

import numpy as np

from .outfits import Outfit
from .skeleton import (
    HEAD_TOP,
    LEFT_HIP,
    LEFT_KNEE,
    PELVIS,
    RIGHT_HIP,
    RIGHT_KNEE,
    SIDES,
    THORAX,
    UPPER_NECK,
    Body,
    turn_x,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """Vertices (rows + 1, columns + 1, 3) in camera axes and colours (rows, columns, 3).

    `lift` is added to the depth by which squares are sorted: what lies on another surface is drawn
    later.
    """

    mesh: np.ndarray
    colour: np.ndarray
    lift: float = 0.0


_LIMB = np.radians(np.linspace(-180, 180, 9))
_TRUNK = np.radians(np.linspace(-180, 180, 13))
# Share of the bone, half width sideways and front to back.
_THIGH = np.array([(0, 0.165, 0.175), (0.3, 0.16, 0.17), (0.7, 0.13, 0.14), (1, 0.11, 0.115)])
_SHANK = np.array([(0, 0.105, 0.11), (0.25, 0.108, 0.12), (0.6, 0.085, 0.09), (1, 0.062, 0.066)])
_UPPER_ARM = np.array([(0, 0.092, 0.1), (0.4, 0.085, 0.095), (1, 0.07, 0.072)])
_FOREARM = np.array([(0, 0.07, 0.072), (0.3, 0.072, 0.075), (1, 0.048, 0.05)])
# Height above the pelvis in torsos, half width, half depth.
_TORSO = np.array(
    [
        (1.09, 0.085, 0.08),
        (1.04, 0.17, 0.10),
        (0.99, 0.31, 0.12),
        (0.9, 0.345, 0.16),
        (0.72, 0.31, 0.185),
        (0.55, 0.285, 0.175),
        (0.42, 0.268, 0.165),
        (0.25, 0.285, 0.175),
        (0.09, 0.315, 0.188),
        (-0.03, 0.322, 0.19),
        (-0.12, 0.27, 0.165),
        (-0.18, 0.12, 0.1),
    ]
)
# Share of the head from its top down, half width, half depth, and how far the middle lies in front.
_HEAD = np.array(
    [
        (0.0, 0.01, 0.01, 0.02),
        (0.05, 0.075, 0.09, 0.02),
        (0.13, 0.115, 0.14, 0.02),
        (0.26, 0.146, 0.18, 0.02),
        (0.4, 0.156, 0.192, 0.025),
        (0.54, 0.15, 0.185, 0.035),
        (0.68, 0.132, 0.16, 0.055),
        (0.82, 0.105, 0.115, 0.085),
        (0.9, 0.06, 0.07, 0.1),
    ]
)
_MIDDLE = np.degrees(0.5 * (_TRUNK[1:] + _TRUNK[:-1]))


def figure_surfaces(body: Body, outfit: Outfit) -> list[Surface]:
    """All surfaces of a clothed person."""
    surfaces = [_torso(body, outfit), _neck(body, outfit), *_head(body, outfit)]
    for index in (0, 1):
        surfaces += [*_leg(body, outfit, index), *_arm(body, outfit, index)]
    if outfit.skirt:
        surfaces.append(_skirt(body, outfit))
    return surfaces


def _tube(
    centre_R3: np.ndarray,
    left_R3: np.ndarray,
    front_R3: np.ndarray,
    half_left_R: np.ndarray,
    half_front_R: np.ndarray,
    around: np.ndarray = _LIMB,
) -> np.ndarray:
    """Vertices (R, columns + 1, 3) of elliptic rings."""
    sideways = half_left_R[:, None] * np.sin(around)
    forwards = half_front_R[:, None] * np.cos(around)
    return np.asarray(
        centre_R3[:, None]
        + sideways[..., None] * left_R3[:, None]
        + forwards[..., None] * front_R3[:, None]
    )


def _limb(
    start: np.ndarray,
    end: np.ndarray,
    frame: np.ndarray,
    profile: np.ndarray,
    girth: float,
    covered: float,
    colours: tuple[np.ndarray, np.ndarray],
    loose: float,
) -> Surface:
    """A limb with round ends, `covered` of it by cloth; colours of cloth and skin."""
    length = float(np.linalg.norm(end - start))
    first, last = girth * profile[0, 1:], girth * profile[-1, 1:]
    cuts = {float(np.clip(covered, 0.02, 0.98))} if 0 < covered < 1 else set()
    share = np.array(sorted({*profile[:, 0].tolist(), 0.15, 0.85, *cuts}))
    half = girth * np.stack(
        [np.interp(share, profile[:, 0], profile[:, column]) for column in (1, 2)], axis=1
    )
    half[share <= covered] *= loose
    before, after = first.mean() / length, last.mean() / length
    share = np.concatenate([[-0.9 * before, -0.55 * before], share, [1 + 0.7 * after]])
    half = np.concatenate([[0.3 * first, 0.8 * first], half, [0.55 * last]])
    centre = start + share[:, None] * (end - start)
    left = np.broadcast_to(frame[:, 0], centre.shape)
    front = np.broadcast_to(frame[:, 2], centre.shape)
    mesh = _tube(centre, left, front, half[:, 0], half[:, 1])
    middle = 0.5 * (share[1:] + share[:-1])
    cloth, skin = colours
    rows = np.where((middle <= covered)[:, None], cloth, skin)
    return Surface(mesh=mesh, colour=np.repeat(rows[:, None], len(_LIMB) - 1, axis=1))


def _leg(body: Body, outfit: Outfit, index: int) -> list[Surface]:
    hip, knee, ankle = ((2, 1, 0), (3, 4, 5))[index]
    points, girth = body.points_K3, body.build.girth
    colours = (outfit.bottom, outfit.skin)
    covered = 2.0 * outfit.legs
    thigh = _limb(
        points[hip],
        points[knee],
        body.thigh_frames[index],
        _THIGH,
        girth,
        2.0 if covered > 1 else covered,
        colours,
        outfit.loose,
    )
    shank = _limb(
        points[knee],
        points[ankle],
        body.shank_frames[index],
        _SHANK,
        girth,
        2.0 if covered >= 2 else covered - 1,
        colours,
        outfit.loose * 1.08,
    )
    if outfit.side_stripe is not None:
        outer = (5, 6) if SIDES[index] > 0 else (1, 2)
        for surface, share in ((thigh, covered), (shank, covered - 1)):
            rows = int(np.clip(share, 0, 1) * (surface.colour.shape[0] - 1))
            surface.colour[:rows, outer] = outfit.side_stripe
    frame = body.foot_frames[index] @ turn_x(np.pi / 2)  # its rows go to the toes
    foot = body.build.foot
    along = foot * np.array([-0.28, -0.22, 0.0, 0.35, 0.6, 0.72])
    wide = np.array([0.02, 0.06, 0.068, 0.075, 0.07, 0.02])
    high = np.array([0.02, 0.065, 0.075, 0.05, 0.04, 0.015])
    centre = points[ankle] + along[:, None] * frame[:, 1] - (0.095 - high)[:, None] * frame[:, 2]
    left, front = (np.broadcast_to(frame[:, column], centre.shape) for column in (0, 2))
    colour = np.broadcast_to(outfit.shoes, (5, len(_LIMB) - 1, 3)).copy()
    return [thigh, shank, Surface(mesh=_tube(centre, left, front, wide, high), colour=colour)]


def _arm(body: Body, outfit: Outfit, index: int) -> list[Surface]:
    shoulder, elbow, wrist = ((12, 11, 10), (13, 14, 15))[index]
    points, girth = body.points_K3, 0.4 + 0.6 * body.build.girth
    covered = -1.0 if outfit.bare_top else 2.0 * outfit.sleeves
    colours = (outfit.top, outfit.skin)
    upper = _limb(
        points[shoulder],
        points[elbow],
        body.upper_arm_frames[index],
        _UPPER_ARM,
        girth,
        2.0 if covered > 1 else covered - 0.02,
        colours,
        outfit.loose,
    )
    fore = _limb(
        points[elbow],
        points[wrist],
        body.forearm_frames[index],
        _FOREARM,
        girth,
        2.0 if covered >= 2 else covered - 1.02,
        colours,
        outfit.loose * 1.05,
    )
    frame = body.forearm_frames[index]
    along = body.build.hand * np.array([-0.1, 0.1, 0.45, 0.8, 1.0])
    thick, wide = (
        np.array(values)
        for values in ((0.03, 0.04, 0.042, 0.03, 0.01), (0.03, 0.05, 0.072, 0.055, 0.02))
    )
    centre = points[wrist] + along[:, None] * frame[:, 1]
    left, front = (np.broadcast_to(frame[:, column], centre.shape) for column in (0, 2))
    skin = outfit.skin if outfit.gloves is None else outfit.gloves
    colour = np.broadcast_to(skin, (4, len(_LIMB) - 1, 3)).copy()
    return [upper, fore, Surface(mesh=_tube(centre, left, front, thick, wide), colour=colour)]


def _torso(body: Body, outfit: Outfit) -> Surface:
    build, height = body.build, _TORSO[:, 0]
    pelvis, chest = body.pelvis_frame, body.chest_frame
    low, high = build.hips / 0.195, build.shoulders / 0.35
    width = np.interp(height, [0.1, 0.7], [low, high]) * (0.3 + 0.7 * build.girth)
    width[height > 0.8] = high
    waist = np.linalg.norm(body.waist)
    below = np.minimum(height, waist)[:, None] * -pelvis[:, 1]
    above = np.maximum(height - waist, 0.0)[:, None] * -chest[:, 1]
    blend = np.clip((height - 0.15) / 0.55, 0, 1)[:, None]
    left = (1 - blend) * pelvis[:, 0] + blend * chest[:, 0]
    front = (1 - blend) * pelvis[:, 2] + blend * chest[:, 2]
    depth = _TORSO[:, 2] * (0.2 + 0.8 * build.girth)
    loose = 1.0 if outfit.bare_top else 0.5 + 0.5 * outfit.loose
    mesh = _tube(below + above, left, front, _TORSO[:, 1] * width * loose, depth * loose, _TRUNK)
    middle = 0.5 * (height[1:] + height[:-1])
    top = outfit.skin if outfit.bare_top else outfit.top
    rows = np.where((middle > 0.06)[:, None], top, outfit.bottom)
    colour = np.repeat(rows[:, None], len(_TRUNK) - 1, axis=1)
    if outfit.bare_top:
        return Surface(mesh=mesh, colour=colour)
    chest_rows, above_belt = (middle > 0.5) & (middle < 0.92), middle > 0.06
    ahead, behind = np.abs(_MIDDLE) < 46, np.abs(_MIDDLE) > 134
    if outfit.badge == "badge":
        colour[np.ix_(chest_rows, ahead)] = outfit.front
        colour[np.ix_(chest_rows, behind)] = outfit.back
    elif outfit.badge == "open":
        colour[np.ix_(above_belt, np.abs(_MIDDLE) < 31)] = outfit.front
    elif outfit.badge == "stripes":
        colour[np.flatnonzero(above_belt)[::2]] = outfit.front
    # The neckline: skin at the front above the chest.
    colour[np.ix_(middle > 1.0, np.abs(_MIDDLE) < 100)] = outfit.skin
    return Surface(mesh=mesh, colour=colour)


def _neck(body: Body, outfit: Outfit) -> Surface:
    points, chest, head = body.points_K3, body.chest_frame, body.head_frame
    upper = points[UPPER_NECK] - 0.16 * head[:, 1] + 0.02 * head[:, 2]
    lower = points[THORAX] + 0.02 * chest[:, 1] - 0.02 * chest[:, 2]
    centre = np.stack([upper, 0.5 * (upper + lower), lower])
    left = np.stack([head[:, 0], chest[:, 0], chest[:, 0]])
    front = np.stack([head[:, 2], chest[:, 2], chest[:, 2]])
    half = np.array([0.088, 0.09, 0.115]) * (0.5 + 0.5 * body.build.girth)
    colour = np.broadcast_to(outfit.skin * 0.9, (2, len(_LIMB) - 1, 3)).copy()
    return Surface(mesh=_tube(centre, left, front, half, half), colour=colour)


def _head(body: Body, outfit: Outfit) -> list[Surface]:
    """The head, the features of its face, and hair that hangs down."""
    frame, top, size = body.head_frame, body.points_K3[HEAD_TOP], body.build.head
    share, scale = _HEAD[:, 0], size / 0.6
    centre = top + (size * share)[:, None] * frame[:, 1]
    centre = centre + (scale * _HEAD[:, 3])[:, None] * frame[:, 2]
    left, front = (np.broadcast_to(frame[:, column], centre.shape) for column in (0, 2))
    mesh = _tube(centre, left, front, scale * _HEAD[:, 1], scale * _HEAD[:, 2], _TRUNK)
    middle = (0.5 * (share[1:] + share[:-1]))[:, None]
    angle = np.abs(_MIDDLE)
    line = {"bald": 0.02, "cap": 0.36, "helmet": 0.34}.get(outfit.style, 0.24)
    face = (angle < 75) & (middle > line)
    nape = {"bald": 0.5, "helmet": 0.75, "long": 1.0}.get(outfit.style, 0.68)
    bare = face | (middle > nape) | ((angle < 110) & (middle > 0.6) & (outfit.style != "long"))
    if outfit.style == "bald":
        bare |= middle < 0.4
    covered_by_hat = (outfit.style == "helmet") | ((outfit.style == "cap") & (middle < 0.42))
    hair = np.where(np.broadcast_to(covered_by_hat, bare.shape)[..., None], outfit.hat, outfit.hair)
    colour = np.where(bare[..., None], outfit.skin, hair).astype(float)
    beard = (angle < 60) & (middle > 0.66) & (outfit.beard > 0)
    colour[beard] += 0.7 * outfit.beard * (outfit.hair - colour[beard])
    surfaces = [Surface(mesh=mesh, colour=colour)]

    def patch(angles: tuple[float, float], down: tuple[float, float], paint: np.ndarray) -> None:
        around = np.radians(np.array(angles))
        rows = [np.interp(down, share, _HEAD[:, column]) * scale * 1.02 for column in range(1, 4)]
        middle_23 = top + (size * np.array(down))[:, None] * frame[:, 1]
        middle_23 = middle_23 + rows[2][:, None] * frame[:, 2]
        sideways, ahead = (np.broadcast_to(frame[:, column], (2, 3)) for column in (0, 2))
        surfaces.append(
            Surface(
                mesh=_tube(middle_23, sideways, ahead, rows[0], rows[1], around),
                colour=np.reshape(paint, (1, 1, 3)),
                lift=0.04,
            )
        )

    brow = 0.5 * outfit.skin + 0.5 * outfit.hair
    for side in SIDES:
        inner, outer = sorted((side * 12.0, side * 38.0))
        patch((inner, outer), (0.485, 0.535), np.full(3, 30.0) + 0.12 * outfit.skin)
        patch((inner, outer), (0.42, 0.45), brow)
    patch((-6.0, 6.0), (0.5, 0.64), 0.9 * outfit.skin)
    patch((-10.0, 10.0), (0.63, 0.66), 0.65 * outfit.skin)
    patch((-20.0, 20.0), (0.735, 0.775), 0.8 * outfit.lips)
    if outfit.style in ("long", "tail"):
        surfaces.append(_hanging_hair(body, outfit))
    return surfaces


def _hanging_hair(body: Body, outfit: Outfit) -> Surface:
    frame, top, size = body.head_frame, body.points_K3[HEAD_TOP], body.build.head
    wide = 0.15 if outfit.style == "long" else 0.05
    share = np.array([0.2, 0.35, 0.7, 1.0, 1.3])
    half = wide * np.array([0.7, 1.0, 1.0, 0.95, 0.4])
    back = np.array([-0.07, -0.1, -0.1, -0.12, -0.16]) - (0.06 if outfit.style == "tail" else 0.0)
    centre = top + (size * share)[:, None] * frame[:, 1] + back[:, None] * frame[:, 2]
    left, front = (np.broadcast_to(frame[:, column], centre.shape) for column in (0, 2))
    colour = np.broadcast_to(0.92 * outfit.hair, (4, len(_LIMB) - 1, 3)).copy()
    return Surface(mesh=_tube(centre, left, front, half, 0.09 * half / wide), colour=colour)


def _skirt(body: Body, outfit: Outfit) -> Surface:
    points = body.points_K3
    share = np.array([-0.12, 0.1, 0.4, 0.7, 1.0]) * outfit.skirt
    right, left = (
        points[hip] + share[:, None] * (points[knee] - points[hip])
        for hip, knee in ((RIGHT_HIP, RIGHT_KNEE), (LEFT_HIP, LEFT_KNEE))
    )
    apart = left - right
    distance = np.linalg.norm(apart, axis=1)
    sideways = apart / np.maximum(distance, 1e-6)[:, None]
    down = 0.5 * (points[RIGHT_KNEE] + points[LEFT_KNEE]) - points[PELVIS]
    front = np.cross(sideways, down / max(float(np.linalg.norm(down)), 1e-6))
    front /= np.maximum(np.linalg.norm(front, axis=1), 1e-6)[:, None]
    half = body.build.girth * np.array([0.16, 0.19, 0.21, 0.2, 0.21])
    colour = np.broadcast_to(outfit.bottom, (4, len(_TRUNK) - 1, 3)).copy()
    mesh = _tube(0.5 * (left + right), sideways, front, 0.5 * distance + half, half, _TRUNK)
    return Surface(mesh=mesh, colour=colour)
