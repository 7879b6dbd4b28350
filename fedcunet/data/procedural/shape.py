"""One face as numbers: identity and expression.

Axes as in an image: x to the right, y down, z towards the viewer. The unit is half the width of a
mean face at the ears, so a mean face spans x from -1 to 1 and its outer eye corners are 1.2 apart.
All proportions are our own round numbers; no statistics of annotated photographs are in here.
"""

from dataclasses import dataclass

import numpy as np

EAR_Y = -0.5  # height of the first and last jaw point
MOUTH_Y = 0.385  # line where closed lips meet, before identity moves it


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
    gap = max(0.004, around(0.015, 0.012)) + wide
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
