"""Which tensor gets which quantisation step: one number S for all, and a class for each tensor.

With errors of variance D for a tensor of deviation σ, an unbiased codec needs ½·log2(1 + σ²/D)
bits a value. The sum of squared errors at a given number of bits is least where D·(D + σ²)/σ² is
the same for all tensors: D for those far above it, less for those below. With D = c·step² the step
then follows from the class alone, the deviation in steps ρ: it is S/sqrt(1 + c/ρ²). Of tensors
below ρ = 0.21, worth less than about half a bit a value, a share p of the values is coded at that
ρ (thinning.py). Then the error is σ²·((1 + c/ρ²)/p - 1) at p times the bits, and the same condition
makes p proportional to σ.

For a codec that scales by Wiener's factor σ²/(σ² + D) all steps are S, and tensors whose deviation
is below 1/16 of it get no bits at all: with error feedback they are held back until they exceed it.
For tensors of different units, such as BatchNorm's statistics, every tensor has the same ρ and a
step of its own (`even`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedcunet.codecs.base import reduce_segments
from fedcunet.codecs.densities import (
    GAUSSIAN_ROOT_MEAN,
    NUM_CLASSES,
    SHAPES,
    class_deviations,
    recognised_shapes,
    steps_of_class,
)
from fedcunet.codecs.rangecoder import RangeDecoder, RangeEncoder
from fedcunet.codecs.thinning import WHOLE

Form = Literal["unbiased", "wiener", "even"]
FORMS: tuple[Form, ...] = ("unbiased", "wiener", "even")

SCALAR_ERROR, TRELLIS_ERROR = 1 / 12, 0.0648  # c: variance of the error for a step of 1
_OCTAVE_PARTS = 8
_MAX_OCTAVES = 511  # of the steps of `even`, in eighths
# Of the greatest deviation: what is weaker still counts as this, or the steps of `even`, of which
# the least has to be coarse enough for the strongest tensor, would not reach that far.
_LEAST_DEVIATION = 2.0**-60
_FACTOR_STEPS = 16  # a factor of the prediction is a multiple of 1/16, below 2
_FACTOR_BITS = 5
_THINNED_CLASS = 14  # of the tensors of which only a share is coded, and of the least others
_THINNED_BITS = 6


def error_variance(num_states: int) -> float:
    """c: the error's variance for a step of 1, as both sides take it."""
    return SCALAR_ERROR if num_states == 1 else TRELLIS_ERROR


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What is said of each tensor beside its symbols; arrays int64 with one number a tensor.

    Attributes:
        coded: 1 where the tensor has symbols, 0 where it is all zeros (or taken for zeros).
        classes: Of deviation in steps; 0 where not coded.
        shapes: Of the density; 0 where not coded.
        octaves: Eighths of an octave by which the step exceeds S if `even`; if `unbiased`, those
            by which the share of values that are coded, and with it the step, is below 1.
        factors: Sixteenths of the reference that were taken away; 0 without a reference.
    """

    coded: np.ndarray
    classes: np.ndarray
    shapes: np.ndarray
    octaves: np.ndarray
    factors: np.ndarray

    def steps(self, scale: float, form: Form, num_states: int) -> np.ndarray:
        """The steps (float64) for S = `scale`, by operations that are exact on every machine."""
        if form == "wiener":
            return np.full(self.classes.size, scale)
        if form == "even":
            eighth = class_deviations()[:8] / steps_of_class(0)
            whole = np.ldexp(1.0, self.octaves // _OCTAVE_PARTS)
            even_values: np.ndarray = scale * (eighth[self.octaves % _OCTAVE_PARTS] * whole)
            return even_values
        ratio = class_deviations()[self.classes]
        error = error_variance(num_states)
        steps_values: np.ndarray = scale / np.sqrt(1 + error / (ratio * ratio)) / self._thinned()
        return steps_values

    def _thinned(self) -> np.ndarray:
        """By what the number of coded values is divided (float64)."""
        eighth = class_deviations()[:_OCTAVE_PARTS] / steps_of_class(0)
        thinned: np.ndarray = np.ldexp(
            eighth[self.octaves % _OCTAVE_PARTS], self.octaves // _OCTAVE_PARTS
        )
        return thinned

    def shares(self, form: Form) -> np.ndarray:
        """Of each tensor's values that are coded, in 1/65536 (int64)."""
        whole = WHOLE * self.coded
        if form != "unbiased":
            return whole
        shares: np.ndarray = np.rint(whole / self._thinned()).astype(np.int64)
        return shares

    def gains(self, form: Form, num_states: int) -> np.ndarray:
        """Factors (float64) of the decoded values: Wiener's, or one over the share coded."""
        if form != "wiener":
            inverse: np.ndarray = WHOLE / np.maximum(self.shares(form), 1)
            return inverse
        ratio = class_deviations()[self.classes]
        energy = ratio * ratio * np.array([shape.variance for shape in SHAPES])[self.shapes]
        gains_values: np.ndarray = energy / (energy + error_variance(num_states))
        return gains_values

    def noise(
        self, scale: float, form: Form, num_states: int, lengths: np.ndarray, energies: np.ndarray
    ) -> np.ndarray:
        """The expected sum of squared errors (float64) of each tensor's values, if unbiased.

        An error of variance D at each value that is coded, D = c·step². Where a share p is coded
        and divided by p, the error of a value x is D/p + x²·(1 - p)/p on average, and the mean
        square of what is decoded (D + x²)/p: so it is D and 1 - p of that mean square.

        No tensor is said to have more noise than energy, which is never less than the noise on
        average: so nobody claims noise that is not there.

        Args:
            scale: S.
            form: `unbiased` or `even`.
            num_states: Of the trellis.
            lengths: Of the tensors.
            energies: Sums of squares of the decoded tensors, without the prediction.
        """
        steps = self.steps(scale, form, num_states)
        left_out = 1 - self.shares(form) / WHOLE
        with np.errstate(all="ignore"):  # steps that no encoder makes
            noise = lengths * error_variance(num_states) * steps * steps + left_out * energies
        least: np.ndarray = np.where(self.coded, np.minimum(noise, energies), 0)
        return least

    def factor_values(self) -> np.ndarray:
        """What the reference of each tensor is multiplied by (float32)."""
        return (self.factors / _FACTOR_STEPS).astype(np.float32)

    def to_bytes(self, lengths: np.ndarray, form: Form, has_reference: bool) -> bytes:
        """The numbers by an adaptive coder, with models by the lengths' octaves."""
        coder = RangeEncoder()
        for index in np.flatnonzero(lengths).tolist():
            octave = int(lengths[index]).bit_length()
            if has_reference:
                coder.number(int(self.factors[index]), _FACTOR_BITS, "factor")
            coder.number(int(self.coded[index]), 1, ("coded", octave))
            if not self.coded[index]:
                continue
            coder.number(int(self.shapes[index]), 3, ("shape", octave))
            if form == "even":
                coder.number(int(self.octaves[index]), 9, ("octave", octave))
            else:
                coder.number(int(self.classes[index]), 8, ("class", octave))
            if form == "unbiased" and self.classes[index] == _THINNED_CLASS:
                coder.number(int(self.octaves[index]), _THINNED_BITS, ("thinned", octave))
        return coder.finish()

    @classmethod
    def from_bytes(
        cls, content: bytes, lengths: np.ndarray, form: Form, has_reference: bool, even_class: int
    ) -> "Tensors":
        """The inverse of `to_bytes`.

        Raises:
            ValueError: A class is none.
        """
        coder = RangeDecoder(content)
        numbers = np.zeros((5, lengths.size), dtype=np.int64)
        coded, classes, shapes, octaves, factors = numbers
        for index in np.flatnonzero(lengths).tolist():
            octave = int(lengths[index]).bit_length()
            if has_reference:
                factors[index] = coder.number(_FACTOR_BITS, "factor")
            coded[index] = coder.number(1, ("coded", octave))
            if not coded[index]:
                continue
            shapes[index] = coder.number(3, ("shape", octave))
            if form == "even":
                octaves[index] = coder.number(9, ("octave", octave))
                classes[index] = even_class
            else:
                classes[index] = coder.number(8, ("class", octave))
            if form == "unbiased" and classes[index] == _THINNED_CLASS:
                octaves[index] = coder.number(_THINNED_BITS, ("thinned", octave))
        if classes.max(initial=0) >= NUM_CLASSES:
            raise ValueError(f"class {classes.max()}, there are {NUM_CLASSES}")
        return cls(coded=coded, classes=classes, shapes=shapes, octaves=octaves, factors=factors)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Deviation (densities.py) and shape of each tensor, and the factor of its prediction.

    Deviations are those of the values times 2^-exponent, of which the greatest lies in [1/2, 1).
    """

    exponent: int
    lengths: np.ndarray
    deviations: np.ndarray  # 0 where all values are 0
    roots: np.ndarray  # of the mean squares
    shapes: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray, factors: np.ndarray) -> "Statistics":
        """Measures `values`, from which the prediction is taken away already."""
        magnitudes = np.abs(values)
        exponent = int(np.frexp(magnitudes.max(initial=0))[1])
        magnitudes = np.ldexp(magnitudes, -exponent)
        count = np.maximum(lengths, 1)
        mean = reduce_segments(np.add, magnitudes, lengths) / count
        mean_square = reduce_segments(np.add, magnitudes * magnitudes, lengths) / count
        root_mean = reduce_segments(np.add, np.sqrt(magnitudes, out=magnitudes), lengths) / count
        square = root_mean * root_mean
        ratio = square / np.where(mean > 0, mean, 1)
        deviations = square / GAUSSIAN_ROOT_MEAN**2
        least = deviations.max(initial=0) * _LEAST_DEVIATION
        return cls(
            exponent=exponent,
            lengths=lengths,
            deviations=np.where(deviations > 0, np.maximum(deviations, least), 0),
            roots=np.sqrt(mean_square),
            shapes=recognised_shapes(ratio),
            factors=factors,
        )

    def tensors(self, scale: float, form: Form, num_states: int) -> tuple[Tensors, int]:
        """What is said of the tensors for S = `scale`, and the class of all if `even`.

        For `even`, S is the step of a tensor of the least deviation.
        """
        error = error_variance(num_states)
        coded = self.deviations > 0
        safe = np.where(coded, self.deviations, 1)
        octaves = np.zeros(safe.size, dtype=np.int64)
        if form == "even":
            least = safe[coded].min() if coded.any() else 1.0
            octaves = np.rint(_OCTAVE_PARTS * np.log2(safe / least)).astype(np.int64)
            octaves = np.clip(octaves, 0, _MAX_OCTAVES) * coded
            ratio = np.full(safe.size, least / scale)
        elif form == "unbiased":
            # deviation/S = ρ²/sqrt(ρ² + c), solved for ρ².
            square = (safe / scale) ** 2
            ratio = np.sqrt((square + np.sqrt(square * square + 4 * error * square)) / 2)
            least_ratio = steps_of_class(_THINNED_CLASS)
            least = scale * least_ratio**2 / np.sqrt(least_ratio**2 + error)
            # A few large values, of which the deviation tells little, must not be left out: such
            # a tensor is coded whole at the least ratio, from which its share then goes down.
            greater = np.maximum(safe, self.roots)
            octaves = np.rint(_OCTAVE_PARTS * np.log2(least / greater)).astype(np.int64)
            octaves = np.clip(octaves, 0, 2**_THINNED_BITS - 1) * coded
            ratio = np.maximum(ratio, least_ratio)
        else:
            ratio = safe / scale
            coded = coded & (ratio >= steps_of_class(0))
        classes = np.rint(_OCTAVE_PARTS * np.log2(ratio / steps_of_class(0))).astype(np.int64)
        classes = np.clip(classes, 0, NUM_CLASSES - 1)
        if form == "unbiased":
            octaves = octaves * (classes == _THINNED_CLASS)
        shapes = self.shapes
        if np.unique(classes * 8 + shapes).size > 256:
            # A table for each pair would be too large: Gaussians have one for each class.
            shapes = np.full_like(shapes, 2)
        even_class = int(classes[0]) if form == "even" and classes.size else 0
        found = Tensors(
            coded=coded.astype(np.int64),
            classes=classes * coded,
            shapes=shapes * coded,
            octaves=octaves,
            factors=self.factors,
        )
        return found, even_class

    def predicted_bits(self, scale: float, form: Form, num_states: int, last: float = 1.0) -> float:
        """About the bits of the values for S = `scale`, for Gaussian values: of all that are coded,
        or of the `last` share of them."""
        found, _ = self.tensors(scale, form, num_states)
        steps = found.steps(scale, form, num_states)
        error = error_variance(num_states) * steps * steps
        bits = 0.5 * np.log2(1 + self.deviations * self.deviations / error)
        bits += 0.25 if num_states == 1 else 0.08
        counts = self.lengths * found.shares(form) / WHOLE
        stops = np.cumsum(counts)
        inside = np.clip(stops - (1 - last) * counts.sum(), 0, counts) if last < 1 else counts
        return float((bits * inside).sum())


def prediction_factors(
    values: np.ndarray, reference: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Sixteenths of `reference` (int64) that leave the least of each tensor of `values`.

    Zero where the prediction saves less than it costs to say so.
    """
    exact = reference.astype(np.float64)
    product = reduce_segments(np.add, values * exact, lengths)
    energy = reduce_segments(np.add, exact * exact, lengths)
    own = reduce_segments(np.add, values.astype(np.float64) ** 2, lengths)
    with np.errstate(all="ignore"):
        factor = np.nan_to_num(product / energy)
        gain = np.nan_to_num(product * product / (energy * own))
    sixteenths = np.clip(np.rint(factor * _FACTOR_STEPS), 0, 2**_FACTOR_BITS - 1)
    saved = -0.5 * np.log2(1 - np.minimum(gain, 1 - 1e-9)) * lengths
    return np.where((product > 0) & (saved > 8), sixteenths, 0).astype(np.int64)
