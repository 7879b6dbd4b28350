"""Decoding of image files, with damage noticed."""

from pathlib import Path

import cv2
import numpy as np

from fedcunet.errors import UserError
from fedcunet.files import write_atomically


def read_image(path: Path) -> np.ndarray:
    """Decoded image, uint8 RGB (H, W, 3), in the orientation in which its pixels are stored.

    Annotations refer to stored pixels, so an orientation tag is not applied.

    Raises:
        UserError: the file cannot be read or decoded, or ends early. A JPEG cut off in the middle
            would otherwise decode to a picture that is grey from there on.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: image cannot be read: {error.strerror}") from error
    if _ends_early(data):
        raise UserError(
            f"{path}: expected a whole image, found one cut off after {len(data)} bytes"
        )
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image_HW3 = cv2.imdecode(
            np.frombuffer(data, dtype=np.uint8),
            cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        )
    except cv2.error:
        image_HW3 = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image_HW3 is None:
        raise UserError(f"{path}: expected an image, found {len(data)} bytes that do not decode")
    return np.asarray(image_HW3)


def write_image(path: Path, image_HW3: np.ndarray) -> None:
    """Writes uint8 RGB in the format that the suffix names. Raises UserError if it cannot."""
    try:
        _, data = cv2.imencode(path.suffix.lower(), image_HW3[:, :, ::-1])
        write_atomically(path, data.tobytes())
    except cv2.error:
        raise UserError(
            f"{path}: expected a name that ends in .png or .jpg, found '{path.suffix}'"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _ends_early(data: bytes) -> bool:
    """True when a JPEG or PNG lacks its end marker."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-4096:]
    if not data.startswith(b"\xff\xd8"):
        return False
    # Segments before the scan may hold a thumbnail with an end marker of its own: step over them.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.find(b"\xff\xd9", position) < 0
