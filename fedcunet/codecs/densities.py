"""Densities that values are coded by: eight shapes from flat to heavy-tailed, as integer tables.

All shapes are Pearson's types II and VII, (1 ± z²/b)^(±power), whose powers are products and
square roots: a table needs no exponential, whose last digit would depend on the machine, and the
same shape and scale give the same frequencies anywhere.

A value x is quantised with subtractive dither to steps of its own (trellis.py): y = x + e is a
whole number plus a known fraction v, in units of the step, and e is independent of x. So the
probability of the whole number m is f(m + v), f being the density of x convolved with that of e.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcunet.codecs.entropy import PRECISION, FrequencyTable

# A table's symbols are the whole numbers -60 to 60, and two that stand for an even and an odd
# number that the table does not hold.
LARGEST = 60
ESCAPES = (2 * LARGEST + 1, 2 * LARGEST + 2)
NUM_BINS = 16  # of the fraction v

# Deviations in steps, by class: eighths of an octave from 1/16 on. From 8 steps on whole numbers
# are coded without their lowest bits, which are as good as random.
NUM_CLASSES = 176
_EIGHTHS = [1.0]
for _ in range(7):
    _EIGHTHS.append(_EIGHTHS[-1] * 1.0905077326652577)  # 2^(1/8)


@dataclass(frozen=True, slots=True)
class Shape:
    """A symmetric density (1 + sign·(deviation·z)²/base)^(-sign·power), z in deviations.

    "Deviation" is that of the Gaussian with the same mean of sqrt|x|, which also exists where the
    variance does not.

    Attributes:
        power: 1.5 or a product of halves that squaring reaches.
        base: See the formula.
        sign: -1 for bounded support (type II), 1 for heavy tails (type VII, Student's t).
        deviation: Of the density with its own unit of scale.
        height: At 0, for a unit deviation.
        variance: For a unit deviation; of the heaviest, whose variance is infinite, a stand-in.
        ratio: (mean sqrt|x|)² / mean|x|, by which the shape of values is recognised.
    """

    power: float
    base: float
    sign: int
    deviation: float
    height: float
    variance: float
    ratio: float

    def density(self, z: np.ndarray) -> np.ndarray:
        """At `z` (float64, in deviations)."""
        square = (z * self.deviation) * (z * self.deviation) / self.base
        base = np.maximum(1 - square, 0) if self.sign < 0 else 1 / (1 + square)
        result, factor, power = np.ones_like(base), base, int(self.power)
        if self.power != power:
            result = np.sqrt(base)
        while power:
            if power % 2:
                result = result * factor
            factor, power = factor * factor, power // 2
        density: np.ndarray = self.height * result
        return density


SHAPES = (
    Shape(1, 1, -1, 0.4830489990512066, 0.36228674928840493, 0.8571318, 0.8707483),
    Shape(4, 1, -1, 0.3121168230860385, 0.384049997156649, 0.9331962, 0.8573325),
    Shape(2**16, 2**17, 1, 1.0, 0.39894228040143637, 1.0, 0.8472131),  # Gaussian
    Shape(8, 15, 1, 1.0440359651362903, 0.4096308130400169, 1.0585637, 0.8394171),
    Shape(4, 7, 1, 1.1008010496948069, 0.4237989931996865, 1.1553415, 0.8283496),
    Shape(3, 5, 1, 1.148576161434247, 0.4360071946510814, 1.2633659, 0.8181231),
    Shape(2, 3, 1, 1.281143907381074, 0.4708877702218441, 1.8277864, 0.7853982),
    Shape(1.5, 2, 1, 1.501646094680325, 0.5309120682453771, 4.0, 0.7177700),
)
GAUSSIAN_ROOT_MEAN = 0.8221789586624584  # mean of sqrt|x| of a Gaussian of deviation 1


def steps_of_class(number: int) -> float:
    """Deviation in steps of class `number` from 0 to NUM_CLASSES - 1."""
    return _EIGHTHS[number % 8] * 2.0 ** (number // 8 - 4)


@functools.cache
def class_deviations() -> np.ndarray:
    """`steps_of_class` of all classes (float64)."""
    return np.array([steps_of_class(number) for number in range(NUM_CLASSES)])


def dropped_bits(number: int) -> int:
    """Lowest bits of a whole number that a class codes as they are."""
    return max(0, -(-(number - 56) // 8))


def error_density(num_states: int) -> np.ndarray:
    """Density of the quantisation error in 32 cells of 1/16 step from -1 to 1 (float64).

    Flat within half a step for the scalar quantiser. For trellises a fit, (1 - e²)^6, to the
    errors of 4 to 256 states, whose variances are 0.066 to 0.061.
    """
    middle = (np.arange(32) + 0.5) / 16 - 1
    if num_states == 1:
        weights = np.where(np.abs(middle) < 0.5, 1.0, 0.0)
    else:
        cube = (1 - middle * middle) * (1 - middle * middle) * (1 - middle * middle)
        weights = cube * cube
    density: np.ndarray = weights / np.cumsum(weights)[-1]
    return density


def _convolved(deviation: float, shape: Shape, num_states: int) -> np.ndarray:
    """Probabilities (NUM_BINS, 121) of whole numbers where the error's density matters."""
    # y = m + (bin + 1/2)/16 and the cells' middles both lie on odd multiples of 1/32: their
    # differences are multiples of 1/16.
    grid = np.arange(-16 * (LARGEST + 1), 16 * (LARGEST + 2) + 1)
    density = shape.density(grid / 16 / deviation) / deviation
    length = NUM_BINS * (2 * LARGEST + 1)
    result = np.zeros(length)
    for cell, weight in enumerate(error_density(num_states)):
        begin = 32 - cell
        result = result + weight * density[begin : begin + length]
    return result.reshape(2 * LARGEST + 1, NUM_BINS).T


def class_weights(number: int, shape: int, num_states: int) -> np.ndarray:
    """Weights (NUM_BINS, 123) of the symbols of a class, by the bin of the fraction (float64)."""
    deviation, form = steps_of_class(number), SHAPES[shape]
    numbers = np.arange(-LARGEST, LARGEST + 1)
    if deviation < 2:
        found = _convolved(deviation, form, num_states)
        found = found / np.cumsum(found, axis=1)[:, -1:]
    else:
        # A convolution with the narrow error widens the density and leaves its form.
        dropped = dropped_bits(number)
        wide = np.sqrt(deviation * deviation + 1 / 15) / 2.0**dropped
        bins = (np.arange(NUM_BINS)[:, None] + 0.5) / NUM_BINS
        found = form.density((numbers + (bins if dropped == 0 else 0.5 + 0 * bins)) / wide) / wide
    # What is too rare for a frequency of its own is left to the escapes.
    weights = np.zeros((NUM_BINS, 2 * LARGEST + 3))
    weights[:, :-2] = np.where(found < 2.0 ** -(PRECISION + 1), 0, found)
    rest = 1 - np.cumsum(weights[:, :-2], axis=1)[:, -1:]
    weights[:, -2:] = np.maximum(0.5 * rest, 2.0**-PRECISION)
    return weights


@functools.lru_cache(maxsize=512)
def _cached_weights(number: int, shape: int, num_states: int) -> np.ndarray:
    return class_weights(number, shape, num_states)


def table_of(pairs: Sequence[tuple[int, int]], num_states: int) -> FrequencyTable:
    """The table of (class, shape) pairs: NUM_BINS rows for each, in order; one row for none."""
    if not pairs:
        return FrequencyTable.of_weights(np.ones((1, 1)))
    rows = [_cached_weights(number, shape, num_states) for number, shape in pairs]
    return FrequencyTable.of_weights(np.concatenate(rows))


def recognised_shapes(ratio: np.ndarray) -> np.ndarray:
    """The shape whose (mean sqrt|x|)² / mean|x| is nearest to each `ratio` (int64)."""
    ratios = np.array([shape.ratio for shape in SHAPES])
    nearest: np.ndarray = np.abs(ratio[:, None] - ratios).argmin(axis=1)
    return nearest
