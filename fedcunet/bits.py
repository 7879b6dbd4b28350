"""k-bit numbers: the paper's linear quantiser (Eq. 6), power-of-two scales, and packing into bytes.

Pure functions that stand under both `quant` (tensors) and `codecs` (vectors). Where both need a
function it takes numpy arrays and torch tensors alike. A width of 32 means "not quantised" in a
setting and never reaches this file.

The packed form is one little-endian stream of bits: code i takes the bits i*k to i*k + k - 1, and
bit j of the stream is bit j % 8 of byte j // 8. The last byte is filled up with zeros.
"""

from typing import Any, TypeVar

import numpy as np
import torch

from fedcunet.errors import UserError

# Every function below that takes an Array returns one of the same kind.
Array = TypeVar("Array", np.ndarray[Any, Any], torch.Tensor)

MAX_CODE_BITS = 16


def check_bits(bits: float, *, low: int, high: int, what: str = "bits") -> int:
    """`bits` as an int in [low, high].

    Raises:
        UserError: `bits` is not a whole number or lies outside the range, which is named.
    """
    try:
        whole = int(bits)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if whole != bits or not low <= whole <= high:
        expected = f"{low}" if low == high else f"a whole number from {low} to {high}"
        found = f"{bits:g}" if isinstance(bits, float) else bits
        raise UserError(f"{what} must be {expected}, not {found}")
    return whole


def sigma(bits: int) -> float:
    """The step σ(k) = 2^-(k-1) of the paper, section 3.3, for k from 1 to 16."""
    return 2.0 ** -(check_bits(bits, low=1, high=MAX_CODE_BITS) - 1)


def linear_quantise(values: Array, bits: int, *, scale: float = 1.0) -> Array:
    """Eq. 6 of the paper over [-scale, scale]: q(x / s, k) · s, halves rounded to even.

    q(x, k) = clip(σ·round(x / σ), -1 + σ, 1 - σ). The printed formula lost its division; this is
    the form of WAGE (Wu et al., ICLR 2018, https://arxiv.org/abs/1802.04680, Eq. 6) from which it
    is taken.

    Args:
        values: Floating point, any shape.
        bits: k, from 2 to 16. At k = 1 the grid would be {0}.
        scale: s, a power of two; 1 is the paper's literal form.
    """
    step = sigma(check_bits(bits, low=2, high=MAX_CODE_BITS)) * scale
    # The step is a power of two: multiplying by its inverse is exact.
    return ((values * (1 / step)).round() * step).clip(step - scale, scale - step)


def _select(mask: Any, chosen: Array, other: Array) -> Array:
    """`where` of the library that the arrays belong to."""
    if isinstance(chosen, np.ndarray):
        return np.where(mask, chosen, other)
    return torch.where(mask, chosen, other)


def _power_and_mantissa(values: Array) -> tuple[Array, Array]:
    """2^e and m in [0.5, 1) with values = m·2^e; both exact; those of 1 where values is not > 0."""
    safe = _select(values > 0, values, values * 0 + 1)
    mantissa = np.frexp(safe)[0] if isinstance(safe, np.ndarray) else torch.frexp(safe)[0]
    # The quotient is a power of two, hence exact; exp2() of some builds is not.
    return safe / mantissa, mantissa


def covering_scale(max_abs: Array, bits: int) -> Array:
    """The smallest power of two s with max|x| <= s·(1 - σ); 1 where the maximum is 0.

    With s = 2^ceil(log2(max|x| / (1 - σ))) Eq. 6 clips nothing, and so stochastic rounding is
    unbiased. WAGE's own scale may clip the largest values.

    Args:
        max_abs: Floating point, any shape, values in [0, 2^126).
        bits: k, from 2 to 16.
    """
    step = sigma(check_bits(bits, low=2, high=MAX_CODE_BITS))
    power, mantissa = _power_and_mantissa(max_abs / (1 - step))
    # A mantissa of 0.5 is an exact power of two, one place lower.
    return _select(mantissa > 0.5, power, power / 2)


