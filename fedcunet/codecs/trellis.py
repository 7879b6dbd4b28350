"""The entropy-coded, dithered trellis-coded quantiser: updates near the information limit.

Entropy-coded trellis-coded quantisation: Fischer and Wang (IEEE Trans. Information Theory 1992),
Kim and Fischer; with subtractive dither, so that errors are independent of the values, have mean
0, and are independent between clients whose seeds differ. docs/codecs.md has the whole design, the
format of the bytes and measured figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.codecs.allocation import Form, Statistics, Tensors, prediction_factors
from fedcunet.codecs.base import check_body, check_budget, check_vector, segment_lengths
from fedcunet.codecs.dithered import (
    LANES_WITH_TAIL,
    MAX_LANES,
    TAIL,
    DitherStream,
    Plan,
    Symbols,
    encode_symbols,
    quantise,
    tail_lanes,
)
from fedcunet.codecs.thinning import kept_values
from fedcunet.codecs.trellis_body import (
    HEAD_BYTES,
    Head,
    body_bytes,
    decode_body,
    plan_of,
    tensor_energies,
)

_TOLERANCE = 0.006  # of the budget
_TOLERATED_BITS = 32
_MAX_PILOTS, _MAX_PASSES = 12, 6  # two or three and one, unless a few large values carry all
# Of steps, the greatest value being 1/2 to 1.
_STEP_RANGE = (2.0**-36, 2.0**6)
# A pilot's lanes are short where values are few; long ones tell the rate more exactly.
_PILOT_VALUES, _PILOT_STEPS, _FEW_PILOT_STEPS = 2**16, 512, 64
# A lane costs about 3.5 bits; a step takes nearly as long with one lane as with `_SOME_LANES`.
_BITS_PER_LANE, _VALUES_PER_LANE = 1024, 1024
_SOME_LANES, _VALUES_PER_SOME_LANES = 64, 256
# One that carries nothing, because the last tensors have few bits, costs 16 bits more.
_BITS_PER_EMPTY_LANE = 8192


@dataclass(frozen=True, slots=True)
class TrellisCodec:
    """Values coded to a budget of bits: the mean over all values of the body, all counted.

    Attributes:
        name: In the table of codecs.
        form: How bits are shared out and whether the values are scaled (allocation.py).
        num_states: Of the trellis, 4 to 256: more are slower to encode and lose less; 1 for the
            scalar quantiser. Any decoder decodes all of them.
    """

    name: str
    form: Form
    num_states: int = 8
    min_bits: float = 0.25
    max_bits: float = 8
    budget: bool = True

    @property
    def unbiased(self) -> bool:
        return self.form != "wiener"

    def body_limits(
        self, *, length: int, bits: float, segments: Sequence[int] = ()
    ) -> tuple[int, int]:
        check_budget(self, bits)
        if not length:
            return 0, 0
        return HEAD_BYTES, int(1.01 * bits * length / 8) + HEAD_BYTES + 32 + 3 * len(segments)

    def encode(
        self,
        vector: np.ndarray,
        *,
        bits: float,
        seed: bytes,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> bytes:
        check_budget(self, bits)
        values = check_vector(vector)
        lengths = segment_lengths(values.size, segments)
        if not values.size:
            return b""
        factors = np.zeros(lengths.size, dtype=np.int64)
        if reference is not None:
            check_vector(vector, reference)
            factors = prediction_factors(values, reference, lengths)
            taken = np.repeat((factors / 16).astype(np.float32), lengths)
            values = check_vector(values - taken * reference)
        statistics = Statistics.of(values, lengths, factors)
        job = _Job(self, values, statistics, bits * values.size, seed, reference is not None)
        _, most = self.body_limits(length=values.size, bits=bits, segments=segments)
        return job.best_body(most)

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
        if not length:
            return np.empty(0, dtype=np.float32)
        budget = bits * length
        least = int(min(_most_lanes(length, budget), budget / _BITS_PER_EMPTY_LANE, MAX_LANES))
        return decode_body(body, lengths, seed, self.form, reference, least)

    def noise(
        self,
        body: bytes,
        decoded: np.ndarray,
        *,
        bits: float,
        segments: Sequence[int] = (),
        reference: np.ndarray | None = None,
    ) -> np.ndarray:
        """As of `KnowsNoise`, from the steps; of the unbiased forms."""
        lengths = segment_lengths(decoded.size, segments)
        if not decoded.size:
            return np.zeros(lengths.size)
        head = Head.of(body, lengths, self.form, reference is not None)
        factors = head.tensors.factor_values()
        energies = tensor_energies(decoded, lengths, factors, reference)
        return head.tensors.noise(head.scale, self.form, head.num_states, lengths, energies)


def _most_lanes(num_values: int, budget: float) -> float:
    """As many lanes as values can use and bits can pay for."""
    some = min(_SOME_LANES, num_values / _VALUES_PER_SOME_LANES)
    return min(budget / _BITS_PER_LANE, max(some, num_values / _VALUES_PER_LANE))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A vector quantised with some scale S."""

    scale: float
    tensors: Tensors
    even_class: int
    plan: Plan
    symbols: Symbols
    side: bytes  # what is said of the tensors
    num_bits: float  # of the whole body, to a few bytes


