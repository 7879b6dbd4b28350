"""The codes inside a file of packed weights: trits, and short vectors at a few bits a value.

Numpy in, bytes out; `fedcunet/training/packed.py` makes whole files of networks from these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import check_bits, pack_codes, packed_length, unpack_codes

MIN_VECTOR_BITS, MAX_VECTOR_BITS = 4, 16
TRITS_IN_BYTE = 5  # 3^5 = 243 of 256 values: 1.6 bits a weight, where two bits each take 2
_NUM_TRIT_BYTES = 3**TRITS_IN_BYTE
_POWERS = (3 ** np.arange(TRITS_IN_BYTE)).astype(np.uint8)
_TRITS = (np.arange(_NUM_TRIT_BYTES)[:, None] // _POWERS % 3).astype(np.uint8)

# How a vector is coded: equal steps; equal ratios of values above 0; equal ratios with a sign and
# a code for 0.
LINEAR, LOG, SIGNED_LOG = 0, 1, 2
# Of each vector in front of the codes: how it is coded, the two ends of its grid, and how many of
# its values stand apart.
_GRID = np.dtype([("kind", "u1"), ("low", "<f4"), ("high", "<f4"), ("num_apart", "<u2")])
_APART = np.dtype([("index", "<u2"), ("value", "<f4")])
APART_BYTES = _APART.itemsize
MAX_VECTOR_LENGTH = 2**16 - 1


def trits_length(count: int) -> int:
    """Bytes that `count` trits take."""
    return -(-count // TRITS_IN_BYTE)


def pack_trits(trits: np.ndarray) -> bytes:
    """Whole numbers 0, 1, 2 (1-D), five in a byte: the sum of trit i times 3^i."""
    if trits.size and not 0 <= trits.min() <= trits.max() <= 2:
        raise ValueError("trits must lie in [0, 2]")
    padded = np.zeros((trits_length(trits.size), TRITS_IN_BYTE), dtype=np.uint8)
    padded.reshape(-1)[: trits.size] = trits
    return (padded @ _POWERS).tobytes()


def unpack_trits(body: bytes, count: int) -> np.ndarray:
    """The `count` trits of `pack_trits`, uint8. Raises ValueError if `body` is not theirs."""
    packed = np.frombuffer(body, dtype=np.uint8)
    if packed.size != trits_length(count):
        raise ValueError(f"{count} trits take {trits_length(count)} bytes, not {packed.size}")
    if packed.size and packed.max() >= _NUM_TRIT_BYTES:
        raise ValueError(f"a byte of five trits is {packed.max()}, above {_NUM_TRIT_BYTES - 1}")
    return _TRITS[packed].reshape(-1)[:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorCode:
    """The grid of one vector, each value's place on it, and the values that stand apart from it.

    Attributes:
        kind: LINEAR, LOG or SIGNED_LOG.
        low: Lower end of the grid; of the magnitudes where `kind` is SIGNED_LOG. Exact in float32.
        high: Its upper end, not below `low`. Exact in float32.
        codes_N: Whole numbers in [0, 2^bits).
        apart_M: Indices, ascending, of the values that are kept as they are.
        values_M: These values, float32.
    """

    kind: int
    low: float
    high: float
    codes_N: np.ndarray
    apart_M: np.ndarray
    values_M: np.ndarray

    def values(self, bits: int) -> np.ndarray:
        """The coded vector in float32."""
        last, codes_N = (1 << bits) - 1, self.codes_N.astype(np.int64)
        if self.kind == SIGNED_LOG:
            half = 1 << (bits - 1)
            place_N = codes_N & (half - 1)
            values_N = _grid_values(place_N - 1, self.low, self.high, half - 2, log=True)
            values_N = np.where(place_N == 0, 0.0, values_N)
            values_N = np.where(codes_N >= half, -values_N, values_N)
        else:
            values_N = _grid_values(codes_N, self.low, self.high, last, log=self.kind == LOG)
        result_N = values_N.astype(np.float32)
        result_N[self.apart_M] = self.values_M
        return result_N


def _grid_values(
    places_N: np.ndarray, low: float, high: float, last: int, *, log: bool
) -> np.ndarray:
    """float64 values of places 0 (`low`) to `last` (`high`) on a grid of equal steps or ratios."""
    if not log:
        return low + places_N * ((high - low) / last)
    # A double's logarithm is exact enough for the ends to come back unchanged in float32.
    first = np.log2(low)
    return np.asarray(np.exp2(first + places_N * ((np.log2(high) - first) / last)))


def _num_apart(sorted_N: np.ndarray) -> tuple[int, int]:
    """How many of the smallest and of the largest values shall stand apart from the grid.

    One that does costs bits, and narrows the grid for the others; halving its range is worth a bit
    for each value of the vector. At most a quarter is taken from either end.
    """
    count = sorted_N.size
    most = count // 4 + 1
    spread = sorted_N[-1] - sorted_N[0]
    if spread <= 0:
        return 0, 0
    low_L1, high_1H = sorted_N[:most, None], sorted_N[::-1][None, :most]
    # A grid that is 2^-16 of the whole is as good as a point.
    worth_LH = count * np.log2(np.maximum((high_1H - low_L1) / spread, 2.0**-16))
    cost_LH = 8 * APART_BYTES * (np.arange(most)[:, None] + np.arange(most)[None, :])
    lower, upper = np.unravel_index((worth_LH + cost_LH).argmin(), cost_LH.shape)
    return int(lower), int(upper)


def _code(values_N: np.ndarray, bits: int, kind: int) -> VectorCode:
    """The values coded in this way, which must be able to hold them."""
    log, signed = kind != LINEAR, kind == SIGNED_LOG
    half = 1 << (bits - 1)
    last = half - 2 if signed else (1 << bits) - 1
    there_N = values_N != 0 if signed else np.ones(values_N.size, dtype=bool)
    size_N = np.where(there_N, np.abs(values_N), 1.0) if signed else values_N
    at_N = np.log2(size_N) if log else size_N
    order_M = np.flatnonzero(there_N)[np.argsort(at_N[there_N], kind="stable")]
    lower, upper = _num_apart(at_N[order_M])
    apart_M = np.sort(np.concatenate([order_M[:lower], order_M[order_M.size - upper :]]))
    low, high = size_N[order_M[lower]], size_N[order_M[order_M.size - upper - 1]]
    first, end = (np.log2(low), np.log2(high)) if log else (low, high)
    step = (end - first) / last
    codes_N = ((at_N - first) / (step if step > 0 else 1.0)).round().clip(0, last)
    if signed:
        codes_N = np.where(there_N, codes_N + 1 + half * (values_N < 0), 0)
    return VectorCode(
        kind=kind,
        low=float(low),
        high=float(high),
        codes_N=codes_N.astype(np.uint16),
        apart_M=apart_M,
        values_M=values_N[apart_M].astype(np.float32),
    )


def code_vector(
    values_N: np.ndarray, *, bits: int, weights_N: np.ndarray | None = None
) -> VectorCode:
    """The values on the grid, linear or logarithmic, that suits them best.

    That is the one with the least weighted squared error, where each value that stands apart from
    its grid counts as many bits as it takes, and a bit for every value is worth a factor of 4.

    Args:
        values_N: Finite in float32, 1-D, 1 to `MAX_VECTOR_LENGTH` of them.
        bits: Of each value, 4 to 16.
        weights_N: How much each value's squared error matters, none below 0; equal where None.
    """
    bits = check_bits(bits, low=MIN_VECTOR_BITS, high=MAX_VECTOR_BITS)
    if not 0 < values_N.size <= MAX_VECTOR_LENGTH:
        raise ValueError(f"a vector to be coded has {values_N.size} values")
    values_N = values_N.astype(np.float32).astype(np.float64)
    kinds = [LINEAR]
    if values_N.any():
        kinds.append(LOG if values_N.min() > 0 else SIGNED_LOG)

    def cost(code: VectorCode) -> float:
        error_N = np.square(code.values(bits) - values_N)
        error = float(error_N.sum() if weights_N is None else (weights_N * error_N).sum())
        return values_N.size / 2 * math.log2(error + 1e-60) + 8 * APART_BYTES * code.apart_M.size

    return min((_code(values_N, bits, kind) for kind in kinds), key=cost)


def round_significant(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 values rounded to `bits` significant bits, halves to even."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    scale = 2.0**bits
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)


def vectors_length(lengths: Sequence[int], bits: int, num_apart: int = 0) -> int:
    """Bytes of vectors of these lengths of which `num_apart` values stand apart."""
    codes = packed_length(sum(lengths), bits)
    return len(lengths) * _GRID.itemsize + codes + num_apart * APART_BYTES


def pack_vectors(codes: Sequence[VectorCode], bits: int) -> bytes:
    """The vectors' grids, all their codes as one stream (`fedcunet/bits.py`), what stands apart."""
    grids = np.array(
        [(code.kind, code.low, code.high, code.apart_M.size) for code in codes], dtype=_GRID
    )
    every = [code.codes_N for code in codes] or [np.zeros(0, dtype=np.uint16)]
    apart = [
        pair
        for code in codes
        for pair in zip(code.apart_M.tolist(), code.values_M.tolist(), strict=True)
    ]
    packed = pack_codes(np.concatenate(every), bits)
    return grids.tobytes() + packed.tobytes() + np.array(apart, dtype=_APART).tobytes()


