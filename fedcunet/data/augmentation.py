"""Random changes of training crops. B crops, H and W their sides, 3 colour channels."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from fedcunet.errors import UserError

MAX_SCALE = 1.25
MAX_DEGREES = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Ranges of the random changes of a training crop, each drawn uniformly.

    Attributes:
        scale: factors on the side of the crop, within 0.25 to 1.25 (what the cached pixels hold).
        rotation_degrees: the crop turns by up to this much either way, at most 30.
        flip: mirror half of the crops, landmarks of the two sides changing names. The paper flips
            people; its faces are not flipped.
        colour: each colour channel is multiplied by 1 - colour to 1 + colour, then clipped.
    """

    scale: tuple[float, float] = (0.75, 1.25)
    rotation_degrees: float = 30.0
    flip: bool = False
    colour: float = 0.4

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0.25 <= low <= high <= MAX_SCALE:
            raise UserError(
                f"augmentation scale: expected 0.25 <= low <= high <= 1.25, found {self.scale}"
            )
        if not 0 <= self.rotation_degrees <= MAX_DEGREES:
            raise UserError(
                f"augmentation rotation: expected 0 to 30, found {self.rotation_degrees}"
            )
        if not 0 <= self.colour <= 1:
            raise UserError(f"augmentation colour: expected 0 to 1, found {self.colour}")


def draw(
    count: int, augmentation: Augmentation | None, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per crop: scale, angle in radians, mirrored or not, and three colour factors."""
    if augmentation is None:
        return np.ones(count), np.zeros(count), np.zeros(count, dtype=bool), np.ones((count, 3))
    if generator is None:
        raise ValueError(
            "augmentation needs a generator: expected numpy.random.Generator, found None"
        )
    uniform_B6 = generator.random((count, 6))
    low, high = augmentation.scale
    return (
        low + (high - low) * uniform_B6[:, 0],
        math.radians(augmentation.rotation_degrees) * (2 * uniform_B6[:, 1] - 1),
        (uniform_B6[:, 2] < 0.5) & augmentation.flip,
        1 + augmentation.colour * (2 * uniform_B6[:, 3:] - 1),
    )


def coloured(images_BHW3: np.ndarray, colour_B3: np.ndarray) -> np.ndarray:
    """uint8 pixels times the factors of their channels, as float32 clipped to [0, 1].

    Each of the 256 values of a channel is multiplied once, in a table: a third of the time that
    multiplying every pixel takes.
    """
    gain_B3 = (colour_B3 / 255.0).astype(np.float32)
    table_B256x3 = np.arange(256, dtype=np.float32)[:, None] * gain_B3[:, None, :]
    np.minimum(table_B256x3, 1.0, out=table_B256x3)
    coloured_BHW3 = np.empty(images_BHW3.shape, dtype=np.float32)
    for image_HW3, table_256x3, out_HW3 in zip(
        images_BHW3, table_B256x3, coloured_BHW3, strict=True
    ):
        cv2.LUT(image_HW3, table_256x3[None], dst=out_HW3)
    return coloured_BHW3
