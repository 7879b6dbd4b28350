"""Who gets which messages and what a fault costs, with a Ray that the test plays itself."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from fedcunet.errors import RunFailure
from fedcunet.identity import set_task_identity, with_message_id
from fedcunet.records import BadReply, Reply, model_content, read_update, update_content
from simulations import ray_pool
from simulations.ray_pool import MAX_FAILED_STARTS, Task, WorkerPool
from simulations.ray_worker import CALL_SECONDS, Answers, Request, pack_reply

from flwr.app import Message  # isort: skip  (after fedcunet.environment)

DIED = "the worker process died"


class Result:
    """Of a call: unknown until it has a value, which may be an error."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Actor:
    """A worker that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.result = Result()
        self.answer = SimpleNamespace(remote=self._answer)

    def _answer(self, requests: Sequence[Request], references: dict[str, Any]) -> Result:
        self.asked = [request.message for request in requests]
        self.result = Result()
        return self.result

    def reply(self, count: int, *, seconds: float = 0.0, outgrown: bool = False) -> None:
        """Answers the first `count` messages that it was asked."""
        replies = [
            pack_reply(
                Message(update_content(b"update", {"num-examples": 1}), reply_to=message), 10**6
            )
            for message in self.asked[:count]
        ]
        self.result.value = Answers(replies, seconds, 10**9, outgrown)

    def die(self, error: RayError | None = None) -> None:
        """Leaves the call without an answer."""
        self.result.value = error or RayActorError()


class Stage:
    """Ray's part: the actors that were started and killed; the first `failing` die at once."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.failing = 0

    def start(self) -> tuple[Actor, Result]:
        self.actors.append(Actor())
        failed = len(self.actors) <= self.failing
        return self.actors[-1], Result(RayActorError() if failed else len(self.actors))

    def wait(
        self, results: list[Result], num_returns: int, timeout: float
    ) -> tuple[list[Result], list[Result]]:
        done = [result for result in results if result.value is not None]
        return done[:num_returns], [result for result in results if result not in done]

    def get(self, result: Result) -> Any:
        if isinstance(result.value, Exception):
            raise result.value
        return result.value

    def kill(self, actor: Actor, no_restart: bool) -> None:
        self.killed.append(actor)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(ray_pool, "ray", stage)
    set_task_identity(1, 0)
    return stage


def pool_of(stage: Stage, num_workers: int = 1, message_seconds: float = 60.0) -> WorkerPool:
    return WorkerPool(stage.start, num_workers, message_seconds=message_seconds)


def push(pool: WorkerPool, *names: str) -> None:
    """Queues messages of these ids, all of which fit into one call, and starts on them."""
    for name in names:
        message = Message(model_content(b"model", {}), dst_node_id=1, message_type="train")
        pool.add(Task(Request(with_message_id(message, name), 1, []), {}))
    pool._call_messages = 64
    pool.assign()


def ids(actor: Actor) -> list[str]:
    return [message.metadata.message_id for message in actor.asked]


def collected(pool: WorkerPool) -> dict[str, Reply | BadReply]:
    replies = {task.message_id: read_update(reply) for task, reply in pool.collect(timeout=0)}
    pool.assign()
    return replies


def test_workers_that_die_as_they_start_are_replaced_counted_and_cost_no_message(
    stage: Stage,
) -> None:
    stage.failing = MAX_FAILED_STARTS - 1
    pool = pool_of(stage)
    push(pool, "a")
    for _ in range(MAX_FAILED_STARTS):
        assert collected(pool) == {}
    assert pool.faults == {f"while it started: {DIED}": MAX_FAILED_STARTS - 1}
    assert stage.killed == stage.actors[:-1]
    assert ids(stage.actors[-1]) == ["a"]
    stage.actors[-1].reply(1)
    assert isinstance(collected(pool)["a"], Reply)


