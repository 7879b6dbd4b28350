"""Families of poses: ranges of joint angles, from standing to somersaults; sampled within limits.

The ranges are ours. They were set by eye, so that angles seen in the picture (knee, hip, elbow, arm
against the torso, tilt of the torso) spread as in MPII's annotations (Andriluka et al., CVPR 2014).
"""

from dataclasses import dataclass

import numpy as np

from .skeleton import Joints, turn_x, turn_y, turn_z


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Means and standard deviations of angles in degrees; a third number is left with right.

    The correlation of the two sides is near -1 for strides, near 1 for both alike. `grounded`
    hips are measured from the vertical, others from the torso.
    """

    lean: tuple[float, float] = (0, 6)  # of the pelvis, forwards
    roll: tuple[float, float] = (0, 4)  # of the whole body, sideways; either way
    spine: tuple[float, float] = (6, 9)
    hip: tuple[float, float, float] = (4, 10, 0.2)
    spread: tuple[float, float] = (7, 7)
    knee: tuple[float, float, float] = (9, 10, 0.3)
    arm: tuple[float, float, float] = (15, 28, 0.3)
    abduction: tuple[float, float] = (16, 17)
    elbow: tuple[float, float, float] = (40, 35, 0.4)
    grounded: bool = True


# fmt: off
FAMILIES = {
    "stand": Family(),
    "walk": Family(lean=(3, 5), hip=(6, 24, -0.9), knee=(24, 20, -0.3), arm=(2, 22, -0.7),
                   elbow=(28, 20, 0.5)),
    "run": Family(lean=(11, 7), hip=(20, 38, -0.9), knee=(58, 36, -0.6), arm=(4, 42, -0.9),
                  abduction=(20, 12), elbow=(85, 22, 0.5)),
    "work": Family(lean=(4, 8), spine=(22, 14), hip=(8, 14, 0.1), knee=(14, 14, 0.4),
                   arm=(45, 28, 0.4), elbow=(62, 32, 0.4)),
    "play": Family(spine=(9, 8), hip=(18, 30, 0.9), knee=(22, 30, 0.9), arm=(34, 22, 0.1),
                   abduction=(25, 15), elbow=(95, 28, 0.2)),
    "sit": Family(lean=(-4, 13), spine=(15, 14), hip=(82, 14, 0.7), spread=(14, 12),
                  knee=(84, 26, 0.6), arm=(35, 28, 0.4), elbow=(62, 34, 0.4)),
    "floor": Family(lean=(-8, 20), spine=(20, 16), hip=(98, 18, 0.5), spread=(22, 20),
                    knee=(70, 48, 0.6), arm=(25, 40, 0.5), abduction=(25, 22), elbow=(40, 35, 0.4)),
    "squat": Family(lean=(18, 14), spine=(24, 14), hip=(98, 22, 0.6), spread=(22, 14),
                    knee=(108, 24, 0.7), arm=(52, 32, 0.4), elbow=(50, 32, 0.4)),
    "kneel": Family(lean=(12, 14), spine=(20, 15), hip=(25, 38, -0.3), spread=(14, 10),
                    knee=(98, 20, 0.5), arm=(45, 30, 0.4), elbow=(52, 32, 0.4)),
    "bend": Family(lean=(46, 22), spine=(32, 16), hip=(10, 16, 0.0), spread=(12, 9),
                   knee=(24, 22, 0.5), arm=(75, 30, 0.5), elbow=(28, 26, 0.4)),
    "lunge": Family(lean=(12, 16), roll=(0, 9), spine=(14, 14), hip=(32, 44, -0.7),
                    spread=(16, 14), knee=(44, 34, -0.4), arm=(45, 50, 0.0),
                    abduction=(42, 34), elbow=(45, 36, 0.1)),
    "swing": Family(lean=(10, 12), roll=(0, 6), spine=(20, 14), hip=(12, 20, -0.3),
                    spread=(17, 10), knee=(26, 20, 0.2), arm=(95, 50, 0.8), abduction=(12, 28),
                    elbow=(40, 34, 0.2)),
    "kick": Family(lean=(-4, 16), roll=(0, 14), hip=(42, 50, -0.9), spread=(24, 24),
                   knee=(32, 34, -0.5), arm=(30, 45, -0.3), abduction=(48, 32),
                   elbow=(50, 36, 0.1)),
    "reach": Family(lean=(2, 8), spine=(4, 12), hip=(8, 18, -0.2), knee=(16, 20, 0.1),
                    arm=(135, 36, 0.5), abduction=(20, 24), elbow=(34, 34, 0.4)),
    "dance": Family(roll=(0, 7), spine=(3, 12), hip=(8, 24, -0.5), spread=(14, 14),
                    knee=(22, 24, 0.0), arm=(35, 55, 0.3), abduction=(55, 34), elbow=(48, 38, 0.3)),
    "split": Family(lean=(6, 18), roll=(0, 10), hip=(8, 66, -0.97), spread=(12, 18),
                    knee=(16, 22, 0.1), arm=(45, 60, 0.3), abduction=(60, 34), elbow=(20, 24, 0.2)),
    "jump": Family(lean=(8, 18), roll=(0, 14), spine=(6, 16), hip=(42, 40, 0.2), spread=(18, 16),
                   knee=(62, 42, 0.2), arm=(90, 58, 0.4), abduction=(35, 30), elbow=(38, 34, 0.3)),
    "cycle": Family(lean=(32, 15), spine=(24, 12), hip=(48, 26, -0.9), knee=(66, 30, -0.8),
                    arm=(76, 16, 0.9), abduction=(12, 9), elbow=(28, 20, 0.8)),
    "ski": Family(lean=(22, 14), roll=(0, 10), spine=(22, 12), hip=(46, 24, 0.8), spread=(10, 9),
                  knee=(56, 26, 0.8), arm=(42, 26, 0.5), abduction=(32, 22), elbow=(55, 28, 0.5)),
    "push up": Family(lean=(82, 10), spine=(6, 10), hip=(4, 24, 0.1), knee=(18, 28, 0.1),
                      arm=(84, 18, 0.8), abduction=(18, 14), elbow=(32, 32, 0.8), grounded=False),
    "crawl": Family(lean=(72, 16), spine=(10, 14), hip=(74, 24, 0.1), knee=(88, 24, 0.2),
                    arm=(80, 18, 0.5), elbow=(22, 22, 0.5), grounded=False),
    "lie": Family(lean=(-84, 14), spine=(8, 14), hip=(34, 36, 0.4), knee=(42, 40, 0.3),
                  arm=(55, 65, 0.4), abduction=(28, 28), elbow=(42, 38, 0.4), grounded=False),
    "swim": Family(lean=(74, 24), roll=(0, 28), hip=(12, 20, -0.3), knee=(24, 24, 0.0),
                   arm=(110, 62, -0.2), abduction=(28, 28), elbow=(34, 30, 0.2), grounded=False),
    "bridge": Family(lean=(-100, 24), spine=(-26, 14), hip=(-4, 20, 0.5), knee=(62, 30, 0.6),
                     arm=(150, 25, 0.8), elbow=(20, 22, 0.6), grounded=False),
    "hang": Family(lean=(0, 16), roll=(0, 8), hip=(22, 34, 0.6), spread=(9, 9), knee=(36, 38, 0.6),
                   arm=(168, 14, 0.8), abduction=(10, 16), elbow=(28, 36, 0.8), grounded=False),
    "handstand": Family(lean=(0, 22), roll=(180, 20), spine=(-2, 16), hip=(8, 38, -0.5),
                        spread=(16, 18), knee=(18, 28, 0.2), arm=(162, 18, 0.7),
                        abduction=(12, 14), elbow=(14, 20, 0.6), grounded=False),
    "cartwheel": Family(lean=(0, 20), roll=(130, 38), hip=(6, 40, -0.6), spread=(34, 22),
                        knee=(12, 20, 0.1), arm=(150, 30, 0.3), abduction=(22, 20),
                        elbow=(14, 20, 0.2), grounded=False),
    "vault": Family(lean=(28, 34), roll=(35, 38), spine=(14, 18), hip=(68, 38, 0.3),
                    spread=(18, 20), knee=(46, 38, 0.3), arm=(58, 48, 0.0), abduction=(28, 26),
                    elbow=(26, 28, 0.2), grounded=False),
    "somersault": Family(lean=(0, 180), roll=(0, 18), spine=(20, 20), hip=(78, 42, 0.8),
                         spread=(12, 14), knee=(74, 46, 0.8), arm=(62, 50, 0.5),
                         abduction=(22, 24), elbow=(46, 38, 0.5), grounded=False),
    "layout": Family(lean=(0, 180), roll=(0, 25), spine=(-8, 18), hip=(4, 28, 0.3),
                     spread=(10, 14), knee=(16, 24, 0.4), arm=(95, 62, 0.4), abduction=(36, 34),
                     elbow=(28, 30, 0.3), grounded=False),
    "aerial": Family(lean=(0, 50), roll=(0, 60), spine=(8, 22), hip=(36, 50, -0.2),
                     spread=(20, 22), knee=(48, 44, 0.1), arm=(80, 62, 0.1), abduction=(40, 36),
                     elbow=(38, 36, 0.1), grounded=False),
}
# fmt: on
_LIMITS = {  # degrees
    "spine": (-45.0, 80.0),
    "hip": (-45.0, 140.0),
    "spread": (-12.0, 85.0),
    "knee": (0.0, 150.0),
    "arm": (-55.0, 185.0),
    "abduction": (-25.0, 120.0),
    "elbow": (0.0, 150.0),
}


def sample_joints(
    family: Family, root: np.ndarray, generator: np.random.Generator, *, upright: float = 0.6
) -> Joints:
    """Joint angles of the family; `root` turns the upright person into camera axes.

    Args:
        family: the ranges.
        root: (3, 3), the view: yaw, height and roll of the camera.
        generator: the source of all randomness.
        upright: share of a forward lean that the head takes back, to look ahead.
    """
    lean, roll = generator.normal(*family.lean), generator.normal(*family.roll)
    roll *= 1.0 if generator.random() < 0.5 else -1.0
    bend = float(np.clip(generator.normal(*family.spine), *_LIMITS["spine"]))
    lifted = lean if family.grounded else 0.0
    hip = _pair("hip", family.hip, generator, shift=lifted)
    ahead = -upright * (lean + bend) if family.grounded else 0.0
    nod = np.clip(ahead + generator.normal(2, 15), -50, 45)
    return Joints(
        root=root @ turn_z(np.radians(roll)) @ turn_x(-np.radians(lean)),
        spine=(
            float(np.radians(bend)),
            float(np.radians(generator.normal(0, 8))),
            float(np.radians(np.clip(generator.normal(0, 13), -40, 40))),
        ),
        head=(
            float(np.radians(nod)),
            float(np.radians(generator.normal(0, 9))),
            float(np.radians(np.clip(generator.normal(0, 24), -65, 65))),
        ),
        hip=hip,
        spread=_pair("spread", (*family.spread, 0.4), generator),
        turnout=np.radians(generator.normal(8, 13, 2)),
        knee=_pair("knee", family.knee, generator),
        ankle=np.radians(np.clip(generator.normal(8 if family.grounded else 32, 15, 2), -20, 60)),
        arm=_pair("arm", family.arm, generator),
        abduction=_pair("abduction", (*family.abduction, 0.5), generator),
        twist=np.radians(np.clip(generator.normal(-12, 34, 2), -80, 70)),
        elbow=_pair("elbow", family.elbow, generator),
    )


def sample_view(generator: np.random.Generator) -> np.ndarray:
    """(3, 3): people seen mostly from the front, often from a side, now and then from behind.

    MPII shows 70 % of its people with the left shoulder at the right of the picture.
    """
    kind = generator.random()
    if kind < 0.62:
        yaw = generator.normal(0, 42)
    elif kind < 0.82:
        yaw = generator.normal(180, 42)
    else:
        yaw = generator.choice((-90.0, 90.0)) + generator.normal(0, 18)
    height, roll = generator.normal(4, 10), generator.normal(0, 4)
    turned = turn_z(np.radians(roll)) @ turn_x(-np.radians(height))
    return np.asarray(turned @ turn_y(np.radians(yaw)))


def _pair(
    name: str,
    spread: tuple[float, float, float],
    generator: np.random.Generator,
    *,
    shift: float = 0.0,
) -> np.ndarray:
    """Right and left angle, radians, correlated."""
    mean, sd, correlation = spread
    first, second = generator.standard_normal(2)
    second = correlation * first + np.sqrt(1 - correlation**2) * second
    pair = np.array([first, second]) if generator.random() < 0.5 else np.array([second, first])
    low, high = _LIMITS[name]
    return np.radians(np.clip(mean + shift + sd * pair, low, high))
