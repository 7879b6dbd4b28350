"""Trellis-coded quantisation at a fixed rate, of values that a rotation has made Gaussian.

Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (IEEE
Trans. Communications 1990), with 8 states, behind EDEN's rotation and with EDEN's unbiased scale
(eden.py): every payload has the same length, and no entropy coder is needed. In blocks of 64, two
at most of a payload, the mean is a little off, as eden.py says.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.codecs.base import add_reference, check_body, check_vector, whole_codec_bits
from fedcunet.codecs.hadamard import Rotation, groups_of_blocks, padded_length
from fedcunet.codecs.rotated import (
    body_bytes,
    pack_body,
    rotated_noise,
    turn_back,
    unit_blocks,
    unpack_body,
)
from fedcunet.codecs.viterbi import next_states, search

_NUM_STATES = 8
_VALUES_PER_LANE = 512

# The positive half of the 2^(bits+1) levels, the means of what is coded to them for Gaussian
# values (found by alternating search and means, as Lloyd's method does).
_HALVES: dict[int, tuple[float, ...]] = {
    1: (0.3548, 1.1993),
    2: (0.1957, 0.606, 1.076, 1.8763),
    3: (0.1145, 0.3402, 0.5819, 0.8277, 1.1101, 1.4337, 1.8809, 2.5768),
    4: (
        0.0662,
        0.1878,
        0.3211,
        0.4455,
        0.5823,
        0.7155,
        0.8597,
        1.0034,
        1.1626,
        1.3274,
        1.5082,
        1.7128,
        1.9532,
        2.2485,
        2.6219,
        3.1956,
    ),
}

# E[q²] - E[x·q]² of these levels for 2^19 Gaussian values of variance 1: the squared error of an
# unbiased value where the scale is 1.
_SQUARED_ERRORS = {1: 0.2116, 2: 0.0788, 3: 0.02335, 4: 0.00647}


@functools.cache
def levels(bits: int) -> np.ndarray:
    """The levels, ascending (float32); level i is in subset i mod 4."""
    half = np.array(_HALVES[bits], dtype=np.float32)
    return np.concatenate([-half[::-1], half])


def _distances(z_TL: np.ndarray, bits: int) -> np.ndarray:
    """Squared distance (T, 2, 2, L) to the nearest level of each subset 2b + p."""
    distance = np.empty((z_TL.shape[0], 2, 2, z_TL.shape[1]), dtype=np.float32)
    for subset in range(4):
        target = distance[:, subset >> 1, subset & 1]
        target[...] = np.inf
        for level in levels(bits)[subset::4]:
            np.minimum(target, np.square(z_TL - level), out=target)
    return distance


@dataclass(frozen=True, slots=True)
class HadamardTrellisCodec:
    """A rotation, 8 states, 1 to 4 bits, and the unbiased scale <x, x> / <R·x, q> per block.

    Segments are of no use to it and are ignored. Value t·lanes + l of the rotated vector is step t
    of lane l; there is a lane for each 512 values.

    Body: the blocks' scales ("<f4"), then the packed codes: bit 0 is the branch of the trellis, the
    others the level's number within the subset.
    """

    name: str = "hadamard-trellis"
    min_bits: int = 1
    max_bits: int = 4
    budget: bool = False
    unbiased: bool = True

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        size = body_bytes(length, whole_codec_bits(self, bits))
        return size, size

    def encode(
        self,
        vector: np.ndarray,
        *,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> bytes:
        width = whole_codec_bits(self, bits)
        values = check_vector(vector, reference)
        padded = np.pad(values, (0, padded_length(values.size) - values.size))
        rotation = Rotation(values.size, seed)
        rotated = np.empty(padded.size, dtype=np.float32)
        roots: list[np.ndarray] = []
        for start, size, count in groups_of_blocks(values.size):
            blocks_BD = padded[start : start + size * count].reshape(count, size)
            unit_BD, root, largest = unit_blocks(blocks_BD)
            rotated[start : start + size * count] = rotation.forward(unit_BD, start).reshape(-1)
            roots.append(root.astype(np.float64) * largest)
        codes, quantised = _quantise(rotated, width)
        return pack_body(_scales(rotated, quantised, roots, values.size), codes, width)

    def decode(
        self,
        body: bytes,
        *,
        length: int,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> np.ndarray:
        check_body(self, body, length=length, bits=bits, segments=segments)
        width = whole_codec_bits(self, bits)
        scales, codes = unpack_body(body, length, width)
        quantised = _levels_of(codes, width)
        values = turn_back(length, seed, scales, lambda part: quantised[part])
        return add_reference(values, reference)

    def noise(
        self,
        body: bytes,
        decoded: np.ndarray,
        *,
        bits: float,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> np.ndarray:
        """As of `KnowsNoise`, from the scales; right on average over large blocks."""
        error = _SQUARED_ERRORS[whole_codec_bits(self, bits)]
        return rotated_noise(body, decoded, segments, error)


def _scales(
    rotated: np.ndarray, quantised: np.ndarray, roots: list[np.ndarray], length: int
) -> np.ndarray:
    """The unbiased scale of each block (float64)."""
    scales = [np.empty(0)]
    for (start, size, count), root in zip(groups_of_blocks(length), roots, strict=True):
        part = slice(start, start + size * count)
        product = np.einsum(
            "bd,bd->b",
            rotated[part].reshape(count, size).astype(np.float64),
            quantised[part].reshape(count, size).astype(np.float64),
        )
        scales.append(np.where(root > 0, size / np.where(product > 0, product, 1), 0) * root)
    return np.concatenate(scales)


def _by_lanes(values: np.ndarray) -> np.ndarray:
    """`values` as (steps, lanes), zeros behind them."""
    num_lanes = max(1, values.size // _VALUES_PER_LANE)
    num_steps = -(-values.size // num_lanes)
    return np.pad(values, (0, num_steps * num_lanes - values.size)).reshape(num_steps, num_lanes)


def _quantise(rotated: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8) and levels (float32) of values."""
    z_TL = _by_lanes(rotated)
    subset = search(z_TL, _NUM_STATES, functools.partial(_distances, bits=bits)).reshape(-1)
    subset = subset[: rotated.size]
    chosen, code = np.empty(rotated.size, dtype=np.float32), subset >> 1
    for number in range(4):
        own = np.flatnonzero(subset == number)
        choices = levels(bits)[number::4]
        index = np.searchsorted((choices[1:] + choices[:-1]) / 2, rotated[own])
        chosen[own] = choices[index]
        code[own] += (2 * index).astype(np.uint8)
    return code, chosen


def _levels_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The levels (float32) that codes stand for, by following the trellis."""
    codes_TL = _by_lanes(codes).astype(np.int64)
    result_TL = np.empty(codes_TL.shape, dtype=np.float32)
    state = np.zeros(codes_TL.shape[1], dtype=np.int64)
    for code, result in zip(codes_TL, result_TL, strict=True):
        branch = code & 1
        levels(bits).take(4 * (code >> 1) + 2 * branch + (state & 1), out=result)
        state = next_states(_NUM_STATES).take(2 * state + branch)
    return result_TL.reshape(-1)[: codes.size]
