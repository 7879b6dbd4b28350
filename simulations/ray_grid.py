"""A Flower Grid on Ray actors: many virtual clients on one machine, or on a Ray cluster.

Why not Flower's own simulation engine (read and measured, 1.39): there a worker that dies goes
back into the pool and takes a client of every later round with it, and the model is pickled once
for every client. Here a death costs the one message that was being answered, and the same bytes
are put into Ray's object store once, however many messages carry them.
"""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict, UserConfig
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedcunet.errors import RunFailure
from fedcunet.records import CLIENT_APP_CRASHED, error_reply, one_line
from simulations.local_grid import LocalGrid
from simulations.ray_session import OBJECT_STORE_BYTES, WORKER_BYTES, check_memory, start_ray
from simulations.tasks import ROOT, ClientCall, Node, describe, load_client_app, run_client_app

logger = logging.getLogger(__name__)

# Smaller arrays travel in the message: a trip to the object store costs more than copying them.
INLINE_BYTES = 64 * 1024

# How long one pull waits for a reply before it returns with none.
POLL_SECONDS = 0.2

# A worker imports torch and the client app; far more than it takes on a slow disk.
START_SECONDS = 180.0

# Workers that may die in a row while they start, before the run is given up.
MAX_FAILED_STARTS = 3

# Where the bytes of an array belong: name of the record, name of the array, key of the bytes.
Place = tuple[str, str, str]


class ClientWorker:
    """Runs client apps in a process of its own, one message at a time."""

    def __init__(self) -> None:
        self._client_app: ClientCall | None = None
        self._blobs: dict[str, bytes] = {}

    def set_up(self, client_app: ClientCall | str, num_threads: int, folder: str) -> None:
        """Load the app. Not in `__init__`, so that a failure comes back as what it is.

        Args:
            client_app: the app or its import string.
            num_threads: torch's threads.
            folder: current folder of the driver, so that relative paths mean the same here.
        """
        if os.path.isdir(folder):  # on another machine of a cluster it need not exist
            os.chdir(folder)
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        torch.set_num_threads(num_threads)
        self._client_app = load_client_app(client_app)

    def answer(
        self,
        message: Message,
        node: Node,
        places: list[Place],
        references: dict[str, Any],
    ) -> Message:
        """The app's reply to `message`, after the bytes at `places` are put back into it."""
        assert self._client_app is not None
        # The model of this round is most often that of the message before.
        self._blobs = {
            key: self._blobs[key] if key in self._blobs else ray.get(reference)
            for key, reference in references.items()
        }
        for record_name, array_name, key in places:
            record = message.content[record_name]
            assert isinstance(record, ArrayRecord)
            record[array_name] = _with_data(record[array_name], self._blobs[key])
        return run_client_app(self._client_app, message, node)


@dataclass(eq=False, slots=True)
class _Task:
    """A message on its way: without its large arrays, which `references` leads to."""

    message: Message
    node: Node
    places: list[Place] = field(default_factory=list)
    references: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Worker:
    """An actor and what it is doing: `result` is of its start while `task` is None."""

    actor: Any
    result: Any = None
    task: _Task | None = None


