"""Reader of MATLAB's `.mat` files of versions 5 to 7, for annotations that hold structs and cells.

scipy's reader is made for whole files: a damaged one can end the process with a segmentation
fault, and with `squeeze_me` a struct array of one element is that element and one of none an empty
number. Here every length is checked before it is used, every struct array is a list, and the
fields of a struct are read when asked for. The format is that of "MAT-File Format" (MathWorks,
version R2019b), chapter 1: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedcunet.errors import UserError

_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 4, 6, 15
_COMPLEX = 0x0800
# Storage types of data elements.
_INT8, _INT32, _UINT32 = 1, 5, 6
_NUMBERS = {
    1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8",
    13: "<u8",
}  # fmt: skip
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
_HEADER_BYTES = 128
_TAG = struct.Struct("<II")
# A 1×1 array of numbers: tag; flags; dimensions; empty name; tag of the number.
_SCALAR = struct.Struct("<14I")
_SCALAR_LAYOUT = [6, 8, 0, 5, 8, 1, 1, 1, 0]
_CODES = {
    1: struct.Struct("<b"), 2: struct.Struct("<B"), 3: struct.Struct("<h"), 4: struct.Struct("<H"),
    5: struct.Struct("<i"), 6: struct.Struct("<I"), 7: struct.Struct("<f"), 9: struct.Struct("<d"),
}  # fmt: skip
# MPII's annotations unpack to about 100 MB; a damaged length must not fill the memory.
_MAX_UNPACKED = 2**31


class MatStruct:
    """One struct; a field is read when it is asked for."""

    def __init__(self, file: "_Elements", places: dict[str, int]) -> None:
        self._file = file
        self._places = places

    def get(self, name: str) -> Any:
        """The field's value; None where the struct has no such field."""
        place = self._places.get(name)
        return None if place is None else self._file.matrix(place)[1]

    def number(self, name: str) -> float | None:
        """The field's value where it is one plain number, else None."""
        place = self._places.get(name)
        return None if place is None else self._file.scalar(place)


