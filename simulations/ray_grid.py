"""A Flower Grid on Ray actors: many virtual clients on one machine, or on a Ray cluster.

Why not Flower's own simulation engine (read and measured, 1.39): there a worker that dies goes
back into the pool and takes a client of every later round with it, and the model is pickled once
for every client. Here a fault costs the message that was being answered at most, the same bytes
are put into Ray's object store once, however many messages carry them, and messages that take
little time share a call. docs/engines.md has the figures.
"""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import ray
from flwr.app import Message, UserConfig

from fedcunet.errors import RunFailure
from simulations.local_grid import LocalGrid
from simulations.ray_pool import Task, WorkerPool
from simulations.ray_session import OBJECT_STORE_BYTES, WORKER_BYTES, check_memory, start_ray
from simulations.ray_worker import ClientWorker, Place, Request, take_out
from simulations.tasks import ROOT, ClientCall, Node


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
        message_seconds: float = 3600.0,
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
            message_seconds: a guard against hung clients: a worker that has been at one message
                for longer is ended, and another takes its place.
            bytes_per_worker: memory a worker is taken to need: checked before anything starts,
                counted by Ray on every machine, and the measure of a worker that grows.
            object_store_bytes: size of Ray's shared memory, where this grid starts Ray.
            ray_address: join this Ray cluster instead of starting one here.

        Raises:
            RunFailure: no room, no Ray, or a client app that cannot be loaded; one line.
        """
        super().__init__(node_configs, run_config, run_id)
        self._blobs: dict[str, Any] = {}  # in the object store, by SHA-256
        self._seen: dict[int, tuple[bytes, str]] = {}  # in this push, by identity
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
            gpu_share = _gpu_share(num_gpus, num_workers)
            _check_room(num_workers, CPU=cpus_per_worker, GPU=gpu_share, memory=bytes_per_worker)
            environment = _worker_environment(threads_per_client, num_gpus, ray_address is None)
            actor_class: Any = ray.remote(ClientWorker).options(
                num_cpus=cpus_per_worker,
                num_gpus=gpu_share,
                memory=bytes_per_worker,
                # A dead worker is replaced by the pool, which knows whose messages it had.
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
            )
            nodes = ray.put(self._nodes)  # once, whatever each worker needs of it
            set_up = (client_app, nodes, threads_per_client, bytes_per_worker, os.getcwd())

            def start() -> tuple[Any, Any]:
                actor = actor_class.remote()
                return actor, actor.set_up.remote(*set_up)

            self.pool = WorkerPool(start, num_workers, message_seconds=message_seconds)
            self._resources.callback(self.pool.close)
        except BaseException:
            self._resources.close()
            raise

    @property
    def faults(self) -> dict[str, int]:
        """Workers that were replaced so far, by the reason."""
        return dict(self.pool.faults)

    def close(self) -> None:
        """End the workers, and Ray where this grid started it. May be called twice."""
        self._blobs = {}
        self._resources.close()

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push_messages(self, messages: Any) -> list[str]:
        """Queue messages and start on them; see `LocalGrid`."""
        message_ids = super().push_messages(messages)
        # What no message needs any longer leaves the object store.
        needed = self.pool.references() | {key for _, key in self._seen.values()}
        self._blobs = {key: blob for key, blob in self._blobs.items() if key in needed}
        self._seen = {}
        self.pool.assign()
        return message_ids

    def _accept(self, message: Message, node: Node) -> None:
        blobs: list[tuple[Place, str]] = []
        message.content = take_out(
            message.content, lambda place, data: blobs.append((place, self._put(data)))
        )
        request = Request(message, node.node_id, blobs)
        self.pool.add(Task(request, {key: self._blobs[key] for _, key in blobs}))

    def _put(self, data: bytes) -> str:
        """The key of `data` in the object store, where it is put unless it is there already."""
        # By identity first: the server sends one object to all. It is held until the end of the
        # push, or another object could take its place in memory.
        known = self._seen.get(id(data))
        if known is not None:
            return known[1]
        key = hashlib.sha256(data).hexdigest()
        self._seen[id(data)] = (data, key)
        if key not in self._blobs:
            self._blobs[key] = ray.put(data)
            self.num_puts += 1
        return key

    def _advance(self, message_ids: set[str], wait_seconds: float) -> None:
        ready = not message_ids.isdisjoint(self._replies)
        for task, reply in self.pool.collect(timeout=0.0 if ready else wait_seconds):
            self._finish(task.message_id, reply)
        self.pool.assign()

    def _drop(self, message_ids: set[str]) -> None:
        self.pool.drop(message_ids)
        self.pool.assign()


def _check_room(num_workers: int, **needed: float) -> None:
    """See that this Ray's machines have what the workers ask for; else they would wait for ever.

    Args:
        num_workers: how many.
        needed: of each of Ray's resources, for one worker.

    Raises:
        RunFailure: they do not fit.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    asked = {name: amount for name, amount in needed.items() if amount}
    fitting = sum(
        min((int(machine.get(name, 0) / amount) for name, amount in asked.items()), default=0)
        for machine in machines
    )
    if asked and fitting < num_workers:
        words = ", ".join(_amount(name, amount) for name, amount in asked.items())
        there = ", ".join(
            _amount(name, sum(machine.get(name, 0) for machine in machines)) for name in asked
        )
        raise RunFailure(
            f"{num_workers} workers of {words} each: Ray has room for {fitting} ({there} in "
            f"{len(machines)} machine{'s' if len(machines) > 1 else ''}): use fewer workers"
        )


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if name == "memory" else f"{amount:g} {name}"


def _gpu_share(num_gpus: int, num_workers: int) -> float:
    """GPUs for each worker: a part of one, in Ray's steps of 1/10000, or a whole number."""
    share = num_gpus / num_workers
    return int(share) if share >= 1 else int(share * 10_000) / 10_000


def _worker_environment(num_threads: int, num_gpus: int, here: bool) -> dict[str, str]:
    """Environment variables of a worker: where to find our folders, and what not to use."""
    environment = {"OMP_NUM_THREADS": str(num_threads)}
    if here:  # a cluster's machines get the code from Ray
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
