"""Entropy coding over many lanes: range asymmetric numeral systems with integer tables.

Duda, "Asymmetric numeral systems" (2013, https://arxiv.org/abs/1311.2540); the interleaving of
lanes over one stream of words is Giesen's ("Interleaved entropy coders", 2014,
https://arxiv.org/abs/1402.3392). Here each lane is an element of a numpy vector, so that a step
codes one symbol in every lane, and each lane may use another row of the table.

All arithmetic is on whole numbers below 2^45: the same bytes give the same symbols anywhere.

A state is a number in [2^16, 2^32), from which 16 bits are given off or taken up at a time. The
states with which encoding begins are what decoding ends with: 16 bits each that are free to carry
other data. `encode_lanes` takes such data and `LaneDecoder.finish` gives them back. Large states
are rarer than small ones, as 1/state; their upper halves are written as lengths and the bits below
the highest (Elias 1975, as in escapes.py). So a lane costs about 3.5 bits, not 24.
"""

from dataclasses import dataclass

import numpy as np

from fedcunet.bits import field_bits, fields_of, pack_codes, unpack_codes

PRECISION = 13  # bits: the frequencies of a row sum to 2^13
WIDTH = 128  # columns of a table
_TOTAL = 1 << PRECISION
_LOW = 1 << 16
_LENGTH_BITS = 4  # of the upper half of a state


@dataclass(frozen=True, slots=True)
class FrequencyTable:
    """Rows of symbol frequencies, and what coding looks up in them.

    Attributes:
        frequency: (rows, WIDTH) int64, each row summing to 2^13. A symbol of frequency 0 cannot
            be coded.
        packed: (rows * WIDTH,) int64: frequency * 2^16 + sum of the frequencies before.
        slots: (rows * 2^13,) uint8: the symbol of each slot of a row.
    """

    frequency: np.ndarray
    packed: np.ndarray
    slots: np.ndarray

    @classmethod
    def of_weights(cls, weights: np.ndarray) -> "FrequencyTable":
        """The table nearest to non-negative `weights` (rows, up to WIDTH), float64.

        Weights are rounded to a multiple of their sum by 2^-13, and what is missing or too much
        goes to the most frequent symbol. Only products, quotients and sums in a fixed order are
        used, so that the table does not depend on the machine.
        """
        num_rows, num_symbols = weights.shape
        total = np.cumsum(weights, axis=1)[:, -1:]
        frequency = np.zeros((num_rows, WIDTH), dtype=np.int64)
        frequency[:, :num_symbols] = np.floor(weights / total * _TOTAL + 0.5)
        largest = frequency.argmax(axis=1)
        frequency[np.arange(num_rows), largest] += _TOTAL - frequency.sum(axis=1)
        start = np.cumsum(frequency, axis=1) - frequency
        symbols = np.tile(np.arange(WIDTH, dtype=np.uint8), num_rows)
        return cls(
            frequency=frequency,
            packed=((frequency << 16) | start).reshape(-1),
            slots=np.repeat(symbols, frequency.reshape(-1)),
        )


