"""Differential privacy of clients: clipped and noisy updates, and what a run has spent.

Source of the mechanism: McMahan et al., "Learning Differentially Private Recurrent Language
Models", ICLR 2018, section 2 (a client's whole update clipped, Gaussian noise, equal weights), with
the noise in shares: each of a round's n wanted clients adds noise of deviation z·C / sqrt(n) to its
clipped update, so that the noise in their sum has the deviation z·C. It is added before coding,
and whatever is done to a noisy update afterwards, coding too, spends nothing more.

Accounting: a Gaussian mechanism of multiplier z that is applied k times is one of multiplier
z / sqrt(k) (Dong et al., "Gaussian Differential Privacy", JRSS B 2022, corollary 3.3), whose
epsilon is exact (Balle and Wang, ICML 2018, theorem 8; package dp-accounting). Who takes part in a
round follows from the run's seed, which all clients have: so nothing is gained by sampling, and
a client pays for each round that it takes part in. `docs/privacy.md` says who is protected against
whom.
"""

import importlib.util
import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedcunet.config import PrivacyConfig, RunConfig
from fedcunet.errors import UserError
from fedcunet.saved import Saved

# Of a virtual client's node config: what its noise follows from, so that a simulation repeats.
NOISE_SEED_KEY = "noise-seed"


def private_update(
    update_N: np.ndarray,
    privacy: PrivacyConfig,
    num_wanted: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """The update clipped to the norm C, with the client's share of the noise; float32.

    All values are clipped together and get the same noise, trained parameters and BatchNorm
    statistics: everything that is sent must be bounded.

    Args:
        update_N: the difference to the model that came.
        privacy: the setting's; where it is off, the update stays as it is.
        num_wanted: n, updates that the round wants.
        generator: of the noise; `noise_generator`.
    """
    if not privacy.enabled:
        return update_N
    clipped_N = update_N.astype(np.float64)
    # Not by `linalg.norm`: the threads of BLAS change the sum.
    norm = math.sqrt(np.square(clipped_N).sum())
    clipped_N *= min(1.0, privacy.clip_norm / max(norm, np.finfo(np.float64).tiny))
    deviation = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(num_wanted)
    noisy_N: np.ndarray = clipped_N + deviation * generator.standard_normal(update_N.size)
    return noisy_N.astype(np.float32)


def noise_generator(
    node_config: Mapping[str, bool | int | float | str], round_number: int, client: int
) -> np.random.Generator:
    """Where a client's noise comes from.

    A virtual client's follows from its node config. A real client's is its own secret: who knew the
    seed could take the noise away again.
    """
    seed = node_config.get(NOISE_SEED_KEY)
    if seed is None or "data.name" in node_config:  # a machine with data of its own
        return np.random.default_rng(secrets.randbits(128))
    return np.random.default_rng([int(seed), round_number, client, 1])


def check_accountant(privacy: PrivacyConfig) -> None:
    """Raises UserError if privacy is on and the package that accounts for it is missing."""
    if privacy.enabled and importlib.util.find_spec("dp_accounting") is None:
        raise UserError(
            "privacy.clip-norm: expected the package dp-accounting "
            "(pip install 'fedcunet[privacy]'), found none"
        )


class PrivacyAccountant:
    """What the rounds so far tell of the client that they tell most of.

    Neighbours are a run and the same run with zeros in the place of one client's clipped updates.

    Args:
        config: the setting, with privacy on.
    """

    def __init__(self, config: RunConfig) -> None:
        check_accountant(config.privacy)
        self._privacy = config.privacy
        # Only then does a model follow from the sum of the noisy updates alone; with any other
        # codec or rule it follows from each of them, which their own noise must protect.
        self._sums_only = (
            config.update.codec == "float32" and config.federation.aggregation == "mean"
        )
        # Squared inverse noise multipliers, summed over the rounds of each client.
        self._of_models: defaultdict[int, float] = defaultdict(float)
        self._of_updates: defaultdict[int, float] = defaultdict(float)
        self._interrupted = 0  # times that the next round may have been asked for already

    def count(self, asked: Iterable[int], summed: Sequence[int], num_wanted: int) -> None:
        """Notes a round.

        Args:
            asked: clients that were asked, whatever became of their updates.
            summed: clients whose updates went into the next model; none if there is no next one.
            num_wanted: n, by which the noise was shared.
        """
        multiplier = self._privacy.noise_multiplier
        single = math.inf if multiplier == 0 else num_wanted / multiplier**2
        # The shares that are there, of which a curious client knows its own.
        shares = max(1, len(summed) - 1) if self._sums_only else 1
        in_model = single / shares
        for client in asked:
            self._of_updates[client] += single * (1 + self._interrupted)
        self._interrupted = 0
        for client in summed:
            self._of_models[client] += in_model

    def saved(self) -> Saved:
        """What `restore` needs."""
        return Saved(
            facts={
                "models": sorted(self._of_models.items()),
                "updates": sorted(self._of_updates.items()),
                "interrupted": self._interrupted,
            }
        )

    def restore(self, saved: Saved) -> None:
        """Goes on with what was spent before the run was stopped.

        The round that was stopped is asked for again, and real clients answer with other noise.
        """
        self._of_models.update(saved.facts["models"])
        self._of_updates.update(saved.facts["updates"])
        self._interrupted = saved.facts["interrupted"] + 1

    def figures(self) -> dict[str, float | None]:
        """`epsilon` against who sees the models, `epsilon_server` against who sees each update.

        None where no noise is added.
        """
        return {
            "epsilon": self._epsilon(self._of_models),
            "epsilon_server": self._epsilon(self._of_updates),
            "delta": self._privacy.delta,
        }

    def _epsilon(self, spent: Mapping[int, float]) -> float | None:
        from dp_accounting import get_epsilon_gaussian

        most = max(spent.values(), default=0.0)
        if most == 0:
            return 0.0
        if most == math.inf:
            return None
        return float(get_epsilon_gaussian(1 / math.sqrt(most), self._privacy.delta))
