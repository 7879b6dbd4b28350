"""Which clients of a simulation attack; what they do is in clients/attacks.py."""

import numpy as np

from fedcunet.config import RunConfig
from fedcunet.errors import UserError


def attackers_of(config: RunConfig) -> dict[int, str]:
    """Client id -> attack of the simulation's attackers, in the order of the ids.

    Who they are follows from the seed and the number of clients alone; at least one attacks where
    the share is not 0.
    """
    federation = config.federation
    if federation.attack == "none":
        return {}
    count = max(1, round(federation.attackers * federation.clients))
    generator = np.random.default_rng([config.seed, 0, 1])
    chosen = generator.permutation(federation.clients)[:count].tolist()
    return dict.fromkeys(sorted(chosen), federation.attack)


def refuse_attackers(config: RunConfig) -> None:
    """Raises UserError if the setting has attackers: real clients are never told to attack."""
    if config.federation.attack != "none":
        raise UserError(
            "federation.attack: expected none outside of python -m simulations, found "
            f"{config.federation.attack}"
        )
