"""The randomised Hadamard rotation of a vector cut into blocks, without padding the whole.

A vector of n values is cut into blocks of 2^14, the remainder into descending powers of two down
to 64, and what is left then, fewer than 64 values, is filled up to 64 with zeros.
"""

import functools
from collections.abc import Iterator

import numpy as np

from fedcunet.codecs.base import random_words

MAX_BLOCK = 2**14
MIN_BLOCK = 2**6

# Blocks of 2^14 that are worked on together: their 256 KiB stay in the cache.
_BLOCKS_AT_ONCE = 4


def block_sizes(length: int) -> list[tuple[int, int]]:
    """(block size, number of such blocks), descending, for a vector of `length` values."""
    count, rest = divmod(length, MAX_BLOCK)
    sizes = [(MAX_BLOCK, count)] if count else []
    size = MAX_BLOCK // 2
    while size >= MIN_BLOCK:
        if rest & size:
            sizes.append((size, 1))
        size //= 2
    if rest % MIN_BLOCK:
        sizes.append((MIN_BLOCK, 1))
    return sizes


def padded_length(length: int) -> int:
    """The values in all blocks together: `length` taken up to a multiple of 64."""
    return -(-length // MIN_BLOCK) * MIN_BLOCK


def groups_of_blocks(length: int) -> Iterator[tuple[int, int, int]]:
    """(start in the vector, block size, number of blocks) of pieces that are worked on at once."""
    start = 0
    for size, count in block_sizes(length):
        while count:
            taken = min(count, _BLOCKS_AT_ONCE)
            yield start, size, taken
            start += taken * size
            count -= taken


def hadamard_transform(blocks_BD: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform of each row, its own inverse (float32).

    Additions alone, in an order that the shape decides: the same bits on any number of threads,
    which products by a BLAS library do not promise. A row is seen as a matrix, whose rows are
    combined, then its columns, so that every pass runs over whole rows of memory.
    """
    num_blocks, size = blocks_BD.shape
    order = size.bit_length() - 1
    rows, columns = 2 ** (order // 2), 2 ** (order - order // 2)
    matrix = _butterfly(blocks_BD.reshape(num_blocks, rows, columns).astype(np.float32))
    matrix = _butterfly(np.ascontiguousarray(matrix.transpose(0, 2, 1)))
    result = np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(num_blocks, size)
    result *= np.float32(1 / np.sqrt(size))
    return result


def _butterfly(matrix_BRC: np.ndarray) -> np.ndarray:
    """The unscaled transform along the rows' axis, R a power of two; overwrites its argument."""
    num_blocks, rows, columns = matrix_BRC.shape
    other = np.empty_like(matrix_BRC)
    half = 1
    while half < rows:
        shape = (num_blocks, rows // (2 * half), 2, half, columns)
        source, target = matrix_BRC.reshape(shape), other.reshape(shape)
        np.add(source[:, :, 0], source[:, :, 1], out=target[:, :, 0])
        np.subtract(source[:, :, 0], source[:, :, 1], out=target[:, :, 1])
        matrix_BRC, other = other, matrix_BRC
        half *= 2
    return matrix_BRC


@functools.cache
def _signs_of_bytes() -> np.ndarray:
    """For each byte its eight bits as signs: shape (256, 8), float32, 1 for a bit that is 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return 1 - 2 * bits.astype(np.float32)


class Rotation:
    """R = H·D2·H·D1 for each block, D1 and D2 being diagonals of random signs from a seed.

    DRIVE and EDEN use one round, H·D. With one round a block that holds a single large value
    rotates to values of equal magnitude, and the codes no longer depend on the small values beside
    it: they would be lost in every round. The second round makes such blocks Gaussian too.
    """

    def __init__(self, length: int, seed: bytes) -> None:
        """A rotation for vectors of `length` values; another seed, another rotation."""
        num_values = padded_length(length)
        words = random_words(seed, 2 * num_values // 64).astype("<u8", copy=False)
        self._bytes_2N = words.view(np.uint8).reshape(2, num_values // 8)

    def _signs(self, which: int, start: int, shape: tuple[int, int]) -> np.ndarray:
        """Row `which` of the signs from value `start` on (a multiple of 64), of `shape`."""
        stop = start + shape[0] * shape[1]
        chosen = self._bytes_2N[which, start // 8 : stop // 8]
        return np.take(_signs_of_bytes(), chosen, axis=0).reshape(shape)

    def forward(self, blocks_BD: np.ndarray, start: int) -> np.ndarray:
        """R·x for each row, the first of which begins at value `start` of the vector."""
        once = hadamard_transform(blocks_BD * self._signs(0, start, blocks_BD.shape))
        once *= self._signs(1, start, blocks_BD.shape)
        return hadamard_transform(once)

    def backward(self, blocks_BD: np.ndarray, start: int) -> np.ndarray:
        """The inverse of `forward`: the transpose of R times each row."""
        once = hadamard_transform(blocks_BD)
        once *= self._signs(1, start, blocks_BD.shape)
        twice = hadamard_transform(once)
        twice *= self._signs(0, start, blocks_BD.shape)
        return twice
