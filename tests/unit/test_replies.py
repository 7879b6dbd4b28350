"""The replies of one round with BatchNorm statistics, stale updates, and metrics left out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.config import RunConfig
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import BadReply, Description, Reply
from fedcunet.replies import RoundLine, RoundReplies
from fedcunet.terms import update_payload

LAYOUT = Layout.from_tensors(
    {"a.weight": (4,), "n.running_mean": (1,), "n.running_var": (1,)},
    fine={"n.running_mean", "n.running_var"},
)
CONFIG = RunConfig().replace(update__codec="float32", update__bits=32)
STATE = np.zeros(6, dtype=np.float32)  # a variance of 1


def judged(
    rows: list[list[float]],
    *,
    config: RunConfig = CONFIG,
    started: Mapping[int, int] | None = None,
    statistics: Mapping[int, list[float]] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> RoundReplies:
    """The updates of clients 0, 1, … with one example each in round 4."""
    facts: dict[str, Any] = {"num_examples": 1, "num_validation": 0, "num_test": 0}
    replies = RoundReplies(
        config=config,
        layout=LAYOUT,
        clients={
            client: Description(
                node_id=client + 1, client=client, device="", memory_bytes=0, **facts
            )
            for client in range(len(rows))
        },
        number=4,
        bytes_down=dict.fromkeys(range(len(rows)), 0),
        started=started or {},
        first_statistics={
            number: np.array(values, dtype=np.float32)
            for number, values in (statistics or {}).items()
        },
    )
    for client, row in enumerate(rows):
        began = replies.started.get(client, 4)
        blob = pack(np.array(row, np.float32), update_payload(LAYOUT, config, began, client))
        told = dict({"loss": 1.0} if metrics is None else metrics)
        reply = Reply(node_id=client + 1, blob=blob, num_examples=1, metrics=told)
        replies.judge(client, reply)
    return replies


def line_of(replies: RoundReplies) -> RoundLine:
    return replies.line("", 0.1, seconds=1.0, aggregate_seconds=0.5, reproducible=True)


def test_a_stale_step_is_shorter_and_stale_statistics_are_not() -> None:
    mean_N = judged([[1, 1, 1, 1, 3, 5]], started={0: 1}).mean(STATE, 1)
    assert mean_N == pytest.approx([0.5, 0.5, 0.5, 0.5, 3, 5], abs=1e-5)  # 1 / sqrt(1 + 3)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_statistics_go_where_clients_came_from_whichever_model_they_began(
    rule: str, tmp_path: Path
) -> None:
    # All three measured the mean 7 and the logarithm 8; two began in round 2, at 1 and 3.
    rows = [[1, 1, 1, 1, 6, 5], [1, 1, 1, 1, 2, 7], [1, 1, 1, 1, 6, 5]]
    config = CONFIG.replace(federation__aggregation=rule, federation__scratch_dir=str(tmp_path))
    replies = judged(rows, config=config, started={0: 2, 2: 2}, statistics={2: [1, 3], 4: [5, 1]})
    state = np.array([0, 0, 0, 0, 4, 2], dtype=np.float32)
    assert replies.mean(state, 1)[4:] == pytest.approx([3, 6], abs=1e-5)


def test_with_privacy_variances_are_averaged_without_the_spread_of_the_means() -> None:
    rows = [[0, 0, 0, 0, 1, np.log(2)], [0, 0, 0, 0, 3, np.log(8)]]
    private = CONFIG.replace(privacy__clip_norm=10.0)
    near = pytest.approx([0, 0, 0, 0, 2, np.log(4 + 1)], abs=1e-4)
    assert judged(rows).mean(STATE, 2) == near
    logarithm = (np.log(2) + np.log(8)) / 2
    found = judged(rows, config=private).mean(STATE, 2)
    assert found == pytest.approx([0, 0, 0, 0, 2, logarithm], abs=1e-6)


def test_a_statistic_beyond_all_measure_is_refused() -> None:
    replies = judged([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 2e9]])
    assert replies.mean(STATE, 1) == pytest.approx([0, 0, 0, 0, 1, 1], abs=1e-5)
    assert [line.outcome for line in replies.lines] == ["accepted", "too-large"]


def test_a_round_whose_clients_tell_no_loss_has_none() -> None:
    rows = [[0.0] * 6]
    assert line_of(judged(rows)).train_loss == 1.0
    assert line_of(judged(rows, metrics={})).train_loss is None


def test_virtual_time_is_that_of_all_who_are_waited_for_and_bytes_of_those_who_send() -> None:
    config = CONFIG.replace(federation__deadline_seconds=20.0)
    honest, huge = [0.0, 0, 0, 0, 0, 0], [2e9, 0, 0, 0, 0, 0]
    replies = judged([honest, huge], metrics={"device-seconds": 7.0})
    assert isinstance(replies.mean(STATE, 1), np.ndarray)
    assert [line.outcome for line in replies.lines] == ["accepted", "too-large"]
    assert line_of(replies).device_seconds == 7.0
    for bad, seconds in (("error-reply", 3.0), ("hung", 20.0)):
        replies = judged([honest, huge], config=config, metrics={"device-seconds": 3.0})
        replies.bytes_down = {0: 10, 1: 10}
        replies.lines.clear()
        reply = Reply(node_id=1, blob=b"x", num_examples=1, metrics={"device-seconds": 3.0})
        replies.judge(0, reply)
        replies.judge(1, BadReply(reason=bad, detail=""))
        line = line_of(replies)
        assert line.device_seconds == seconds
        assert (line.clients_up, line.bytes_up, line.clients_down) == (1, 1, 2)
    late = judged([honest], config=config, metrics={"device-seconds": 700.0})
    assert [one.outcome for one in late.lines] == ["late"]
    assert line_of(late).device_seconds == 20.0
