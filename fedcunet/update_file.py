"""The decoded updates of a round, kept on disk: robust rules look at all of them at a coordinate.

Our codecs give a whole update or nothing, so that updates cannot be decoded coordinate by
coordinate. Each admitted update is decoded once and becomes a row of float32 in a file without a
name, which is gone when it is closed, or when the process dies. The rules read it in blocks of
coordinates: n updates of N values take 4·n·N bytes of disk and, whatever n and N, some tens of
megabytes of memory.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fedcunet.errors import RunFailure

BLOCK_BYTES = 4 * 2**20  # of float32 values that are looked at together
VALUE_BYTES = 4


class UpdateFile:
    """Rows of N float32 values, one for each update, in the order in which they were added.

    Args:
        folder: where the file lies; made if it is not there.
        num_parameters: N.

    Raises:
        RunFailure: the folder cannot be written; also from adding and reading.
    """

    def __init__(self, folder: Path, num_parameters: int) -> None:
        self._folder, self.num_parameters = folder, num_parameters
        self.weights: list[float] = []  # of the updates
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> "UpdateFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.weights)

    def add_parts(self, parts: Iterable[tuple[slice, np.ndarray]], weight: float) -> None:
        """Adds an update whose values come in parts with their places, which cover all of it."""
        row = len(self)
        try:
            for place, values in parts:
                data = np.ascontiguousarray(values, dtype=np.float32).data.cast("B")
                offset = self._offset(row, place.start)
                while data:  # a full disk first takes a part
                    written = os.pwrite(self._file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
        except OSError as error:
            raise self._failure(error) from None
        self.weights.append(weight)

    def columns(self, place: slice) -> np.ndarray:
        """The values (n, place.stop - place.start) of all updates at some coordinates, float32."""
        values_nB = np.empty((len(self), place.stop - place.start), dtype=np.float32)
        for row, values_B in enumerate(values_nB):
            try:
                offset = self._offset(row, place.start)
                count = os.preadv(self._file.fileno(), [values_B.data], offset)
            except OSError as error:
                raise self._failure(error) from None
            if count != values_B.nbytes:
                raise RunFailure(f"{self._folder}: {count} bytes read, expected {values_B.nbytes}")
        return values_nB

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All coordinates, ascending, in blocks as `columns` gives them."""
        length = max(1, BLOCK_BYTES // (VALUE_BYTES * max(1, len(self))))
        for start in range(0, self.num_parameters, length):
            place = slice(start, min(start + length, self.num_parameters))
            yield place, self.columns(place)

    def _offset(self, row: int, position: int) -> int:
        return VALUE_BYTES * (row * self.num_parameters + position)

    def _failure(self, error: OSError) -> RunFailure:
        wanted = f"{VALUE_BYTES * self.num_parameters} bytes for each update of a round"
        return RunFailure(f"federation.scratch-dir {self._folder}: {error.strerror}; {wanted}")
