"""BatchNorm's running variances as they stand in a vector of a network's state: as logarithms.

Variances of one tensor lie far apart, behind unscaled weights at 1 or 2 bits between tenths and
thousands. An update codec with one scale for a tensor adds noise of one size to all of them. Of the
variances themselves that is more than the small ones have: they become zero, and what is divided
by them grows without limit. Of their logarithms it is a factor, and a variance stays one.

The logarithms lie on a grid that is coarser than a float32 variance and finer than any measurement,
so a vector that is put into a network comes out of it as it was. `EPS` is that of torch's
BatchNorm, below which a variance makes no difference.
"""

import numpy as np

VARIANCE_SUFFIX = ".running_var"  # of the names of such tensors
EPS = 1e-5
STEP = 2.0**-19  # of the grid; float32 has all its places up to 32
LOWEST, HIGHEST = (float(np.log((variance + EPS) / (1 + EPS))) for variance in (0, 1e9))


def to_logarithms(variance: np.ndarray) -> np.ndarray:
    """log((variance + EPS) / (1 + EPS)), float32, on the grid; what is negative counts as 0.

    The variance of a new BatchNorm, 1, has the logarithm 0.
    """
    return kept(np.log((np.maximum(variance, 0).astype(np.float64) + EPS) / (1 + EPS)))


def to_variances(logarithm: np.ndarray) -> np.ndarray:
    """The inverse, float64, 0 to 1e9, whatever the logarithms."""
    clipped = np.clip(logarithm.astype(np.float64), LOWEST, HIGHEST)
    variances: np.ndarray = np.maximum(np.exp(clipped) * (1 + EPS) - EPS, 0)
    return variances


def kept(logarithm: np.ndarray) -> np.ndarray:
    """Logarithms (float32) brought to the grid, within those of 0 and 1e9."""
    steps = np.rint(np.clip(logarithm, LOWEST, HIGHEST).astype(np.float64) / STEP)
    result: np.ndarray = (steps * STEP).astype(np.float32)
    return result
