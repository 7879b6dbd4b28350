"""Decoding of image files, with every damage noticed that the format lets one notice.

JPEG is decoded by libjpeg-turbo in its strict mode: what it would only warn about (data that end
early, codes that do not exist) leaves grey or shifted blocks in the picture, and refuses it here.
PNG and BMP are OpenCV's, checked before: PNG by the checksum of every chunk, BMP by its length.
"""

import stat
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from fedcunet.errors import UserError
from fedcunet.files import write_atomically

# A header may promise any size. Larger pictures than this are refused before memory is taken.
MAX_PIXELS = 2**27  # 384 MiB of RGB
_MAX_FILE_BYTES = 2**30
_PNG_START = b"\x89PNG\r\n\x1a\n"
_log_level = threading.Lock()  # OpenCV's level is one for all threads


def read_image(path: Path, *, oriented: bool = False) -> np.ndarray:
    """Decoded JPEG, PNG or BMP, uint8 RGB (H, W, 3).

    Annotations refer to the pixels as they are stored, so by default an orientation tag (EXIF, of
    phones) is not applied.

    Args:
        path: the file; its contents tell the format, not its name.
        oriented: apply the tag: the picture as viewers show it.

    Raises:
        UserError: the file cannot be read, is of another format, decodes in part only, or declares
            more than `MAX_PIXELS` pixels.
    """
    data = _read_file(path)
    if data.startswith(b"\xff\xd8"):
        image_HW3 = _decode_jpeg(path, data, oriented=oriented)
    elif data.startswith(_PNG_START):
        _check_png(path, data)
        image_HW3 = _decode(path, data, oriented=oriented)
    elif data.startswith(b"BM"):
        _check_bmp(path, data)
        image_HW3 = _decode(path, data, oriented=oriented)
    else:
        raise UserError(
            f"{path}: expected an image in JPEG, PNG or BMP, found {len(data)} bytes of another "
            "format"
        )
    return image_HW3


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


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        # Reading a pipe or a device may never end; a folder is told by the reading itself.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: expected an image file, found a pipe or device")
        if status.st_size > _MAX_FILE_BYTES:
            raise UserError(
                f"{path}: expected an image of at most {_MAX_FILE_BYTES} bytes, "
                f"found {status.st_size}"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: image cannot be read: {error.strerror}") from error


def _decode_jpeg(path: Path, data: bytes, *, oriented: bool) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(path, width, height)
        is_cmyk = colours in ("CMYK", "YCCK")
        image_HW3 = simplejpeg.decode_jpeg(data, "CMYK" if is_cmyk else "RGB")
    except ValueError as error:
        raise _damaged(path, "JPEG", str(error)) from None
    # Neither the four inks nor the orientation tag are libjpeg-turbo's business.
    if is_cmyk or oriented:
        return _decode(path, data, oriented=oriented)
    return np.asarray(image_HW3)


def _decode(path: Path, data: bytes, *, oriented: bool) -> np.ndarray:
    """The picture by OpenCV, whatever the format."""
    flags = cv2.IMREAD_COLOR_RGB | (0 if oriented else cv2.IMREAD_IGNORE_ORIENTATION)
    with _log_level:
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            image_HW3 = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
        except cv2.error:
            image_HW3 = None
        finally:
            cv2.utils.logging.setLogLevel(level)
    if image_HW3 is None:
        raise UserError(f"{path}: expected an image, found {len(data)} bytes that do not decode")
    return np.asarray(image_HW3)


def _check_png(path: Path, data: bytes) -> None:
    """Walks over the chunks: size, every checksum, and that the last one is there."""
    view, position = memoryview(data), len(_PNG_START)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[position + 4 : end - 4]) != checksum:
            raise _damaged(path, "PNG", f"checksum at byte {position}")
        if position == len(_PNG_START):
            if kind != b"IHDR" or length != 13:
                raise _damaged(path, "PNG", "no header")
            _check_size(path, *struct.unpack_from(">II", data, position + 8))
        if kind == b"IEND":
            return
        position = end
    raise _damaged(path, "PNG", f"cut off after {len(data)} bytes")


def _check_bmp(path: Path, data: bytes) -> None:
    """Uncompressed, and as long as its size needs it."""
    if len(data) < 54:
        raise _damaged(path, "BMP", f"cut off after {len(data)} bytes")
    start, header, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    if header < 40 or compression not in (0, 3) or bits not in (1, 4, 8, 16, 24, 32):
        raise UserError(f"{path}: expected an uncompressed BMP, found another kind")
    height = abs(height)
    _check_size(path, width, height)
    needed = start + (width * bits + 31) // 32 * 4 * height
    if start < 14 + header or len(data) < needed:
        raise _damaged(path, "BMP", f"{len(data)} bytes where {width}×{height} need {needed}")


def _check_size(path: Path, width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: expected an image of 1 to {MAX_PIXELS} pixels, found {width}×{height}"
        )


def _damaged(path: Path, kind: str, what: str) -> UserError:
    return UserError(f"{path}: expected a whole {kind} image, found a damaged one ({what})")
