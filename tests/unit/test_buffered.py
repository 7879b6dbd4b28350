"""Buffered asynchronous aggregation: who is at work, whose answer counts when, and how much."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedcunet import terms
from fedcunet.buffered import BufferedServer, _Answer
from fedcunet.downlink import receive
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import Reply, description_content, read_model, update_content
from fedcunet.saved import read_saved, write_saved
from simulations.loopback import LoopbackGrid
from tests.made_rounds import CONFIG, EXAMPLES, LAYOUT, Watcher, error, made_server, no_model

BUFFERED = CONFIG.replace(
    federation__mode="buffered",
    federation__buffer_size=2,
    federation__rounds=6,
    federation__seconds_per_example=1.0,
)
SECONDS = (1.0, 2.0, 2.5, 100.0)  # of the clients on their devices


def server(
    seen: list[tuple[int, int]], watcher: Watcher, full: Sequence[int] = (), **changes: Any
) -> BufferedServer:
    """Four clients, three of them fast; each sends `client + 1` everywhere.

    Those in `full` find no memory in round 1.
    """
    config = BUFFERED.replace(**changes)

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(
                description_content(client, EXAMPLES[client], "laptop"), reply_to=message
            )
        blob, values = read_model(message)
        number = int(values["round"])
        receive(blob, config, LAYOUT, number, held=None, first=no_model)
        seen.append((number, client))
        if (number, client) == (2, 1):
            error()
        if number == 1 and client in full:
            raise MemoryError
        update_N = np.full(43, client + 1.0, dtype=np.float32)
        coded = pack(update_N, terms.update_payload(LAYOUT, config, number, client))
        metrics = {"num-examples": EXAMPLES[client], "loss": 1.0}
        content = update_content(coded, metrics | {"device-seconds": SECONDS[client]})
        return Message(content, reply_to=message)

    made = made_server(client_app, config, watcher, kind=BufferedServer)
    assert isinstance(made, BufferedServer)
    return made


def test_the_server_steps_without_waiting_for_the_slowest() -> None:
    seen: list[tuple[int, int]] = []
    watcher = Watcher()
    server(seen, watcher).run()
    # All four begin; the fast ones answer and begin again; the slow one is at work all the time.
    assert seen[:4] == [(1, 3), (1, 2), (1, 1), (1, 0)]
    assert [client for _, client in seen].count(3) == 1
    lines = [(line.round, line.client, line.outcome) for line in watcher.clients]
    assert lines[:2] == [(1, 0, "accepted"), (1, 1, "accepted")]
    # At second 2 both begin again; client 1 fails, client 2 answers at 2.5 and client 0 at 3.
    assert lines[2:5] == [(2, 0, "accepted"), (2, 1, "error-reply"), (2, 2, "accepted")]
    clocks = np.cumsum([line.device_seconds for line in watcher.lines])
    assert clocks[:2].tolist() == [2.0, 3.0]
    assert clocks[-1] < 100
    assert all(line.reproducible for line in watcher.lines)


def test_a_stale_update_counts_less_and_makes_the_step_shorter() -> None:
    watcher = Watcher()
    server([], watcher).run()
    first = (1 * 10 + 2 * 20) / 30
    assert watcher.states[0] == pytest.approx(np.full(43, first))
    # In round 2 client 0 is accepted, and client 2 a step after it began: 1/√2 of its weight.
    stale = EXAMPLES[2] / 2**0.5
    second = (1 * EXAMPLES[0] + 3 * stale) / (EXAMPLES[0] + EXAMPLES[2])
    assert watcher.states[1] == pytest.approx(np.full(43, first + second))


def test_measured_seconds_make_a_run_that_cannot_be_repeated() -> None:
    watcher = Watcher()
    server([], watcher, federation__seconds_per_example=0.0).run()
    assert not any(line.reproducible for line in watcher.lines)


def test_rounds_in_which_faults_of_machines_are_judged_are_marked() -> None:
    watcher = Watcher()
    server([], watcher, full=(0, 1, 2)).run()
    assert [line.replies.get("out-of-memory", 0) for line in watcher.lines[:2]] == [3, 0]
    assert [line.reproducible for line in watcher.lines[:2]] == [False, True]


@pytest.mark.parametrize("lie", ["fails", "sends rubbish"])
def test_clients_that_only_fail_cost_no_others_update(lie: str) -> None:
    """Two of four are at work: those that fail at once would fill every buffer of two."""
    watcher = Watcher()

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, EXAMPLES[client], ""), reply_to=message)
        if client < 2 and lie == "fails":
            error()
        number = int(read_model(message)[1]["round"])
        coded = pack(
            np.ones(43, np.float32), terms.update_payload(LAYOUT, BUFFERED, number, client)
        )
        metrics = {"num-examples": EXAMPLES[client], "device-seconds": 0.0 if client < 2 else 9.0}
        return Message(update_content(b"" if client < 2 else coded, metrics), reply_to=message)

    made_server(client_app, BUFFERED, watcher, kind=BufferedServer).run()
    assert [line.outcome for line in watcher.lines] == ["committed"] * BUFFERED.federation.rounds
    assert [line.replies["accepted"] for line in watcher.lines] == [2] * len(watcher.lines)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_answers_on_their_way_survive_a_stop(stop: int, tmp_path: Path) -> None:
    through = Watcher()
    server([], through).run()
    stopped = server([], Watcher(), federation__rounds=stop)
    stopped.run()
    write_saved(tmp_path / "state", stopped.saved())
    watcher = Watcher()
    resumed = server([], watcher)
    resumed.restore(read_saved(tmp_path / "state"))
    resumed.run()
    assert [s.tolist() for s in watcher.states] == [s.tolist() for s in through.states[stop:]]
    assert [(c.round, c.client, c.outcome) for c in watcher.clients] == [
        (c.round, c.client, c.outcome) for c in through.clients if c.round > stop
    ]


def test_what_does_not_go_with_a_buffer_is_refused() -> None:
    for change, said in (
        ({"federation__deadline_seconds": 5.0}, "deadline-seconds: expected 0 with"),
        ({"federation__aggregation": "median"}, "aggregation: expected mean with"),
        ({"federation__over_selection": 1.3}, "over-selection: expected 1 with"),
    ):
        with pytest.raises(UserError, match=said):
            BUFFERED.replace(**change)  # type: ignore[arg-type]


def test_a_buffer_larger_than_the_clients_at_work_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as refusal:
        server([], Watcher(), federation__buffer_size=3, federation__fraction=0.5).run()
    assert str(refusal.value) == (
        "federation.buffer-size: expected at most 2, the clients that are at work (0.5 of 4, "
        "federation.fraction), found 3"
    )


def test_an_answer_of_a_client_that_is_gone_after_a_stop_is_dropped() -> None:
    stopped = server([], Watcher(), federation__rounds=1)
    stopped.run()
    watcher = Watcher()
    resumed = server([], watcher)
    resumed.restore(stopped.saved())
    assert {answer.client for answer in resumed.at_work} == {2, 3}
    assert isinstance(resumed.grid, LoopbackGrid)
    resumed.grid = LoopbackGrid(resumed.grid._client_app, [{}] * 2, {})
    resumed.run()
    assert {line.client for line in watcher.clients} == {0, 1}
    assert len(watcher.lines) == 5


@pytest.mark.parametrize("seconds", [1e300, -1.0])
def test_seconds_that_no_device_takes_cost_the_answer_and_leave_the_clock(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SECONDS", (1.0, 2.0, seconds, 100.0))
    watcher = Watcher()
    server([], watcher).run()
    assert {line.outcome for line in watcher.clients if line.client == 2} == {"bad-metrics"}
    assert 0 < sum(line.device_seconds for line in watcher.lines) < 200


def test_the_round_in_which_an_answer_began_is_acknowledged_and_lines_are_in_the_order_of_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "SECONDS", (2.0, 1.0, 2.5, 100.0))  # client 1 is first
    watcher = Watcher()
    federation = server([], watcher, federation__rounds=2)
    federation.run()
    assert [(line.round, line.client) for line in watcher.clients[:2]] == [(1, 0), (1, 1)]
    assert federation.acknowledged == {0: 2, 1: 1, 2: 1}


def test_answers_are_saved(tmp_path: Path) -> None:
    reply = Reply(node_id=1, blob=b"", num_examples=10, metrics={"loss": 0.1, "steps": 3})
    before, after = server([], Watcher()), server([], Watcher())
    before.first_statistics = {number: np.array([number], dtype=np.float32) for number in (0, 1)}
    before.at_work = [_Answer(0.5, 0, 1, reply, 7)]
    write_saved(tmp_path / "state", before.saved())
    after.restore(read_saved(tmp_path / "state"))
    (answer,) = after.at_work
    assert (answer.seconds, answer.client, answer.started) == (0.5, 0, 1)
    assert (answer.reply, answer.bytes_down) == (reply, 7)
    assert {number: one.tolist() for number, one in after.first_statistics.items()} == {1: [1]}


def test_statistics_go_where_late_clients_came() -> None:
    """All measure the mean 1 and e times the variance, from whichever model they begin."""
    layout = Layout.from_tensors({"n.running_mean": (2,), "n.running_var": (2,)})
    config = BUFFERED.replace(federation__buffer_size=1)

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, EXAMPLES[client], ""), reply_to=message)
        blob, values = read_model(message)
        number = int(values["round"])
        began_N = receive(blob, config, layout, number, held=None, first=no_model).visible.state_N
        coded = pack(1 - began_N, terms.update_payload(layout, config, number, client))
        metrics = {"num-examples": EXAMPLES[client], "loss": 1.0}
        content = update_content(coded, metrics | {"device-seconds": SECONDS[client]})
        return Message(content, reply_to=message)

    watcher = Watcher()
    made_server(client_app, config, watcher, kind=BufferedServer, layout=layout).run()
    for state_N in watcher.states:
        assert state_N == pytest.approx(np.ones(4), abs=1e-5)
