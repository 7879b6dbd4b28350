"""Which values of a weak tensor are coded at all: a share of them that both sides know.

A trellis costs about 0.15 bit a value however small the values are, and a scalar quantiser is far
from the limit too. Where a tensor is worth less than about half a bit a value it is cheaper to code
a share p of its values at that rate, and to decode them divided by p and the others as zeros: where
each value is among them with probability p, the mean stays the value itself.
"""

import numpy as np

from fedcunet.codecs.base import random_words

WHOLE = 1 << 16  # the share of a tensor all of whose values are coded


def kept_values(
    lengths: np.ndarray, shares: np.ndarray, seed: bytes
) -> tuple[np.ndarray, np.ndarray | None]:
    """How many values of each tensor are coded (int64), and which of all; None: all of them.

    Those kept lie evenly in the tensor, behind an offset that depends on `seed` alone.

    Args:
        lengths: Of the tensors, int64.
        shares: Of their values that are coded, in 1/65536, int64; 0 for none.
        seed: Of all randomness of the vector.
    """
    if (shares == WHOLE).all():
        return lengths, None
    offsets = (random_words(seed + b"/kept", lengths.size) % WHOLE).astype(np.int64)
    kept = np.empty(int(lengths.sum()), dtype=bool)
    counts = np.empty_like(lengths)
    stops = np.cumsum(lengths)
    for index, (length, stop) in enumerate(zip(lengths.tolist(), stops.tolist(), strict=True)):
        part = kept[stop - length : stop]
        if shares[index] in (0, WHOLE):
            part[...] = shares[index] == WHOLE
        else:
            place = np.arange(length) * shares[index]
            place += offsets[index]
            place %= WHOLE
            np.less(place, shares[index], out=part)
        counts[index] = np.count_nonzero(part)
    return counts, kept