def test_too_many_failed_starts_in_a_row_end_the_run_and_leave_no_worker(stage: Stage) -> None:
    stage.failing = MAX_FAILED_STARTS
    pool = pool_of(stage)
    for _ in range(MAX_FAILED_STARTS - 2):
        collected(pool)
    with pytest.raises(RunFailure, match=f"{MAX_FAILED_STARTS} workers in a row did not start"):
        collected(pool)
    pool.close()
    assert stage.killed == stage.actors


def test_messages_whose_worker_died_are_asked_once_more_each_alone(stage: Stage) -> None:
    pool = pool_of(stage)
    push(pool, "a", "b", "c")
    stage.actors[0].die()
    assert collected(pool) == {}
    collected(pool)
    assert ids(stage.actors[1]) == ["a"]
    stage.actors[1].die()
    assert collected(pool) == {"a": BadReply(reason="crashed", detail=DIED)}
    collected(pool)
    assert ids(stage.actors[2]) == ["b"]
    stage.actors[2].reply(1)
    assert list(collected(pool)) == ["b"]
    assert ids(stage.actors[2]) == ["c"]
    assert pool.faults == {DIED: 2}


def test_a_worker_that_ray_ends_for_want_of_memory_is_counted_as_that(stage: Stage) -> None:
    pool = pool_of(stage)
    push(pool, "a")
    for actor in range(2):
        stage.actors[actor].die(OutOfMemoryError("the node was running\nlow on memory"))
        found = collected(pool)
        collected(pool)
    ended = "the worker process was ended by Ray: the machine ran out of memory"
    assert found == {"a": BadReply(reason="out-of-memory", detail=ended)}


def test_one_that_is_asked_again_is_never_in_the_call_of_those_before_it(stage: Stage) -> None:
    pool = pool_of(stage)
    push(pool, "a", "b", "c")
    pool._queue.clear()
    first, second, third = pool.workers[0].tasks
    second.attempts = 1
    pool._queue = {task.message_id: task for task in (first, second, third)}
    assert [[task.message_id for task in pool._next_tasks()] for _ in range(3)] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_a_client_that_hangs_by_itself_is_not_asked_again(stage: Stage) -> None:
    pool = pool_of(stage, message_seconds=-1.0)
    collected(pool)
    push(pool, "a")
    found = collected(pool)
    assert found == {"a": BadReply(reason="hung", detail="no reply within -1 s")}
    assert pool.num_calls == 1
    assert not pool.references()


def test_those_that_shared_a_call_with_a_client_that_hangs_are_asked_again(stage: Stage) -> None:
    pool = pool_of(stage, message_seconds=-1.0)
    push(pool, "a", "b")
    assert collected(pool) == {}
    collected(pool)
    assert ids(stage.actors[1]) == ["a"]


def test_those_that_shared_a_call_with_a_forgotten_message_are_asked_again(stage: Stage) -> None:
    pool = pool_of(stage)
    push(pool, "a", "b", "c")
    push(pool, "d")
    pool.drop({"b"})
    collected(pool)
    assert ids(stage.actors[1]) == ["a", "c", "d"]
    assert pool.faults == {"the round did not wait for it": 1}


def test_what_a_call_has_not_come_to_is_asked_before_all_else(stage: Stage) -> None:
    pool = pool_of(stage)
    push(pool, "a", "b", "c")
    push(pool, "d")
    stage.actors[0].reply(1, seconds=CALL_SECONDS)
    assert list(collected(pool)) == ["a"]
    assert ids(stage.actors[0]) == ["b"]  # one took as long as a call may


def test_a_worker_that_has_outgrown_its_share_is_replaced_and_its_replies_count(
    stage: Stage,
) -> None:
    pool = pool_of(stage)
    push(pool, "a", "b")
    stage.actors[0].reply(2, outgrown=True)
    assert all(isinstance(reply, Reply) for reply in collected(pool).values())
    assert stage.killed == stage.actors[:1]
    assert pool.faults == {"it had outgrown its share of memory": 1}
    assert pool.peak_worker_bytes == 10**9
