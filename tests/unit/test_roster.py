"""Who takes part: nodes under the ids that their keys were admitted with, or parts they play."""

import pytest
from flwr.app import Context, Message

from fedcunet.records import UNKNOWN_CLIENT, description_content, error_reply
from fedcunet.roster import describe_clients
from simulations.loopback import LoopbackGrid


def described(said: list[int], admitted: dict[int, int] | None) -> tuple[list[int], list[str]]:
    """The ids that nodes 1, 2, ... get, and who is left out, if node n says the n-th id."""

    def client_app(message: Message, context: Context) -> Message:
        return Message(description_content(said[context.node_id - 1], 5, ""), reply_to=message)

    grid = LoopbackGrid(client_app, [{}] * len(said), {})
    clients, left_out = describe_clients(grid, 60, admitted)
    assert all(found.client == client for client, found in clients.items())
    return sorted(clients), left_out


def test_a_node_is_the_client_under_whose_id_its_key_was_admitted() -> None:
    unknown = UNKNOWN_CLIENT
    assert described([unknown, unknown], {1: 7, 2: 3}) == ([3, 7], [])
    ids, left_out = described([unknown, 3, 4], {1: 7, 2: 3, 3: 5})
    assert ids == [3, 7]
    assert left_out == ["client 5: admitted as client 5, says that it is client 4"]


def test_a_node_whose_key_was_not_admitted_and_one_without_an_id_are_left_out() -> None:
    ids, left_out = described([0, 1], {2: 1})
    assert (ids, len(left_out)) == ([1], 1)
    assert left_out[0].startswith("node 1: ")
    ids, left_out = described([0, UNKNOWN_CLIENT], None)
    assert ids == [0]
    assert left_out == ["node 2: neither its key was admitted nor is it a part"]


def test_of_two_nodes_that_say_one_id_the_second_is_left_out() -> None:
    ids, left_out = described([0, 1, 1], None)
    assert (ids, left_out) == ([0, 1], ["client 1 answered twice"])


def test_a_client_on_a_rung_that_is_not_there_is_left_out() -> None:
    def client_app(message: Message, context: Context) -> Message:
        number = context.node_id - 1
        content = description_content(number, 5, "laptop", rung=number, needed_bytes=9)
        return Message(content, reply_to=message)

    clients, left_out = describe_clients(LoopbackGrid(client_app, [{}] * 3, {}), 60, num_rungs=2)
    assert {client: found.rung for client, found in clients.items()} == {0: 0, 1: 1}
    assert [found.needed_bytes for found in clients.values()] == [9, 9]
    assert left_out == ["node 3: rung 2, the ladder has 1"]


def test_many_with_one_reason_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def client_app(message: Message, context: Context) -> Message:
        if context.node_id > 1:
            return error_reply(message, "too small" if context.node_id < 5 else "no images")
        return Message(description_content(0, 5, "laptop"), reply_to=message)

    _, left_out = describe_clients(LoopbackGrid(client_app, [{}] * 5, {}), 60)
    assert left_out[1] == "node 3: too small"
    assert len(left_out) == 4
    assert caplog.messages == [
        "left out of the run (and 2 more): node 2: too small",
        "left out of the run: node 5: no images",
    ]
