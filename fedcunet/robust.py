"""Rules that aggregate updates of which a minority may be anything: lies, noise, an attack.

Sources: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018, sections 3 and 4 (median and trimmed mean of each coordinate); Blanchard et al., "Machine
Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017, sections 4 and 5
(Krum and Multi-Krum); Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 3
(clipping of norms).

Letters: n updates, of which f are taken to be an attacker's, of N values each.

Only `mean` and `norm-clipping` weight updates by their examples: a count is a client's word, and a
lie about it would count for many clients. Updates come in the order of the clients' ids, and sums
are made in that order, so that nothing depends on who answered first.

**BatchNorm statistics** are measurements and no steps: running means and variances have units of
their own. So norms and distances leave them out, and, since an attacker could then lie there at no
risk, they never take a mean: `trimmed-mean` trims them, the other three take their median. As in
the mean of all (`MeanAccumulator`), a variance is that of the mixture: what the rule makes of the
logarithms of the clients' variances, plus its value of their means' squared distances to the
aggregated mean.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fedcunet.aggregation import statistics_mask, statistics_places
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.terms import rounded_up, select
from fedcunet.update_file import UpdateFile
from fedcunet.variances import to_logarithms, to_variances

# Least number of updates that withstand f attackers, after the papers' breakdown points.
LEAST_UPDATES: Mapping[str, Callable[[int], int]] = {
    "mean": lambda f: 1,  # withstands none
    "trimmed-mean": lambda f: 2 * f + 1,
    "median": lambda f: 2 * f + 1,
    "multi-krum": lambda f: 2 * f + 3,
    "norm-clipping": lambda f: 2 * f + 1,  # else an attacker sets the norm, and the statistics
}


def breakdown(rule: str, attackers: int, num_updates: int) -> str:
    """In one line why `rule` cannot withstand so many among the updates, or nothing."""
    least = LEAST_UPDATES[rule](attackers)
    if num_updates >= least:
        return ""
    return f"{rule} against {attackers} attackers needs {least} updates, found {num_updates}"


def check_breakdown(config: RunConfig, num_clients: int) -> None:
    """Raises UserError if a round of so many clients is too small for the attackers assumed."""
    federation = config.federation
    num_asked = len(select(list(range(num_clients)), config, 1)[0])
    attackers = rounded_up(federation.assumed_attackers, num_asked)
    if reason := breakdown(federation.aggregation, attackers, num_asked):
        raise UserError(
            f"federation.aggregation: {reason} in a round ({federation.assumed_attackers:g} of "
            f"{num_asked} clients, federation.assumed-attackers)"
        )


def aggregate(
    rule: str, updates: UpdateFile, attackers: int, layout: Layout, state_N: np.ndarray
) -> np.ndarray:
    """The aggregated update (N,), float32, by the rule of that name.

    Args:
        rule: a name of RULES.
        updates: of the round, finite, in the order of the clients' ids.
        attackers: f.
        layout: names and shapes of the vector's tensors.
        state_N: the global state that the updates are differences to.

    Raises:
        ValueError: the updates are too few for f.
    """
    if reason := breakdown(rule, attackers, len(updates)):
        raise ValueError(reason)
    result_N = RULES[rule](updates, attackers, ~statistics_mask(layout))
    trimmed = attackers if rule == "trimmed-mean" else _median_trim(len(updates))
    for mean, variance in statistics_places(layout):
        means_nC = state_N[mean] + updates.columns(mean).astype(np.float64)
        logarithms_nC = state_N[variance] + updates.columns(variance).astype(np.float64)
        centre_C = middle_mean(means_nC, trimmed)
        spread_C = middle_mean((means_nC - centre_C) ** 2, trimmed)
        result_N[mean] = centre_C - state_N[mean]
        variances_C = to_variances(middle_mean(logarithms_nC, trimmed)) + spread_C
        result_N[variance] = to_logarithms(variances_C) - state_N[variance]
    return result_N


def middle_mean(values_nB: np.ndarray, trimmed: int) -> np.ndarray:
    """The mean (B,), float64, of each column without its `trimmed` least and greatest values.

    With fewer than half of n attackers, and as many trimmed at each end, the values that are left
    lie between honest ones.
    """
    # A column's values side by side: sorting along the first axis would gather them one by one.
    sorted_Bn = np.sort(np.ascontiguousarray(values_nB.T), axis=1)
    middle: np.ndarray = sorted_Bn[:, trimmed : len(values_nB) - trimmed].mean(1, dtype=np.float64)
    return middle


def _median_trim(n: int) -> int:
    """Trimmed at each end, this leaves the one or two values in the middle of n."""
    return (n - 1) // 2


def _trimmed_mean(updates: UpdateFile, attackers: int, is_parameter_N: np.ndarray) -> np.ndarray:
    """Yin et al., Definition 2, with f of n trimmed at each end."""
    result_N = np.empty(is_parameter_N.size, dtype=np.float32)
    for place, values_nB in updates.blocks():
        result_N[place] = middle_mean(values_nB, attackers)
    return result_N


def _median(updates: UpdateFile, attackers: int, is_parameter_N: np.ndarray) -> np.ndarray:
    """Yin et al., Definition 1; of an even number the mean of the two in the middle."""
    return _trimmed_mean(updates, _median_trim(len(updates)), is_parameter_N)


def _multi_krum(updates: UpdateFile, attackers: int, is_parameter_N: np.ndarray) -> np.ndarray:
    """The mean of the m = n - f - 2 updates that are nearest to their neighbours.

    An update's score is the sum of its squared distances to the n - f - 2 others nearest to it
    (Blanchard et al., section 4); at equal scores the lower client id is taken.
    """
    n = len(updates)
    products_nn = np.zeros((n, n))
    for place, values_nB in updates.blocks():
        parameters_nB = (values_nB * is_parameter_N[place]).astype(np.float64)
        products_nn += parameters_nB @ parameters_nB.T
    norms_n = products_nn.diagonal()
    distances_nn = np.maximum(norms_n[:, None] + norms_n - 2 * products_nn, 0)
    np.fill_diagonal(distances_nn, -1)  # comes first, and is left out
    count = n - attackers - 2
    scores_n = np.sort(distances_nn, axis=1)[:, 1 : count + 1].sum(axis=1)
    chosen_n = np.zeros(n)
    chosen_n[np.argsort(scores_n, kind="stable")[:count]] = 1
    return _weighted_mean(updates, chosen_n)


def _norm_clipping(updates: UpdateFile, attackers: int, is_parameter_N: np.ndarray) -> np.ndarray:
    """The mean weighted by examples of updates shortened to the median of their norms."""
    squares_n = np.zeros(len(updates))
    for place, values_nB in updates.blocks():
        parameters_nB = (values_nB * is_parameter_N[place]).astype(np.float64)
        squares_n += (parameters_nB**2).sum(axis=1)
    norms_n = np.sqrt(squares_n)
    limit = np.median(norms_n)
    longer_n = np.maximum(norms_n, limit)
    factors_n = np.divide(limit, longer_n, out=np.ones(len(updates)), where=longer_n > 0)
    return _weighted_mean(updates, np.array(updates.weights), factors_n)


def _weighted_mean(
    updates: UpdateFile, weights_n: np.ndarray, factors_n: np.ndarray | float = 1.0
) -> np.ndarray:
    """The mean of the updates times their factors, summed in the order of the clients."""
    shares_n1 = (weights_n / weights_n.sum() * factors_n)[:, None]
    result_N = np.empty(updates.num_parameters, dtype=np.float32)
    for place, values_nB in updates.blocks():
        result_N[place] = (shares_n1 * values_nB).sum(axis=0)
    return result_N


RULES: Mapping[str, Callable[[UpdateFile, int, np.ndarray], np.ndarray]] = {
    "trimmed-mean": _trimmed_mean,
    "median": _median,
    "multi-krum": _multi_krum,
    "norm-clipping": _norm_clipping,
}
