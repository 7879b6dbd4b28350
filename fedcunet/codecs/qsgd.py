"""QSGD: stochastic rounding of each value to a share of the l2 norm of its bucket."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import pack_codes, packed_length, round_up_where, unpack_codes
from fedcunet.codecs.base import (
    add_reference,
    check_body,
    check_vector,
    random_uniform,
    whole_codec_bits,
)

BUCKET = 512


@dataclass(frozen=True, slots=True)
class QsgdCodec:
    """Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding"
    (NeurIPS 2017, section 3.1, https://arxiv.org/abs/1610.02132), buckets of 512 values, without
    its Elias code: s = 2^(bits-1) - 1 levels and a sign in `bits` bits.

    Body: the norms ("<f4"), then the packed codes m + s of the whole numbers m from -s to s; the
    value is norm·m/s.
    """

    name: str = "qsgd"
    min_bits: int = 2
    max_bits: int = 8
    budget: bool = False
    unbiased: bool = True

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        size = 4 * -(-length // BUCKET) + packed_length(length, whole_codec_bits(self, bits))
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
        most = 2 ** (width - 1) - 1
        num_buckets = -(-values.size // BUCKET)
        padded = np.zeros(num_buckets * BUCKET)
        padded[: values.size] = values
        buckets_BD = padded.reshape(num_buckets, BUCKET)
        # Never below the true norm, or a single value would round to more than the last level.
        norms = np.sqrt(np.einsum("bd,bd->b", buckets_BD, buckets_BD)).astype("<f4")
        norms = np.where(norms > 0, np.nextafter(norms, np.float32(np.inf)), norms).astype("<f4")
        shares = buckets_BD * (most / np.where(norms > 0, norms, 1).astype(np.float64))[:, None]
        numbers = round_up_where(
            shares.reshape(-1)[: values.size], random_uniform(seed, values.size)
        )
        codes = (numbers + most).astype(np.uint8)
        head: bytes = norms.tobytes()
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
        most = 2 ** (width - 1) - 1
        num_buckets = -(-length // BUCKET)
        norms = np.frombuffer(body, dtype="<f4", count=num_buckets)
        packed = np.frombuffer(body, dtype=np.uint8, offset=4 * num_buckets)
        numbers = unpack_codes(packed, bits=width, count=length).astype(np.float64) - most
        # Norms that no encoder makes (NaN, infinity) must not warn: the caller checks values.
        with np.errstate(all="ignore"):
            values = numbers * np.repeat(norms.astype(np.float64) / most, BUCKET)[:length]
            return add_reference(values.astype(np.float32), reference)
