"""The loopback engine answers every message once, in order, whatever the client app does."""

from typing import Any

import pytest
import torch

from fedcunet import identity
from fedcunet.errors import RunFailure
from fedcunet.records import BadReply, Reply, model_content, read_update
from simulations.loopback import LoopbackGrid

from flwr.app import Context, Message  # isort: skip  (after fedcunet.environment)

TOY = "tests.toy_client_app:app"


def make_grid(num_nodes: int = 3, **options: Any) -> LoopbackGrid:
    return LoopbackGrid(TOY, [{} for _ in range(num_nodes)], {"seed": 1}, **options)


def ask(node_id: int, blob: bytes = b"model", **config: Any) -> Message:
    return Message(
        model_content(blob, config), dst_node_id=node_id, message_type="train", group_id="1"
    )


def test_every_node_answers_and_replies_name_their_message() -> None:
    grid = make_grid()
    assert list(grid.get_node_ids()) == [1, 2, 3]
    message_ids = grid.push_messages([ask(node_id) for node_id in (3, 1, 2)])
    replies: list[Message] = []
    while len(replies) < 3:
        pulled = grid.pull_messages(message_ids)
        assert len(pulled) == 1  # one a pull: the caller can show progress in between
        replies += pulled
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1, 2]
    assert [reply.metadata.reply_to_message_id for reply in replies] == message_ids
    assert len({reply.metadata.message_id for reply in replies} - {""}) == 3
    assert grid.pull_messages(message_ids) == []


def test_the_same_message_is_answered_with_the_same_bytes() -> None:
    first, second = (read_update(make_grid().send_and_receive([ask(2)])[0]) for _ in range(2))
    assert isinstance(first, Reply)
    assert first == second


def test_nodes_differ_by_their_partition_and_given_configs_win() -> None:
    seen: list[Context] = []

    def app(message: Message, context: Context) -> Message:
        seen.append(context)
        return Message(message.content, reply_to=message)

    grid = LoopbackGrid(app, [{}, {"partition-id": 7, "device": "phone"}], {"seed": 1}, run_id=4)
    grid.send_and_receive([ask(1), ask(2)])
    assert [context.node_config for context in seen] == [
        {"partition-id": 0, "num-partitions": 2},
        {"partition-id": 7, "num-partitions": 2, "device": "phone"},
    ]
    assert [(context.run_id, context.node_id) for context in seen] == [(4, 1), (4, 2)]
    assert seen[0].run_config == {"seed": 1}
    assert seen[0].state is not seen[1].state


def test_an_exception_costs_one_error_reply_of_one_line() -> None:
    replies = make_grid().send_and_receive([ask(1), ask(2, do="raise"), ask(3)])
    first, failed, last = (read_update(reply) for reply in replies)
    assert isinstance(first, Reply)
    assert isinstance(last, Reply)
    assert isinstance(failed, BadReply)
    assert failed.reason == "error-reply"
    assert failed.detail.startswith("ValueError: first line second line (toy_client_app.py:")


def test_a_tensor_that_finds_no_memory_is_counted_as_that() -> None:
    (reply,) = make_grid().send_and_receive([ask(1, do="gorge")])
    failed = read_update(reply)
    assert isinstance(failed, BadReply)
    assert failed.reason == "out-of-memory"


@pytest.mark.parametrize(
    ("do", "text"), [("exit", "SystemExit: 3"), ("nothing", "returned NoneType")]
)
def test_an_app_that_exits_or_returns_nothing_has_failed(do: str, text: str) -> None:
    (reply,) = make_grid().send_and_receive([ask(1, do=do)])
    assert text in reply.error.reason


def test_an_answer_to_another_message_is_refused() -> None:
    kept: list[Message] = []

    def app(message: Message, context: Context) -> Message:
        kept.append(message)
        return Message(message.content, reply_to=kept[0])

    replies = LoopbackGrid(app, [{}, {}], {}).send_and_receive([ask(1), ask(2)])
    assert [reply.has_error() for reply in replies] == [False, True]


def test_an_interrupt_in_a_client_ends_the_call() -> None:
    def app(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = LoopbackGrid(app, [{}, {}], {})
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([ask(1), ask(2)])
    assert grid.send_and_receive([]) == []


def test_a_client_cannot_change_what_others_get() -> None:
    content = model_content(b"model", {"do": "spoil"})
    messages = [Message(content, dst_node_id=i, message_type="train") for i in (1, 2)]
    replies = make_grid().send_and_receive(messages)
    assert all(isinstance(read_update(reply), Reply) for reply in replies)
    assert set(content) == {"arrays", "config"}
    assert content["config"]["do"] == "spoil"


def test_a_message_to_a_node_that_does_not_exist_gets_an_error() -> None:
    replies = make_grid().send_and_receive([ask(4), ask(1)])
    assert {reply.metadata.src_node_id: reply.has_error() for reply in replies} == {
        4: True,
        1: False,
    }
    assert "no node 4" in next(reply.error.reason for reply in replies if reply.has_error())


def test_after_the_timeout_nothing_more_is_run() -> None:
    calls: list[int] = []

    def app(message: Message, context: Context) -> Message:
        calls.append(context.node_id)
        return Message(message.content, reply_to=message)

    grid = LoopbackGrid(app, [{}, {}], {})
    assert grid.send_and_receive([ask(1), ask(2)], timeout=0) == []
    assert len(grid.send_and_receive([ask(2)], timeout=60)) == 1
    assert calls == [2]


def test_forgotten_messages_are_not_run() -> None:
    grid = make_grid()
    first, second = grid.push_messages([ask(1, do="raise"), ask(2)])
    grid.forget([first])
    (reply,) = grid.pull_messages([first, second])
    assert reply.metadata.src_node_id == 2
    assert grid.pull_messages([first, second]) == []


def test_clients_compute_with_the_configured_threads_and_the_server_with_its_own() -> None:
    before = torch.get_num_threads()
    (reply,) = make_grid(threads_per_client=2).send_and_receive([ask(1, do="where")])
    update = read_update(reply)
    assert isinstance(update, Reply)
    assert update.blob.endswith(b"|2")
    assert torch.get_num_threads() == before


def test_the_server_is_itself_again_after_a_client_ran() -> None:
    seen: list[int] = []

    def app(message: Message, context: Context) -> Message:
        # A message that is no reply is sent by whoever runs here.
        seen.append(ask(1).metadata.src_node_id)
        return Message(message.content, reply_to=message)

    grid = LoopbackGrid(app, [{}, {}], {})
    grid.send_and_receive([ask(2)])
    assert seen == [2]
    assert ask(1).metadata.src_node_id == 0


@pytest.mark.parametrize(
    ("client_app", "text"),
    [
        ("clients.app", "expected the form 'module:attribute'"),
        ("no_such_module:app", "No module named 'no_such_module'"),
        ("tests.toy_client_app:no_such_app", "no attribute 'no_such_app'"),
        ("tests.toy_client_app:__doc__", "is a str, not a ClientApp"),
    ],
)
def test_a_client_app_that_cannot_be_loaded_is_named_in_one_line(
    client_app: str, text: str
) -> None:
    with pytest.raises(RunFailure, match=text) as failure:
        LoopbackGrid(client_app, [{}], {})
    assert "\n" not in str(failure.value)


def test_flowers_own_description_of_the_run_can_be_set() -> None:
    grid = make_grid(run_id=3)
    assert grid.run.run_id == 3
    grid.set_run(identity.make_run(5))
    assert grid.run.run_id == 5
    message = grid.create_message(model_content(b"", {}), "train", 1, "1")
    assert message.metadata.run_id == 3
