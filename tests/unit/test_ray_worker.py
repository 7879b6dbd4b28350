"""A Ray worker's calls and what it says of its memory, in this process; nothing starts Ray."""

import os
from pathlib import Path

import pytest

from fedcunet.records import model_content, read_update
from simulations import ray_worker
from simulations.ray_worker import Answers, ClientWorker, Request, own_memory_bytes, unpack_reply
from simulations.tasks import Node

from flwr.app import Message  # isort: skip  (after fedcunet.environment)


def answers(
    share_bytes: int, free: int, monkeypatch: pytest.MonkeyPatch, num_messages: int = 1
) -> Answers:
    from fedcunet.identity import set_task_identity

    set_task_identity(1, 0)
    monkeypatch.setattr(ray_worker, "free_memory_bytes", lambda: free)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    worker = ClientWorker()
    node = Node(run_id=1, node_id=3, node_config={}, run_config={})
    folder = str(Path.cwd())
    process = worker.set_up("tests.toy_client_app:app", {3: node}, 1, share_bytes, folder)
    assert process == os.getpid()
    message = Message(model_content(b"model", {}), dst_node_id=3, message_type="train")
    return worker.answer([Request(message, 3, [])] * num_messages, {})


def test_a_worker_over_its_share_is_outgrown_only_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert answers(10**6, 10**5, monkeypatch).outgrown
    assert not answers(10**6, 10**9, monkeypatch).outgrown
    assert not answers(10**12, 10**5, monkeypatch).outgrown


def test_an_answer_carries_reply_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = answers(10**12, 10**12, monkeypatch)
    (packed,) = answer.replies
    assert len(read_update(unpack_reply(packed)).blob) == 32
    assert answer.seconds > 0
    assert answer.worker_bytes == pytest.approx(own_memory_bytes(), rel=0.2)


def test_a_call_ends_when_its_time_is_over_or_its_replies_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_worker, "CALL_SECONDS", 1e6)
    assert len(answers(10**12, 10**12, monkeypatch, 3).replies) == 3
    size = len(answers(10**12, 10**12, monkeypatch).replies[0].pickled)
    with monkeypatch.context() as patch:
        patch.setattr(ray_worker, "CALL_BYTES", size + size // 2)
        assert len(answers(10**12, 10**12, monkeypatch, 3).replies) == 2
    monkeypatch.setattr(ray_worker, "CALL_SECONDS", 0.0)
    assert len(answers(10**12, 10**12, monkeypatch, 3).replies) == 1
