"""The model on its way to the clients: whole, or as coded differences from what they have.

With the float32 codec each message carries the whole model, and clients keep nothing of it. Else
the server keeps the *visible model*, which is what the clients have, and each round codes the
difference between it and the global model: the same bytes to all. The next global model is the
visible one and the clients' mean update to it, so that what an unbiased code lost is gone; the
clients, who train from the visible model, make up for it. What a biased code loses stays in the
next difference instead (error feedback on the server without a residual of its own, as in Tang et
al., "DoubleSqueeze", ICML 2019), for it would be lost in the same direction each time. (BatchNorm
statistics go to where the clients came with either, `RoundReplies.mean`.) A client
that missed rounds gets the differences that it missed, or the visible model as one snapshot,
whichever is smaller. The first visible model follows from the setting's seed and is not sent.

    parcel    "FCDN", version 1, kind (0: whole, 1: differences), number of payloads (2 bytes),
              id of the model that the differences start from (16 bytes), then
              each payload (payload.py) with its length (4 bytes) before it; little-endian

A visible model is known by an id: the hash of the first model's values, of a snapshot's bytes, or
of the id before and the difference's bytes. A client that has none of the models that differences
lead through, new or with its state lost, says so (`NeedsSnapshot`) and gets a snapshot: that costs
bytes and never correctness.
"""

import hashlib
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedcunet.aggregation import StateRange
from fedcunet.codecs import get_codec
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.payload import admit, pack
from fedcunet.payload_header import Rejection, read_header
from fedcunet.saved import Saved
from fedcunet.terms import difference_payload, model_payload

MAGIC, VERSION = b"FCDN", 1
WHOLE, DIFFERENCES = 0, 1
ID_BYTES = 16
_HEAD = struct.Struct(f"<4sBBH{ID_BYTES}s")
_LENGTH = struct.Struct("<I")
NO_ID = bytes(ID_BYTES)


class NeedsSnapshot(UserError):
    """The client has no model that the differences start from."""


@dataclass(frozen=True, slots=True)
class Visible:
    """A model as the clients have it: its id and its values (N,), float32."""

    model_id: bytes
    state_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Received:
    """What a client has after a parcel."""

    visible: Visible
    # The round's step of the visible model as both sides know it; None after a snapshot, and where
    # the round made none.
    change_N: np.ndarray | None


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def first_model(state_N: np.ndarray) -> Visible:
    """The model before the first round, known by its values."""
    return Visible(_hash(state_N.astype("<f4", copy=False).tobytes()), state_N)


