"""What codecs of rotated blocks share: blocks of mean square 1, and a body of scales and codes.

Body: a scale for each block ("<f4"), then the packed codes of all blocks.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedcunet.bits import pack_codes, packed_length, unpack_codes
from fedcunet.codecs.base import segment_lengths, sum_of_squares
from fedcunet.codecs.hadamard import Rotation, block_sizes, groups_of_blocks, padded_length


def body_bytes(length: int, width: int) -> int:
    """The length of the body of `length` values at `width` bits."""
    return 4 * _num_blocks(length) + packed_length(padded_length(length), width)


def pack_body(scales: np.ndarray, codes: np.ndarray, width: int) -> bytes:
    """The body of the blocks' scales and of all their codes (uint8)."""
    return scales.astype("<f4").tobytes() + pack_codes(codes, width).tobytes()


def unpack_body(body: bytes, length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_body` for a vector of `length` values: scales (float32) and codes."""
    scales = np.frombuffer(body, dtype="<f4", count=_num_blocks(length)).astype(np.float32)
    packed = np.frombuffer(body, dtype=np.uint8, offset=scales.nbytes)
    return scales, unpack_codes(packed, bits=width, count=padded_length(length))


def unit_blocks(blocks_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blocks brought to mean square 1, and the two factors of each: root and largest value.

    No square of a large or tiny value leaves float32's range; a block of zeros stays as it is.
    """
    largest = np.maximum(blocks_BD.max(axis=1), -blocks_BD.min(axis=1))
    unit_BD = blocks_BD / np.where(largest > 0, largest, 1)[:, None]
    root = np.sqrt(np.einsum("bd,bd->b", unit_BD, unit_BD) / blocks_BD.shape[1])
    unit_BD /= np.where(root > 0, root, 1)[:, None]
    return unit_BD, root, largest


def turn_back(
    length: int, seed: bytes, scales: np.ndarray, levels: Callable[[slice], np.ndarray]
) -> np.ndarray:
    """The vector of `length` values behind its rotation.

    Args:
        length: of the vector.
        seed: of the rotation.
        scales: of the blocks.
        levels: the quantised values (float32) at some places of the rotated vector.
    """
    rotation = Rotation(length, seed)
    values = np.empty(padded_length(length), dtype=np.float32)
    block = 0
    for start, size, count in groups_of_blocks(length):
        part = slice(start, start + size * count)
        turned_BD = rotation.backward(levels(part).reshape(count, size), start)
        # Scaled last: levels are small, a scale that no encoder made may be anything.
        with np.errstate(all="ignore"):
            turned_BD *= scales[block : block + count, None]
        values[part] = turned_BD.reshape(-1)
        block += count
    return values[:length]


def rotated_noise(
    body: bytes, decoded: np.ndarray, segments: Sequence[int], squared_error: float
) -> np.ndarray:
    """The expected sum of squared errors of each segment (float64), at most the segment's energy.

    The unbiased scale is ‖x‖²/<R·x, q>. So the error is orthogonal to the values, and the rotation,
    unlike any other's, spreads it evenly over the block.

    Args:
        body: Of `pack_body`.
        decoded: The vector, shape (n,).
        segments: Lengths of the tensors.
        squared_error: Of a value of a block whose scale is 1.
    """
    length = decoded.size
    sizes = np.repeat(*np.array(block_sizes(length), dtype=np.int64).reshape(-1, 2).T)
    scales = np.frombuffer(body, dtype="<f4", count=sizes.size).astype(np.float64)
    places = np.concatenate([[0], np.cumsum(sizes)])
    total = np.concatenate([[0.0], np.cumsum(squared_error * scales * scales * sizes)])
    lengths = segment_lengths(length, segments)
    stops = np.cumsum(lengths)
    noise = np.diff(np.interp(stops, places, total), prepend=0)
    parts = zip(stops - lengths, stops, strict=True)
    # Nobody claims noise that is not there, to shorten the mean of all.
    energies = np.array([sum_of_squares(decoded[start:stop]) for start, stop in parts])
    bounded: np.ndarray = np.minimum(noise, energies)
    return bounded


def _num_blocks(length: int) -> int:
    return sum(count for _, count in block_sizes(length))