def unpack_vectors(body: bytes, lengths: Sequence[int], bits: int) -> list[np.ndarray]:
    """The float32 vectors of `pack_vectors`. Raises ValueError if `body` is not theirs."""
    bits = check_bits(bits, low=MIN_VECTOR_BITS, high=MAX_VECTOR_BITS)
    without = vectors_length(lengths, bits)
    if len(body) < without or (len(body) - without) % APART_BYTES:
        raise ValueError(f"vectors of {sum(lengths)} values cannot take {len(body)} bytes")
    grids = np.frombuffer(body, dtype=_GRID, count=len(lengths))
    apart = np.frombuffer(body, dtype=_APART, offset=without)
    if grids["num_apart"].sum(dtype=np.int64) != apart.size:
        raise ValueError("the values that stand apart are not as many as their grids say")
    packed = np.frombuffer(body, dtype=np.uint8, offset=grids.nbytes)
    stream = packed[: packed_length(sum(lengths), bits)]
    codes = unpack_codes(stream, bits=bits, count=sum(lengths))
    vectors, start, begin = [], 0, 0
    for grid, length in zip(grids, lengths, strict=True):
        kind, low, high = int(grid["kind"]), float(grid["low"]), float(grid["high"])
        lowest = -np.inf if kind == LINEAR else 0.0
        if kind not in (LINEAR, LOG, SIGNED_LOG) or not lowest < low <= high < np.inf:
            raise ValueError(f"a grid of kind {kind} cannot go from {low:g} to {high:g}")
        pairs = apart[begin : begin + int(grid["num_apart"])]
        if pairs.size and pairs["index"].max() >= length:
            raise ValueError(f"a vector of {length} values has none at {pairs['index'].max()}")
        part = VectorCode(
            kind=kind,
            low=low,
            high=high,
            codes_N=codes[start : start + length],
            apart_M=pairs["index"],
            values_M=pairs["value"],
        )
        vectors.append(part.values(bits))
        start, begin = start + length, begin + pairs.size
    return vectors