def encode_lanes(packed: np.ndarray, num_lanes: int, carried: np.ndarray) -> np.ndarray:
    """Words (uint16) of the symbols whose entries of `FrequencyTable.packed` are given.

    Args:
        packed: Entries of the symbols (int64): step by step, in each step one for every lane, in
            the last step perhaps fewer.
        num_lanes: Lanes of a step.
        carried: Words (uint16) that the decoder gets back behind its symbols.

    Returns:
        The lanes' last states (`_state_words`), then the words in the order of decoding, then what
        of `carried` found no place in the lanes' first states.
    """
    # Whole numbers below 2^45 in float64, which numpy divides and rounds faster than integers.
    state = np.full(num_lanes, _LOW, dtype=np.float64)
    inside = carried[:num_lanes]
    state[: inside.size] += inside
    given: list[np.ndarray] = []
    # Pieces of whole steps that stay in the cache.
    piece = max(1, 2**14 // num_lanes) * num_lanes
    for begin in range((packed.size - 1) // piece * piece, -1, -piece):
        _encode_piece(packed[begin : begin + piece], state, given)
    states = _state_words(state.astype(np.int64))
    return np.concatenate([states, *reversed(given), carried[num_lanes:]]).astype(np.uint16)


def _state_words(state: np.ndarray) -> np.ndarray:
    """States (int64) as words (uint16): the bit lengths of their upper halves less 1 in 4 bits
    each, the bits below the highest of each, zeros to the end of a word, then the lower halves."""
    high = state >> 16
    lengths = np.frexp(high.astype(np.float64))[1].astype(np.int64) - 1
    nibbles = field_bits(lengths, np.full_like(lengths, _LENGTH_BITS))
    bits = np.concatenate([nibbles, field_bits(high, lengths)])
    packed = pack_codes(np.pad(bits, (0, -bits.size % 16)), 1)
    return np.concatenate([packed.view("<u2").astype(np.uint16), state & 0xFFFF])


def _read_states(words: np.ndarray, num_lanes: int) -> tuple[np.ndarray, int]:
    """The states (int64) of `_state_words`, and how many words they took.

    Raises:
        ValueError: The words are too few, or there are bits between the last and a word's end.
    """
    most = -(-(_LENGTH_BITS + 15) * num_lanes // 16)
    packed = words[:most].astype("<u2").view(np.uint8)
    bits = unpack_codes(packed, bits=1, count=8 * packed.size).astype(np.int64)
    nibbles = bits[: _LENGTH_BITS * num_lanes]
    lengths = fields_of(nibbles, np.full(nibbles.size // _LENGTH_BITS, _LENGTH_BITS))
    num_bits = _LENGTH_BITS * num_lanes + int(lengths.sum())
    num_words = -(-num_bits // 16)
    if lengths.size < num_lanes or words.size < num_words + num_lanes:
        raise ValueError(f"{words.size} words hold no states of {num_lanes} lanes")
    if bits[num_bits : 16 * num_words].any():
        raise ValueError("there are bits behind the lanes' states")
    high = (1 << lengths) + fields_of(bits[_LENGTH_BITS * num_lanes : num_bits], lengths)
    low = words[num_words : num_words + num_lanes].astype(np.int64)
    return (high << 16) | low, num_words + num_lanes


def _encode_piece(packed: np.ndarray, state: np.ndarray, given: list[np.ndarray]) -> None:
    """Takes some steps' symbols into `state` (float64), appending to `given` what it gives off."""
    num_lanes = state.size
    frequency = (packed >> 16).astype(np.float64)
    inverse = 1 / frequency
    bound = frequency * (_LOW * _LOW / _TOTAL)
    growth = _TOTAL - frequency
    start = (packed & 0xFFFF).astype(np.float64)
    buffer = np.empty(num_lanes)
    for begin in range((packed.size - 1) // num_lanes * num_lanes, -1, -num_lanes):
        stop = min(begin + num_lanes, packed.size)
        part, quotient = state[: stop - begin], buffer[: stop - begin]
        over = (part >= bound[begin:stop]).nonzero()[0]
        if over.size:
            large = part[over]
            kept = np.floor(large * (1 / _LOW))
            given.append(large - kept * _LOW)
            part[over] = kept
        # The quotient floor(state / frequency), exactly: no true one lies within 2^-13 below a
        # whole number, and the product is off by less than 2^-19.
        np.multiply(part, inverse[begin:stop], out=quotient)
        quotient += 2.0**-15
        np.floor(quotient, out=quotient)
        quotient *= growth[begin:stop]
        part += quotient
        part += start[begin:stop]


class LaneDecoder:
    """Decodes one symbol per lane and step from the words of `encode_lanes`."""

    def __init__(self, words: np.ndarray, num_lanes: int, table: FrequencyTable) -> None:
        """Raises ValueError if there are fewer words than the lanes' states take."""
        self._words = words.astype(np.int64)
        self._state, self._position = _read_states(words, num_lanes)
        self._packed, self._slots = table.packed, table.slots

    def step(self, rows: np.ndarray) -> np.ndarray:
        """The next symbols (int64) of the first lanes, `rows` (int64) being 2^13 * table row.

        Raises:
            ValueError: The words have come to an end.
        """
        state = self._state[: rows.size]
        slot = state & (_TOTAL - 1)
        # Widened at once: numpy is slow where types are mixed.
        symbols: np.ndarray = self._slots.take(rows + slot).astype(np.int64)
        packed = self._packed.take((rows >> (PRECISION - 7)) + symbols)
        state >>= PRECISION
        state *= packed >> 16
        state += slot
        state -= packed & 0xFFFF
        low = (state < _LOW).nonzero()[0]
        if low.size:
            taken = self._words[self._position : self._position + low.size]
            if taken.size < low.size:
                raise ValueError("the coded words end before the symbols do")
            self._position += low.size
            state[low] = (state[low] << 16) | taken
        return symbols

    def finish(self) -> np.ndarray:
        """The words (uint16) that `encode_lanes` carried, zeros behind them where lanes were free.

        Raises:
            ValueError: The states are not those with which an encoder begins.
        """
        if (self._state >> 16 != 1).any():
            raise ValueError("the coded words do not end as an encoder began")
        rest = self._words[self._position :]
        return np.concatenate([self._state & 0xFFFF, rest]).astype(np.uint16)
