"""A body of rigid bones in three dimensions: proportions and joint angles give 16 joints.

Axes as in head.py: x to the right of the picture, y down, z towards the camera. A body without
rotation stands upright and faces the camera, so that the person's left side is at x > 0. Lengths
are in torsos (pelvis to thorax of an upright body). Pairs are (right, left).
"""

from dataclasses import dataclass

import numpy as np

# Joints in MPII's order.
RIGHT_ANKLE, RIGHT_KNEE, RIGHT_HIP, LEFT_HIP, LEFT_KNEE, LEFT_ANKLE = range(6)
PELVIS, THORAX, UPPER_NECK, HEAD_TOP = range(6, 10)
RIGHT_WRIST, RIGHT_ELBOW, RIGHT_SHOULDER, LEFT_SHOULDER, LEFT_ELBOW, LEFT_WRIST = range(10, 16)
SIDES = (-1.0, 1.0)  # right, left
_LEG = ((RIGHT_HIP, RIGHT_KNEE, RIGHT_ANKLE), (LEFT_HIP, LEFT_KNEE, LEFT_ANKLE))
_ARM = ((RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_WRIST), (LEFT_SHOULDER, LEFT_ELBOW, LEFT_WRIST))
_DOWN = np.array([0.0, 1.0, 0.0])
_WAIST = 0.42  # where the spine bends, from the pelvis up


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """Lengths of the bones in torsos, and `girth`, a factor on all widths.

    The medians follow MPII's annotations (Andriluka et al., CVPR 2014; 19,856 complete people):
    seen in the picture, in torsos: thigh 0.80 (95th percentile 1.24), shank 0.79 (1.24), upper arm
    0.55 (0.89), forearm 0.46 (0.79), half shoulders 0.31 (0.55), half hips 0.18 (0.36), thorax to
    upper neck 0.14, upper neck to head top 0.60. Bones are longer than their seen median, since
    most are foreshortened.
    """

    thigh: float = 0.86
    shank: float = 0.85
    upper_arm: float = 0.60
    forearm: float = 0.51
    shoulders: float = 0.35  # half
    hips: float = 0.195  # half
    neck: float = 0.14
    head: float = 0.60
    foot: float = 0.36
    hand: float = 0.22
    girth: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Joints:
    """Angles of the joints, radians; `root` (3, 3) turns the pelvis into camera axes."""

    root: np.ndarray
    spine: tuple[float, float, float]  # bend forwards, bend sideways, twist
    head: tuple[float, float, float]  # nod down, tilt, turn
    hip: np.ndarray  # (2,) forwards
    spread: np.ndarray  # (2,) hip outwards
    turnout: np.ndarray  # (2,) of the leg about itself
    knee: np.ndarray  # (2,)
    ankle: np.ndarray  # (2,) toes down
    arm: np.ndarray  # (2,) forwards and up
    abduction: np.ndarray  # (2,) arm outwards
    twist: np.ndarray  # (2,) of the upper arm about itself
    elbow: np.ndarray  # (2,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """A posed body, pelvis at 0, in camera axes. Frames are (3, 3): columns left, down, front."""

    build: Build
    points_K3: np.ndarray  # (16, 3)
    waist: np.ndarray  # (3,)
    pelvis_frame: np.ndarray
    chest_frame: np.ndarray
    head_frame: np.ndarray
    thigh_frames: tuple[np.ndarray, np.ndarray]
    shank_frames: tuple[np.ndarray, np.ndarray]
    foot_frames: tuple[np.ndarray, np.ndarray]
    upper_arm_frames: tuple[np.ndarray, np.ndarray]
    forearm_frames: tuple[np.ndarray, np.ndarray]