class RayGrid(LocalGrid):
    """Answers messages on a pool of Ray actors, in the order of arrival, as workers get free."""

    def __init__(
        self,
        client_app: ClientCall | str,
        node_configs: Sequence[UserConfig],
        run_config: UserConfig,
        run_id: int = 1,
        *,
        num_workers: int = 2,
        num_gpus: int = 0,
        cpus_per_worker: int = 1,
        threads_per_client: int = 1,
        bytes_per_worker: int = WORKER_BYTES,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        ray_address: str | None = None,
    ) -> None:
        """Start Ray, unless this process has it already, and the workers; wait for all of them.

        Args:
            client_app: an import string such as "clients.app:app", or a ClientApp that can be
                pickled.
            node_configs: one for each virtual client.
            run_config: what every app finds in its context.
            run_id: the run that all messages belong to.
            num_workers: processes that answer messages.
            num_gpus: GPUs that they share in equal parts; with 0 no worker sees one.
            cpus_per_worker: processors that Ray counts for each worker.
            threads_per_client: torch's threads in a worker; decides the order of sums, so it is
                never derived from the workers or the machine.
            bytes_per_worker: memory a worker is taken to need, checked before anything starts.
            object_store_bytes: size of Ray's shared memory, where this grid starts Ray.
            ray_address: join this Ray cluster instead of starting one here.

        Raises:
            RunFailure: no room, no Ray, or a client app that cannot be loaded; one line.
        """
        super().__init__(node_configs, run_config, run_id)
        self._client_app = client_app
        self._threads = threads_per_client
        self._queue: dict[str, _Task] = {}
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._blobs: dict[str, Any] = {}  # in the object store, by SHA-256
        self.num_puts = 0  # blobs put there so far
        if ray_address is None:
            check_memory(num_workers, bytes_per_worker)
        self._resources = ExitStack()
        try:
            self._resources.enter_context(
                start_ray(
                    num_workers,
                    num_gpus=num_gpus,
                    cpus_per_worker=cpus_per_worker,
                    object_store_bytes=object_store_bytes,
                    ray_address=ray_address,
                )
            )
            self._resources.callback(self._end_workers)
            _check_resources(num_workers, cpus_per_worker, num_gpus)
            self._actor_class = ray.remote(ClientWorker).options(
                num_cpus=cpus_per_worker,
                num_gpus=_gpu_share(num_gpus, num_workers),
                # A dead worker is replaced here, where it is known whose message it had.
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": _worker_environment(threads_per_client, num_gpus)},
            )
            self._workers = [self._start_worker() for _ in range(num_workers)]
            self._wait_for_start()
        except BaseException:
            self._resources.close()
            raise

    def close(self) -> None:
        """End the workers, and Ray where this grid started it. May be called twice."""
        self._queue.clear()
        self._resources.close()

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push_messages(self, messages: Any) -> list[str]:
        """Queue messages and start on them; see `LocalGrid`."""
        # Bytes by identity: the server sends one object to all. Held until the end of the push,
        # or another object could take its place in memory.
        self._seen: dict[int, tuple[bytes, str]] = {}
        message_ids = super().push_messages(messages)
        in_use = {key for _, key in self._seen.values()}
        for task in [*self._queue.values(), *(w.task for w in self._workers if w.task)]:
            in_use |= set(task.references)
        # What no message needs any longer leaves the object store.
        self._blobs = {key: blob for key, blob in self._blobs.items() if key in in_use}
        self._seen = {}
        self._assign()
        return message_ids

    def _accept(self, message: Message, node: Node) -> None:
        task = _Task(message=message, node=node)
        content = RecordDict()
        for record_name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                # A record of its own: the server's must keep its bytes.
                record = ArrayRecord(dict(record))
                for array_name, array in record.items():
                    if len(array.data) > INLINE_BYTES:
                        key = self._put(array.data)
                        task.places.append((record_name, array_name, key))
                        task.references[key] = self._blobs[key]
                        record[array_name] = _with_data(array, b"")
            content[record_name] = record
        message.content = content
        self._queue[message.metadata.message_id] = task

    def _put(self, data: bytes) -> str:
        """The key of `data` in the object store, where it is put unless it is there already."""
        known = self._seen.get(id(data))
        if known is not None:
            return known[1]
        key = hashlib.sha256(data).hexdigest()
        self._seen[id(data)] = (data, key)
        if key not in self._blobs:
            self._blobs[key] = ray.put(data)
            self.num_puts += 1
        return key

    def _advance(self, message_ids: set[str]) -> None:
        self._collect(timeout=0.0)
        self._assign()
        if message_ids.isdisjoint(self._replies):
            self._collect(timeout=POLL_SECONDS)
            self._assign()

    def _drop(self, message_ids: set[str]) -> None:
        for message_id in message_ids:
            self._queue.pop(message_id, None)
        # A client that is still at it may never end: its worker must not be lost to later rounds.
        for worker in list(self._workers):
            if worker.task and worker.task.message.metadata.message_id in message_ids:
                self._replace(worker)

    def _assign(self) -> None:
        """Give the oldest messages to the workers that have nothing to do."""
        for worker in self._workers:
            if worker.result is not None or not self._queue:
                continue
            task = self._queue.pop(next(iter(self._queue)))
            worker.task = task
            worker.result = worker.actor.answer.remote(
                task.message, task.node, task.places, task.references
            )

    def _collect(self, timeout: float) -> None:
        """Take what workers have finished; wait up to `timeout` seconds for the first."""
        busy = {worker.result: worker for worker in self._workers if worker.result is not None}
        if not busy:
            return
        done, _ = ray.wait(list(busy), num_returns=1, timeout=timeout)
        if done:  # and what else is there by now
            done, _ = ray.wait(list(busy), num_returns=len(busy), timeout=0)
        for result in done:
            worker = busy[result]
            if worker.task is None:
                self._collect_start(worker)
            else:
                self._collect_reply(worker, worker.task)

    def _collect_start(self, worker: _Worker) -> None:
        try:
            ray.get(worker.result)
        except RayError as error:
            self._failed_starts += 1
            if isinstance(error, RayTaskError) or self._failed_starts >= MAX_FAILED_STARTS:
                raise RunFailure(f"a worker does not start: {_reason(error)}") from error
            self._replace(worker)
        else:
            self._failed_starts = 0
            worker.result = None

    def _collect_reply(self, worker: _Worker, task: _Task) -> None:
        message_id = task.message.metadata.message_id
        try:
            reply = ray.get(worker.result)
        except RayTaskError as error:
            # Not the app, whose errors are replies, but our side of the worker, which lives on.
            reply = error_reply(task.message, _reason(error), code=CLIENT_APP_CRASHED)
        except RayError as error:
            reply = error_reply(task.message, _reason(error), code=CLIENT_APP_CRASHED)
            logger.warning("node %d: %s", task.node.node_id, reply.error.reason)
            self._replace(worker)
        worker.task = worker.result = None
        self._finish(message_id, reply)

    def _start_worker(self) -> _Worker:
        actor = self._actor_class.remote()
        return _Worker(actor, actor.set_up.remote(self._client_app, self._threads, os.getcwd()))

    def _replace(self, worker: _Worker) -> None:
        """A fresh worker in the place of one that died or is of no more use."""
        ray.kill(worker.actor, no_restart=True)
        self._workers[self._workers.index(worker)] = self._start_worker()

    def _wait_for_start(self) -> None:
        results = [worker.result for worker in self._workers]
        done, late = ray.wait(results, num_returns=len(results), timeout=START_SECONDS)
        if late:
            raise RunFailure(
                f"{len(done)} of {len(results)} workers started within {START_SECONDS:.0f} s"
            )
        for worker in list(self._workers):
            self._collect_start(worker)

    def _end_workers(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor, no_restart=True)
        self._workers = []
        self._blobs = {}