class Downlink:
    """The server's side: what it sends to whom.

    Args:
        config: the setting.
        layout: of the model.
        first_N: the model before the first round, (N,) float32.
    """

    def __init__(self, config: RunConfig, layout: Layout, first_N: np.ndarray) -> None:
        self._config, self._layout = config, layout
        self._range = _range_of(layout, config)
        self._first_id = first_model(first_N).model_id
        self.visible_N = first_N.copy()  # what clients begin from in this round
        self._round = 0
        # What leads from the visible model after `_base_round` to the present one, oldest first.
        self._base_round = 0
        self._differences: deque[tuple[int, bytes]] = deque()
        self._held: dict[int, tuple[int, bytes]] = {}  # client -> round and id of what it has
        self._sent: dict[int, bytes] = {}  # client -> id of what it has after this round's parcel
        # Once made in this round: id that a client comes to and its parcel, whole and by the id of
        # what it has. Most have the same, and one object is sent to all of them.
        self._whole: tuple[bytes, bytes] | None = None
        self._parcels: dict[bytes, tuple[bytes, bytes]] = {}
        self._change_N: np.ndarray | None = None  # of the visible model in this round, to predict

    def begin_round(self, round_number: int, state_N: np.ndarray) -> None:
        """Moves the visible model towards the global one."""
        self._round, self._whole, self._parcels, self._sent = round_number, None, {}, {}
        self._change_N = None
        if not self._config.downlink.coded:
            self.visible_N = state_N
            return
        missing_N = state_N - self.visible_N
        if not missing_N.any():
            return
        expected = difference_payload(self._layout, self._config, round_number)
        payload = pack(missing_N, expected)
        change_N = _decoded(payload, expected)
        self.visible_N = self._range.keep(self.visible_N + change_N)
        if self._config.update.prediction:
            self._change_N = change_N
        self._differences.append((round_number, payload))
        # Nobody is ever sent more of them than a snapshot takes.
        total = sum(len(payload) for _, payload in self._differences)
        while 8 * total > self._config.downlink.snapshot_bits * self._layout.num_parameters:
            self._base_round, oldest = self._differences.popleft()
            total -= len(oldest)

    def base(self, state_N: np.ndarray) -> np.ndarray:
        """The model (N,) that the round's mean update is added to, `state_N` being the global one.

        Without the memory of what was lost, which an unbiased code does not need, training at 1 bit
        came closer to float32 in equal rounds (docs/downlink.md).
        """
        downlink = self._config.downlink
        keeps_errors = not (downlink.coded and get_codec(downlink.codec).unbiased)
        return state_N if keeps_errors else self.visible_N

    def parcel(self, client: int) -> bytes:
        """What `client` is sent in this round."""
        last_round, model_id = self._held.get(client, (0, self._first_id))
        if not self._config.downlink.coded or last_round < self._base_round:
            return self.snapshot(client)
        if model_id not in self._parcels:
            payloads = [payload for number, payload in self._differences if number > last_round]
            parcel = _parcel(DIFFERENCES, model_id, payloads)
            self._parcels[model_id] = _ids(model_id, payloads)[-1], parcel
        self._sent[client], parcel = self._parcels[model_id]
        return parcel

    def snapshot(self, client: int) -> bytes:
        """The whole visible model, for a client whose state does not suffice."""
        if self._whole is None:
            expected = model_payload(self._layout, self._config, self._round)
            payload = pack(self.visible_N, expected)
            self._whole = _hash(payload), _parcel(WHOLE, NO_ID, [payload])
        self._sent[client] = self._whole[0]
        return self._whole[1]

    def got_snapshot(self, client: int) -> bool:
        """Whether the client was sent the whole model in this round."""
        return self._whole is not None and self._sent[client] == self._whole[0]

    def delivered(self, client: int) -> None:
        """The client's answer shows that it has what it was sent in this round."""
        if self._config.downlink.coded:
            self._held[client] = self._round, self._sent[client]

    def reference(self, client: int) -> np.ndarray | None:
        """The prediction of the client's update: the last global step, where it knows that."""
        return None if self.got_snapshot(client) else self._change_N

    def saved(self) -> Saved:
        """What `restore` needs."""
        tensors = {"visible": self.visible_N} if self._config.downlink.coded else {}
        for number, payload in self._differences:
            tensors[f"difference-{number}"] = np.frombuffer(payload, dtype=np.uint8)
        held = [[client, number, held.hex()] for client, (number, held) in self._held.items()]
        return Saved(
            tensors,
            {"first_id": self._first_id.hex(), "base_round": self._base_round, "held": held},
        )

    def restore(self, saved: Saved) -> None:
        """Goes on from what was saved."""
        self._first_id = bytes.fromhex(saved.facts["first_id"])
        self._base_round = saved.facts["base_round"]
        self._held = {
            client: (number, bytes.fromhex(held)) for client, number, held in saved.facts["held"]
        }
        self.visible_N = saved.tensors.get("visible", self.visible_N)
        numbers = sorted(
            int(name.removeprefix("difference-"))
            for name in saved.tensors
            if name.startswith("difference-")
        )
        self._differences = deque(
            (number, saved.tensors[f"difference-{number}"].tobytes()) for number in numbers
        )


