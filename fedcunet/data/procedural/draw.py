"""Painting on 8-bit images with sub-pixel outlines: what features, people and scenes share.

Colours are (blue, green, red) in 0..255; points are (x, y) in pixels, (0, 0) the centre of the
first pixel. `fill` and `stroke` cover what is there and are quick; where something shows through on
known ground, `mix` its colour beforehand; `blend` is for unknown ground.
"""

from collections.abc import Sequence

import cv2
import numpy as np

_SHIFT = 4  # OpenCV takes coordinates in sixteenths of a pixel
Colour = Sequence[float] | np.ndarray | float


def fixed(points: np.ndarray) -> np.ndarray:
    """Points as OpenCV's fixed-point integers, int32 of the same shape."""
    return np.asarray(np.rint(points * (1 << _SHIFT)), np.int32)


def mix(under: np.ndarray, colour: Colour, opacity: float) -> np.ndarray:
    """The colour seen where `colour` lies with `opacity` on `under`."""
    return np.asarray(under + opacity * (np.asarray(colour) - under))


def fill(image: np.ndarray, polygon: np.ndarray, colour: Colour) -> None:
    """Fill one polygon (N, 2), any simple shape, with a smooth edge."""
    cv2.fillPoly(image, [fixed(polygon)], _scalar(colour), cv2.LINE_AA, _SHIFT)


def stroke(image: np.ndarray, lines: Sequence[np.ndarray], colour: Colour, width: float) -> None:
    """Draw open lines `width` pixels wide, rounded to whole pixels, one at least."""
    thickness = max(1, round(width))
    outlines = [fixed(line) for line in lines]
    cv2.polylines(image, outlines, False, _scalar(colour), thickness, cv2.LINE_AA, _SHIFT)


def blend(
    image: np.ndarray, polygon: np.ndarray, colour: Colour, opacity: float, *, soften: float = 0.0
) -> None:
    """Fill one polygon with `opacity`; `soften` is the sd in pixels of a blurred edge."""
    height, width = image.shape[:2]
    margin = 2 + int(3 * soften)
    low = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - margin, 0)
    high = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + margin + 1, (width, height))
    if (high <= low).any():
        return
    region = image[low[1] : high[1], low[0] : high[0]]
    mask: np.ndarray = np.zeros(region.shape[:2], np.uint8)
    cv2.fillPoly(mask, [fixed(polygon - low)], 255, cv2.LINE_AA, _SHIFT)
    if soften:
        mask = cv2.GaussianBlur(mask, (0, 0), soften)
    weight = mask[..., None] * np.float32(opacity / 255.0)
    paint = np.clip(np.asarray(colour, np.float32), 0, 255)
    region[:] = region + weight * (paint - region) + np.float32(0.5)


def ellipse(
    centre: np.ndarray,
    right: np.ndarray,
    down: np.ndarray,
    *,
    first: float = 0.0,
    last: float = 360.0,
) -> np.ndarray:
    """Points on an ellipse spanned by two half axes, from `right` towards `down`, (N, 2)."""
    if (first, last) == (0.0, 360.0):
        turn = _CIRCLE
    else:
        angle = np.radians(np.linspace(first, last, 13))
        turn = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(centre + turn @ np.stack([right, down]))


def curve(points_N2: np.ndarray) -> np.ndarray:
    """A smooth open curve exactly through the given points, three further points on each piece.

    Catmull-Rom (Catmull and Rom 1974), which is linear in the points: one matrix for each N.
    """
    return np.asarray(_curve_matrix(len(points_N2)) @ points_N2)


def _scalar(colour: Colour) -> list[float]:
    # OpenCV wraps round beyond 8 bits.
    return [min(max(value, 0.0), 255.0) for value in np.ravel(colour).tolist()]


def _circle() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


_CIRCLE = _circle()
_CURVES: dict[int, np.ndarray] = {}


def _curve_matrix(count: int) -> np.ndarray:
    if count not in _CURVES:
        eye = np.eye(count)
        padded = np.concatenate([2 * eye[:1] - eye[1:2], eye, 2 * eye[-1:] - eye[-2:-1]])
        t = (np.arange(4) / 4)[None, :, None]
        a, b, c, d = (
            part[:, None] for part in (padded[:-3], padded[1:-2], padded[2:-1], padded[3:])
        )
        smooth = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        _CURVES[count] = np.concatenate([smooth.reshape(-1, count), eye[-1:]])
    return _CURVES[count]
