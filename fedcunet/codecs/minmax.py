"""Stochastic rounding to equal steps between a tensor's least and greatest value."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import pack_codes, packed_length, round_up_where, unpack_codes
from fedcunet.codecs.base import (
    add_reference,
    check_body,
    check_vector,
    random_uniform,
    reduce_segments,
    segment_lengths,
    whole_codec_bits,
)


@dataclass(frozen=True, slots=True)
class MinMaxCodec:
    """Stochastic k-level quantisation of Suresh et al., "Distributed Mean Estimation with Limited
    Communication" (ICML 2017, section 2.2, https://arxiv.org/abs/1611.00429), per tensor and
    without their rotation, as in FedPAQ and TensorFlow Federated.

    Body: least and greatest value of each segment ("<f4"), then the packed codes c; the value is
    least + c·(greatest - least)/(2^bits - 1).
    """

    name: str = "min-max"
    min_bits: int = 1
    max_bits: int = 16
    budget: bool = False
    unbiased: bool = True

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        size = 8 * max(len(segments), 1) + packed_length(length, whole_codec_bits(self, bits))
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
        least = reduce_segments(np.minimum, values, lengths)
        span = reduce_segments(np.maximum, values, lengths) - least
        factors = (2**width - 1) / np.where(span > 0, span, 1)
        places = (values - np.repeat(least, lengths)) * np.repeat(factors, lengths)
        codes = round_up_where(places, random_uniform(seed, values.size))
        head = np.stack([least, least + span], axis=1).astype("<f4").tobytes()
        # The greatest value's place may exceed the last code by a rounding.
        codes = np.minimum(codes, 2**width - 1).astype(np.uint16)
        return head + pack_codes(codes, width).tobytes()

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
        coded_ends = np.frombuffer(body, dtype="<f4", count=2 * lengths.size)
        packed = np.frombuffer(body, dtype=np.uint8, offset=8 * lengths.size)
        codes = unpack_codes(packed, bits=width, count=length).astype(np.float64)
        # Ends that no encoder makes (NaN, infinity) must not warn: the caller checks values.
        with np.errstate(all="ignore"):
            ends = coded_ends.astype(np.float64)
            steps = (ends[1::2] - ends[::2]) / (2**width - 1)
            values = np.repeat(ends[::2], lengths) + codes * np.repeat(steps, lengths)
            return add_reference(values.astype(np.float32), reference)
