"""Landmarks drawn on crops, for people to look at."""

import math
from itertools import pairwise

import cv2
import numpy as np

from fedcunet.data.annotations import LandmarkScheme

TARGET_COLOUR = (80, 255, 80)


def draw_landmarks(
    image_HW3: np.ndarray,
    points_K2: np.ndarray,
    labelled_K: np.ndarray,
    scheme: LandmarkScheme,
    *,
    zoom: int = 1,
    colour: tuple[int, int, int] = TARGET_COLOUR,
) -> np.ndarray:
    """The image `zoom` times as large with points and lines; unlabelled points are left out.

    Args:
        image_HW3: uint8 RGB; not changed.
        points_K2: 0-based pixels of the image.
        labelled_K: bool.
        scheme: says which points are joined by lines.
        zoom: whole number.
        colour: RGB.
    """
    canvas_HW3 = np.repeat(np.repeat(image_HW3, zoom, axis=0), zoom, axis=1)
    # Pixel 0 of the image covers -0.5 to zoom - 0.5 of the canvas. Drawn to 1/16 pixel (shift 4).
    spots_K2 = np.round(((points_K2 + 0.5) * zoom - 0.5).clip(-1e4, 1e4) * 16).astype(int)
    for line in scheme.lines:
        for start, end in pairwise(line):
            if labelled_K[start] and labelled_K[end]:
                ends = (spots_K2[start].tolist(), spots_K2[end].tolist())
                cv2.line(canvas_HW3, *ends, colour, 1, cv2.LINE_AA, 4)
    for spot_2, labelled in zip(spots_K2, labelled_K, strict=True):
        if labelled:
            cv2.circle(canvas_HW3, spot_2.tolist(), 24, colour, -1, cv2.LINE_AA, 4)
    return canvas_HW3


def contact_sheet(images_NHW3: list[np.ndarray], *, columns: int = 8) -> np.ndarray:
    """Images of one size (H, W, 3) side by side in rows, uint8; the last row ends in black."""
    columns = min(columns, len(images_NHW3))
    rows = math.ceil(len(images_NHW3) / columns)
    blank_HW3 = np.zeros_like(images_NHW3[0])
    filled = images_NHW3 + [blank_HW3] * (rows * columns - len(images_NHW3))
    lines = [np.hstack(filled[row * columns : (row + 1) * columns]) for row in range(rows)]
    return np.vstack(lines)
