"""The Flower client app: says who it is, trains on its own images and evaluates on others of them.

What to do comes with the message; where the images lie, which part of them is this client's and
what device it plays comes from the node's own config, or from the run's where the node has none
(Flower's own simulation).
"""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import functools
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from clients.attacks import attack_of, hostile_payload, hostile_update, training_crops
from clients.fitting import STAYS_OUT_KEY, fit
from clients.state import ClientState
from fedcunet import terms
from fedcunet.config import DataConfig, FederationConfig, RunConfig
from fedcunet.data import AnnotationSet, load
from fedcunet.data.crops import Crops, CropSubset
from fedcunet.data.partition import OwnParts, own_parts
from fedcunet.devices import device_time, profile_named
from fedcunet.downlink import NeedsSnapshot, Received, Visible, first_model, receive
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.partitioners import deal
from fedcunet.payload import bits_per_parameter, decode_own, pack
from fedcunet.privacy import noise_generator, private_update
from fedcunet.records import (
    NEEDS_SNAPSHOT,
    NUM_EXAMPLES_KEY,
    UNKNOWN_CLIENT,
    ConfigScalar,
    description_content,
    error_reply,
    evaluation_content,
    read_model,
    update_content,
)
from fedcunet.training.evaluation import predict, scorable, score
from fedcunet.training.local import (
    LocalResult,
    augmentation_of,
    crops_of,
    make_optimizer,
    train_pass,
)
from fedcunet.training.network import build_network, get_vector, network_layout, set_vector
from fedcunet.training.packed import unpack_network
from fedcunet.training.schedule import norm_is_frozen, weight_share

app = ClientApp()
logger = logging.getLogger(__name__)

