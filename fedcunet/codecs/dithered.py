"""Dithered quantisation and its entropy coding: values to bytes, given each tensor's step.

A value x of a tensor of step s is turned into y = s·(m + v): v in [0, 1) is a fraction known to
both sides, m the whole number that is coded. With k = 2m + parity, k is a number of the trellis
(viterbi.py) for (x - s·u/2) / (s/2), where the dither u in [0, 4) comes from the seed. Since u
covers a whole period of the subsets, y - x is independent of x and of mean 0: subtractive dither
(Schuchman 1964; for trellises see docs/codecs.md). With one state there is no trellis, and the
quantiser is the scalar one.

The order of values is that of the vector. They are cut into a main part and a tail; step t of a
part codes its values t·lanes to (t+1)·lanes - 1. The tail's words are carried in the first states
of the main part's lanes (entropy.py).
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedcunet.codecs.base import random_stream
from fedcunet.codecs.densities import (
    ESCAPES,
    LARGEST,
    NUM_BINS,
    dropped_bits,
    table_of,
)
from fedcunet.codecs.entropy import PRECISION, WIDTH, FrequencyTable, LaneDecoder, encode_lanes
from fedcunet.codecs.escapes import escapes_length
from fedcunet.codecs.viterbi import next_states, search

MAX_LANES = 4096
LANES_WITH_TAIL = 8  # fewer lanes carry nothing
TAIL = 64  # the tail is one of so many parts
_FRACTION_BITS = 15
_FRACTION_MASK = (1 << _FRACTION_BITS) - 1
_BIN_SHIFT = _FRACTION_BITS - (NUM_BINS.bit_length() - 1)
_HALF_STEP = 1 << (_FRACTION_BITS - 1)
_VALUES_AT_ONCE = 2**20  # of one search through the trellis
_PIECE = 2**15  # values whose numbers stay in the cache


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both sides know before the symbols: each tensor's step, class and shape.

    Attributes:
        lengths: Of the tensors that are coded, int64, none of them 0.
        steps: Their steps, float64.
        classes: Their classes (densities.py), int64.
        shapes: Their shapes, int64.
        num_states: Of the trellis; 1 for the scalar quantiser.
    """

    lengths: np.ndarray
    steps: np.ndarray
    classes: np.ndarray
    shapes: np.ndarray
    num_states: int
    table: FrequencyTable = field(init=False)
    first_rows: np.ndarray = field(init=False)  # of each tensor in the table
    dropped: np.ndarray = field(init=False)  # bits of each tensor's numbers beside the table
    stops: np.ndarray = field(init=False)  # where each tensor's values end

    def __post_init__(self) -> None:
        codes, which = np.unique(self.classes * 8 + self.shapes, return_inverse=True)
        given = [divmod(code, 8) for code in codes.tolist()]
        dropped = np.array([dropped_bits(number) for number, _ in given], dtype=np.int64)
        for name, value in (
            ("table", table_of(given, self.num_states)),
            ("first_rows", which * NUM_BINS),
            ("dropped", dropped[which]),
            ("stops", np.cumsum(self.lengths)),
        ):
            object.__setattr__(self, name, value)

    @property
    def num_values(self) -> int:
        """Values of all tensors together."""
        return int(self.stops[-1]) if self.stops.size else 0

    @functools.cached_property
    def of_value(self) -> np.ndarray:
        """The tensor of each value."""
        return self.tensor_of(slice(0, self.num_values))

    def tensor_of(self, where: slice) -> np.ndarray:
        """The tensor of each value in a piece of the vector."""
        first = int(self.stops.searchsorted(where.start, side="right"))
        last = int(self.stops.searchsorted(where.stop, side="left")) + 1
        stops = np.minimum(self.stops[first:last], where.stop)
        index_type = np.int16 if self.lengths.size < 2**15 else np.int32
        tensors = np.arange(first, first + stops.size, dtype=index_type)
        return np.repeat(tensors, np.diff(stops, prepend=where.start))

    @property
    def num_low_bits(self) -> int:
        """Bits that are coded beside the table."""
        return int((self.dropped * self.lengths).sum())