def _with_data(array: Array, data: bytes) -> Array:
    return Array(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=data)


def _reason(error: RayError) -> str:
    """Why there is no reply, in one line."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return one_line(str(cause) if isinstance(cause, RunFailure) else describe(cause))
    text = " ".join(str(error).split())
    # Ray's account of a death is a page long and names no cause but this one with certainty.
    if "memory pressure" in text or "running low on memory" in text:
        return "the worker process was ended by Ray: the machine ran out of memory"
    if isinstance(error, RayActorError):
        return "the worker process died"
    return one_line(f"{type(error).__name__}: {text}")


def _check_resources(num_workers: int, cpus_per_worker: int, num_gpus: int) -> None:
    """See that this Ray has what the workers ask for; else they would wait for ever."""
    found = ray.cluster_resources()
    for name, needed in (("CPU", num_workers * cpus_per_worker), ("GPU", num_gpus)):
        if needed > found.get(name, 0):
            raise RunFailure(
                f"{num_workers} workers ask Ray for {needed} {name}s, it has "
                f"{found.get(name, 0):.0f}: use fewer workers"
            )


def _gpu_share(num_gpus: int, num_workers: int) -> float:
    """GPUs for each worker: a part of one, in Ray's steps of 1/10000, or a whole number."""
    share = num_gpus / num_workers
    return int(share) if share >= 1 else int(share * 10_000) / 10_000


def _worker_environment(num_threads: int, num_gpus: int) -> dict[str, str]:
    """Environment variables of a worker: where to find our folders, and what not to use."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(num_threads),
    }
    if num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
