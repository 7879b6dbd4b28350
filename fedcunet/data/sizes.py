"""How much each client holds in proportion to the others: the sizes that a partition aims at."""

from typing import Literal, get_args

import numpy as np

Sizes = Literal["log-normal", "mpii-activities", "mpii-categories"]
SIZES: tuple[Sizes, ...] = get_args(Sizes)

# People of the 397 activities in 17,372 people of MPII Human Pose (Andriluka et al., CVPR 2014),
# counted: smallest, 10 %, median, 90 %, largest.
MPII_ACTIVITY_QUANTILES = ((0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 8.0, 31.0, 88.0, 283.0))
# People of its 20 categories among the same, in falling order: sports, occupation, conditioning
# exercise, home activities, lawn and garden, home repair, water activities, miscellaneous, winter
# activities, fishing and hunting, dancing, walking, music playing, bicycling, running, inactivity,
# religious activities, self care, transportation, volunteer activities. (41 people have none.)
MPII_CATEGORY_COUNTS = (
    3450, 2329, 1682, 1377, 1092, 1065, 1008, 741, 740, 705, 697, 577, 534, 516, 291, 185, 120, 89,
    87, 46,
)  # fmt: skip


def client_weights(
    sizes: Sizes, num_clients: int, skew: float, rng: np.random.Generator
) -> np.ndarray:
    """Positive weights (num_clients,) float64; only their ratios mean anything.

    "log-normal" is exp(skew * z), z standard normal. "mpii-activities" draws each client's size
    from the distribution of MPII's activities, its logarithm interpolated between the quantiles.
    "mpii-categories" deals out the real counts of the 20 categories in random order, and deals
    them again to each further 20 clients. The last two take no skew.
    """
    if sizes == "log-normal":
        return np.asarray(np.exp(skew * rng.standard_normal(num_clients)))
    if sizes == "mpii-activities":
        shares, counts = MPII_ACTIVITY_QUANTILES
        return np.asarray(np.exp(np.interp(rng.random(num_clients), shares, np.log(counts))))
    rounds = -(-num_clients // len(MPII_CATEGORY_COUNTS))
    dealt = [rng.permutation(MPII_CATEGORY_COUNTS) for _ in range(rounds)]
    return np.concatenate(dealt)[:num_clients].astype(np.float64)