class DitherStream:
    """The dithers u of a seed in 1/16384, in order, a piece at a time."""

    def __init__(self, seed: bytes) -> None:
        self._stream = random_stream(seed)
        self._left = np.empty(0, dtype="<u2")  # of the last word

    def take(self, count: int) -> np.ndarray:
        """The next `count` numbers (uint16)."""
        num_words = -(-(count - self._left.size) // 4)
        if num_words > 0:
            words = self._stream.random_raw(num_words).astype("<u8", copy=False).view("<u2")
            self._left = np.concatenate([self._left, words]) if self._left.size else words
        taken, self._left = self._left[:count], self._left[count:]
        return taken


@dataclass(frozen=True, slots=True)
class Symbols:
    """Quantised values in order: what is coded, and at what cost."""

    packed: np.ndarray  # entries of the table, int64
    low: np.ndarray  # dropped bits of the values of tensors that drop some, int64
    escaped: np.ndarray  # numbers beyond the table, int64

    @property
    def num_bits(self) -> float:
        """The ideal length of all, without what lanes and bytes cost."""
        logarithm = PRECISION - np.log2(np.arange(1, 2**PRECISION + 1))
        total = float(logarithm.take((self.packed >> 16) - 1).sum())
        return total + 8.0 * escapes_length(self.escaped >> 1)


def quantise(
    values: np.ndarray, dither: np.ndarray, of_value: np.ndarray, plan: Plan, num_lanes: int
) -> Symbols:
    """The symbols of `values` (float32), each with its dither and the number of its tensor."""
    numbers = np.empty(values.size, dtype=np.int64)
    fractions = np.empty(values.size, dtype=np.int64)
    scale = (2 / plan.steps).astype(np.float32)
    for part, lanes in split(values.size, num_lanes):
        for block in _blocks(part, lanes, _VALUES_AT_ONCE):
            z = values[block] * scale.take(of_value[block])
            z -= dither[block] * np.float32(2.0**-14)
            numbers[block], fractions[block] = _numbers(z, dither[block], plan.num_states, lanes)
    return _symbols(numbers, fractions, of_value, plan)


def _numbers(
    z: np.ndarray, dither: np.ndarray, num_states: int, num_lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers m and fractions v (in 2^-15) of the values z = 2x/s - u (float32)."""
    if num_states == 1:
        k = 2 * np.rint(z * np.float32(0.5)).astype(np.int64)
    else:
        num_steps = -(-z.size // num_lanes)
        padded = np.zeros(num_steps * num_lanes, dtype=np.float32)
        padded[: z.size] = z
        found = search(padded.reshape(num_steps, num_lanes), num_states)
        subset = found.reshape(-1)[: z.size].astype(np.float32)
        k = 4 * np.rint((z - subset) * np.float32(0.25)).astype(np.int64)
        k += subset.astype(np.int64)
    place = dither + (k & 1) * _HALF_STEP
    return (k >> 1) + (place >> _FRACTION_BITS), place & _FRACTION_MASK


def _symbols(
    numbers: np.ndarray, fractions: np.ndarray, of_value: np.ndarray, plan: Plan
) -> Symbols:
    low = np.empty(0, dtype=np.int64)
    if plan.dropped.any():
        dropped = plan.dropped.take(of_value)
        low = (numbers & ((1 << dropped) - 1))[dropped > 0]
        numbers = numbers >> dropped
    inside = np.abs(numbers) <= LARGEST
    index = plan.first_rows.take(of_value)
    index += fractions >> _BIN_SHIFT
    index *= WIDTH
    packed = plan.table.packed.take(index + np.where(inside, numbers + LARGEST, 0))
    missed = np.flatnonzero(~inside | (packed >> 16 == 0))
    escaped = numbers[missed]
    packed[missed] = plan.table.packed.take(index[missed] + ESCAPES[0] + (escaped + 1) % 2)
    return Symbols(packed=packed, low=low, escaped=escaped)


def split(num_values: int, num_lanes: int) -> list[tuple[slice, int]]:
    """(values, lanes) of the main part and of the tail."""
    tail = num_values // TAIL if num_lanes >= LANES_WITH_TAIL else 0
    parts = [(slice(0, num_values - tail), num_lanes)]
    if tail:
        parts.append((slice(num_values - tail, num_values), tail_lanes(num_lanes)))
    return parts


def tail_lanes(num_lanes: int) -> int:
    """Lanes of the tail behind a main part of `num_lanes`."""
    return max(1, num_lanes // 16)


def _blocks(part: slice, lanes: int, most: int) -> list[slice]:
    """Whole steps of a part, about `most` values at once."""
    size = max(1, most // lanes) * lanes
    return [slice(at, min(at + size, part.stop)) for at in range(part.start, part.stop, size)]


def encode_symbols(symbols: Symbols, num_lanes: int) -> np.ndarray:
    """The words (uint16) of all symbols' table entries."""
    words = np.empty(0, dtype=np.uint16)
    for part, lanes in reversed(split(symbols.packed.size, num_lanes)):
        words = encode_lanes(symbols.packed[part], lanes, words)
    return words


def decode_values(
    words: np.ndarray,
    low: np.ndarray,
    escaped: np.ndarray,
    seed: bytes,
    plan: Plan,
    num_lanes: int,
    gains: np.ndarray,
) -> np.ndarray:
    """The values (float32) from their words, dropped bits and numbers beyond the table.

    Beside the values only pieces of them are held at a time.

    Args:
        words: As `encode_symbols` gave them, uint16.
        low: As in `Symbols`, any integer type; its length is that of the plan.
        escaped: As in `Symbols`, without their lowest bit, which the symbols tell.
        seed: Of the dither.
        plan: As for `quantise`.
        num_lanes: As for `quantise`.
        gains: What each tensor's values are multiplied by, float64.

    Raises:
        ValueError: Words or escaped numbers are too few or too many.
    """
    pieces = _Pieces(plan, DitherStream(seed), low, escaped, plan.steps * gains)
    values = np.empty(plan.num_values, dtype=np.float32)
    for part, lanes in split(plan.num_values, num_lanes):
        decoder = LaneDecoder(words, lanes, plan.table)
        for block in _blocks(part, lanes, _VALUES_AT_ONCE):
            state = np.zeros(lanes, dtype=np.int64)
            for piece in _blocks(block, lanes, _PIECE):
                pieces.decode(piece, decoder, state, values[piece])
        words = decoder.finish()
    if words.any():
        raise ValueError("there are coded words behind the last symbol")
    pieces.finish()
    return values


class _Pieces:
    """Values from their symbols, piece by piece, with what comes beside the symbols."""

    def __init__(
        self,
        plan: Plan,
        dither: DitherStream,
        low: np.ndarray,
        escaped: np.ndarray,
        scales: np.ndarray,
    ) -> None:
        self._plan, self._dither, self._scales = plan, dither, scales
        self._low, self._escaped = low, escaped
        self._num_escaped = escaped.size
        self._num_missed = 0
        self._any_dropped = bool(plan.dropped.any())

    def decode(
        self, where: slice, decoder: LaneDecoder, state: np.ndarray, out: np.ndarray
    ) -> None:
        """The next piece of values into `out` (float32); moves the trellis's `state` on."""
        size = where.stop - where.start
        dither, of_value = self._dither.take(size), self._plan.tensor_of(where)
        dropped, low = self._dropped(of_value)
        branches = _branches(dither, self._plan.first_rows.take(of_value), dropped, low)
        symbols = np.empty(size, dtype=np.int64)
        odd = np.zeros(size, dtype=np.int64)
        _decode_steps(decoder, branches, state, self._plan.num_states, symbols, odd)
        exact = self._numbers(symbols).astype(np.float64)
        if dropped.size:
            exact *= (1 << dropped).astype(np.float64)
            exact += low
        odd *= _HALF_STEP
        odd += dither
        odd &= _FRACTION_MASK
        exact += odd * 2.0**-_FRACTION_BITS
        exact *= self._scales.take(of_value)
        with np.errstate(all="ignore"):
            out[...] = exact

    def _dropped(self, of_value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many bits were dropped of each value, and which; nothing if of none."""
        if not self._any_dropped:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        dropped = self._plan.dropped.take(of_value)
        low = np.zeros(of_value.size, dtype=np.int64)
        where = np.flatnonzero(dropped)
        low[where] = self._low[: where.size]
        self._low = self._low[where.size :]
        return dropped, low

    def _numbers(self, symbols: np.ndarray) -> np.ndarray:
        """The whole numbers of symbols, those beyond the table in their order."""
        numbers = symbols - LARGEST
        beyond = np.flatnonzero(symbols >= ESCAPES[0])
        self._num_missed += beyond.size
        known = beyond[: self._escaped.size]
        numbers[known] = 2 * self._escaped[: known.size] + symbols[known] % 2
        self._escaped = self._escaped[known.size :]
        return numbers

    def finish(self) -> None:
        """Raises ValueError unless as many numbers beyond the table came as symbols of them."""
        if self._num_missed != self._num_escaped:
            raise ValueError(
                f"{self._num_escaped} numbers beyond the table, {self._num_missed} are asked for"
            )


class _Branches(NamedTuple):
    """What a value's symbol depends on, for an even and an odd state: (values * 2,), int64."""

    rows: np.ndarray  # of the table, times 2^13
    flips: np.ndarray  # added to the symbol, its lowest bit is bit 1 of the trellis's number
    masks: np.ndarray | None  # taken of the symbol before; None: all ones


def _branches(
    dither: np.ndarray, first_rows: np.ndarray, dropped: np.ndarray, low: np.ndarray
) -> _Branches:
    place = dither[:, None] + np.array([0, _HALF_STEP])
    rows = (place & _FRACTION_MASK) >> _BIN_SHIFT
    rows += first_rows[:, None]
    rows <<= PRECISION
    flips = place >> _FRACTION_BITS
    if not dropped.size:
        return _Branches(rows.reshape(-1), flips.reshape(-1), None)
    # Where bits are dropped the lowest of them decides, not the symbol's.
    flips += low[:, None]
    return _Branches(rows.reshape(-1), flips.reshape(-1), np.repeat(dropped == 0, 2).astype(int))


def _decode_steps(
    decoder: LaneDecoder,
    branches: _Branches,
    state: np.ndarray,
    num_states: int,
    symbols: np.ndarray,
    odd: np.ndarray,
) -> None:
    """Decodes some steps into `symbols` and the states' parities `odd`; moves `state` on."""
    num_lanes = state.size
    following = next_states(num_states) if num_states > 1 else None
    pairs = 2 * np.arange(num_lanes)
    for begin in range(0, symbols.size, num_lanes):
        stop = min(begin + num_lanes, symbols.size)
        pair = slice(2 * begin, 2 * stop)
        if following is None:
            symbols[begin:stop] = decoder.step(branches.rows[pair][::2])
            continue
        current = state[: stop - begin]
        parity = current & 1
        place = pairs[: stop - begin] + parity
        found = decoder.step(branches.rows[pair].take(place))
        symbols[begin:stop] = found
        odd[begin:stop] = parity
        if branches.masks is not None:
            found &= branches.masks[pair].take(place)
        found += branches.flips[pair].take(place)
        found &= 1
        current += current
        current += found
        following.take(current, out=current, mode="clip")