def read_mat(path: Path, variable: str) -> Any:
    """The value of a variable.

    Returns:
        An array as MATLAB shows it (2 axes or more), a text, a list of `MatStruct` for a struct
        array of any size, or a list of values for a cell array, both in MATLAB's linear order.

    Raises:
        UserError: the file cannot be read, is damaged, or lacks the variable. Parts of a struct
            that are damaged raise it when they are asked for.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:10] == b"MATLAB 7.3":
        raise UserError(f"{path}: expected a .mat file of version 5 to 7, found 7.3; save with -v7")
    if len(data) < _HEADER_BYTES or data[124:128] != b"\x00\x01IM":
        raise UserError(f"{path}: expected a little-endian .mat file of version 5 to 7, found none")
    elements = _Elements(path, data)
    at = _HEADER_BYTES
    while at < len(data):
        kind, start, size, following = elements.tag(at, len(data))
        inner, place = elements, at
        if kind == _COMPRESSED:
            inner, place, following = elements.unpacked(start, size), 0, start + size
        name, value = inner.matrix(place, variable)
        if name == variable:
            return value
        at = following
    raise UserError(f"{path}: expected a variable named {variable}, found none")


class _Elements:
    """The data elements in a sequence of bytes."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._data = data

    def damage(self, at: int, what: str) -> UserError:
        return UserError(f"{self._path}: damaged at byte {at}: {what}")

    def unpacked(self, start: int, size: int) -> "_Elements":
        """The elements of a compressed one, its checksum verified."""
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(self._data[start : start + size], _MAX_UNPACKED)
        except zlib.error as error:
            raise self.damage(start, f"compressed data do not unpack ({error})") from None
        if not unpacker.eof:
            raise self.damage(start, "compressed data end early or are too large")
        return _Elements(self._path, data)

    def tag(self, at: int, end: int) -> tuple[int, int, int, int]:
        """Type, first byte and size of the element at a place, and the place that follows it."""
        if at + 8 > end:
            raise self.damage(at, "an element ends early")
        kind, size = _TAG.unpack_from(self._data, at)
        if kind >> 16:  # up to 4 bytes stand in the tag itself
            kind, size, start, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise self.damage(at, f"a short element of {size} bytes")
        else:
            start = at + 8
            following = start + size + (-size % 8 if kind != _COMPRESSED else 0)
        if start + size > end:
            raise self.damage(at, f"an element of {size} bytes where {end - start} are left")
        return kind, start, size, min(following, end)

    def matrix(self, at: int, wanted: str | None = None) -> tuple[str, Any]:
        """Name and value of the array at a place; no value if it has another name than wanted."""
        data = self._data
        kind, start, size, end = self.tag(at, len(data))
        if kind != _MATRIX:
            raise self.damage(at, f"expected an array, found element type {kind}")
        if size == 0:  # MATLAB's [] in structs and cells
            return "", np.zeros((0, 0))
        flags, next_at = self._numbers(start, end, _UINT32)
        if len(flags) != 2:
            raise self.damage(start, "array flags of another size")
        dims, next_at = self._numbers(next_at, end, _INT32)
        if not 2 <= len(dims) <= 32 or min(dims) < 0:
            raise self.damage(start, f"array of size {dims[:8]}")
        name_bytes, next_at = self._bytes(next_at, end, _INT8)
        name = name_bytes.decode("latin-1")
        if wanted is not None and name != wanted:
            return name, None
        count, array_class = math.prod(dims), flags[0] & 0xFF
        if flags[0] & _COMPLEX:
            raise self.damage(start, "complex numbers, which no annotation has")
        if array_class == _CELL:
            places, next_at = self._places(next_at, end, count)
            try:
                value: Any = [self.matrix(place)[1] for place in places]
            except RecursionError:
                raise self.damage(start, "cells in cells without end") from None
        elif array_class == _STRUCT:
            value, next_at = self._structs(next_at, end, count)
        elif array_class == _CHAR:
            value, next_at = self._text(next_at, end, dims)
        elif _FIRST_NUMERIC <= array_class <= _LAST_NUMERIC:
            value, next_at = self._array(next_at, end, dims)
        else:
            raise self.damage(start, f"array class {array_class}, which no annotation has")
        if next_at != end:
            raise self.damage(start, f"an array with {end - next_at} bytes too many")
        return name, value

    def _structs(self, at: int, end: int, count: int) -> tuple[list[MatStruct], int]:
        lengths, at = self._numbers(at, end, _INT32)
        joined, at = self._bytes(at, end, _INT8)
        length = lengths[0] if len(lengths) == 1 else 0
        if length < 1 or len(joined) % length:
            raise self.damage(at, "field names of another size")
        names = [
            joined[first : first + length].split(b"\0")[0].decode("latin-1")
            for first in range(0, len(joined), length)
        ]
        if len(set(names)) < len(names) or (count and not names):
            raise self.damage(at, f"field names {names[:4]}")
        places, at = self._places(at, end, count * len(names))
        width = len(names)
        return [
            MatStruct(self, dict(zip(names, places[row * width : (row + 1) * width], strict=True)))
            for row in range(count)
        ], at

    def _places(self, at: int, end: int, count: int) -> tuple[list[int], int]:
        if count * 8 > end - at:
            raise self.damage(at, f"{count} elements in {end - at} bytes")
        places = []
        data = self._data
        for _ in range(count):
            places.append(at)
            # `tag` for the usual case, written out: this runs for every field of every joint.
            kind, size = _TAG.unpack_from(data, at) if at + 8 <= end else (0, 0)
            if kind == _MATRIX and not size % 8 and at + 8 + size <= end:
                at += 8 + size
            else:
                at = self.tag(at, end)[3]
        return places, at

    def scalar(self, at: int) -> float | None:
        """The number at a place if it is a plain 1×1 array without name, else None.

        The same as `matrix`, several times as fast: MPII has about two million of them.
        """
        data = self._data
        if at + 56 > len(data):
            return None
        kind, size, *rest, number_kind, number_size = _SCALAR.unpack_from(data, at)
        if kind != _MATRIX or rest[:2] + rest[3:] != _SCALAR_LAYOUT:
            return None
        if rest[2] & _COMPLEX or not _FIRST_NUMERIC <= rest[2] & 0xFF <= _LAST_NUMERIC:
            return None
        if number_kind >> 16:
            number_kind, number_size, start = number_kind & 0xFFFF, number_kind >> 16, at + 52
        else:
            start = at + 56
        code = _CODES.get(number_kind)
        end = at + 8 + size
        if code is None or code.size != number_size or end > len(data):
            return None
        if end != (at + 56 if start == at + 52 else at + 64):
            return None
        return float(code.unpack_from(data, start)[0])

    def _array(self, at: int, end: int, dims: list[int]) -> tuple[np.ndarray, int]:
        kind, start, size, next_at = self.tag(at, end)
        if kind not in _NUMBERS:
            raise self.damage(at, f"numbers of element type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        if size != math.prod(dims) * dtype.itemsize:
            raise self.damage(at, f"{size} bytes for an array of {'×'.join(map(str, dims))}")
        flat = np.frombuffer(self._data, dtype, math.prod(dims), start)
        return flat.reshape(dims, order="F"), next_at

    def _text(self, at: int, end: int, dims: list[int]) -> tuple[str, int]:
        kind, start, size, next_at = self.tag(at, end)
        try:
            text = self._data[start : start + size].decode(_TEXTS[kind])
        except (KeyError, UnicodeDecodeError):
            raise self.damage(at, "a text that does not decode") from None
        if len(text) != math.prod(dims) or (len(text) and dims[0] != 1):
            raise self.damage(at, f"a text of {len(text)} characters, expected one row of {dims}")
        return text, next_at

    def _numbers(self, at: int, end: int, kind: int) -> tuple[list[int], int]:
        found, next_at = self._bytes(at, end, kind)
        if len(found) % 4:
            raise self.damage(at, f"{len(found)} bytes of 4-byte numbers")
        code = "I" if kind == _UINT32 else "i"
        return list(struct.unpack(f"<{len(found) // 4}{code}", found)), next_at

    def _bytes(self, at: int, end: int, kind: int) -> tuple[bytes, int]:
        found, start, size, next_at = self.tag(at, end)
        if found != kind:
            raise self.damage(at, f"expected element type {kind}, found {found}")
        return self._data[start : start + size], next_at


def structs(value: Any, where: str) -> list[MatStruct]:
    """The structs of a struct array that may be absent or empty."""
    if value is None or (isinstance(value, np.ndarray) and value.size == 0):
        return []
    if not isinstance(value, list) or not all(isinstance(item, MatStruct) for item in value):
        raise UserError(f"{where}: expected structs, found {short(value)}")
    return value


def one_struct(value: Any, where: str) -> MatStruct | None:
    """A struct that may be absent or empty."""
    found = structs(value, where)
    if len(found) > 1:
        raise UserError(f"{where}: expected one struct, found {len(found)}")
    return found[0] if found else None


def number(holder: MatStruct | None, name: str, where: str) -> float | None:
    """A finite number of a field; None where it is missing or empty."""
    if holder is None:
        return None
    plain = holder.number(name)
    if plain is not None and math.isfinite(plain):
        return plain
    value = holder.get(name)
    if value is None or (isinstance(value, np.ndarray) and value.size == 0):
        return None
    found = float(value.flat[0]) if isinstance(value, np.ndarray) and value.size == 1 else math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}.{name}: expected a finite number, found {short(value)}")
    return found


def text(holder: MatStruct | None, name: str, where: str) -> str:
    """The text of a field; "" where it is missing or empty."""
    value = None if holder is None else holder.get(name)
    if value is None or (isinstance(value, np.ndarray) and value.size == 0):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}.{name}: expected a text, found {short(value)}")
    return value


def short(value: Any) -> str:
    """A value in a message: one line, at most 60 characters."""
    if isinstance(value, list) and value and isinstance(value[0], MatStruct):
        return f"{len(value)} structs"
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else shown[:57] + "..."
