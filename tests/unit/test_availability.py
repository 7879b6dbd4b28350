"""Availability: who answers follows from the seed, and who does not costs no training."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedcunet import terms
from fedcunet.buffered import BufferedServer
from fedcunet.config import RunConfig
from fedcunet.devices import PROFILES, availability_of
from fedcunet.records import description_content, read_model
from fedcunet.rounds import Server
from tests.made_rounds import CONFIG, EXAMPLES, Watcher, made_server, reply

MAYBE = CONFIG.replace(federation__availability=True, federation__rounds=6)


@pytest.fixture(autouse=True)
def _a_fair_coin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "availability_of", lambda device: 0.5)


def run(config: RunConfig, kind: type[Server] = Server) -> tuple[Watcher, list[tuple[int, int]]]:
    """A run of four clients, and which of them trained in which round."""
    trained: list[tuple[int, int]] = []

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            content = description_content(client, EXAMPLES[client], "phone-low")
            return Message(content, reply_to=message)
        number = int(read_model(message)[1]["round"])
        trained.append((number, client))
        update_N = np.full(43, client + 1.0, dtype=np.float32)
        content = reply(client, number, update_N, **{"device-seconds": 2.0 + client})
        return Message(content, reply_to=message)

    watcher = Watcher()
    made_server(client_app, config, watcher, kind=kind).run()
    return watcher, sorted(trained)


def expected(config: RunConfig) -> set[tuple[int, int]]:
    rounds = range(1, config.federation.rounds + 1)
    return {(n, c) for n in rounds for c in range(4) if terms.is_available(config, n, c, "x")}


def test_clients_answer_as_often_as_their_devices_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "availability_of", availability_of)
    for device in ("phone-low", "phone-low@900MB", "edge-gpu"):
        there = [terms.is_available(MAYBE, 1, client, device) for client in range(20_000)]
        profile = PROFILES[device.split("@")[0]]
        assert np.mean(there) == pytest.approx(profile.availability, abs=0.01)
    # A real client may call its device what it likes.
    assert all(terms.is_available(MAYBE, 1, client, "a toaster") for client in range(100))
    off = MAYBE.replace(federation__availability=False)
    assert all(terms.is_available(off, 1, client, "phone-low") for client in range(100))


def test_who_answers_follows_from_seed_round_and_client() -> None:
    def drawn(seed: int, round_number: int) -> list[bool]:
        config = MAYBE.replace(seed=seed)
        return [terms.is_available(config, round_number, client, "x") for client in range(64)]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2) != drawn(1, 2)
    # A change would make old runs unrepeatable.
    assert [int(one) for one in drawn(0, 1)[:12]] == GOLDEN_SEED_0_ROUND_1


# From `drawn(0, 1)`.
GOLDEN_SEED_0_ROUND_1 = [1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]


def test_one_that_does_not_answer_gets_nothing_and_does_not_train() -> None:
    watcher, trained = run(MAYBE)
    assert set(trained) == expected(MAYBE)
    assert 0 < len(trained) < 24
    for line in watcher.clients:
        there = (line.round, line.client) in trained
        assert line.outcome == ("accepted" if there else "unavailable")
        assert (line.bytes_down > 0) == (line.bytes_up > 0) == there
    for line in watcher.lines:
        there = [client for number, client in trained if number == line.round]
        # The quorum is half of the four that are wanted.
        assert line.outcome == ("committed" if len(there) >= 2 else "abandoned")
        assert line.device_seconds == (2.0 + max(there) if there else 0.0)
        assert line.replies.get("unavailable", 0) == 4 - len(there)
        assert line.reproducible


def test_the_mean_is_that_of_those_that_answer() -> None:
    watcher, trained = run(MAYBE)
    state = 0.0
    for number, found in enumerate(watcher.states, start=1):
        there = [client for one, client in trained if one == number]
        if len(there) >= 2:
            weights = [EXAMPLES[client] for client in there]
            state += float(np.average([client + 1 for client in there], weights=weights))
        assert found == pytest.approx(np.full(43, state))


def test_with_a_deadline_the_server_waits_for_who_does_not_answer() -> None:
    watcher, _ = run(MAYBE.replace(federation__deadline_seconds=60.0))
    for line in watcher.lines:
        assert (line.device_seconds == 60.0) == ("unavailable" in line.replies)


def test_over_selection_makes_up_for_who_does_not_answer() -> None:
    few = MAYBE.replace(federation__fraction=0.5, federation__quorum=1.0)
    more = few.replace(federation__over_selection=2.0)
    committed = [
        sum(line.outcome == "committed" for line in run(config)[0].lines) for config in (few, more)
    ]
    assert committed[0] < committed[1]


def test_a_buffered_server_goes_on_and_asks_them_again() -> None:
    config = MAYBE.replace(
        federation__mode="buffered",
        federation__buffer_size=2,
        federation__seconds_per_example=1.0,
        federation__rounds=12,
    )
    watcher, trained = run(config, BufferedServer)
    away = [line for line in watcher.clients if line.outcome == "unavailable"]
    assert away
    assert all(line.bytes_down == 0 for line in away)
    for line in away:
        assert not terms.is_available(config, line.round, line.client, "x")
        assert (line.round, line.client) not in trained
        # Its place and itself are free again at the next step.
        later = [one.round for one in watcher.clients if one.client == line.client]
        assert line.round == 12 or line.round + 1 <= max(later)
    assert {client for _, client in trained} == {0, 1, 2, 3}
    assert len(watcher.lines) == 12
    # A step counts answers, not those that are away; it makes do with who is at work.
    for line in watcher.lines:
        assert line.replies.get("accepted", 0) <= 2
    assert sum(line.outcome == "committed" for line in watcher.lines) > 6


def test_a_buffered_server_with_nobody_at_work_abandons_the_step_and_its_clock_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(terms, "availability_of", lambda device: 0.0)
    config = MAYBE.replace(federation__mode="buffered", federation__seconds_per_example=1.0)
    watcher, trained = run(config, BufferedServer)
    assert trained == []
    assert [line.reason for line in watcher.lines] == ["0 updates accepted, the quorum is 1"] * 6
    assert [line.device_seconds for line in watcher.lines] == [0.0] * 6
    assert {line.outcome for line in watcher.clients} == {"unavailable"}


def test_privacy_counts_nothing_for_who_was_sent_nothing() -> None:
    private = {"privacy__clip_norm": 1.0, "privacy__noise_multiplier": 1.0}
    config = MAYBE.replace(**private, federation__rounds=1)
    counted: list[list[int]] = []

    class Counting(Server):
        def _end_round(self, *arguments: Any, **named: Any) -> None:
            assert self.accountant is not None
            count = self.accountant.count
            self.accountant.count = lambda asked, summed, wanted: (  # type: ignore[method-assign]
                counted.append(sorted(asked)),
                count(asked, summed, wanted),
            )[1]
            Server._end_round(self, *arguments, **named)

    _, trained = run(config, Counting)
    assert counted == [[client for _, client in trained]]
    assert counted != [[0, 1, 2, 3]]
