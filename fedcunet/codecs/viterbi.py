"""Trellis-coded quantisation over many lanes: Ungerboeck's codes, searched by Viterbi's algorithm.

Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (IEEE
Trans. Communications 1990); the codes are those of Ungerboeck, "Channel coding with
multilevel/phase signals" (IEEE Trans. Information Theory 1982, table I).

Whole numbers k are split by k mod 4 into four subsets. In a state s only numbers of parity s mod 2
are allowed, and bit 1 of k decides on the next state. So a number costs as much as one of a grid
twice as coarse, but the error is that of a better quantiser: 1.09 dB lower with 8 states, 1.22 dB
with 32, 1.35 dB with 256, of 1.53 dB that any quantiser can gain.

A lane is a trellis of its own, beginning in state 0; numpy works on all lanes at once.
"""

import functools
from collections.abc import Callable

import numpy as np

# Parity-check polynomials (h0, h1) by number of states.
_POLYNOMIALS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
NUM_STATES = tuple(_POLYNOMIALS)
_VALUES_AT_ONCE = 2**16


@functools.cache
def next_states(num_states: int) -> np.ndarray:
    """The next state (int64) at 2 * state + bit 1 of the number."""
    h0, h1 = _POLYNOMIALS[num_states]
    state, bit = np.divmod(np.arange(2 * num_states), 2)
    following: np.ndarray = (state >> 1) ^ (state % 2 * (h0 >> 1)) ^ (bit * (h1 >> 1))
    return following


@functools.cache
def _back_steps(num_states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of a state's decision; and, at 2 * state + decision, the former state and the subset."""
    h0, h1 = (polynomial >> 1 for polynomial in _POLYNOMIALS[num_states])
    half = num_states // 2
    parity, low = np.divmod(np.arange(num_states), half)
    # The former state without its parity: in the half-states' numbers, by the first way and second.
    first = low ^ (parity * (h0 & (half - 1)))
    former = np.stack([2 * first + parity, 2 * (first ^ h1) + parity], axis=1)
    subset = parity[:, None] + np.array([0, 2])
    return parity * half + first, former.reshape(-1), subset.reshape(-1).astype(np.uint8)


def _mirrored(array: np.ndarray, mask: int, num_axes: int) -> np.ndarray:
    """A view with index j of the first axes (of length 2 each) in the place of index j ^ mask."""
    reverse, forward = slice(None, None, -1), slice(None)
    turned = [reverse if mask >> (num_axes - 1 - axis) & 1 else forward for axis in range(num_axes)]
    view: np.ndarray = array[tuple(turned)]
    return view


class _Search:
    """Costs of the best ways into each state, lane by lane, and the step that extends them.

    A state is 2j + p: parity p, half-state j. From it lead two branches, by bit 1 of the number
    (b): into state (p, j ^ b·h1 ^ p·h0), highest bit first. So a new state has two candidates,
    with b = 0 and 1, that lie in mirrored places of the same array.
    """

    def __init__(self, num_states: int, num_lanes: int) -> None:
        h0, h1 = (polynomial >> 1 for polynomial in _POLYNOMIALS[num_states])
        half, num_axes = num_states // 2, num_states.bit_length() - 2
        self._cost_JPL = np.full((half, 2, num_lanes), 1e9, dtype=np.float32)
        self._cost_JPL[0, 0] = 0
        self._branch_JBPL = np.empty((half, 2, 2, num_lanes), dtype=np.float32)
        cube = (2,) * num_axes
        branch = self._branch_JBPL.reshape(*cube, 2, 2, num_lanes)
        self._first = [branch[..., 0, p, :] for p in (0, 1)]
        self._second = [_mirrored(branch[..., 1, p, :], h1, num_axes) for p in (0, 1)]
        by_parity = self._cost_JPL.reshape(2, half, num_lanes)
        self._next = [
            by_parity[0].reshape(*cube, num_lanes),
            _mirrored(by_parity[1].reshape(*cube, num_lanes), h0 & (half - 1), num_axes),
        ]
        self._cube = cube

    def step(self, distance_BPL: np.ndarray, decision_SL: np.ndarray) -> None:
        """Adds squared distances to the subsets (subset 2b + p); notes which way was better."""
        np.add(self._cost_JPL[:, None], distance_BPL, out=self._branch_JBPL)
        decision = decision_SL.reshape(2, *self._cube, -1)
        for p in (0, 1):
            np.less(self._second[p], self._first[p], out=decision[p])
        for p in (0, 1):
            np.minimum(self._second[p], self._first[p], out=self._next[p])

    def best_states(self) -> np.ndarray:
        """The state of least cost in each lane (int64)."""
        num_lanes = self._cost_JPL.shape[2]
        states: np.ndarray = self._cost_JPL.reshape(-1, num_lanes).argmin(axis=0)
        return states


def periodic_distances(z_TL: np.ndarray) -> np.ndarray:
    """Squared distance (T, 2, 2, L) to the nearest number of each subset 2b + p."""
    distance = np.empty((z_TL.shape[0], 2, 2, z_TL.shape[1]), dtype=np.float32)
    for subset in range(4):
        rest = z_TL - np.float32(subset)
        rest -= 4 * np.rint(rest * np.float32(0.25))
        np.multiply(rest, rest, out=distance[:, subset >> 1, subset & 1])
    return distance


def search(
    z_TL: np.ndarray,
    num_states: int,
    distances: Callable[[np.ndarray], np.ndarray] = periodic_distances,
) -> np.ndarray:
    """The numbers' subsets (T, L), uint8, on the way of least squared error through the trellis.

    Args:
        z_TL: float32, T values in each of L lanes.
        num_states: One of NUM_STATES.
        distances: Gives the squared distances of some steps' values to the nearest number of each
            subset; as it stands, numbers are all whole numbers, their subset k mod 4.
    """
    num_steps, num_lanes = z_TL.shape
    forward = _Search(num_states, num_lanes)
    decision_TSL = np.empty((num_steps, num_states, num_lanes), dtype=bool)
    piece = max(1, _VALUES_AT_ONCE // max(num_lanes, 1))
    for begin in range(0, num_steps, piece):
        for offset, distance in enumerate(distances(z_TL[begin : begin + piece])):
            forward.step(distance, decision_TSL[begin + offset])
    row, former, subset_of = _back_steps(num_states)
    row = row * num_lanes
    lane = np.arange(num_lanes)
    state = forward.best_states()
    subset_TL = np.empty((num_steps, num_lanes), dtype=np.uint8)
    flat = decision_TSL.reshape(num_steps, num_states * num_lanes).view(np.uint8)
    for step in range(num_steps - 1, -1, -1):
        index = 2 * state
        index += flat[step].take(row.take(state) + lane)
        subset_of.take(index, out=subset_TL[step])
        state = former.take(index)
    return subset_TL
