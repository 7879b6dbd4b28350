"""What server and clients agree on before a round: keys, the form of both payloads, who takes part.

Everything here follows from the setting, the round and the clients' stable ids alone.
"""

import functools
import hashlib
import math
from dataclasses import replace

import numpy as np

from fedcunet.config import RunConfig, Scalar
from fedcunet.devices import availability_of
from fedcunet.errors import UserError
from fedcunet.expected import Expected
from fedcunet.layout import Layout

SERVER = 0  # sender of the model's payload; clients send as their id + 1

# Config keys of train and evaluate messages beside those of the setting.
ROUND, LEARNING_RATE, CLIENT, ACKNOWLEDGED, BYTES_DOWN, TOKEN, PART, WANTED = (
    "round",
    "learning-rate",
    "client",
    "acknowledged-round",
    "bytes-down",  # of the models sent to the client in this round, this message's among them
    "run-token",
    "part",
    "wanted-updates",
)
# Of a client's images: what the model is evaluated on while it is trained, and when it is done.
VALIDATION, TEST = "validation", "test"
# What a client's own machine decides, and no server: these keys are never sent.
LOCAL_KEYS = (
    "data.root",
    "data.cache-bytes",
    "data.cache-dir",
    "data.disk-cache-bytes",
    "federation.state-dir",
    "federation.measured-dir",
    "federation.scratch-dir",
)


def evaluation_due(config: RunConfig, round_number: int) -> bool:
    """Whether the model is evaluated after a round, by the server and by the clients."""
    federation = config.federation
    return round_number % federation.evaluate_every == 0 or round_number == federation.rounds


def model_payload(layout: Layout, config: RunConfig, round_number: int) -> Expected:
    """What the payload of a whole model is, the same bytes to all clients that get one."""
    downlink = config.downlink
    exact = not downlink.coded or downlink.snapshot_bits == 32
    return Expected(
        layout=layout,
        run_seed=config.seed,
        round=round_number,
        sender=SERVER,
        codec="float32" if exact else "trellis-wiener",
        bits=32 if exact else downlink.snapshot_bits,
        fine_bits=32 if exact else 0,
    )


def difference_payload(layout: Layout, config: RunConfig, round_number: int) -> Expected:
    """What the payload of the difference that a round brings to the visible model is."""
    return Expected(
        layout=layout,
        run_seed=config.seed,
        round=round_number,
        sender=SERVER,
        codec=config.downlink.codec,
        bits=config.downlink.bits,
    )


def update_payload(layout: Layout, config: RunConfig, round_number: int, client: int) -> Expected:
    """What the payload of a client's update in a round is."""
    return Expected(
        layout=layout,
        run_seed=config.seed,
        round=round_number,
        sender=client + 1,
        codec=config.update_codec,
        bits=config.update.bits,
        fine_bits=config.update.fine_bits,
    )


@functools.lru_cache(maxsize=256)
def client_setting(config: RunConfig, device: str, rung: int) -> RunConfig:
    """The setting as a client gets it: on its rung of the ladder, with its device's update bits."""
    setting, bits = config.rungs()[rung], config.update.bits_on(device)
    if bits == config.update.bits:
        return setting
    return replace(setting, update=replace(setting.update, bits=bits, bits_by_device=""))


@functools.lru_cache(maxsize=256)
def own_values(config: RunConfig, device: str, rung: int) -> dict[str, Scalar]:
    """What a client's message says in place of the setting's own values."""
    common = config.flat()
    own = client_setting(config, device, rung).flat()
    return {key: value for key, value in own.items() if value != common[key]}


def refuse_availability(config: RunConfig) -> None:
    """Raises UserError if the setting draws who answers: real clients do, or do not."""
    if config.federation.availability:
        raise UserError(
            "federation.availability: expected false outside of python -m simulations, found true"
        )


def is_available(config: RunConfig, round_number: int, client: int, device: str) -> bool:
    """Whether a client answers when it is asked to train.

    It follows from the seed, the round, the client's id and its device's availability alone.
    """
    if not config.federation.availability:
        return True
    drawn = f"fedcunet availability {config.seed} {round_number} {client}"
    digest = hashlib.sha256(drawn.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < availability_of(device)


def rounded_up(share: float, count: int) -> int:
    """`share` of `count`, rounded up; 0.07 of 100 are 7, though in floating point a little more."""
    return math.ceil(share * count - 1e-9)


def num_wanted(config: RunConfig, num_clients: int) -> int:
    """How many updates a round wants."""
    return max(1, round(config.federation.fraction * num_clients))


def staleness_factor(steps: int) -> float:
    """Weight of an update that began `steps` steps of the server ago (FedBuff, section 3.2)."""
    return 1 / math.sqrt(1 + steps)


def select(clients: list[int], config: RunConfig, round_number: int) -> tuple[list[int], int]:
    """The clients of a round in the order of their ids, and how many updates are wanted.

    Which ones follows from the seed, the round and the ids alone.
    """
    wanted = num_wanted(config, len(clients))
    count = min(len(clients), rounded_up(config.federation.over_selection, wanted))
    generator = np.random.default_rng([config.seed, round_number, 0])
    return sorted(generator.permutation(clients)[:count].tolist()), wanted