def turn_x(angle: float) -> np.ndarray:
    """Rotation that takes down (y) to the front (z)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def turn_y(angle: float) -> np.ndarray:
    """Rotation about the vertical that takes the front (z) to x."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def turn_z(angle: float) -> np.ndarray:
    """Rotation in the picture that takes x to down (y)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def sample_build(generator: np.random.Generator) -> Build:
    """An adult, or now and then a child with a larger head and shorter limbs."""
    child = max(0.0, float(generator.uniform(-5.0, 1.0)))
    limb = generator.normal(1.0, 0.05) - 0.15 * child

    def about(value: float, spread: float = 0.04) -> float:
        return float(value * np.clip(generator.normal(1.0, spread), 0.85, 1.15))

    return Build(
        thigh=about(0.86 * limb),
        shank=about(0.85 * limb),
        upper_arm=about(0.60 * limb),
        forearm=about(0.51 * limb),
        shoulders=about(0.35, 0.06),
        hips=about(0.195, 0.06),
        neck=about(0.14, 0.08),
        head=about(0.60, 0.05) * (1.0 + 0.25 * child),
        foot=about(0.36),
        hand=about(0.22),
        girth=float(np.clip(generator.lognormal(0.1, 0.16), 0.8, 1.6)),
    )


def pose_body(build: Build, joints: Joints) -> Body:
    """Where the joints of `build` are under these angles (forward kinematics)."""
    points_K3 = np.zeros((16, 3))
    root = joints.root
    bend, side, twist = joints.spine
    chest = root @ turn_y(twist) @ turn_z(side) @ turn_x(-bend)
    nod, tilt, look = joints.head
    head = chest @ turn_y(look) @ turn_z(tilt) @ turn_x(-nod)
    waist = -_WAIST * root @ _DOWN
    points_K3[THORAX] = waist - (1 - _WAIST) * chest @ _DOWN
    points_K3[UPPER_NECK] = points_K3[THORAX] - build.neck * chest @ _DOWN
    points_K3[HEAD_TOP] = points_K3[UPPER_NECK] - build.head * head @ _DOWN
    frames: dict[str, list[np.ndarray]] = {
        name: [] for name in ("thigh", "shank", "foot", "upper_arm", "forearm")
    }
    for index, sign in enumerate(SIDES):
        hip, knee, ankle = _LEG[index]
        thigh = root @ turn_x(joints.hip[index]) @ turn_z(-sign * joints.spread[index])
        thigh = thigh @ turn_y(sign * joints.turnout[index])
        shank = thigh @ turn_x(-joints.knee[index])
        points_K3[hip] = sign * build.hips * root[:, 0]
        points_K3[knee] = points_K3[hip] + build.thigh * thigh @ _DOWN
        points_K3[ankle] = points_K3[knee] + build.shank * shank @ _DOWN
        frames["thigh"].append(thigh)
        frames["shank"].append(shank)
        frames["foot"].append(shank @ turn_x(-joints.ankle[index]))
        shoulder, elbow, wrist = _ARM[index]
        upper = chest @ turn_x(joints.arm[index]) @ turn_z(-sign * joints.abduction[index])
        upper = upper @ turn_y(sign * joints.twist[index])
        fore = upper @ turn_x(joints.elbow[index])
        # A raised arm lifts its shoulder.
        lift = 0.13 * max(0.0, -float((upper @ _DOWN) @ (chest @ _DOWN)))
        points_K3[shoulder] = points_K3[THORAX] + chest @ (sign * build.shoulders, -lift, 0.0)
        points_K3[elbow] = points_K3[shoulder] + build.upper_arm * upper @ _DOWN
        points_K3[wrist] = points_K3[elbow] + build.forearm * fore @ _DOWN
        frames["upper_arm"].append(upper)
        frames["forearm"].append(fore)
    return Body(
        build=build,
        points_K3=points_K3,
        waist=waist,
        pelvis_frame=root,
        chest_frame=chest,
        head_frame=head,
        thigh_frames=(frames["thigh"][0], frames["thigh"][1]),
        shank_frames=(frames["shank"][0], frames["shank"][1]),
        foot_frames=(frames["foot"][0], frames["foot"][1]),
        upper_arm_frames=(frames["upper_arm"][0], frames["upper_arm"][1]),
        forearm_frames=(frames["forearm"][0], frames["forearm"][1]),
    )
