"""The round loop against clients of every kind: honest, wrong, hostile, late, silent."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedcunet import rounds, terms
from fedcunet.aggregation import statistics_mask
from fedcunet.client_evaluation import ClientEvaluation
from fedcunet.config import RunConfig
from fedcunet.downlink import Visible, receive
from fedcunet.errors import RunFailure
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import (
    UNKNOWN_CLIENT,
    description_content,
    evaluation_content,
    read_model,
    update_content,
)
from fedcunet.replies import ClientLine, RoundLine
from fedcunet.saved import Saved
from simulations.loopback import LoopbackGrid

LAYOUT = Layout.from_tensors({"a.weight": (40,), "b.bias": (3,)}, fine={"b.bias"})
CONFIG = RunConfig().replace(
    update__codec="float32", update__bits=32, federation__rounds=2, federation__clients=4
)
EXAMPLES = (10, 20, 30, 40)
# Of a parcel with one payload: 4 + 1 + 1 + 2 + 16, and the payload's length.
HEAD_BYTES = 24 + 4

Reply = Callable[[int, int, np.ndarray, Message], RecordDict | None]


def no_model() -> Visible:
    raise AssertionError("a whole model needs no other")


class Watcher:
    """Keeps what the round loop tells."""

    def __init__(self) -> None:
        self.lines: list[RoundLine] = []
        self.clients: list[ClientLine] = []
        self.states: list[np.ndarray] = []
        self.evaluations: list[ClientEvaluation | None] = []
        self.tests: list[ClientEvaluation | None] = []

    def client_done(self, round_number: int, done: int, total: int) -> None:
        assert 1 <= done <= total

    def round_done(
        self,
        line: RoundLine,
        clients: list[ClientLine],
        state_N: np.ndarray,
        evaluation: ClientEvaluation | None,
    ) -> None:
        self.evaluations.append(evaluation)
        self.lines.append(line)
        self.clients += clients
        self.states.append(state_N.copy())

    def save(self, parts: dict[str, Saved]) -> None:
        self.saved = parts

    def tested(self, evaluation: ClientEvaluation | None) -> None:
        self.tests.append(evaluation)


def honest(client: int, round_number: int, model: np.ndarray, message: Message) -> RecordDict:
    """The update `client + 1` everywhere."""
    return reply(client, round_number, np.full(43, client + 1.0, dtype=np.float32))


def reply(client: int, round_number: int, update: np.ndarray, **metrics: Any) -> RecordDict:
    expected = terms.update_payload(LAYOUT, CONFIG, round_number, client)
    values = {"num-examples": EXAMPLES[client], "loss": 1.0, "device-seconds": 1.0} | metrics
    return update_content(pack(update, expected), values)


def run(
    odd: Reply | None = None, config: RunConfig = CONFIG, **changes: Any
) -> tuple[Watcher, rounds.Server]:
    """Two rounds of four clients, of which client 2 answers as `odd` says."""

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            content = description_content(client, EXAMPLES[client], "laptop")
            return Message(content, reply_to=message)
        blob, values = read_model(message)
        number = int(values["round"])
        received = receive(blob, CONFIG, LAYOUT, number, held=None, first=no_model)
        answer = odd if odd is not None and client == 2 else honest
        content = answer(client, number, received.visible.state_N, message)
        return Message(content, reply_to=message)

    config = config.replace(**changes)
    watcher = Watcher()
    server = rounds.Server(
        grid=LoopbackGrid(client_app, [{}] * 4, {}),
        config=config,
        layout=LAYOUT,
        state_N=np.zeros(43, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=watcher,
    )
    server.run()
    return watcher, server


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


def error(*_: Any) -> RecordDict:
    raise ValueError("the disk is full")


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


def test_large_batchnorm_variances_are_no_large_update() -> None:
    layout = Layout.from_tensors(
        {"a.weight": (4,), "n.running_mean": (2,), "n.running_var": (2,)},
        fine={"n.running_mean", "n.running_var"},
    )
    assert statistics_mask(layout).tolist() == [False] * 4 + [True] * 4
    update = np.array([1, 1, 1, 1, 5e5, 5e5, 5e5, 5e5], dtype=np.float32)

    def client_app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return Message(description_content(0, 5, ""), reply_to=message)
        content = update_content(
            pack(update, terms.update_payload(layout, CONFIG, 1, 0)),
            {"num-examples": 5, "loss": 1.0},
        )
        return Message(content, reply_to=message)

    watcher = Watcher()
    rounds.Server(
        grid=LoopbackGrid(client_app, [{}], {}),
        config=CONFIG.replace(federation__rounds=1),
        layout=layout,
        state_N=np.zeros(8, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=watcher,
    ).run()
    assert watcher.lines[0].replies == {"accepted": 1}
    assert watcher.states[0].tolist() == update.tolist()


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


def test_a_grid_without_usable_nodes_fails_with_the_first_reason() -> None:
    def client_app(message: Message, context: Context) -> Message:
        raise ValueError("no images here")

    server = rounds.Server(
        grid=LoopbackGrid(client_app, [{}] * 2, {}),
        config=CONFIG,
        layout=LAYOUT,
        state_N=np.zeros(43, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=Watcher(),
    )
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
    server = rounds.Server(
        grid=LoopbackGrid(client_app, [{}] * 4, {}),
        config=CONFIG.replace(federation__timeout_seconds=0.5, federation__rounds=1),
        layout=LAYOUT,
        state_N=np.zeros(43, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=watcher,
    )
    server.clients, _ = rounds.describe_clients(server.grid, 60)
    server.grid = Silent(client_app, [{}] * 4, {})
    server.run_round(1)
    assert watcher.lines[0].replies == {"accepted": 3, "no-reply": 1}
    assert not watcher.lines[0].reproducible


def evaluated(odd: Callable[[Message], RecordDict] | None = None, **changes: Any) -> Watcher:
    """As `run`; clients 1 to 3 keep 1 to 3 images and score 10, 20, 30, client 2 as `odd` says.

    Client 3 keeps 5 more for the test and scores 7.
    """

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        kind = message.metadata.message_type
        if kind == "query":
            content = description_content(
                client,
                EXAMPLES[client],
                "",
                num_validation=client,
                num_test=5 if client == 3 else 0,
            )
        elif kind == "evaluate":
            blob, values = read_model(message)
            # The model after the round: each adds the mean of 1 to 4, weighted by examples.
            state_N = np.frombuffer(blob, dtype=np.float32)
            assert state_N == pytest.approx(np.full(43, 3.0 * int(values["round"])))
            assert values["client"] == client
            percent, count = (7.0, 5) if values["part"] == "test" else (10.0 * client, client)
            content = evaluation_content({"percent": percent, "num-examples": count})
            content = odd(message) if odd is not None and client == 2 else content
        else:
            content = honest(client, int(read_model(message)[1]["round"]), np.zeros(43), message)
        return Message(content, reply_to=message)

    watcher = Watcher()
    rounds.Server(
        grid=LoopbackGrid(client_app, [{}] * 4, {}),
        config=CONFIG.replace(**changes),
        layout=LAYOUT,
        state_N=np.zeros(43, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=watcher,
    ).run()
    return watcher


def test_clients_that_keep_images_back_evaluate_the_model_after_the_round() -> None:
    watcher = evaluated()
    training, _ = run()
    assert watcher.states[-1].tolist() == training.states[-1].tolist()
    assert watcher.lines[0].bytes_down == training.lines[0].bytes_down
    evaluation = watcher.evaluations[0]
    assert evaluation is not None
    assert [score.client for score in evaluation.scores] == [1, 2, 3]
    figures = evaluation.figures(lower_is_better=True)
    assert figures["client_mean_percent"] == pytest.approx((10 + 2 * 20 + 3 * 30) / 6)
    assert figures["client_worst_percent"] == 30
    assert figures["client_tenth_percent"] == pytest.approx(28)
    assert figures["client_spread_percent"] == pytest.approx(np.std([10, 20, 30]))
    assert figures["client_evaluations"] == {"accepted": 3}
    assert figures["evaluation_bytes_down"] == 3 * 4 * 43
    content = evaluation_content({"percent": 10.0, "num-examples": 1})
    assert figures["evaluation_bytes_up"] == 3 * content["metrics"].count_bytes()
    shares = evaluation.figures(lower_is_better=False)
    assert (shares["client_worst_percent"], shares["client_tenth_percent"]) == (10, 12)


def test_clients_evaluate_at_the_rounds_that_are_evaluated_and_none_without_images() -> None:
    watcher = evaluated(federation__rounds=5, federation__evaluate_every=2)
    assert [e is not None for e in watcher.evaluations] == [False, True, False, True, True]
    assert run()[0].evaluations == [None, None]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (lambda _: error(), "error-reply"),
        (lambda _: RecordDict(), "malformed-reply"),
        (lambda _: update_content(b"", {"num-examples": 2, "percent": 1.0}), "malformed-reply"),
        (lambda _: evaluation_content({"percent": 1.0, "num-examples": 10**6}), "bad-num-examples"),
        (lambda _: evaluation_content({"percent": 1.0}), "bad-num-examples"),
        (lambda _: evaluation_content({"percent": float("nan"), "num-examples": 2}), "bad-metrics"),
        (lambda _: evaluation_content({"percent": -1.0, "num-examples": 2}), "bad-metrics"),
        (lambda _: evaluation_content({"num-examples": 2}), "bad-metrics"),
    ],
)
def test_a_wrong_evaluation_costs_only_itself(odd: Any, reason: str) -> None:
    watcher = evaluated(odd)
    assert watcher.lines[0].replies == {"accepted": 4}
    evaluation = watcher.evaluations[0]
    assert evaluation is not None
    figures = evaluation.figures(lower_is_better=True)
    assert figures["client_evaluations"] == {"accepted": 2, reason: 1}
    assert figures["client_mean_percent"] == pytest.approx((10 + 3 * 30) / 4)


def test_when_every_evaluation_fails_there_is_no_figure() -> None:
    scores = ClientEvaluation(part="validation", scores=())
    assert scores.figures(lower_is_better=True)["client_worst_percent"] is None


def described(said: list[int], admitted: dict[int, int] | None) -> tuple[list[int], list[str]]:
    """The ids that nodes 1, 2, ... get, and who is left out, if node n says the n-th id."""

    def client_app(message: Message, context: Context) -> Message:
        return Message(description_content(said[context.node_id - 1], 5, ""), reply_to=message)

    grid = LoopbackGrid(client_app, [{}] * len(said), {})
    clients, left_out = rounds.describe_clients(grid, 60, admitted)
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


def test_the_final_model_is_tested_once_by_the_clients_that_keep_images_for_it() -> None:
    watcher = evaluated(federation__rounds=2)
    assert len(watcher.lines) == 2
    [test] = watcher.tests
    assert test is not None
    assert [(score.round, score.client, score.percent) for score in test.scores] == [(2, 3, 7.0)]
    figures = test.figures(lower_is_better=True)
    assert figures["client_test_mean_percent"] == 7.0
    assert figures["client_tests"] == {"accepted": 1}
    assert run()[0].tests == [None]
