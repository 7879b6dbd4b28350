"""What a codec is, and what all codecs share: seeds, checks of vectors, segments, exponent bytes.

A codec turns a float32 vector into bytes and back, purely: the same vector, bits and seed give the
same bytes. It knows nothing of networks, rounds or clients; the caller hashes those into the seed
(`make_seed`). Bodies are little-endian everywhere.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedcunet.bits import check_bits
from fedcunet.errors import UserError

# Larger magnitudes are refused: above it, scales and rotated values would leave float32's range.
MAX_MAGNITUDE = 2.0**120

# Bits of a codec with a budget, where something else takes a part of what a user may ask for. No
# dithered trellis can do with less than about 0.16.
LEAST_BUDGET, MOST_BUDGET = 0.18, 8.5

# A power-of-two scale travels as one byte: 0 for "all zero", else exponent + 128.
_EXPONENT_BIAS = 128
_MIN_EXPONENT, _MAX_EXPONENT = -127, 127


class Codec(Protocol):
    """A way to code a float32 vector at `bits` bits per value, known by name in `CODECS`."""

    @property
    def name(self) -> str: ...

    @property
    def min_bits(self) -> float: ...

    @property
    def max_bits(self) -> float: ...

    @property
    def budget(self) -> bool:
        """Whether `bits` is a budget: the mean over the whole body, all counted, in steps of 1/256.

        Else it is a whole number, the width of each value's code.
        """
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the decoded vector, averaged over seeds, is the vector that was coded."""
        ...

    def encode(
        self,
        vector: np.ndarray,
        *,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> bytes:
        """The body that stands for `vector`, its length within `body_limits`.

        Args:
            vector: Shape (n,), finite, magnitudes up to 2^120; n may be 0.
            bits: In [min_bits, max_bits]; see `budget`.
            seed: Of all randomness; the decoder needs the same.
            segments: Lengths of the tensors in the vector, which may have a scale each; their sum
                is n. Empty: the whole vector is one segment.
            reference: A prediction of the vector that the decoder has too; shape (n,). The
                difference from it is what is coded.

        Raises:
            ValueError: The vector has NaN, infinite or too large values, or lengths do not agree.
        """
        ...

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
        """The vector of `length` float32 values that `body` stands for.

        Bytes that no encoder makes may give values that are not finite, or a ValueError, and
        nothing else; they take no more memory than those that an encoder makes.

        Raises:
            ValueError: `body` is outside of `body_limits`, or no encoder can have made it.
        """
        ...

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        """The least and the greatest number of bytes of a coded vector of `length` values.

        The two are equal unless `budget`.
        """
        ...


@runtime_checkable
class KnowsNoise(Protocol):
    """A codec whose receiver can tell how far the decoded values are from those coded."""

    def noise(
        self,
        body: bytes,
        decoded: np.ndarray,
        *,
        bits: float,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> np.ndarray:
        """The expected sum of squared errors of each segment's values: (segments,), float64.

        Args:
            body: One that was decoded.
            decoded: What it stands for; shape (n,).
            bits: As for `decode`, and so are the others.
            segments: Lengths of the tensors; empty: the whole vector is one.
            reference: The prediction.
        """
        ...


def noise_known(codec: Codec) -> KnowsNoise | None:
    """The codec if it is unbiased and its noise is known to the receiver."""
    return codec if codec.unbiased and isinstance(codec, KnowsNoise) else None


def make_seed(run: int, round: int, client: int, purpose: str) -> bytes:
    """16 bytes hashed from the four: the seed of one use of randomness, unlike any other's."""
    text = f"fedcunet/{run}/{round}/{client}/{purpose}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def random_stream(seed: bytes) -> np.random.Philox:
    """The source of random words that depend on `seed` alone, to be taken by `random_raw`.

    Raw words of the counter-based Philox generator: numpy keeps their stream fixed across
    versions, which it does not promise for the methods of its Generator.
    """
    key = int.from_bytes(hashlib.blake2b(seed, digest_size=16).digest(), "little")
    return np.random.Philox(key=key)


def random_words(seed: bytes, count: int) -> np.ndarray:
    """The first `count` uint64 words of `random_stream(seed)`."""
    words: np.ndarray = random_stream(seed).random_raw(count)
    return words


def random_uniform(seed: bytes, count: int) -> np.ndarray:
    """`count` float32 values in [0, 1), multiples of 2^-24, that depend on `seed` alone."""
    halves = random_words(seed, -(-count // 2)).astype("<u8", copy=False).view("<u4")[:count]
    return (halves >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def check_codec_bits(codec: Codec, bits: float) -> float:
    """`bits`, which `codec` allows; else a UserError that names codec and range."""
    if not codec.budget:
        return whole_codec_bits(codec, bits)
    if not (codec.min_bits <= bits <= codec.max_bits and bits * 256 == int(bits * 256)):
        raise UserError(
            f"bits of codec '{codec.name}' must be a multiple of 1/256 from {codec.min_bits:g} to"
            f" {codec.max_bits:g}, not {bits}"
        )
    return bits


def check_budget(codec: Codec, bits: float) -> None:
    """Raises UserError unless `bits` is a budget that can be met."""
    if not LEAST_BUDGET <= bits <= MOST_BUDGET:
        raise UserError(
            f"bits of codec '{codec.name}' must be from {codec.min_bits:g} to {codec.max_bits:g},"
            f" not {bits}"
        )


def whole_codec_bits(codec: Codec, bits: float) -> int:
    """`bits` as the whole number that `codec` allows; else a UserError as above."""
    what = f"bits of codec '{codec.name}'"
    return check_bits(bits, low=int(codec.min_bits), high=int(codec.max_bits), what=what)


def check_vector(vector: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """`vector` less `reference` as a contiguous float32 vector, checked.

    Raises:
        ValueError: It is not a vector of floating point, or not finite, or beyond 2^120.
    """
    if vector.ndim != 1 or vector.dtype.kind != "f":
        raise ValueError(
            f"a codec takes a vector of floating point, not shape {vector.shape} {vector.dtype}"
        )
    if reference is not None:
        if reference.shape != vector.shape:
            raise ValueError(f"reference has shape {reference.shape}, vector {vector.shape}")
        with np.errstate(all="ignore"):
            vector = vector - reference
    # Beyond float32's range becomes infinite here and is refused with the rest.
    with np.errstate(all="ignore"):
        values: np.ndarray = np.ascontiguousarray(vector, dtype=np.float32)
        extremes = (values.min(), values.max()) if values.size else (0, 0)
    # Two reductions without a temporary; NaN makes both comparisons false.
    if not (extremes[0] >= -MAX_MAGNITUDE and extremes[1] <= MAX_MAGNITUDE):
        bad = np.flatnonzero(~(np.abs(values) <= MAX_MAGNITUDE))
        raise ValueError(
            f"{bad.size} of {vector.size} values are NaN, infinite or beyond 2^120,"
            f" the first at index {bad[0]}: {vector[bad[0]]}"
        )
    return values


def check_body(codec: Codec, body: bytes, *, length: int, bits: float, segments: Any) -> None:
    """Raises ValueError unless `body` has the length that `codec` gives such a vector."""
    least, most = codec.body_limits(length=length, bits=bits, segments=segments)
    if not least <= len(body) <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise ValueError(
            f"a body of codec '{codec.name}' for {length} values at {bits} bits has {expected}"
            f" bytes, not {len(body)}"
        )


def add_reference(values: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """`values` plus the prediction that the encoder took away."""
    if reference is None:
        return values
    with np.errstate(all="ignore"):
        total: np.ndarray = (values + reference).astype(np.float32, copy=False)
    return total


def segment_lengths(length: int, segments: Sequence[int]) -> np.ndarray:
    """The lengths of all segments as int64, checked against `length`; one segment if none given."""
    lengths = np.array(segments if len(segments) else (length,), dtype=np.int64)
    if lengths.min() < 0 or lengths.sum() != length:
        raise ValueError(f"segments sum to {lengths.sum()}, the vector has {length} values")
    return lengths


def reduce_segments(ufunc: np.ufunc, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`ufunc` over each segment of `values`, in float64; 0 for an empty segment."""
    result = np.zeros(lengths.size, dtype=np.float64)
    filled = lengths > 0
    if filled.any():
        # reduceat takes starts; an empty segment would repeat its neighbour's value.
        starts = (np.cumsum(lengths) - lengths)[filled]
        result[filled] = ufunc.reduceat(values, starts, dtype=np.float64)
    return result


def sum_of_squares(vector: np.ndarray) -> float:
    """In float64, in pieces: no second vector is made."""
    pieces = (vector[begin : begin + 2**16] for begin in range(0, vector.size, 2**16))
    return sum(float(np.square(piece.astype(np.float64)).sum()) for piece in pieces)


def exponent_bytes(scales: np.ndarray, nonzero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Powers of two as one byte each (uint8), and the scales (float32) that the bytes stand for.

    Scales below 2^-127 are taken up to it; where `nonzero` is False byte and scale are 0.
    """
    exponents = np.clip(np.frexp(scales)[1] - 1, _MIN_EXPONENT, _MAX_EXPONENT)
    coded = np.where(nonzero, exponents + _EXPONENT_BIAS, 0).astype(np.uint8)
    return coded, scales_of_bytes(coded)


def scales_of_bytes(coded: np.ndarray) -> np.ndarray:
    """The powers of two (float32) that `exponent_bytes` coded."""
    exponents = coded.astype(np.int32) - _EXPONENT_BIAS
    scales: np.ndarray = np.where(coded == 0, 0, np.ldexp(1.0, exponents)).astype(np.float32)
    return scales
