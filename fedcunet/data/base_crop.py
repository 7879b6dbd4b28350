"""The pixels that all crops of one box come from: its neighbourhood, as fine as a crop needs it."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from fedcunet.data.augmentation import MAX_DEGREES, MAX_SCALE

# Half the side of the kept neighbourhood, in sides of the crop: it holds every crop that is
# MAX_SCALE times as large and turned by up to MAX_DEGREES.
_REACH = MAX_SCALE * (math.cos(math.radians(MAX_DEGREES)) + math.sin(math.radians(MAX_DEGREES))) / 2
_FINENESS = 2  # kept pixels per crop pixel, at most: zooming in by 0.75 still finds detail
# A smaller image is decoded as fast as a file is opened: not worth a place on disk.
_WORTH_DISK_PIXELS = 128 * 128
# What the pixels depend on beside image and box, for the key on disk; the last counts changes of
# `cut` and of the decoder.
CUT_FORM = (_REACH, _FINENESS, 1)


@dataclass(frozen=True, slots=True)
class BaseCrop:
    """uint8 RGB pixels of the neighbourhood, and the affine map image -> these pixels."""

    pixels_HW3: np.ndarray
    scale_2: tuple[float, float]
    offset_2: tuple[float, float]
    is_worth_disk: bool = True  # whether decoding took longer than reading a file


def cut(image_HW3: np.ndarray, centre_2: np.ndarray, side: float, size: int) -> BaseCrop:
    """The part of the image that any augmented crop can see, as fine as the crops need it."""
    height, width = image_HW3.shape[:2]
    reach = _REACH * side + 1  # a pixel more for the interpolation
    left, top = (max(0, math.floor(c - reach)) for c in centre_2)
    right = min(width, math.ceil(centre_2[0] + reach) + 1)
    bottom = min(height, math.ceil(centre_2[1] + reach) + 1)
    if right <= left or bottom <= top:  # the box lies outside the image: all black
        return BaseCrop(np.zeros((1, 1, 3), dtype=np.uint8), (1.0, 1.0), (-left - 1e6, -top - 1e6))
    pixels_HW3 = image_HW3[top:bottom, left:right]
    shrink = _FINENESS * size / side
    if shrink < 1:
        new_width = max(1, round((right - left) * shrink))
        new_height = max(1, round((bottom - top) * shrink))
        # INTER_AREA averages whole pixels: the warp's bilinear steps would skip some (aliasing).
        pixels_HW3 = cv2.resize(pixels_HW3, (new_width, new_height), interpolation=cv2.INTER_AREA)
    scale_2 = (pixels_HW3.shape[1] / (right - left), pixels_HW3.shape[0] / (bottom - top))
    # Pixel centres: kept = (image - left + 0.5) * scale - 0.5.
    offset_2 = ((0.5 - left) * scale_2[0] - 0.5, (0.5 - top) * scale_2[1] - 0.5)
    return BaseCrop(
        np.ascontiguousarray(pixels_HW3),
        scale_2,
        offset_2,
        is_worth_disk=height * width >= _WORTH_DISK_PIXELS,
    )