DEFAULT_DEVICE = "phone-mid"
TOKEN_FORM = re.compile(r"[A-Za-z0-9_-]{1,64}")


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answers who this node is: its stable id, its number of examples, its device."""
    try:
        config = _local_config({}, context)
        num_landmarks = _dataset(config.data).scheme.num_landmarks
        found = fit(config, context.node_config, _device(context), num_landmarks)
        own = _own_parts(config, context)
    except UserError as error:  # what does not fit is no accident: the server shall know why
        if STAYS_OUT_KEY not in context.node_config:  # of which the simulation has spoken
            logger.warning("refused: %s", error)
        return error_reply(message, str(error))
    content = description_content(
        _client_id(context),
        len(own.train),
        _device(context),
        num_validation=len(own.validation),
        num_test=len(own.test),
        memory_bytes=found.memory_bytes,
        needed_bytes=found.needed_bytes,
        rung=found.rung,
    )
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains from the model in the message and answers with the coded difference."""
    task = _task(message, context)
    config, values = task.config, task.values
    model, layout = _network(_of_network(config), _dataset(config.data).scheme.num_landmarks)
    state = ClientState(
        folder=Path(config.federation.state_dir),
        token=_checked_token(values[terms.TOKEN]),
        client=task.client,
    )
    try:
        received = _receive(task, layout, state)
    except NeedsSnapshot as error:
        return error_reply(message, str(error), code=NEEDS_SNAPSHOT)
    set_vector(model, received.visible.state_N)
    # What training starts from, where the weights are kept in fewer bits than they came in.
    start_N = get_vector(model)
    attack = attack_of(context.node_config)  # none but of a simulation's attackers
    members = _own_parts(config, context)[0].tolist()
    crops = training_crops(attack, _crops(config.data), members)
    result = _train_locally(
        model, crops, config, float(values[terms.LEARNING_RATE]), task.client, task.round
    )

    begin = time.perf_counter()
    # Before coding: what follows spends no more privacy, and loses none.
    update_N = private_update(
        get_vector(model) - start_N,
        config.privacy,
        int(values.get(terms.WANTED, 1)),
        noise_generator(context.node_config, task.round, task.client),
    )
    coded = _encode(
        hostile_update(attack, update_N),
        received.change_N if config.update.prediction else None,
        config,
        layout,
        state,
        task.round,
        acknowledged_round=int(values[terms.ACKNOWLEDGED]),
    )
    coded = hostile_payload(attack, coded)
    encode_seconds = time.perf_counter() - begin
    bytes_down = int(values[terms.BYTES_DOWN])  # more than this message's after a snapshot
    metrics = _metrics(result, coded, bytes_down, layout, config, _device(context))
    metrics |= {NUM_EXAMPLES_KEY: len(crops), "encode-seconds": encode_seconds}
    return Message(update_content(coded, metrics), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answers with the metric of the model in the message on the images this client keeps back."""
    task = _task(message, context)
    data, scheme = task.config.data, _dataset(task.config.data).scheme
    own, part = _own_parts(task.config, context), task.values[terms.PART]
    held_part = own.test if part == terms.TEST else own.validation
    if not len(held_part):
        raise UserError(f"expected images kept back for {part}, found none")
    network = unpack_network(task.blob, "model to evaluate")
    if network.scheme.name != scheme.name:
        raise UserError(f"model to evaluate: expected {scheme.name}, found {network.scheme.name}")
    held_crops = CropSubset(_crops(data), held_part.tolist())
    predicted_NK2 = predict(network.model.to(_processor()), held_crops, flip_test=data.flip_test)
    target_NK2, labelled_NK, head_size_N = _targets(data)
    evaluation = score(
        predicted_NK2,
        target_NK2[held_part],
        labelled_NK[held_part],
        scheme.metric,
        head_size_N[held_part],
    )
    metrics = {"percent": evaluation.percent, NUM_EXAMPLES_KEY: len(held_part)}
    return Message(evaluation_content(metrics), reply_to=message)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A train or evaluate message, read and checked; its model is still in bytes."""

    config: RunConfig
    values: dict[str, ConfigScalar]  # the setting's and the message's own
    client: int
    round: int
    blob: bytes


def _task(message: Message, context: Context) -> _Task:
    """What the message asks for; torch and OpenCV get their threads as it says.

    Raises:
        UserError: the message is for another client.
    """
    blob, values = read_model(message)
    config = _local_config(values, context)
    client, round_number = int(values[terms.CLIENT]), int(values[terms.ROUND])
    if _client_id(context) not in (client, UNKNOWN_CLIENT):
        raise UserError(f"message for client {client} reached client {_client_id(context)}")
    torch.set_num_threads(config.training.threads)
    cv2.setNumThreads(config.training.threads)
    return _Task(config=config, values=values, client=client, round=round_number, blob=blob)


def _receive(task: _Task, layout: Layout, state: ClientState) -> Received:
    """The model of a train message; where models come as differences it is kept for the next."""
    config, coded = task.config, task.config.downlink.coded
    received = receive(
        task.blob,
        config,
        layout,
        task.round,
        held=state.visible(layout.num_parameters) if coded else None,
        first=lambda: _first_model(_of_network(config), _dataset(config.data).scheme.num_landmarks),
    )
    if coded:
        state.keep_visible(received.visible)
    return received


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
    done, total = round_number - 1, config.federation.rounds
    way = weight_share(config, done=done, total=total)
    optimizer = make_optimizer(model, training, learning_rate, weight_share=way)
    return train_pass(
        model,
        crops,
        optimizer,
        batch_size=training.batch_size,
        num_epochs=training.local_epochs,
        sigma=data.sigma,
        augmentation=augmentation_of(data, _dataset(data).scheme),
        seed=(config.seed, round_number, client),
        weight_share=way,
        freeze_norm=norm_is_frozen(config, done=done, total=total),
    )


def _encode(
    update_N: np.ndarray,
    reference_N: np.ndarray | None,
    config: RunConfig,
    layout: Layout,
    state: ClientState,
    round_number: int,
    *,
    acknowledged_round: int,
) -> bytes:
    """The payload of the update; with error feedback, what the coding lost is kept for later."""
    expected = terms.update_payload(layout, config, round_number, state.client)
    if not config.error_feedback:
        return pack(update_N, expected, reference_N)
    before_N = state.residual(len(update_N), acknowledged_round)
    update_N = update_N + before_N
    coded = pack(update_N, expected, reference_N)
    state.save(round_number, before_N, update_N - decode_own(coded, expected, reference_N))
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
    # A node with data of its own has no value from any server; a virtual client has the run's.
    others = RunConfig().flat() if "data.name" in context.node_config else context.run_config
    for key in terms.LOCAL_KEYS:
        own = context.node_config.get(key, others.get(key))
        if own is not None:
            setting[key] = own
    asked, own = setting.get("data.name"), context.node_config.get("data.name", "")
    if own not in ("", asked):
        raise UserError(f"this client has data '{own}', the run asks for '{asked}'")
    return RunConfig.from_flat(setting, "message")


def _client_id(context: Context) -> int:
    """The stable id where this machine knows it: the number of its part of the images."""
    return int(context.node_config.get("partition-id", UNKNOWN_CLIENT))


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
def _scorable(data: DataConfig) -> np.ndarray:
    return scorable(_dataset(data))


@functools.lru_cache(maxsize=2)
def _crops(data: DataConfig) -> Crops:
    return crops_of(data, _dataset(data))


@functools.lru_cache(maxsize=4)
def _parts(
    data: DataConfig, federation: FederationConfig, seed: int, num_parts: int
) -> list[np.ndarray]:
    return deal(_dataset(data).annotations, federation, num_clients=num_parts, seed=seed)


@functools.lru_cache(maxsize=2)
def _targets(data: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, flags and head sizes of all the plain crops; needs no image."""
    crops = _crops(data)
    return *crops.targets(), crops.head_sizes()


def _own_parts(config: RunConfig, context: Context) -> OwnParts:
    """This client's images, to train on and kept back; all are on a machine with its own data.

    Of those kept back the ones that cannot be scored are left out.
    """
    annotations = _dataset(config.data).annotations
    part = np.arange(len(annotations))
    if "num-partitions" in context.node_config:
        num_parts = int(context.node_config["num-partitions"])
        parts = _parts(config.data, config.federation, config.seed, num_parts)
        number = _client_id(context)
        if not 0 <= number < num_parts:
            raise UserError(f"this client is part {number}, there are 0 to {num_parts - 1}")
        part = parts[number]
    federation = config.federation
    train, *held_back = own_parts(
        annotations,
        part,
        validation=federation.validation_fraction,
        test=federation.test_fraction,
        seed=config.seed,
    )
    can_N = _scorable(config.data)
    return OwnParts(train, *(held_part[can_N[held_part]] for held_part in held_back))


def _of_network(config: RunConfig) -> RunConfig:
    """What the network follows from: clients with other update bits or batches share it."""
    return RunConfig(seed=config.seed, model=config.model, quant=config.quant)


@functools.lru_cache(maxsize=1)
def _network(config: RunConfig, num_landmarks: int) -> tuple[nn.Module, Layout]:
    model = build_network(config, num_landmarks)
    layout = network_layout(model)
    return model.to(_processor()), layout


@functools.lru_cache(maxsize=1)
def _first_model(config: RunConfig, num_landmarks: int) -> Visible:
    """The model before the first round, which follows from the setting."""
    return first_model(get_vector(build_network(config, num_landmarks)))


def _processor() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
