"""Eq. 6 of the paper as a codec: k-bit whole numbers and one power-of-two scale per segment."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import covering_scale, pack_codes, packed_length, round_up_where, unpack_codes
from fedcunet.codecs.base import (
    add_reference,
    check_body,
    check_vector,
    exponent_bytes,
    random_uniform,
    reduce_segments,
    scales_of_bytes,
    segment_lengths,
    whole_codec_bits,
)


@dataclass(frozen=True, slots=True)
class LinearCodec:
    """q(x / s, k) of Eq. 6 with s = 2^ceil(log2(max|x| / (1 - σ))) per segment.

    The scale is taken up, where WAGE's 2^round(log2 max|x|) may clip: nothing is clipped, so
    that stochastic rounding is unbiased and values on the grid come back exactly.

    Body: one exponent byte per segment, then the packed codes m + 2^(k-1) - 1 of the whole
    numbers m with |m| < 2^(k-1); the value is s·σ·m.

    Attributes:
        stochastic: Round up with the probability of the fraction (unbiased), else to nearest
            (smaller error, biased: for use with error feedback).
    """

    name: str
    stochastic: bool
    min_bits: int = 2
    max_bits: int = 16
    budget: bool = False

    @property
    def unbiased(self) -> bool:
        return self.stochastic

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        size = max(len(segments), 1) + packed_length(length, whole_codec_bits(self, bits))
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
        lengths = segment_lengths(values.size, segments)
        largest = reduce_segments(np.maximum, np.abs(values), lengths)
        exponents, scales = exponent_bytes(covering_scale(largest, width), largest > 0)
        most = 2 ** (width - 1) - 1
        # In float64, since the factor of a scale of 2^-127 at 16 bits is beyond float32.
        factors = 2.0 ** (width - 1) / np.where(exponents > 0, scales, 1).astype(np.float64)
        if factors.max() < 2.0**127:
            factors = factors.astype(np.float32)
        numbers = (values * np.repeat(factors, lengths)).astype(np.float32, copy=False)
        if self.stochastic:
            numbers = round_up_where(numbers, random_uniform(seed, numbers.size))
        else:
            numbers = numbers.round()
        numbers += np.float32(most)
        codes = numbers.astype(np.uint8 if width <= 8 else np.uint16)
        return exponents.tobytes() + pack_codes(codes, width).tobytes()

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
        lengths = segment_lengths(length, segments)
        scales = scales_of_bytes(np.frombuffer(body, dtype=np.uint8, count=lengths.size))
        packed = np.frombuffer(body, dtype=np.uint8, offset=lengths.size)
        numbers = unpack_codes(packed, bits=width, count=length).astype(np.float32)
        numbers -= np.float32(2 ** (width - 1) - 1)
        numbers *= np.repeat(scales * np.float32(2.0 ** -(width - 1)), lengths)
        return add_reference(numbers, reference)
