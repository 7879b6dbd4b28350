"""One bit per value: its sign, and the mean magnitude of its segment."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import pack_codes, packed_length, unpack_codes
from fedcunet.codecs.base import (
    add_reference,
    check_body,
    check_vector,
    reduce_segments,
    segment_lengths,
    whole_codec_bits,
)


@dataclass(frozen=True, slots=True)
class SignCodec:
    """sign(x)·mean|x| per segment, sign(0) = +1: biased, so for use with error feedback only.

    The scaled sign of Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019, section 4,
    https://arxiv.org/abs/1901.09847), with a scale for each tensor.

    Body: the scales ("<f4"), then the packed bits, 1 for a negative value.
    """

    name: str = "sign"
    min_bits: int = 1
    max_bits: int = 1
    budget: bool = False
    unbiased: bool = False

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        whole_codec_bits(self, bits)
        size = 4 * max(len(segments), 1) + packed_length(length, 1)
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
        means = reduce_segments(np.add, np.abs(values), lengths) / np.maximum(lengths, 1)
        head: bytes = means.astype("<f4").tobytes()
        return head + pack_codes(values < 0, 1).tobytes()

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
        scales = np.frombuffer(body, dtype="<f4", count=lengths.size).astype(np.float32)
        packed = np.frombuffer(body, dtype=np.uint8, offset=4 * lengths.size)
        negative = unpack_codes(packed, bits=1, count=length)
        # Signs times magnitudes by the sign bit of float32; no arithmetic, so no warnings.
        magnitudes = np.repeat(scales, lengths)
        magnitudes.view(np.uint32)[:] ^= negative.astype(np.uint32) << np.uint32(31)
        return add_reference(magnitudes, reference)
