"""The character of each folder's photos, as the folders of 300-W differ.

AFW is small, dim and crowded; HELEN large and bright; LFPW of mixed sharpness and compression; IBUG
strongly turned, expressive and partly hidden. So a partition by source is really non-IID.
"""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The character of one folder's photos."""

    folder: str
    suffix: str
    side: tuple[int, int]  # pixels of a picture
    face: tuple[float, float]  # landmark box / side
    yaw: float  # sd in degrees; the others alike
    pitch: float
    roll: float
    expression: float
    companions: float  # chance that a photo has one more face
    clutter: float
    hardness: float
    gain: tuple[float, float]
    saturation: tuple[float, float]
    warmth: float
    blur: tuple[float, float]
    motion: float  # chance
    noise: tuple[float, float]
    jpeg: tuple[int, int]
    grey: float  # chance
    occluders: float
    glasses: float = 0.15


_AFW = Source(
    folder="afw",
    suffix=".jpg",
    side=(150, 170),
    face=(0.38, 0.48),
    yaw=18,
    pitch=9,
    roll=8,
    expression=1.0,
    companions=0.45,
    clutter=0.9,
    hardness=0.6,
    gain=(0.6, 0.95),
    saturation=(0.6, 1.05),
    warmth=0.05,
    blur=(0.4, 1.0),
    motion=0.05,
    noise=(3, 9),
    jpeg=(55, 85),
    grey=0.03,
    occluders=0.1,
)
_HELEN = Source(
    folder="helen/trainset",
    suffix=".jpg",
    side=(190, 204),
    face=(0.46, 0.54),
    yaw=12.5,
    pitch=8,
    roll=7,
    expression=1.15,
    companions=0.1,
    clutter=0.4,
    hardness=0.4,
    gain=(0.92, 1.15),
    saturation=(0.9, 1.15),
    warmth=0.02,
    blur=(0.0, 0.6),
    motion=0.0,
    noise=(1, 4),
    jpeg=(80, 95),
    grey=0.05,
    occluders=0.08,
)
_LFPW = Source(
    folder="lfpw/trainset",
    suffix=".png",
    side=(165, 190),
    face=(0.46, 0.56),
    yaw=15,
    pitch=8,
    roll=6,
    expression=0.8,
    companions=0.0,
    clutter=0.25,
    hardness=0.75,
    gain=(0.8, 1.15),
    saturation=(0.5, 1.1),
    warmth=-0.03,
    blur=(0.0, 1.7),
    motion=0.12,
    noise=(1, 6),
    jpeg=(22, 80),
    grey=0.15,
    occluders=0.06,
)
_IBUG = Source(
    folder="ibug",
    suffix=".jpg",
    side=(175, 190),
    face=(0.45, 0.55),
    yaw=22,
    pitch=11,
    roll=11,
    expression=1.7,
    companions=0.0,
    clutter=0.7,
    hardness=0.8,
    gain=(0.65, 1.2),
    saturation=(0.7, 1.1),
    warmth=0.03,
    blur=(0.2, 1.2),
    motion=0.06,
    noise=(2, 7),
    jpeg=(50, 90),
    grey=0.08,
    occluders=0.45,
    glasses=0.22,
)
# Share of the training faces of each folder, then of the test faces.
TRAIN = ((_AFW, 0.24), (_HELEN, 0.46), (_LFPW, 0.30))
TEST = (
    (dataclasses.replace(_HELEN, folder="helen/testset"), 0.46),
    (dataclasses.replace(_LFPW, folder="lfpw/testset"), 0.34),
    (_IBUG, 0.20),
)
