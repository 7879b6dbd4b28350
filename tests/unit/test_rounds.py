"""The round loop against clients of every kind: honest, wrong, hostile, late, silent."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from fedcunet import records, terms
from fedcunet.aggregation import statistics_mask
from fedcunet.config import RunConfig
from fedcunet.downlink import Visible, first_model, receive
from fedcunet.errors import RunFailure
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import OUTCOMES, description_content, error_reply, read_model, update_content
from fedcunet.replies import RoundReplies, without_excess
from fedcunet.roster import describe_clients
from simulations.loopback import LoopbackGrid
from simulations.tasks import Node
from tests.made_rounds import (
    CONFIG,
    EXAMPLES,
    HEAD_BYTES,
    LAYOUT,
    Leaving,
    Reply,
    Watcher,
    error,
    honest,
    made_server,
    reply,
    run,
)


def test_honest_clients_give_the_mean_weighted_by_their_examples() -> None:
    watcher, _ = run()
    mean = (1 * 10 + 2 * 20 + 3 * 30 + 4 * 40) / 100
    assert watcher.states[0] == pytest.approx(np.full(43, mean))
    assert watcher.states[1] == pytest.approx(np.full(43, 2 * mean))
    assert [line.outcome for line in watcher.lines] == ["committed", "committed"]
    assert watcher.lines[0].replies == {"accepted": 4}
    assert watcher.lines[0].train_loss == 1.0


def test_bytes_are_the_lengths_of_what_was_sent() -> None:
    watcher, _ = run()
    up = terms.update_payload(LAYOUT, CONFIG, 1, 0).payload_limits[1]
    down = HEAD_BYTES + terms.model_payload(LAYOUT, CONFIG, 1).payload_limits[1]
    assert watcher.lines[0].bytes_up == 4 * up
    assert watcher.lines[0].bytes_down == 4 * down
    assert watcher.clients[0].bits_per_parameter == 8 * up / 43


def packed(client: int, update: np.ndarray, expected: Any, tail: bytes = b"") -> RecordDict:
    """A payload as `expected`, its last bytes replaced by `tail`."""
    blob = pack(update, expected)
    return update_content(blob[: len(blob) - len(tail)] + tail, {"num-examples": EXAMPLES[client]})


def own(client: int, round_number: int, config: RunConfig = CONFIG) -> Any:
    return terms.update_payload(LAYOUT, config, round_number, client)


EDEN = CONFIG.replace(update__codec="eden", update__bits=2)
HOSTILE: dict[str, Reply] = {
    "error-reply": error,
    "malformed-reply": lambda *_: RecordDict(),
    "too-large": lambda c, n, m, _: reply(c, n, np.full(43, 1e5, np.float32)),
    "wrong-round": lambda c, n, m, _: packed(c, m, own(c, n + 1)),
    "wrong-sender": lambda c, n, m, _: packed(c, m, own(0, n)),
    "wrong-seed": lambda c, n, m, _: packed(c, m, own(c, n, CONFIG.replace(seed=9))),
    "wrong-codec": lambda c, n, m, _: packed(c, m, own(c, n, EDEN)),
    "wrong-layout": lambda c, n, m, _: packed(
        c, m[:5], terms.update_payload(Layout.vector(5), CONFIG, n, c)
    ),
    "bad-num-examples": lambda c, n, m, _: reply(c, n, m, **{"num-examples": 10**6}),
    "bad-metrics": lambda c, n, m, _: reply(c, n, m, loss=float("nan")),
    "too-short": lambda c, n, m, _: update_content(b"", {"num-examples": EXAMPLES[c]}),
    "bad-checksum": lambda c, n, m, _: packed(c, m, own(c, n), tail=b"?"),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_a_wrong_reply_costs_its_own_update_and_is_counted_by_its_reason(reason: str) -> None:
    watcher, _ = run(HOSTILE[reason])
    assert watcher.lines[0].replies == {"accepted": 3, reason: 1}
    assert watcher.lines[0].outcome == "committed"
    refused = [line for line in watcher.clients if line.client == 2]
    assert [line.outcome for line in refused] == [reason, reason]
    mean = (1 * 10 + 2 * 20 + 4 * 40) / 70
    assert watcher.states[0] == pytest.approx(np.full(43, mean), rel=1e-6)


def test_a_payload_that_is_too_long_is_refused_for_what_its_header_says() -> None:
    """Of a round all replies are kept until the last one is there."""

    def reason(blob: bytes) -> str:
        reply = records.Reply(node_id=9, blob=blob, num_examples=30, metrics={})
        kept = without_excess(reply, own(2, 1))
        return kept.reason if isinstance(kept, records.BadReply) else ""

    assert reason(pack(np.zeros(43, np.float32), own(2, 1))) == ""
    others = terms.update_payload(Layout.vector(9999), CONFIG, 1, 2)
    assert reason(pack(np.zeros(9999, np.float32), others)) == "wrong-layout"
    assert reason(b"x" * 10**6) != ""


def test_the_bytes_of_a_payload_that_is_too_long_count_and_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[int] = []
    judge = RoundReplies.judge

    def watched(self: RoundReplies, client: int, reply: Any) -> None:
        kept.extend([len(reply.blob)] if isinstance(reply, records.Reply) else [])
        judge(self, client, reply)

    monkeypatch.setattr(RoundReplies, "judge", watched)
    long = update_content(b"x" * 10**6, {"num-examples": EXAMPLES[2]})
    watcher, _ = run(lambda *_: long, federation__rounds=1)
    assert [line.bytes_up for line in watcher.clients if line.client == 2] == [10**6]
    assert len(kept) == 3
    assert max(kept) < 1000


def test_values_that_are_not_finite_are_refused_after_decoding() -> None:
    def poisoned(client: int, number: int, model: np.ndarray, _: Message) -> RecordDict:
        # The encoder refuses NaN, so they are written into a valid payload with a new checksum.
        update = np.full(43, 7.0, dtype=np.float32)
        blob = pack(update, terms.update_payload(LAYOUT, CONFIG, number, client))
        seven, nan = np.float32(7).tobytes(), np.float32(np.nan).tobytes()
        body = blob[:-8].replace(seven, nan)
        blob = body + hashlib.blake2b(body, digest_size=8).digest()
        return update_content(blob, {"num-examples": EXAMPLES[client], "loss": 1.0})

    watcher, _ = run(poisoned)
    assert watcher.lines[0].replies == {"accepted": 3, "not-finite": 1}
    assert np.isfinite(watcher.states[-1]).all()


def test_large_batchnorm_statistics_are_no_large_update() -> None:
    layout = Layout.from_tensors(
        {"a.weight": (4,), "n.running_mean": (2,), "n.running_var": (2,)},
        fine={"n.running_mean", "n.running_var"},
    )
    assert statistics_mask(layout).tolist() == [False] * 4 + [True] * 4
    # Variances are logarithms: e to the 16th is 9 million.
    update = np.array([1, 1, 1, 1, 5e5, 5e5, 16, 16], dtype=np.float32)

    def client_app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return Message(description_content(0, 5, ""), reply_to=message)
        content = update_content(
            pack(update, terms.update_payload(layout, CONFIG, 1, 0)),
            {"num-examples": 5, "loss": 1.0},
        )
        return Message(content, reply_to=message)

    watcher = Watcher()
    made_server(
        client_app, CONFIG.replace(federation__rounds=1), watcher, layout=layout, clients=1
    ).run()
    assert watcher.lines[0].replies == {"accepted": 1}
    assert watcher.states[0].tolist() == update.tolist()


@pytest.mark.parametrize("codec", ["trellis", "trellis-wiener"])  # without bias, and with
def test_statistics_behind_a_coded_downlink_are_what_the_clients_measured(codec: str) -> None:
    """Clients that measure the means -1 and 1 and the variance 0.5, wherever they begin."""
    layout = Layout.from_tensors(
        {"a.weight": (600,), "n.running_mean": (40,), "n.running_var": (40,)},
        fine={"n.running_mean", "n.running_var"},
    )
    config = CONFIG.replace(
        federation__rounds=4, downlink__codec=codec, downlink__bits=0.5, quant__bits="32,1,32"
    )
    visible: dict[int, Visible] = {}

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, 5, ""), reply_to=message)
        blob, values = read_model(message)
        number = int(values["round"])
        new = first_model(np.zeros(680, dtype=np.float32))
        received = receive(
            blob, config, layout, number, held=visible.get(client), first=lambda: new
        )
        visible[client] = received.visible
        measured = np.concatenate(
            [np.full(600, 0.1), np.full(40, 2.0 * client - 1), np.full(40, np.log(0.5))]
        )
        update = measured.astype(np.float32) - received.visible.state_N
        content = update_content(
            pack(update, terms.update_payload(layout, config, number, client)),
            {"num-examples": 5, "loss": 1.0},
        )
        return Message(content, reply_to=message)

    watcher = Watcher()
    made_server(client_app, config, watcher, layout=layout, clients=2).run()
    for state_N in watcher.states:
        assert state_N[600:640] == pytest.approx(np.zeros(40), abs=1e-5)
        assert state_N[640:] == pytest.approx(np.full(40, np.log(1.5)), abs=1e-4)


def test_a_round_below_its_quorum_is_abandoned_and_changes_nothing() -> None:
    watcher, server = run(error, federation__quorum=1.0)
    assert [line.outcome for line in watcher.lines] == ["abandoned", "abandoned"]
    assert watcher.lines[0].reason == "3 updates accepted, the quorum is 4"
    assert not watcher.states[-1].any()
    assert server.acknowledged == {}


def test_a_client_that_is_late_on_its_virtual_clock_is_left_out() -> None:
    def slow(client: int, number: int, model: np.ndarray, _: Message) -> RecordDict:
        update = np.full(43, 1.0, dtype=np.float32)
        return reply(client, number, update, **{"device-seconds": 99.0})

    watcher, _ = run(slow, federation__deadline_seconds=30.0)
    assert watcher.lines[0].replies == {"accepted": 3, "late": 1}
    assert watcher.lines[0].device_seconds == 30.0


def test_acknowledgements_name_the_last_round_that_was_taken() -> None:
    seen: list[tuple[int, int]] = []

    def sometimes(client: int, number: int, model: np.ndarray, message: Message) -> RecordDict:
        seen.append((number, int(read_model(message)[1]["acknowledged-round"])))
        return error() if number == 2 else honest(client, number, model, message)

    _, server = run(sometimes, federation__rounds=4)
    assert seen == [(1, 0), (2, 1), (3, 1), (4, 3)]
    assert server.acknowledged == {0: 4, 1: 4, 2: 4, 3: 4}


def test_paths_of_a_clients_own_machine_are_never_sent() -> None:
    def checking(client: int, number: int, model: np.ndarray, message: Message) -> RecordDict:
        keys = set(read_model(message)[1])
        assert not keys & set(terms.LOCAL_KEYS)
        assert "training.learning-rate" in keys
        return honest(client, number, model, message)

    watcher, _ = run(checking)
    assert watcher.lines[0].replies == {"accepted": 4}


def test_a_part_of_the_clients_is_chosen_by_seed_and_round() -> None:
    config = CONFIG.replace(federation__fraction=0.5, federation__over_selection=1.5)
    clients = list(range(100, 120))
    first, wanted = terms.select(clients, config, 1)
    assert wanted == 10
    assert len(first) == 15
    assert first == sorted(first)
    assert first == terms.select(clients, config, 1)[0]
    assert first != terms.select(clients, config, 2)[0]
    assert first != terms.select(clients, config.replace(seed=1), 1)[0]


def test_shares_are_rounded_up_and_what_floating_point_adds_is_none() -> None:
    assert [terms.rounded_up(share, 10) for share in (0, 0.01, 0.2, 0.3, 0.21)] == [0, 1, 2, 3, 3]
    assert [terms.rounded_up(share, 100) for share in (0.07, 0.55, 1.1)] == [7, 55, 110]
    config = CONFIG.replace(federation__fraction=0.5, federation__over_selection=1.1)
    assert len(terms.select(list(range(100)), config, 1)[0]) == 55


def test_seven_of_25_are_a_quorum_of_28_percent() -> None:
    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, 5, "laptop"), reply_to=message)
        if client >= 7:
            return error_reply(message, "the disk is full")
        update = pack(np.ones(43, dtype=np.float32), own(client, 1))
        return Message(update_content(update, {"num-examples": 5, "loss": 1.0}), reply_to=message)

    watcher = Watcher()
    config = CONFIG.replace(federation__rounds=1, federation__quorum=0.28)
    made_server(client_app, config, watcher, clients=25).run()
    assert watcher.lines[0].replies == {"accepted": 7, "error-reply": 18}
    assert watcher.lines[0].outcome == "committed"


def test_a_grid_without_usable_nodes_fails_with_the_first_reason() -> None:
    def client_app(message: Message, context: Context) -> Message:
        raise ValueError("no images here")

    server = made_server(client_app, CONFIG, Watcher(), clients=2)
    with pytest.raises(
        RunFailure, match="no client can take part: node 1: ValueError: no images here"
    ):
        server.run()


def test_the_wall_clock_guard_ends_a_round_and_marks_it() -> None:
    class Silent(LoopbackGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            return [m for m in super().pull_messages(message_ids) if m.metadata.src_node_id != 3]

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, EXAMPLES[client], ""), reply_to=message)
        number = int(read_model(message)[1]["round"])
        return Message(honest(client, number, np.zeros(43), message), reply_to=message)

    watcher = Watcher()
    server = made_server(
        client_app, CONFIG.replace(federation__timeout_seconds=0.5, federation__rounds=1), watcher
    )
    server.clients, _ = describe_clients(server.grid, 60)
    server.grid = Silent(client_app, [{}] * 4, {})
    server.run_round(1)
    assert watcher.lines[0].replies == {"accepted": 3, "no-reply": 1}
    assert not watcher.lines[0].reproducible


@pytest.mark.parametrize("code", [2, *OUTCOMES])
def test_a_round_in_which_a_machine_lost_a_reply_is_marked(code: int) -> None:
    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            return Message(description_content(client, EXAMPLES[client], ""), reply_to=message)
        if client == 2:
            return error_reply(message, "why", code=code)
        number = int(read_model(message)[1]["round"])
        return Message(honest(client, number, np.zeros(43), message), reply_to=message)

    watcher = Watcher()
    made_server(client_app, CONFIG.replace(federation__rounds=1), watcher).run()
    outcome = OUTCOMES.get(code, "error-reply")
    assert watcher.lines[0].replies == {"accepted": 3, outcome: 1}
    assert watcher.lines[0].reproducible == (outcome in ("error-reply", "needs-snapshot"))


class Superlink(LoopbackGrid):
    """Flower's SuperLink answers in place of node 3, which is not there, in its own name."""

    def _accept(self, message: Message, node: Node) -> None:
        if message.metadata.message_type == "train" and node.node_id == 3:
            answer = create_message_error_unavailable_res_message(message.metadata, "node_unavail")
            assert answer.metadata.src_node_id == 1
            self._finish(message.metadata.message_id, answer)
        else:
            super()._accept(message, node)


class InMemory(Leaving):
    """As Flower's grid of that name: messages get their ids, those not taken are left out."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        message_ids = Leaving.push_messages(self, messages)
        for message, message_id in zip(messages, message_ids, strict=True):
            message.metadata.__dict__["_message_id"] = message_id or "not taken"
        return list(filter(None, message_ids))


@pytest.mark.parametrize("grid", [Superlink, Leaving, InMemory])
def test_a_node_that_is_not_there_is_unreachable_and_what_it_was_not_sent_not_counted(
    grid: type[LoopbackGrid],
) -> None:
    watcher, _ = run(grid=grid)
    line = watcher.lines[0]
    assert line.replies == {"accepted": 3, "unreachable": 1}
    assert not line.reproducible
    assert watcher.clients[2].outcome == "unreachable"
    sent = 4 if grid is Superlink else 3
    assert line.bytes_down == sent * watcher.clients[0].bytes_down
    assert watcher.clients[2].bytes_down == (sent - 3) * watcher.clients[0].bytes_down
    assert "node" in watcher.clients[2].detail.lower()
