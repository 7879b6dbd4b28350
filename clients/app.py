"""The Flower client app: says who it is, and trains on its own images when it is asked.

What to do comes with the message; where the images lie, which part of them is this client's and
what device it plays comes from the node's own config, or from the run's where the node has none
(Flower's own simulation).
"""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import functools
import re
import time
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from clients.devices import device_time, profile_named
from clients.state import ClientState
from fedcunet import rounds
from fedcunet.config import DataConfig, FederationConfig, RunConfig
from fedcunet.data import AnnotationSet, load
from fedcunet.data.crops import Crops, CropSubset
from fedcunet.data.partition import partition
from fedcunet.errors import UserError
from fedcunet.payload import Layout, Rejection, admit, bits_per_parameter, decode_own, pack
from fedcunet.records import (
    NUM_EXAMPLES_KEY,
    ConfigScalar,
    description_content,
    read_train,
    update_content,
)
from fedcunet.training.local import (
    OPTIMIZERS,
    LocalResult,
    augmentation_of,
    crops_of,
    train_pass,
)
from fedcunet.training.network import build_network, get_vector, network_layout, set_vector

app = ClientApp()

DEFAULT_DEVICE = "phone-mid"
TOKEN_FORM = re.compile(r"[A-Za-z0-9_-]{1,64}")


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answers who this node is: its stable id, its number of examples, its device."""
    config = _local_config({}, context)
    content = description_content(
        _client_id(context), len(_own_crops(config, context)), _device(context)
    )
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains from the model in the message and answers with the coded difference."""
    blob, values = read_train(message)
    config = _local_config(values, context)
    client, round_number = _client_id(context), int(values[rounds.ROUND])
    if values[rounds.CLIENT] != client:
        raise UserError(f"message for client {values[rounds.CLIENT]} reached client {client}")
    torch.set_num_threads(config.training.threads)
    cv2.setNumThreads(config.training.threads)
    crops = _own_crops(config, context)
    model, layout = _network(config, _dataset(config.data).scheme.num_landmarks)
    received = admit(blob, rounds.model_payload(layout, config.seed, round_number))
    if isinstance(received, Rejection):
        raise UserError(f"model of round {round_number}: {received.reason}: {received.detail}")
    start_N = received.decode()
    set_vector(model, start_N)
    result = _train_locally(
        model, crops, config, float(values[rounds.LEARNING_RATE]), client, round_number
    )

    begin = time.perf_counter()
    state = ClientState(
        folder=Path(config.federation.state_dir),
        token=_checked_token(values[rounds.TOKEN]),
        client=client,
    )
    coded = _encode(
        get_vector(model) - start_N,
        config,
        layout,
        state,
        round_number,
        acknowledged_round=int(values[rounds.ACKNOWLEDGED]),
    )
    encode_seconds = time.perf_counter() - begin
    metrics = _metrics(result, coded, len(blob), layout, config, _device(context))
    metrics |= {NUM_EXAMPLES_KEY: len(crops), "encode-seconds": encode_seconds}
    return Message(update_content(coded, metrics), reply_to=message)


def _train_locally(
    model: nn.Module,
    crops: CropSubset,
    config: RunConfig,
    learning_rate: float,
    client: int,
    round_number: int,
) -> LocalResult:
    data, training = config.data, config.training
    # A fresh optimiser each round: a mobile client keeps nothing that the server could not lose.
    optimizer = OPTIMIZERS[training.optimizer](list(model.parameters()), learning_rate)
    return train_pass(
        model,
        crops,
        optimizer,
        batch_size=training.batch_size,
        num_epochs=training.local_epochs,
        sigma=data.sigma,
        augmentation=augmentation_of(data, _dataset(data).scheme),
        seed=(config.seed, round_number, client),
    )


def _encode(
    update_N: np.ndarray,
    config: RunConfig,
    layout: Layout,
    state: ClientState,
    round_number: int,
    *,
    acknowledged_round: int,
) -> bytes:
    """The payload of the update; with error feedback, what the coding lost is kept for later."""
    expected = rounds.update_payload(layout, config, round_number, state.client)
    if not config.update.error_feedback:
        return pack(update_N, expected)
    before_N = state.residual(len(update_N), acknowledged_round)
    update_N = update_N + before_N
    coded = pack(update_N, expected)
    state.save(round_number, before_N, update_N - decode_own(coded, expected))
    return coded


def _metrics(
    result: LocalResult,
    coded: bytes,
    bytes_down: int,
    layout: Layout,
    config: RunConfig,
    device: str,
) -> dict[str, int | float]:
    """What the server notes of this client; times on its device are computed, not waited for."""
    assumed = config.federation.seconds_per_example
    compute = assumed * result.num_examples if assumed else result.seconds
    on_device = device_time(profile_named(device), compute, bytes_down, len(coded))
    return {
        "steps": result.num_steps,
        "loss": result.loss,
        "compute-seconds": result.seconds,
        "bits-per-parameter": bits_per_parameter(coded, layout),
        "device-compute-seconds": on_device.compute,
        "device-downlink-seconds": on_device.downlink,
        "device-uplink-seconds": on_device.uplink,
        "device-seconds": on_device.total,
    }


def _local_config(values: Mapping[str, ConfigScalar], context: Context) -> RunConfig:
    """The setting of the message, with what this machine decides for itself."""
    setting = {key: value for key, value in values.items() if "." in key or key == "seed"}
    if not values:  # a question who we are comes without a setting
        values = context.run_config
        setting = {key: value for key, value in values.items() if "." in key or key == "seed"}
    for key in rounds.LOCAL_KEYS:
        own = context.node_config.get(key, context.run_config.get(key))
        if own is not None:
            setting[key] = own
    return RunConfig.from_flat(setting, "message")


def _client_id(context: Context) -> int:
    return int(context.node_config.get("partition-id", 0))


def _device(context: Context) -> str:
    return str(context.node_config.get("device", DEFAULT_DEVICE))


def _checked_token(token: ConfigScalar) -> str:
    """The run's token, which becomes part of a path."""
    if not isinstance(token, str) or not TOKEN_FORM.fullmatch(token):
        raise UserError(f"run token: expected letters, digits, '-' and '_', found {token!r}")
    return token


# One process plays many clients one after the other: images and network are kept for all of them.


@functools.lru_cache(maxsize=2)
def _dataset(data: DataConfig) -> AnnotationSet:
    return load(data.name, data.root, data.train_subset, boxes=data.boxes)


@functools.lru_cache(maxsize=2)
def _crops(data: DataConfig) -> Crops:
    return crops_of(data, _dataset(data))


@functools.lru_cache(maxsize=4)
def _parts(
    data: DataConfig, federation: FederationConfig, seed: int, num_parts: int
) -> list[np.ndarray]:
    return partition(
        _dataset(data).annotations,
        num_clients=num_parts,
        scheme=federation.partition,
        alpha=federation.partition_alpha,
        skew=federation.partition_skew,
        seed=seed,
    )


def _own_crops(config: RunConfig, context: Context) -> CropSubset:
    """This client's part of the images; all of them on a machine with data of its own."""
    crops = _crops(config.data)
    if "num-partitions" not in context.node_config:
        return CropSubset(crops, range(len(crops)))
    num_parts = int(context.node_config["num-partitions"])
    parts = _parts(config.data, config.federation, config.seed, num_parts)
    return CropSubset(crops, parts[_client_id(context)].tolist())


@functools.lru_cache(maxsize=1)
def _network(config: RunConfig, num_landmarks: int) -> tuple[nn.Module, Layout]:
    model = build_network(config, num_landmarks)
    layout = network_layout(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), layout
