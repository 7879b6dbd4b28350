"""Test pictures with the predicted and the true landmarks, as HTML.

The crop is enlarged with OpenCV and embedded; the points are drawn over it as vectors, in crop
pixels, so that they stay sharp and stand exactly where the numbers say.
"""

from __future__ import annotations

import base64
import html

import cv2
import numpy as np

from fedcunet.data.annotations import SCHEMES
from reports import units
from reports.run_folder import Examples

_LINES = {scheme.name: (scheme.num_landmarks, scheme.lines) for scheme in SCHEMES.values()}
_SHOWN_SIDE = 256  # pixels: a 64 pixel crop is enlarged four times

LEGEND = (
    '<p class="legend"><span class="key dot true"></span>true point '
    '<span class="key dot predicted"></span>predicted point and outline '
    '<span class="key rule"></span>error</p>'
)


def jpeg_data_uri(image_HW3: np.ndarray) -> str:
    """A uint8 RGB image, enlarged to about 256 pixels, as a `data:` URI."""
    height, width = image_HW3.shape[:2]
    factor = min(max(_SHOWN_SIDE // max(height, width), 1), 8)
    bgr = cv2.cvtColor(np.ascontiguousarray(image_HW3), cv2.COLOR_RGB2BGR)
    large = cv2.resize(bgr, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)
    if max(large.shape[:2]) > 2 * _SHOWN_SIDE:
        shrink = 2 * _SHOWN_SIDE / max(large.shape[:2])
        large = cv2.resize(large, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def picture(examples: Examples, index: int, *, alt: str, link: str | None = None) -> str:
    """One example as a `<figure>`: crop, true and predicted points, its error below.

    Args:
        examples: The examples.
        index: Which one.
        alt: What the picture shows, for people who cannot see it.
        link: `data:` URI of the crop, if it was made before.
    """
    image = examples.images_NHWC[index]
    height, width = image.shape[:2]
    predicted, target = examples.predicted_NK2[index], examples.target_NK2[index]
    error = units.percent(examples.error_N[index].item(), 1)
    unit = max(height, width) / 64
    known = np.isfinite(predicted).all(axis=1)
    both = known & np.isfinite(target).all(axis=1)
    sticks = "".join(
        f"M{_xy(target[k])}L{_xy(predicted[k])}" for k in np.flatnonzero(both).tolist()
    )
    layers = (
        ("halo", 1.6, _dots(target)),
        ("halo", 1.25, _dots(predicted)),
        ("outline", 0.35, _outline(predicted, known, examples.scheme)),
        ("stick", 0.45, sticks),
        ("true", 1.2, _dots(target)),
        ("predicted", 0.9, _dots(predicted)),
    )
    drawn = "".join(
        f'<path class="{name}" stroke-width="{thickness * unit:.2f}" d="{path}"/>'
        for name, thickness, path in layers
        if path
    )
    # The first pixel's centre is (0, 0), so the image begins half a pixel before.
    return (
        f'<figure class="picture"><svg role="img" aria-label="{html.escape(alt)}, error {error}" '
        f'viewBox="-0.5 -0.5 {width} {height}"><image x="-0.5" y="-0.5" width="{width}" '
        f'height="{height}" href="{link or jpeg_data_uri(image)}"/>{drawn}</svg>'
        f"<figcaption>{error}</figcaption></figure>"
    )


def _xy(point_2: np.ndarray) -> str:
    """A point for a path; far outside the crop it is moved to a bound that is never seen."""
    x, y = np.clip(point_2, -1e4, 1e4).tolist()
    return f"{x:.1f} {y:.1f}"


def _dots(points_K2: np.ndarray) -> str:
    """A path of zero-length strokes: with round caps each is a dot."""
    return "".join(f"M{_xy(point)}h0" for point in points_K2 if np.isfinite(point).all())


def _outline(points_K2: np.ndarray, known_K: np.ndarray, scheme: str) -> str:
    """A path along the lines of the scheme, if it is known and fits."""
    num_landmarks, lines = _LINES.get(scheme, (0, ()))
    if num_landmarks != len(points_K2) or not known_K.all():
        return ""
    return "".join("M" + "L".join(_xy(points_K2[k]) for k in line) for line in lines)
