"""Who takes part: nodes under the ids that their keys were admitted with, or parts they play."""

from flwr.app import Context, Message

from fedcunet.records import UNKNOWN_CLIENT, description_content
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
