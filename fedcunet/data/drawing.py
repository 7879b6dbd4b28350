"""Landmarks drawn on crops, for people to look at."""

import math
from itertools import pairwise

import cv2
import numpy as np

from fedcunet.data.annotations import LandmarkScheme

# RGB of the person's right side, left side and middle: what mirroring must exchange can be seen.
RIGHT, LEFT, MIDDLE = (80, 255, 80), (255, 150, 40), (255, 255, 255)


def draw_landmarks(
    image_HW3: np.ndarray,
    points_K2: np.ndarray,
    labelled_K: np.ndarray,
    scheme: LandmarkScheme,
    *,
    zoom: int = 1,
) -> np.ndarray:
    """The image `zoom` times as large with points and lines; unlabelled points are left out.

    Landmarks of the person's right side are green, of the left side orange, others white.

    Args:
        image_HW3: uint8 RGB; not changed.
        points_K2: 0-based pixels of the image.
        labelled_K: bool.
        scheme: says which points are joined by lines.
        zoom: whole number.
    """
    canvas_HW3 = np.repeat(np.repeat(image_HW3, zoom, axis=0), zoom, axis=1)
    # Pixel 0 of the image covers -0.5 to zoom - 0.5 of the canvas. Drawn to 1/16 pixel (shift 4).
    spots_K2 = np.round(((points_K2 + 0.5) * zoom - 0.5).clip(-1e4, 1e4) * 16).astype(int)
    colours = _colours(scheme)
    for line in scheme.lines:
        for start, end in pairwise(line):
            if labelled_K[start] and labelled_K[end]:
                ends = (spots_K2[start].tolist(), spots_K2[end].tolist())
                colour = _line_colour(colours[start], colours[end])
                cv2.line(canvas_HW3, *ends, colour, 1, cv2.LINE_AA, 4)
    for spot_2, labelled, colour in zip(spots_K2, labelled_K, colours, strict=True):
        if labelled:
            cv2.circle(canvas_HW3, spot_2.tolist(), 24, colour, -1, cv2.LINE_AA, 4)
    return canvas_HW3


def _colours(scheme: LandmarkScheme) -> list[tuple[int, int, int]]:
    """A colour a landmark; the first of each pair is on the person's right."""
    colours = [MIDDLE] * scheme.num_landmarks
    for right, left in scheme.flip_pairs:
        colours[right], colours[left] = RIGHT, LEFT
    return colours


def _line_colour(start: tuple[int, int, int], end: tuple[int, int, int]) -> tuple[int, int, int]:
    """That of its ends; of the one end with a side; of the middle, from one side to the other."""
    sides = {start, end} - {MIDDLE}
    return sides.pop() if len(sides) == 1 else MIDDLE


def contact_sheet(images_NHW3: list[np.ndarray], *, columns: int = 8) -> np.ndarray:
    """Images of one size (H, W, 3) side by side in rows, uint8; the last row ends in black."""
    columns = min(columns, len(images_NHW3))
    rows = math.ceil(len(images_NHW3) / columns)
    blank_HW3 = np.zeros_like(images_NHW3[0])
    filled = images_NHW3 + [blank_HW3] * (rows * columns - len(images_NHW3))
    lines = [np.hstack(filled[row * columns : (row + 1) * columns]) for row in range(rows)]
    return np.vstack(lines)
