"""The largest values alone, as signs of one magnitude: sparse ternary compression."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import pack_codes, packed_length, unpack_codes
from fedcunet.codecs.base import add_reference, check_body, check_budget, check_vector

# Magnitude, number of values, bits of a gap's remainder.
_HEAD = struct.Struct("<fIB")


@dataclass(frozen=True, slots=True)
class TopKCodec:
    """Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data"
    (2019, algorithm 1, https://arxiv.org/abs/1903.02891): the k values of largest magnitude as
    ±(their mean magnitude), gaps between them in Golomb-Rice code, k as large as the budget allows.
    Biased, so for use with error feedback only.

    Body: head, packed signs (1 for negative), packed remainders of the gaps modulo 2^r, then
    their quotients in unary, each ended by a 1.
    """

    name: str = "top-k"
    min_bits: float = 0.25
    max_bits: float = 1
    budget: bool = True
    unbiased: bool = False

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        check_budget(self, bits)
        return (_HEAD.size, _HEAD.size + 2 + int(bits * length / 8)) if length else (0, 0)

    def encode(
        self,
        vector: np.ndarray,
        *,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> bytes:
        _, most = self.body_limits(length=vector.size, bits=bits)
        values = check_vector(vector, reference)
        if not values.size:
            return b""
        order = np.argsort(-np.abs(values), kind="stable")[: np.count_nonzero(values)]
        target = max(int(bits * values.size / 8), _HEAD.size)
        low, high = 0, order.size  # `low` values fit, more than `high` do not
        while low < high:
            middle = (low + high + 1) // 2
            if len(_pack(values, np.sort(order[:middle]))) <= target:
                low = middle
            else:
                high = middle - 1
        body = _pack(values, np.sort(order[:low]))
        assert len(body) <= most
        return body

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
        values = np.zeros(length, dtype=np.float32)
        if length:
            magnitude, count, width = _HEAD.unpack_from(body)
            places, negative = _unpack(body[_HEAD.size :], count, width, length)
            values[places] = np.where(negative == 1, -magnitude, magnitude)
        return add_reference(values, reference)


def _pack(values: np.ndarray, places: np.ndarray) -> bytes:
    """The body that has the values at `places`, ascending."""
    chosen = values[places]
    magnitude = float(np.abs(chosen).mean(dtype=np.float64)) if places.size else 0.0
    gaps = np.diff(places, prepend=-1) - 1
    # The best remainder for gaps of a geometric distribution, 2^r near 0.69 times their mean.
    width = (
        int(np.clip(np.rint(np.log2(max(0.69 * (gaps.mean() + 1), 1))), 0, 16)) if gaps.size else 0
    )
    quotients = gaps >> width
    unary = np.zeros(int(quotients.sum()) + places.size, dtype=np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    parts = [pack_codes(chosen < 0, 1)]
    if width:
        parts.append(pack_codes(gaps & ((1 << width) - 1), width))
    parts.append(pack_codes(unary, 1))
    head = _HEAD.pack(magnitude, places.size, width)
    return head + b"".join(part.tobytes() for part in parts)


def _unpack(content: bytes, count: int, width: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (int64) and sign bits; ValueError for what no encoder makes."""
    signs, remainders = packed_length(count, 1), packed_length(count, width)
    if count > length or width > 16 or signs + remainders > len(content):
        raise ValueError(f"{count} values with gaps of {width} bits in {len(content)} bytes")
    packed = np.frombuffer(content, dtype=np.uint8)
    negative = unpack_codes(packed[:signs], bits=1, count=count)
    rest = np.zeros(count, dtype=np.int64)
    if width:
        rest += unpack_codes(packed[signs : signs + remainders], bits=width, count=count)
    ends = np.flatnonzero(np.unpackbits(packed[signs + remainders :], bitorder="little"))
    if ends.size != count or packed.size - signs - remainders != packed_length(
        int(ends.max(initial=-1)) + 1, 1
    ):
        raise ValueError(f"{ends.size} gaps, {count} are stated")
    gaps = ((np.diff(ends, prepend=-1) - 1) << width) + rest
    places = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= length:
        raise ValueError(f"a value at {places[-1]}, the vector has {length}")
    return places, negative