def receive(
    parcel: bytes,
    config: RunConfig,
    layout: Layout,
    round_number: int,
    *,
    held: Visible | None,
    first: Callable[[], Visible],
) -> Received:
    """The client's side: the model of a parcel.

    Args:
        parcel: the bytes from the server.
        config: the setting.
        layout: of the model.
        round_number: of the message.
        held: what the client has kept.
        first: makes the model before the first round, where it is needed.

    Raises:
        NeedsSnapshot: the client has nothing that the differences start from.
        UserError: the parcel is damaged or not of this run.
    """
    kind, start_id, payloads = _opened(parcel)
    values = _range_of(layout, config)
    if kind == WHOLE:
        state_N = _decoded(payloads[0], model_payload(layout, config, round_number))
        if config.downlink.coded:
            values.keep(state_N)
        return Received(Visible(_hash(payloads[0]), state_N), None)
    ids = _ids(start_id, payloads)
    if held is None or held.model_id not in ids:
        held = first()
    if held.model_id not in ids:
        raise NeedsSnapshot("no model that the differences start from is kept here")
    known, state_N, change_N = ids.index(held.model_id), held.state_N, None
    for index, payload in enumerate(payloads):
        made = _round_of(payload)
        is_change = made == round_number  # and no earlier round's, where this one made none
        if index >= known or is_change:
            step_N = _decoded(payload, difference_payload(layout, config, made))
            state_N = values.keep(state_N + step_N) if index >= known else state_N
            change_N = step_N if is_change else None
    return Received(Visible(ids[-1], state_N), change_N)


def _range_of(layout: Layout, config: RunConfig) -> StateRange:
    return StateRange(layout, clamp_latent=config.quant.has_latent_weights)


def _round_of(payload: bytes) -> int:
    header = read_header(payload)
    if isinstance(header, Rejection):
        raise UserError(f"model: {header.reason}: {header.detail}")
    return header.round


def _ids(start_id: bytes, payloads: list[bytes]) -> list[bytes]:
    """Ids of the models that the differences lead through, the first one's before all."""
    ids = [start_id]
    for payload in payloads:
        ids.append(_hash(ids[-1], payload))
    return ids


def _parcel(kind: int, start_id: bytes, payloads: list[bytes]) -> bytes:
    parts = [_HEAD.pack(MAGIC, VERSION, kind, len(payloads), start_id)]
    for payload in payloads:
        parts += [_LENGTH.pack(len(payload)), payload]
    return b"".join(parts)


def _opened(parcel: bytes) -> tuple[int, bytes, list[bytes]]:
    """Kind, id and payloads of a parcel. Raises UserError if its lengths do not add up."""
    if len(parcel) < _HEAD.size or parcel[:4] != MAGIC or parcel[4] != VERSION:
        raise UserError(f"model: expected a parcel of version {VERSION}, found {parcel[:5]!r}")
    _, _, kind, count, start_id = _HEAD.unpack_from(parcel)
    position = _HEAD.size
    payloads: list[bytes] = []
    for _ in range(count):
        begin = position + _LENGTH.size
        if begin > len(parcel):
            raise UserError(f"model: expected {count} payloads, found {len(payloads)}")
        position = begin + _LENGTH.unpack_from(parcel, position)[0]
        payloads.append(parcel[begin:position])
    if position != len(parcel):
        raise UserError(f"model: expected {position} bytes, found {len(parcel)}")
    if kind not in (WHOLE, DIFFERENCES) or (kind == WHOLE and count != 1):
        raise UserError(f"model: expected one whole model or differences, found kind {kind}")
    return kind, start_id, payloads


def _decoded(payload: bytes, expected: Expected) -> np.ndarray:
    found = admit(payload, expected)
    if isinstance(found, Rejection):
        raise UserError(f"model of round {expected.round}: {found.reason}: {found.detail}")
    return found.decode()
