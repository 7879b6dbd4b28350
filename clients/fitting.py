"""Does training fit into this client's memory, and on which rung of the ladder."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedcunet.config import RunConfig, Scalar
from fedcunet.devices import profile_named
from fedcunet.errors import UserError
from fedcunet.ladder import climb
from fedcunet.measured import free_memory_bytes

# What a simulation tells its virtual clients, which it has looked at together.
RUNG_KEY, NEEDED_KEY, STAYS_OUT_KEY = "rung", "needed-bytes", "stays-out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How a client trains.

    Attributes:
        memory_bytes: what training may take; 0 where nobody has set a limit.
        rung: of the ladder; 0 is the setting itself.
        needed_bytes: what was measured; 0 where nothing had to be. On a real node this is the whole
            process with the images that it keeps.
    """

    memory_bytes: int = 0
    rung: int = 0
    needed_bytes: int = 0


def fit(
    config: RunConfig, node_config: Mapping[str, Scalar], device: str, num_landmarks: int
) -> Fit:
    """How training fits into a client's memory.

    A real node has the memory that it was given or that is free, and nobody who looked before; a
    virtual one has its device's share, and only where the setting has a ladder.

    Args:
        config: the setting.
        node_config: of the client's node.
        device: the name of its device.
        num_landmarks: K of the heatmaps.

    Raises:
        UserError: it does not fit.
    """
    if STAYS_OUT_KEY in node_config:
        raise UserError(str(node_config[STAYS_OUT_KEY]))
    if RUNG_KEY in node_config:
        rung, needed = int(node_config[RUNG_KEY]), int(node_config[NEEDED_KEY])
        return Fit(rung=rung, needed_bytes=needed)
    if "data.name" in node_config or "memory-bytes" in node_config:
        allowed = int(node_config.get("memory-bytes", free_memory_bytes()))
        images = config.data.cache_bytes
        place = climb(
            config,
            num_landmarks,
            allowed,
            who="this client",
            needed=lambda need: need.resident_bytes + images,
            counted="measured, images included",
            is_here=True,
        )
    elif config.federation.ladder:  # Flower's own simulation
        allowed = profile_named(device).training_bytes
        place = climb(config, num_landmarks, allowed, who=device)
    else:
        return Fit()
    return Fit(memory_bytes=allowed, rung=place.rung, needed_bytes=place.needed_bytes)