def round_up_where(values: Array, uniform: Array) -> Array:
    """floor(values), plus 1 where the fraction exceeds `uniform` in [0, 1)."""
    floor = np.floor(values) if isinstance(values, np.ndarray) else torch.floor(values)
    # floor(values + uniform) would round the sum first, which is a bias for large values.
    return _select(uniform < values - floor, floor + 1, floor)


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take when packed."""
    return (count * bits + 7) // 8


def _field_mask(width: int, period: int) -> np.uint64:
    """A 64-bit word with its lowest `width` bits of every `period` bits set."""
    return np.uint64(sum(((1 << width) - 1) << start for start in range(0, 64, period)))


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned `codes` (1-D, integers below 2^bits) as packed bytes (uint8).

    Words of 64 bits hold 8 or 4 codes each in lanes; neighbouring lanes are moved together until
    one dense field is left.

    Args:
        codes: Values in [0, 2^bits), any integer type.
        bits: From 1 to 16.
    """
    bits = check_bits(bits, low=1, high=MAX_CODE_BITS)
    if codes.size and (codes.max() >= 1 << bits or codes.min() < 0):
        raise ValueError(f"codes must lie in [0, {1 << bits}) to be packed at {bits} bits")
    if bits == 1:
        return np.packbits(codes.astype(np.uint8, copy=False), bitorder="little")
    lane = 8 if bits <= 8 else 16
    padded = np.zeros(-(-codes.size // 8) * 8, dtype="<u1" if lane == 8 else "<u2")
    padded[: codes.size] = codes
    if bits == lane:
        return padded[: codes.size].view(np.uint8)
    words, width = padded.view("<u8"), bits
    while lane < 64:
        low = _field_mask(lane, 2 * lane)
        words = (words & low) | ((words & ~low) >> np.uint64(lane - width))
        lane, width = 2 * lane, 2 * width
    if bits > 8:
        # A word holds 4 codes, 36 to 60 bits; two words make whole bytes again.
        first, second = words[0::2], words[1::2]
        words = np.empty(words.size, dtype="<u8")
        words[0::2] = first | (second << np.uint64(width))
        words[1::2] = second >> np.uint64(64 - width)
    group = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8 if bits <= 8 else 16)
    return group[:, :bits].reshape(-1)[: packed_length(codes.size, bits)]


def unpack_codes(packed: np.ndarray, *, bits: int, count: int) -> np.ndarray:
    """The `count` codes in `packed` (uint8, 1-D): uint8 for up to 8 bits, else uint16.

    Raises:
        ValueError: `packed` does not have the length of `count` codes.
    """
    bits = check_bits(bits, low=1, high=MAX_CODE_BITS)
    if packed.size != packed_length(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_length(count, bits)} bytes,"
            f" not {packed.size}"
        )
    if bits == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    lane_type = "<u1" if bits <= 8 else "<u2"
    if bits in (8, 16):
        return packed.copy().view(lane_type)
    num_groups, word_bytes = -(-count // 8), 8 if bits <= 8 else 16
    dense = np.zeros(num_groups * bits, dtype=np.uint8)
    dense[: packed.size] = packed
    group = np.zeros((num_groups, word_bytes), dtype=np.uint8)
    group[:, :bits] = dense.reshape(num_groups, bits)
    words = group.reshape(-1).view("<u8")
    lane, width = 64, 8 * bits if bits <= 8 else 4 * bits
    if bits > 8:
        low, high = words[0::2].copy(), words[1::2].copy()
        words[0::2] = low & _field_mask(width, 64)
        words[1::2] = (low >> np.uint64(width)) | (high << np.uint64(64 - width))
    while width > bits:
        lane, width = lane // 2, width // 2
        low_field = _field_mask(width, 2 * lane)
        words = (words & low_field) | (
            (words & (low_field << np.uint64(width))) << np.uint64(lane - width)
        )
    return words.astype("<u8", copy=False).view(lane_type)[:count]


def field_bits(numbers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The lowest `widths` bits of each of `numbers` (int64, not negative), one after the other.

    Args:
        numbers: (N,)
        widths: (N,) int64, 0 to 62.

    Returns:
        (sum of widths,) int64 of 0 and 1, each number's lowest bit first.
    """
    place = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
    bits: np.ndarray = (np.repeat(numbers, widths) >> place) & 1
    return bits


def fields_of(bits: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The numbers (int64) whose `field_bits` are `bits` (int64, as many as the widths' sum)."""
    stops = np.cumsum(widths)
    place = np.arange(bits.size) - np.repeat(stops - widths, widths)
    # Sums may pass 2^63 and come round: differences do not mind.
    sums = np.concatenate([[0], np.cumsum(bits << place)])
    numbers: np.ndarray = sums[stops] - sums[stops - widths]
    return numbers
