"""Whole numbers of any size up to 2^60 in bits: a length, a sign, and the bits below the highest.

The form of Elias's gamma code ("Universal codeword sets", IEEE Trans. Information Theory 1975)
with lengths of 6 bits: for the few numbers that a table of frequencies does not hold.
"""

import numpy as np

from fedcunet.bits import field_bits, fields_of, pack_codes, packed_length, unpack_codes

_LENGTH_BITS = 7  # 6 of the length, 1 of the sign
_MAX_LENGTH = 60


def _bit_lengths(numbers: np.ndarray) -> np.ndarray:
    """Bits of the magnitudes; exact, since all are below 2^53 or rounded within their octave."""
    lengths: np.ndarray = np.frexp(np.abs(numbers).astype(np.float64))[1].astype(np.int64)
    return lengths


def escapes_length(numbers: np.ndarray) -> int:
    """Bytes of `pack_escapes(numbers)`."""
    rest = int(np.maximum(_bit_lengths(numbers) - 1, 0).sum())
    return packed_length(numbers.size, _LENGTH_BITS) + packed_length(rest, 1)


def pack_escapes(numbers: np.ndarray) -> bytes:
    """The bytes of `numbers` (int64, magnitudes below 2^53)."""
    lengths = _bit_lengths(numbers)
    codes = 2 * lengths + (numbers < 0)
    rest = np.maximum(lengths - 1, 0)
    bits = field_bits(np.abs(numbers), rest)
    return pack_codes(codes, _LENGTH_BITS).tobytes() + pack_codes(bits, 1).tobytes()


def unpack_escapes(content: bytes, count: int) -> np.ndarray:
    """The `count` numbers (int64) that `content` stands for.

    Raises:
        ValueError: `content` has too few or too many bytes, or a length above 60.
    """
    head = packed_length(count, _LENGTH_BITS)
    if len(content) < head:
        raise ValueError(f"{len(content)} bytes hold no lengths of {count} numbers")
    packed = np.frombuffer(content, dtype=np.uint8)
    codes = unpack_codes(packed[:head], bits=_LENGTH_BITS, count=count).astype(np.int64)
    lengths = codes >> 1
    if lengths.max(initial=0) > _MAX_LENGTH:
        raise ValueError(f"a number of {lengths.max()} bits, at most {_MAX_LENGTH} are allowed")
    rest = np.maximum(lengths - 1, 0)
    bits = unpack_codes(packed[head:], bits=1, count=int(rest.sum())).astype(np.int64)
    magnitudes = fields_of(bits, rest) + np.where(lengths > 0, 1 << rest, 0)
    numbers: np.ndarray = np.where(codes % 2 == 1, -magnitudes, magnitudes)
    return numbers
