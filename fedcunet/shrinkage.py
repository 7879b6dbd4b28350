"""The mean of coded updates, shortened by what coding is known to have added to it.

The mean of unbiased updates is the mean that the clients meant plus noise, whose variance follows
from what was decoded: the steps, or the scales. With weights w_i that sum to 1 and a sum of squared
errors V_i of a tensor, the noise in its mean is V = sum w_i²·V_i. Of all multiples of the mean y
the least squared error has Wiener's, S/(S + V) with S the energy of what was meant; S + V is
estimated by ‖y‖². With d - 2 in the place of d, the tensor's number of values, that is the
positive-part estimator of James and Stein ("Estimation with Quadratic Loss", Fourth Berkeley
Symposium 1961, section 2; Baranchik, Stanford report 51, 1964), for d > 2 never worse than y itself
where errors are Gaussian:

    max(0, 1 - (d - 2)/d·V/‖y‖²)·y
"""

import numpy as np

from fedcunet.aggregation import statistics_mask
from fedcunet.codecs.base import sum_of_squares
from fedcunet.layout import Layout


class Shrinkage:
    """The noise in the mean of a round's updates, a number a tensor.

    BatchNorm statistics are left as they are: they are measurements, no steps.

    Args:
        layout: names and shapes of the vector's tensors.
    """

    def __init__(self, layout: Layout) -> None:
        self._lengths, self._is_statistic_N = layout.lengths, statistics_mask(layout)
        self._noise_T = np.zeros(len(layout.lengths))

    def add(self, noise_T: np.ndarray, weight: float) -> None:
        """Counts an update: `Admitted.noise`, and its weight in the sum of all."""
        self._noise_T += weight**2 * noise_T

    def shrink(self, mean_N: np.ndarray, weight: float) -> np.ndarray:
        """Shrinks the mean (N,), float32, in place; returns it.

        Args:
            mean_N: the mean of the updates that were added.
            weight: the sum of their weights.
        """
        start = 0
        for length, noise in zip(self._lengths, self._noise_T / weight**2, strict=True):
            part = mean_N[start : start + length]
            if noise and length > 2 and not self._is_statistic_N[start]:
                part *= np.float32(shrinkage_factor(noise, sum_of_squares(part), length))
            start += length
        return mean_N


def shrinkage_factor(noise: float, energy: float, length: int) -> float:
    """The factor of a mean of `length` values, from the expected noise and its own energy."""
    return max(0.0, 1 - (length - 2) / length * noise / energy) if energy else 0.0
