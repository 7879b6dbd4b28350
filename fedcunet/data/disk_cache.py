"""Arrays of pixels on disk, shared by all processes of a machine within one budget of bytes.

    FOLDER/3f/3f0a….crop     one array: header, checksum, pixels
    FOLDER/total             bytes that the folder holds, changed under its lock

A file is written beside its place and renamed, so that readers find a whole one or none, and it is
never changed: the key says all that the pixels depend on. What cannot be read, has another length
or another checksum counts as absent and is made anew. A cache never fails: without a folder that
can be written to, or with a full disk, nothing is kept.
"""

import fcntl
import hashlib
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<4sIII2d2d")  # magic, CRC-32 of the rest, rows, columns, scale, offset
_MAGIC = b"fcc1"
_TOTAL = "total"
_TOTAL_DIGITS = 20  # always as many, so that the file is never cut short
_SUFFIX = ".crop"
_UNFINISHED = ".unfinished-"  # begins the name of a file that is being written
_STALE_SECONDS = 24 * 3600  # what nobody used for a day gives way when the folder is full
_FULL_SECONDS = 60.0  # how long a process takes a full folder to stay full

Kept = tuple[np.ndarray, tuple[float, float], tuple[float, float]]


class DiskCache:
    """Arrays uint8 (H, W, 3) by key, each with two pairs of numbers (scale and offset).

    Safe with any number of processes and threads that read and write at once.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        """A cache in `folder`, which is made when the first array is kept.

        Args:
            folder: shared by whoever names it; holds nothing else.
            budget_bytes: what all its arrays may take together, with headers.
        """
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._full_until = 0.0

    @staticmethod
    def key(*parts: object) -> str:
        """One key for everything that the array depends on."""
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> Kept | None:
        """What was kept under `key`, or None if it is not there whole."""
        path = self._path(key)
        try:
            blob = path.read_bytes()
            os.utime(path)  # the time of the last use
        except OSError:
            return None
        return _unpack(blob)

    def put(
        self,
        key: str,
        pixels_HW3: np.ndarray,
        scale_2: tuple[float, float],
        offset_2: tuple[float, float],
    ) -> bool:
        """Keeps an array if the budget holds it, after what is stale has gone; says whether."""
        blob = _pack(pixels_HW3, scale_2, offset_2)
        if len(blob) > self._budget_bytes or time.monotonic() < self._full_until:
            return False
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
            # One writer at a time, or the folder's bytes could not be held to the budget.
            with self._locked_total() as handle:
                return self._put(handle, self._path(key), blob)
        except OSError:
            return False

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{_SUFFIX}"

    def _write(self, path: Path, blob: bytes) -> None:
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(blob)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _put(self, handle: int, path: Path, blob: bytes) -> bool:
        """Writes `blob` unless that would overdraw the budget; the total is locked."""
        total = _read_total(handle)
        if path.exists():  # damaged, or another process was faster
            total = None if total is None else total - path.stat().st_size
            path.unlink()
        if total is None or total + len(blob) > self._budget_bytes:
            total = self._swept(len(blob))
        if total + len(blob) > self._budget_bytes:
            _write_total(handle, total)
            self._full_until = time.monotonic() + _FULL_SECONDS
            return False
        _write_total(handle, total + len(blob))
        self._write(path, blob)
        return True

    @contextmanager
    def _locked_total(self) -> Iterator[int]:
        """The open file of the total, this process the only one that may use it."""
        handle = os.open(self._folder / _TOTAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # and with it goes the lock

    def _swept(self, needed_bytes: int) -> int:
        """Bytes in the folder, once what is stale has made room, the longest unused first."""
        now = time.time()
        files = []
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
                if path.suffix == _SUFFIX:
                    files.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith(_UNFINISHED):
                    path.unlink()  # its writer died: the lock is ours
            except FileNotFoundError:
                continue
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if total + needed_bytes <= self._budget_bytes or now - used < _STALE_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _read_total(handle: int) -> int | None:
    """None where the file is new or damaged: then the folder is counted."""
    text = os.pread(handle, _TOTAL_DIGITS + 1, 0)
    return int(text) if len(text) == _TOTAL_DIGITS and text.isdigit() else None


def _write_total(handle: int, total: int) -> None:
    if os.fstat(handle).st_size != _TOTAL_DIGITS:
        os.ftruncate(handle, 0)
    os.pwrite(handle, f"{total:0{_TOTAL_DIGITS}}".encode(), 0)


def _pack(
    pixels_HW3: np.ndarray, scale_2: tuple[float, float], offset_2: tuple[float, float]
) -> bytes:
    height, width = pixels_HW3.shape[:2]
    header = _HEADER.pack(_MAGIC, 0, height, width, *scale_2, *offset_2)
    rest = header[8:] + pixels_HW3.tobytes()
    return _MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def _unpack(blob: bytes) -> Kept | None:
    if len(blob) < _HEADER.size:
        return None
    magic, checksum, height, width, *numbers = _HEADER.unpack_from(blob)
    if magic != _MAGIC or len(blob) != _HEADER.size + height * width * 3:
        return None
    if zlib.crc32(memoryview(blob)[8:]) != checksum:
        return None
    pixels_HW3 = np.frombuffer(blob, np.uint8, offset=_HEADER.size).reshape(height, width, 3)
    return pixels_HW3, (numbers[0], numbers[1]), (numbers[2], numbers[3])
