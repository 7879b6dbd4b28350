"""The virtual clients of a setting as `python -m simulations` runs them: Ray or this process."""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import os
from contextlib import ExitStack
from dataclasses import dataclass

from flwr.serverapp import Grid

from clients.attacks import ATTACK_KEY
from fedcunet.attackers import attackers_of
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.privacy import NOISE_SEED_KEY
from simulations.fleet import growth_bytes, node_values
from simulations.loopback import LoopbackGrid
from simulations.ray_grid import RayGrid
from simulations.ray_session import check_memory, start_ray

CLIENT_APP = "clients.app:app"
ENGINES = ("ray", "loopback")

# Measured: a worker that has loaded torch and the client app and trained a small step.
IDLE_WORKER_BYTES = 400 * 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """How the virtual clients are run; none of it changes the result."""

    name: str
    num_workers: int
    num_gpus: int
    ray_address: str | None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise UserError(f"--engine: expected {' or '.join(ENGINES)}, found '{self.name}'")
        if self.num_workers < 1:
            raise UserError(f"--num-workers: expected 1 or more, found {self.num_workers}")
        if self.num_gpus < 0:
            raise UserError(f"--num-gpus: expected 0 or more, found {self.num_gpus}")

    def check(self, config: RunConfig) -> None:
        """Raises RunFailure if memory does not suffice for workers that train the setting."""
        if self.name == "ray" and self.ray_address is None:
            check_memory(self.num_workers, worker_bytes(config))

    def session(self, stack: ExitStack) -> None:
        """Starts Ray until the stack closes, so that the runs of several settings share one.

        Raises:
            RunFailure: if Ray does not start.
        """
        if self.name == "ray":
            stack.enter_context(
                start_ray(self.num_workers, num_gpus=self.num_gpus, ray_address=self.ray_address)
            )
        elif not self.num_gpus:  # as Ray's workers: else the result would be another
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def grid(self, config: RunConfig, stack: ExitStack) -> Grid:
        """The grid of the setting's virtual clients, closed with the stack."""
        nodes = [{NOISE_SEED_KEY: config.seed, **values} for values in node_values(config)]
        for client, attack in attackers_of(config).items():
            nodes[client] |= {ATTACK_KEY: attack}
        flat = config.flat()
        threads = config.training.threads
        if self.name == "loopback":
            return LoopbackGrid(CLIENT_APP, nodes, flat, threads_per_client=threads)
        return stack.enter_context(
            RayGrid(
                CLIENT_APP,
                nodes,
                flat,
                num_workers=self.num_workers,
                num_gpus=self.num_gpus,
                threads_per_client=threads,
                message_seconds=config.federation.client_timeout_seconds,
                bytes_per_worker=worker_bytes(config),
                ray_address=self.ray_address,
            )
        )


def worker_bytes(config: RunConfig) -> int:
    """What a worker process takes, so that a run that cannot fit is refused at its start.

    A worker that has loaded everything (measured once), the images it keeps (a limit that it
    holds), and a training step of this setting (measured: `fedcunet/measured.py`).
    """
    return IDLE_WORKER_BYTES + config.data.cache_bytes + growth_bytes(config)
