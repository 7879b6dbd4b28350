"""The clients' end of the Ray engine: an actor, and what travels between it and the grid.

Ray and pickle spend more on a call and on copying bytes through pickle than a short message is
worth. So a call carries several messages, and large arrays travel beside them: models as objects
of Ray's store, which a worker fetches once, and updates as numpy arrays, which Ray copies once.
"""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedcunet.measured import free_memory_bytes
from fedcunet.records import error_reply
from simulations.tasks import ROOT, ClientCall, Node, describe, load_client_app, run_client_app

# Smaller arrays travel in the message: a way of their own costs more than copying them.
INLINE_BYTES = 64 * 1024

# A call ends early when its messages have taken this long, or its replies are this large: what it
# has not come to goes to whoever is free, and the grid holds no more than this for each worker.
CALL_SECONDS = 0.2
CALL_BYTES = 16 * 2**20

# A reply may be this much larger than its message: no client's mistake fills the server's memory.
REPLY_FACTOR, REPLY_BYTES = 4, 16 * 2**20

# Where the bytes of an array belong: name of the record, name of the array.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """A message to a client, without its large arrays; `blobs` names these in the object store."""

    message: Message
    node_id: int
    blobs: Sequence[tuple[Place, str]]


@dataclass(frozen=True, slots=True)
class Packed:
    """A reply on its way: pickled without its large arrays, so that one that cannot be read spoils
    no other."""

    pickled: bytes
    blobs: Sequence[tuple[Place, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a call brought: replies to its first messages, and the worker's memory after it."""

    replies: list[Packed]
    seconds: float
    worker_bytes: int
    outgrown: bool  # it holds more than its share, and its machine has no share left


class ClientWorker:
    """Runs client apps in a process of its own, one message at a time."""

    def __init__(self) -> None:
        self._client_app: ClientCall | None = None
        self._nodes: dict[int, Node] = {}
        self._share_bytes = 0
        self._blobs: dict[str, bytes] = {}

    def set_up(
        self,
        client_app: ClientCall | str,
        nodes: dict[int, Node],
        num_threads: int,
        share_bytes: int,
        folder: str,
    ) -> int:
        """Load the app. Not in `__init__`, so that a failure comes back as what it is.

        Args:
            client_app: the app or its import string.
            nodes: all virtual clients.
            num_threads: torch's threads.
            share_bytes: memory that is meant for this process.
            folder: current folder of the driver, so that relative paths mean the same here.

        Returns:
            The id of this process.
        """
        if os.path.isdir(folder):  # on another machine of a cluster it need not exist
            os.chdir(folder)
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        torch.set_num_threads(num_threads)
        self._client_app = load_client_app(client_app)
        self._nodes = nodes
        self._share_bytes = share_bytes
        return os.getpid()

    def answer(self, requests: list[Request], references: dict[str, Any]) -> Answers:
        """The replies to the first of `requests`, at least to one.

        Args:
            requests: messages, in their order.
            references: where the object store has the blobs that they name.
        """
        # The model of this round is most often that of the call before.
        self._blobs = {
            key: self._blobs[key] if key in self._blobs else ray.get(reference)
            for key, reference in references.items()
        }
        begin, num_bytes = time.monotonic(), 0
        replies: list[Packed] = []
        for request in requests:
            reply = self._reply(request)
            replies.append(reply)
            num_bytes += len(reply.pickled) + sum(len(blob) for _, blob in reply.blobs)
            if time.monotonic() - begin > CALL_SECONDS or num_bytes > CALL_BYTES:
                break
        own_bytes = own_memory_bytes()
        outgrown = own_bytes > self._share_bytes and free_memory_bytes() < self._share_bytes
        return Answers(replies, time.monotonic() - begin, own_bytes, outgrown)

    def _reply(self, request: Request) -> Packed:
        assert self._client_app is not None
        message = request.message
        asked_bytes = 0
        for place, key in request.blobs:
            _put_back(message.content, place, self._blobs[key])
            asked_bytes += len(self._blobs[key])
        reply = run_client_app(self._client_app, message, self._nodes[request.node_id])
        try:
            return pack_reply(reply, REPLY_BYTES + REPLY_FACTOR * asked_bytes)
        except Exception as error:
            text = f"the reply cannot be sent: {describe(error)}"
            return pack_reply(error_reply(message, text), REPLY_BYTES)


def pack_reply(reply: Message, limit_bytes: int) -> Packed:
    """`reply` as it travels.

    Raises:
        ValueError: it is larger than `limit_bytes`.
        Exception: it holds what cannot be pickled.
    """
    blobs: list[tuple[Place, np.ndarray]] = []
    if not reply.has_error():

        def aside(place: Place, data: bytes) -> None:
            blobs.append((place, np.frombuffer(data, dtype=np.uint8)))

        reply.content = take_out(reply.content, aside)
    pickled = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
    num_bytes = len(pickled) + sum(len(blob) for _, blob in blobs)
    if num_bytes > limit_bytes:
        raise ValueError(f"it has {num_bytes} bytes, at most {limit_bytes} are taken")
    return Packed(pickled, blobs)


def unpack_reply(packed: Packed) -> Message:
    """The inverse of `pack_reply`, with bytes of its own: nothing stays in the object store.

    Raises:
        Exception: it cannot be read here, or is no reply.
    """
    reply = pickle.loads(packed.pickled)
    if not isinstance(reply, Message):
        raise TypeError(f"it is a {type(reply).__name__}, no Message")
    for place, blob in packed.blobs:
        _put_back(reply.content, place, blob.tobytes())
    return reply


def take_out(content: RecordDict, aside: Callable[[Place, bytes], None]) -> RecordDict:
    """A copy of `content` with empty arrays for the large ones, whose bytes go to `aside`.

    `content` keeps its own: other messages may share it.
    """
    rest = RecordDict()
    for record_name, record in content.items():
        if isinstance(record, ArrayRecord):
            # A record of its own: the sender's must keep its bytes.
            record = ArrayRecord(dict(record))
            for array_name, array in record.items():
                if isinstance(array.data, bytes) and len(array.data) > INLINE_BYTES:
                    aside((record_name, array_name), array.data)
                    record[array_name] = _with_data(array, b"")
        rest[record_name] = record
    return rest


def _put_back(content: RecordDict, place: Place, data: bytes) -> None:
    record_name, array_name = place
    record = content[record_name]
    assert isinstance(record, ArrayRecord)
    record[array_name] = _with_data(record[array_name], data)


def _with_data(array: Array, data: bytes) -> Array:
    return Array(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=data)


def own_memory_bytes() -> int:
    """What this process holds in memory without what it shares with others."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