@dataclass(slots=True)
class _Bracket:
    """Between which scales the one lies that is looked for."""

    low: float  # has too many bits
    high: float  # has too few

    def narrow(self, scale: float, *, too_many: bool) -> None:
        """Takes in what was found."""
        if too_many:
            self.low = max(self.low, scale)
        else:
            self.high = min(self.high, scale)

    def inside(self, scale: float) -> float:
        """The scale, or the middle by the logarithm where it does not lie between."""
        return scale if self.low < scale < self.high else float(np.sqrt(self.low * self.high))


class _Job:
    """One vector on its way to bytes: finds the scale S that meets the budget."""

    def __init__(
        self,
        codec: TrellisCodec,
        values: np.ndarray,
        statistics: Statistics,
        budget: float,
        seed: bytes,
        has_reference: bool,
    ) -> None:
        self._codec, self._statistics = codec, statistics
        self._budget, self._has_reference, self._seed = budget, has_reference, seed
        self._dither = DitherStream(seed).take(values.size)
        # Brought to magnitudes up to 1, so that no step or quotient leaves float32's range.
        self._exponent = statistics.exponent
        self._values = np.ldexp(values, -self._exponent)
        least, most = _STEP_RANGE
        known = statistics.deviations[statistics.deviations > 0]
        if codec.form == "even" and known.size:  # S is the least of the steps, half for rounding
            least, most = least * known.min(), most / 2 * known.min() / known.max()
        self._range = (least, most)
        self._tolerance = max(_TOLERANCE * budget, _TOLERATED_BITS)
        self._tail_bits = self._predicted(self._scale_for(budget), 1 / TAIL)
        filled = self._tail_bits / 16 + budget / _BITS_PER_EMPTY_LANE
        most = _most_lanes(values.size, budget)
        self._num_lanes = int(np.clip(min(most, filled), 1, MAX_LANES))

    def best_body(self, most: int) -> bytes:
        """The body nearest to the budget, and never longer than `most` bytes."""
        scale, bracket = self._scale_for(self._budget), _Bracket(*self._range)
        for _ in range(_MAX_PILOTS):
            excess = self._pilot_excess(scale)
            if abs(self._predicted(scale) + excess - self._budget) <= self._tolerance / 2:
                break
            scale = self._next_scale(scale, excess, bracket)
        best = draft = self._draft(scale)
        bracket = _Bracket(*self._range)
        for _ in range(_MAX_PASSES):
            if self._miss(best) <= self._tolerance:
                break
            excess = draft.num_bits - self._predicted(draft.scale)
            draft = self._draft(self._next_scale(draft.scale, excess, bracket))
            best = min(best, draft, key=self._miss)
        body = self._body(best)
        while len(body) > most:
            best = self._draft(1.25 * best.scale)
            body = self._body(best)
            assert best.scale < 8 * self._range[1]
        return body

    def _next_scale(self, scale: float, excess: float, bracket: "_Bracket") -> float:
        """After one with so many bits above the prediction: the one that has the budget with them.

        Where the excess changes with S, as with values of which many are zero, that may lie on the
        far side of one that was tried: then the middle of what is left.
        """
        too_many = self._predicted(scale) + excess > self._budget
        bracket.narrow(scale, too_many=too_many)
        return bracket.inside(self._scale_for(self._budget - excess))

    def _miss(self, draft: _Draft) -> float:
        return abs(draft.num_bits - self._budget)

    def _predicted(self, scale: float, last: float = 1.0) -> float:
        codec = self._codec
        return self._statistics.predicted_bits(scale, codec.form, codec.num_states, last)

    def _scale_for(self, bits: float) -> float:
        """The scale for which `bits` are predicted, by bisection over its logarithm."""
        # Numbers stay below 2^40, and decoded values in the range of float32.
        low, high = np.log(self._range)
        for _ in range(40):
            middle = (low + high) / 2
            if self._predicted(float(np.exp(middle))) > bits:
                low = middle
            else:
                high = middle
        return float(np.exp(high))

    def _plan(self, scale: float) -> tuple[Tensors, int, Plan, np.ndarray]:
        """The tensors, the class of all, the plan of what is coded, and the values coded."""
        codec = self._codec
        tensors, even_class = self._statistics.tensors(scale, codec.form, codec.num_states)
        lengths = self._statistics.lengths
        counts, kept = kept_values(lengths, tensors.shares(codec.form), self._seed)
        values = self._values if kept is None else self._values[kept]
        return (
            tensors,
            even_class,
            plan_of(tensors, counts, scale, codec.form, codec.num_states),
            values,
        )

    def _pilot_excess(self, scale: float) -> float:
        """Bits above the prediction, measured on a part of the values in short, many lanes."""
        _, _, plan, values = self._plan(scale)
        stride = max(1, values.size // _PILOT_VALUES)
        chosen = values[::stride]
        num_steps = _PILOT_STEPS if chosen.size >= _PILOT_VALUES else _FEW_PILOT_STEPS
        num_lanes = max(1, chosen.size // num_steps)
        symbols = quantise(
            chosen, self._dither[: chosen.size], plan.of_value[::stride], plan, num_lanes
        )
        num_bits = symbols.num_bits * values.size / max(chosen.size, 1) + plan.num_low_bits
        return num_bits + 8 * HEAD_BYTES + self._lane_bits() - self._predicted(scale)

    def _lane_bits(self) -> float:
        """What lanes cost beyond the symbols, on average: 3.5 bits where they carry words."""
        if self._num_lanes < LANES_WITH_TAIL:
            return 19.5 * self._num_lanes
        empty = max(0.0, 16 * self._num_lanes - self._tail_bits)
        return 3.5 * self._num_lanes + empty + 19.5 * tail_lanes(self._num_lanes)

    def _draft(self, scale: float) -> _Draft:
        tensors, even_class, plan, values = self._plan(scale)
        symbols = quantise(
            values, self._dither[: values.size], plan.of_value, plan, self._num_lanes
        )
        side = tensors.to_bytes(self._statistics.lengths, self._codec.form, self._has_reference)
        num_bits = symbols.num_bits + plan.num_low_bits + 8 * (HEAD_BYTES + len(side))
        num_bits += self._lane_bits()
        return _Draft(scale, tensors, even_class, plan, symbols, side, num_bits)

    def _body(self, draft: _Draft) -> bytes:
        symbols, codec = draft.symbols, self._codec
        words = np.empty(0, dtype=np.uint16)
        if symbols.packed.size:
            words = encode_symbols(symbols, self._num_lanes)
        return body_bytes(
            scale=np.ldexp(draft.scale, self._exponent),
            form=codec.form,
            num_states=codec.num_states,
            num_lanes=self._num_lanes,
            has_reference=self._has_reference,
            even_class=draft.even_class,
            side=draft.side,
            words=words,
            symbols=symbols,
            plan=draft.plan,
        )
