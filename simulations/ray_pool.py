"""The workers of the Ray engine: who gets which messages, and what a fault costs.

A worker that dies, hangs or grows too large is replaced, and the rest of the round goes on.
Whose fault it was is not known while a call carries several messages, or when the machine ran out
of memory: the messages of that call are asked once more, each in a call of its own. So a fault
that comes from outside costs time and no reply, and a client that ends its worker again and again
costs its own reply and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from flwr.app import Message
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedcunet.errors import RunFailure
from fedcunet.records import (
    CLIENT_APP_CRASHED,
    CLIENT_APP_HUNG,
    OUT_OF_MEMORY,
    error_reply,
    one_line,
)
from simulations.ray_worker import CALL_SECONDS, Answers, Packed, Request, unpack_reply
from simulations.tasks import describe

logger = logging.getLogger(__name__)

# A worker imports torch and the client app; far more than it takes on a slow disk.
START_SECONDS = 180.0

# Workers that may die in a row while they start, before the run is given up.
MAX_FAILED_STARTS = 5

# Messages in one call: beyond this nothing is saved.
MAX_CALL_MESSAGES = 64

# Times that a message is asked, if its worker ends meanwhile.
MAX_ATTEMPTS = 2


@dataclass(eq=False, slots=True)
class Task:
    """A message on its way."""

    request: Request
    references: dict[str, Any]  # of its blobs, in the object store
    attempts: int = 0  # calls in which its worker ended

    @property
    def message_id(self) -> str:
        """The id of its message."""
        return str(self.request.message.metadata.message_id)


@dataclass(eq=False, slots=True)
class Worker:
    """An actor and what it is doing: with a `result` and no tasks it starts."""

    actor: Any
    result: Any
    deadline: float  # on the monotonic clock, of what it is doing
    tasks: list[Task] = field(default_factory=list)
    process: int = 0  # its id, on its machine


class WorkerPool:
    """Answers tasks in the order of arrival, as workers get free."""

    def __init__(
        self,
        start: Callable[[], tuple[Any, Any]],
        num_workers: int,
        *,
        message_seconds: float,
    ) -> None:
        """Start the workers and wait for all of them.

        Args:
            start: starts a worker; its actor, and the reference that its process id will come by.
            num_workers: how many.
            message_seconds: a worker that has been at one message for longer is ended.

        Raises:
            RunFailure: they do not start; one line.
        """
        self._start = start
        self._message_seconds = message_seconds
        self._queue: dict[str, Task] = {}  # by message id
        self._call_messages = 1  # what a call carries at most, as far as is known
        self._failed_starts = 0
        self.num_calls = 0  # of workers, so far
        self.faults: Counter[str] = Counter()  # workers that were replaced, by the reason
        self.peak_worker_bytes = 0  # the most that a worker was seen to hold
        self.workers: list[Worker] = []
        try:
            for _ in range(num_workers):
                self.workers.append(self._start_worker())
            self._wait_for_start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        self._queue.clear()
        for worker in self.workers:
            ray.kill(worker.actor, no_restart=True)
        self.workers = []

    def add(self, task: Task) -> None:
        """Queue a task; `assign` starts on it."""
        self._queue[task.message_id] = task

    def references(self) -> set[str]:
        """Names of the blobs that tasks still need."""
        tasks = [*self._queue.values(), *(task for one in self.workers for task in one.tasks)]
        return {key for task in tasks for key in task.references}

    def drop(self, message_ids: set[str]) -> None:
        """Stop working on these messages."""
        for message_id in message_ids:
            self._queue.pop(message_id, None)
        for worker in list(self.workers):
            others = [task for task in worker.tasks if task.message_id not in message_ids]
            if len(others) < len(worker.tasks):
                # A client that is still at it may never end: its worker must not be lost to
                # later rounds.
                self._replace(worker, "the round did not wait for it")
                self._queue_first(others)

    def assign(self) -> None:
        """Give the oldest tasks to the workers that have nothing to do."""
        for worker in self.workers:
            if worker.result is None and self._queue:
                worker.tasks = self._next_tasks()
                references: dict[str, Any] = {}
                for task in worker.tasks:
                    references |= task.references
                requests = [task.request for task in worker.tasks]
                worker.deadline = time.monotonic() + self._message_seconds + CALL_SECONDS
                worker.result = worker.actor.answer.remote(requests, references)
                self.num_calls += 1

    def _next_tasks(self) -> list[Task]:
        """The tasks of the next call: few where they take long, or where few are left."""
        fair = -(-len(self._queue) // len(self.workers))
        tasks: list[Task] = []
        oldest = islice(self._queue.values(), min(self._call_messages, fair))
        for task in list(oldest):
            if task.attempts and tasks:
                break
            tasks.append(self._queue.pop(task.message_id))
            if task.attempts:  # alone: then it is known whose fault it is
                break
        return tasks

    def collect(self, timeout: float) -> list[tuple[Task, Message]]:
        """Replies to what workers have finished, after at most `timeout` seconds."""
        busy = {worker.result: worker for worker in self.workers if worker.result is not None}
        if not busy:
            return []
        first_deadline = min(worker.deadline for worker in busy.values())
        wait = max(0.0, min(timeout, first_deadline - time.monotonic()))
        done, _ = ray.wait(list(busy), num_returns=1, timeout=wait)
        if done and len(busy) > 1:  # and what else is there by now
            done, _ = ray.wait(list(busy), num_returns=len(busy), timeout=0)
        replies: list[tuple[Task, Message]] = []
        for result in done:
            worker = busy.pop(result)
            replies += self._collect_call(worker) if worker.tasks else self._collect_start(worker)
        for worker in busy.values():
            if time.monotonic() > worker.deadline:
                replies += self._end_late(worker)
        return replies

    def _collect_start(self, worker: Worker) -> list[tuple[Task, Message]]:
        try:
            worker.process = ray.get(worker.result)
        except RayError as error:
            if isinstance(error, RayTaskError):
                raise RunFailure(f"a worker does not start: {reason_of(error)}") from error
            self._start_again(worker, reason_of(error))
        else:
            self._failed_starts = 0
            worker.result = None
        return []

    def _start_again(self, worker: Worker, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RunFailure(f"{self._failed_starts} workers in a row did not start: {reason}")
        self._replace(worker, f"while it started: {reason}")

    def _collect_call(self, worker: Worker) -> list[tuple[Task, Message]]:
        tasks, result = worker.tasks, worker.result
        try:
            answers: Answers = ray.get(result)
        except RayError as error:
            if isinstance(error, RayTaskError):
                # Not the app, whose errors are replies, but our side of the worker, which lives.
                worker.tasks, worker.result = [], None
            else:
                self._replace(worker, reason_of(error))
            code = OUT_OF_MEMORY if _memory_ran_out(error) else CLIENT_APP_CRASHED
            return self._ask_again(tasks, reason_of(error), code)
        worker.tasks, worker.result = [], None
        num_done = len(answers.replies)
        self._queue_first(tasks[num_done:])
        if num_done < len(tasks):
            self._call_messages = num_done
        elif answers.seconds < CALL_SECONDS / 2:
            self._call_messages = min(MAX_CALL_MESSAGES, 2 * num_done)
        self.peak_worker_bytes = max(self.peak_worker_bytes, answers.worker_bytes)
        if answers.outgrown:
            self._replace(worker, "it had outgrown its share of memory")
        return [
            (task, _read(packed, task))
            for task, packed in zip(tasks, answers.replies, strict=False)
        ]

    def _end_late(self, worker: Worker) -> list[tuple[Task, Message]]:
        """Replaces a worker that has been at a message, or at its start, for too long."""
        tasks = worker.tasks
        if not tasks:
            self._start_again(worker, f"nothing after {START_SECONDS:.0f} s")
            return []
        reason = f"no reply within {self._message_seconds:g} s"
        self._replace(worker, reason)
        if len(tasks) == 1:  # it would hang again
            tasks[0].attempts = MAX_ATTEMPTS
        return self._ask_again(tasks, reason, CLIENT_APP_HUNG)

    def _ask_again(self, tasks: list[Task], reason: str, code: int) -> list[tuple[Task, Message]]:
        """Queues the tasks of a call that failed; error replies to those that had their chances."""
        replies = []
        for task in tasks:
            task.attempts += 1
            if task.attempts >= MAX_ATTEMPTS:
                reply = error_reply(task.request.message, reason, code=code)
                logger.warning("node %d: %s", task.request.node_id, reason)
                replies.append((task, reply))
        self._queue_first([task for task in tasks if task.attempts < MAX_ATTEMPTS])
        return replies

    def _queue_first(self, tasks: Sequence[Task]) -> None:
        """Tasks that were queued before: they are older than all others."""
        if tasks:
            self._queue = {task.message_id: task for task in tasks} | self._queue

    def _start_worker(self) -> Worker:
        actor, result = self._start()
        return Worker(actor, result, deadline=time.monotonic() + START_SECONDS)

    def _replace(self, worker: Worker, reason: str) -> None:
        """A fresh worker in the place of one that died or is of no more use."""
        logger.info("worker %d is replaced: %s", worker.process, reason)
        self.faults[reason] += 1
        ray.kill(worker.actor, no_restart=True)
        self.workers[self.workers.index(worker)] = self._start_worker()

    def _wait_for_start(self) -> None:
        results = [worker.result for worker in self.workers]
        done, late = ray.wait(results, num_returns=len(results), timeout=START_SECONDS)
        if late:
            raise RunFailure(
                f"{len(done)} of {len(results)} workers started within {START_SECONDS:.0f} s"
            )
        for worker in list(self.workers):
            self._collect_start(worker)


def _read(packed: Packed, task: Task) -> Message:
    try:
        return unpack_reply(packed)
    except Exception as error:  # whatever a client sent: it ends nobody's run
        return error_reply(task.request.message, f"the reply cannot be read: {describe(error)}")


def reason_of(error: RayError) -> str:
    """Why there is no reply, in one line."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return one_line(str(cause) if isinstance(cause, RunFailure) else describe(cause))
    if _memory_ran_out(error):
        return "the worker process was ended by Ray: the machine ran out of memory"
    if isinstance(error, RayActorError):
        return "the worker process died"
    return one_line(f"{type(error).__name__}: {error}")


def _memory_ran_out(error: RayError) -> bool:
    # Ray's account of a death is a page long and names no cause but this one with certainty.
    text = " ".join(str(error).split())
    return "memory pressure" in text or "running low on memory" in text
