"""Floating point as it is: `float32`, and `float16` with one power-of-two scale per segment."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.codecs.base import (
    add_reference,
    check_body,
    check_vector,
    exponent_bytes,
    reduce_segments,
    scales_of_bytes,
    segment_lengths,
    whole_codec_bits,
)


@dataclass(frozen=True, slots=True)
class Float32Codec:
    """Little-endian float32 values: exact, 32 bits each."""

    name: str = "float32"
    min_bits: int = 32
    max_bits: int = 32
    budget: bool = False
    unbiased: bool = True

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        whole_codec_bits(self, bits)
        return 4 * length, 4 * length

    def encode(
        self,
        vector: np.ndarray,
        *,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> bytes:
        whole_codec_bits(self, bits)
        return check_vector(vector, reference).astype("<f4", copy=False).tobytes()

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
        return add_reference(np.frombuffer(body, dtype="<f4").astype(np.float32), reference)

    def noise(
        self,
        body: bytes,
        decoded: np.ndarray,
        *,
        bits: float,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> np.ndarray:
        """As of `KnowsNoise`: no error, values come as they are."""
        return np.zeros(segment_lengths(decoded.size, segments).size)


@dataclass(frozen=True, slots=True)
class Float16Codec:
    """IEEE half precision, rounded to nearest, after a power-of-two scale per segment.

    The scale brings each segment's largest magnitude to [2^15, 65504]. Small updates thus keep
    half precision's 11 bits instead of falling among its denormals, and nothing overflows.
    Values that are halves already come back exactly.

    Body: one exponent byte per segment, then the halves.
    """

    name: str = "float16"
    min_bits: int = 16
    max_bits: int = 16
    budget: bool = False
    unbiased: bool = False

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        whole_codec_bits(self, bits)
        size = max(len(segments), 1) + 2 * length
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
        whole_codec_bits(self, bits)
        values = check_vector(vector, reference)
        lengths = segment_lengths(values.size, segments)
        largest = reduce_segments(np.maximum, np.abs(values), lengths)
        # Mantissas from 65520 / 65536 on would round up to infinity at the smaller scale.
        mantissa, exponents = np.frexp(largest)
        exponents = exponents - 16 + (mantissa >= 65520 / 65536)
        coded, scales = exponent_bytes(np.ldexp(1.0, exponents), largest > 0)
        factors = np.where(coded > 0, 1 / np.where(coded > 0, scales, 1), 0).astype(np.float32)
        halves = (values * np.repeat(factors, lengths)).astype("<f2")
        return coded.tobytes() + halves.tobytes()

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
        lengths = segment_lengths(length, segments)
        scales = scales_of_bytes(np.frombuffer(body, dtype=np.uint8, count=lengths.size))
        halves = np.frombuffer(body, dtype="<f2", offset=lengths.size)
        # Halves that no encoder makes (NaN, infinity) must not warn: the caller checks values.
        with np.errstate(all="ignore"):
            values = halves.astype(np.float32) * np.repeat(scales, lengths)
        return add_reference(values, reference)
