"""Rounds in which clients say that they lost the model: what they are sent, once, and at what cost.

Real parcels over the loopback; a client here keeps its model in a dictionary.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Context, Message

from fedcunet import rounds, terms
from fedcunet.buffered import BufferedServer
from fedcunet.downlink import NeedsSnapshot, Visible, first_model, receive
from fedcunet.payload import pack
from fedcunet.records import (
    NEEDS_SNAPSHOT,
    description_content,
    error_reply,
    read_model,
    update_content,
)
from simulations.loopback import LoopbackGrid
from tests.made_rounds import Watcher, made_server
from tests.unit.test_downlink import CONFIG, LAYOUT, LENGTH

NUM_CLIENTS, STUBBORN = 3, 2
Sent = list[tuple[int, int, bytes, int]]  # round, client, parcel, bytes-down of the message


class Gone(LoopbackGrid):
    """Node 2 is gone when it is sent a second message of a round: it gets none, and no id."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        second = len(messages) < NUM_CLIENTS
        return [
            ""
            if second and one.metadata.dst_node_id == 2
            else super(Gone, self).push_messages([one])[0]
            for one in messages
        ]


def run(
    num_rounds: int,
    *,
    loses_at: int = 0,
    fails_at: int = 0,
    grid: type[LoopbackGrid] = LoopbackGrid,
    kind: type[rounds.Server] = rounds.Server,
    **changes: Any,
) -> tuple[Sent, Watcher]:
    """Client 1 loses its model, or fails before it has read the message, in one of the rounds.

    `STUBBORN` refuses whatever it gets.
    """
    config = CONFIG.replace(federation__rounds=num_rounds, **changes)
    kept: dict[int, Visible] = {}
    sent: Sent = []

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, 5, "laptop"), reply_to=message)
        parcel, values = read_model(message)
        number = int(values["round"])
        first_of_round = (number, client) not in {one[:2] for one in sent}
        sent.append((number, client, parcel, int(values["bytes-down"])))
        if (number, client) == (fails_at, 1):
            raise ValueError("the disk is full")
        if (number, client) == (loses_at, 1) and first_of_round:
            kept[client] = Visible(bytes(16), np.zeros(LENGTH, dtype=np.float32))
        try:
            if client == STUBBORN:
                raise NeedsSnapshot("never")
            received = receive(
                parcel,
                config,
                LAYOUT,
                number,
                held=kept.get(client),
                first=lambda: first_model(np.zeros(LENGTH, dtype=np.float32)),
            )
        except NeedsSnapshot as error:
            return error_reply(message, str(error), code=NEEDS_SNAPSHOT)
        kept[client] = received.visible
        update_N = np.random.default_rng([number, client]).normal(0, 0.02, LENGTH)
        expected = terms.update_payload(LAYOUT, config, number, client)
        coded = pack(update_N.astype(np.float32), expected)
        return Message(update_content(coded, {"num-examples": 5, "loss": 1.0}), reply_to=message)

    watcher = Watcher()
    server = made_server(client_app, config, watcher, kind=kind, layout=LAYOUT)
    server.grid = grid(client_app, [{}] * NUM_CLIENTS, {})
    server.run()
    return sent, watcher


def of(sent: Sent, number: int, client: int) -> list[bytes]:
    return [parcel for n, who, parcel, _ in sent if (n, who) == (number, client)]


def test_a_client_that_lost_its_model_gets_a_snapshot_at_once_and_both_are_counted() -> None:
    sent, watcher = run(4, loses_at=3)
    differences, snapshot = of(sent, 3, 1)
    assert len(differences) < 0.2 * LENGTH < 0.9 * LENGTH < len(snapshot)
    lines = {(line.round, line.client): line for line in watcher.clients}
    assert lines[3, 1].outcome == "accepted"
    assert lines[3, 1].bytes_down == len(differences) + len(snapshot)
    # The client knows what it was sent before, and takes its time for both.
    assert [down for n, who, _, down in sent if (n, who) == (3, 1)] == [
        len(differences),
        len(differences) + len(snapshot),
    ]
    assert len(of(sent, 4, 1)) == 1  # afterwards differences apply again
    assert len(of(sent, 4, 1)[0]) < 0.2 * LENGTH
    assert watcher.lines[2].bytes_down == sum(len(parcel) for n, _, parcel, _ in sent if n == 3)


def test_a_client_that_always_asks_for_a_snapshot_gets_one_a_round_and_costs_itself_only() -> None:
    sent, watcher = run(3)
    for line in watcher.lines:
        assert line.outcome == "committed"
        assert line.replies == {"accepted": 2, "needs-snapshot": 1}
        assert line.bytes_down == sum(len(p) for n, _, p, _ in sent if n == line.round)
    assert [len(of(sent, number, STUBBORN)) for number in (1, 2, 3)] == [2, 2, 2]


def test_whole_models_are_not_sent_again() -> None:
    sent, watcher = run(2, downlink__codec="float32", downlink__bits=32.0)
    assert watcher.lines[0].replies == {"accepted": 2, "needs-snapshot": 1}
    assert [len(of(sent, number, STUBBORN)) for number in (1, 2)] == [1, 1]


def test_clients_that_have_the_same_are_sent_one_object() -> None:
    sent, _ = run(3, loses_at=3)
    for number in (1, 2, 3):
        assert of(sent, number, 0)[0] is of(sent, number, 1)[0]
    assert of(sent, 3, 1)[1] is of(sent, 3, STUBBORN)[1]  # the snapshot


def test_a_client_that_failed_is_sent_what_it_missed() -> None:
    sent, watcher = run(3, fails_at=2)
    [parcel] = of(sent, 3, 1)
    assert 0.25 * LENGTH < len(parcel) < 0.4 * LENGTH  # two differences
    assert watcher.lines[2].replies == {"accepted": 2, "needs-snapshot": 1}


def test_a_client_that_is_gone_before_its_snapshot_is_unreachable() -> None:
    sent, watcher = run(3, loses_at=3, grid=Gone)
    [line] = [line for line in watcher.clients if (line.round, line.client) == (3, 1)]
    assert (line.outcome, line.bytes_up) == ("unreachable", 0)
    assert line.bytes_down == len(of(sent, 3, 1)[0])


def test_in_a_buffer_too_each_client_is_sent_what_it_does_not_have() -> None:
    buffered = {"federation__mode": "buffered", "federation__buffer_size": NUM_CLIENTS}
    sent, watcher = run(4, kind=BufferedServer, **buffered)
    assert len(watcher.lines) == 4
    for number in (2, 3, 4):
        assert len(of(sent, number, 0)[0]) < 0.2 * LENGTH
