"""Clients evaluate the global model on images that they keep back; a wrong answer costs itself."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from clients.app import _dataset, _own_parts, _scorable
from fedcunet.client_evaluation import ClientEvaluation
from fedcunet.config import RunConfig
from fedcunet.records import (
    description_content,
    evaluation_content,
    read_model,
    update_content,
)
from simulations.loopback import LoopbackGrid
from tests.made_rounds import (
    CONFIG,
    EXAMPLES,
    Leaving,
    Watcher,
    error,
    honest,
    made_server,
    run,
)


def evaluated(
    odd: Callable[[Message], RecordDict] | None = None,
    grid: type[LoopbackGrid] = LoopbackGrid,
    held_back: float = 0.1,
    **changes: Any,
) -> Watcher:
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
    fractions = {
        "federation__validation_fraction": held_back,
        "federation__test_fraction": held_back,
    }
    made_server(client_app, CONFIG.replace(**fractions, **changes), watcher, grid=grid).run()
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
    # Where the setting keeps nothing back, nobody is asked, whatever clients say that they keep.
    assert evaluated(held_back=0).evaluations == [None, None]


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


def test_a_client_that_has_left_is_sent_no_model_to_evaluate() -> None:
    class Left(Leaving):
        kind = "evaluate"

    evaluation = evaluated(grid=Left).evaluations[0]
    assert evaluation is not None
    assert evaluation.outcomes == {"accepted": 2, "unreachable": 1}
    assert evaluation.bytes_down == 2 * 4 * 43


def test_when_every_evaluation_fails_there_is_no_figure() -> None:
    scores = ClientEvaluation(part="validation", scores=())
    assert scores.figures(lower_is_better=True)["client_worst_percent"] is None


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


def test_images_that_cannot_be_scored_are_none_of_those_kept_back(make_300w: Any) -> None:
    root = make_300w({"afw": [f"{number}_1.jpg" for number in range(4)]})
    config = RunConfig().replace(
        data__name="300w",
        data__root=str(root),
        data__train_subset="afw",
        federation__validation_fraction=0.5,
    )
    context: Any = SimpleNamespace(node_config={"num-partitions": 1, "partition-id": 0})
    before = _own_parts(config, context)
    assert (len(before.train), len(before.validation)) == (2, 2)
    odd = sorted((root / "afw").glob("*.pts"))[before.validation[0]]
    lines = odd.read_text().splitlines()
    lines[3 + 45] = lines[3 + 36]
    odd.write_text("\n".join(lines))
    _dataset.cache_clear()
    _scorable.cache_clear()
    after = _own_parts(config, context)
    assert after.train.tolist() == before.train.tolist()
    assert after.validation.tolist() == before.validation[1:].tolist()
