"""Ray itself: start it, stop it, and see before that the machine has room for the workers."""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Ray)

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import ray

from fedcunet.errors import RunFailure
from fedcunet.measured import free_memory_bytes
from fedcunet.processes import uninterrupted
from fedcunet.records import one_line
from simulations.tasks import ROOT

# Shared memory for models on their way; they are small, and Ray's default is 30 % of the machine.
OBJECT_STORE_BYTES = 512 * 2**20

# Measured with torch 2.13 (CPU) and Ray 2.55.1, memory of its own (USS): a worker that has done
# nothing but import torch takes 0.22 GB, Ray's seven processes together 0.33 GB. The rest of a
# worker's share is for the network's training and its cached images.
WORKER_BYTES = 600 * 10**6
RAY_BYTES = 400 * 10**6

# What a worker imports.
SENT_FOLDERS = ("fedcunet", "clients", "simulations")

# How long processes may take to end by themselves, and then once more after a kill.
END_SECONDS = 3.0


@contextmanager
def start_ray(
    num_workers: int,
    *,
    num_gpus: int = 0,
    cpus_per_worker: int = 1,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    ray_address: str | None = None,
) -> Iterator[None]:
    """Ray for the duration of a `with` block, in which grids then share it.

    A Ray that this process has started already is used as it is and left running. On the way
    out, also after an error or an interrupt, every process of ours is ended, and the folder of
    logs that Ray keeps in the system's temporary folder is removed.

    Args:
        num_workers: how many workers there must be room for.
        num_gpus: GPUs of this machine that the workers may share.
        cpus_per_worker: processors that Ray counts for each worker.
        object_store_bytes: size of Ray's shared memory.
        ray_address: join this Ray cluster instead of starting one here.

    Raises:
        RunFailure: Ray does not start or cannot be reached; one line.
    """
    if ray_address is not None:
        _check_address(ray_address)
    if ray.is_initialized():
        yield
        return
    local = {
        "address": "local",  # whatever RAY_ADDRESS says
        "num_cpus": num_workers * cpus_per_worker,
        "num_gpus": num_gpus,
        "object_store_memory": object_store_bytes,
        "include_dashboard": False,
    }
    # Ray sends the code to the cluster's machines: they need our dependencies and nothing else.
    code = {"py_modules": [str(ROOT / name) for name in SENT_FOLDERS], "excludes": ["__pycache__"]}
    cluster = {"address": ray_address, "runtime_env": code}
    not_ours = set(psutil.Process().children())
    folders_before = _session_folders()
    started = False
    try:
        try:
            with warnings.catch_warnings(), _interrupt_afterwards():
                # Ray leaves closing its log files to the garbage collector.
                warnings.simplefilter("ignore", ResourceWarning)
                ray.init(
                    **(local if ray_address is None else cluster),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:
            where = "Ray does not start" if ray_address is None else f"no Ray at {ray_address}"
            raise RunFailure(one_line(f"{where}: {error}")) from error
        started = True
        yield
    finally:
        # What is interrupted in the middle of its start does not end by itself.
        _stop_ray(not_ours, grace_seconds=END_SECONDS if started else 0.0)
        for folder in _session_folders() - folders_before:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(ray_address: str) -> None:
    """See that something listens there: Ray itself would try for minutes."""
    host, separator, port = ray_address.rpartition(":")
    if not separator or not port.isdigit() or "/" in host:
        return  # "auto" and other forms that are Ray's own
    try:
        socket.create_connection((host, int(port)), timeout=END_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunFailure(f"no Ray at {ray_address}: {error}") from error


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Keep an interrupt (Ctrl-C) for the end of a `with` block; a second one comes through.

    Ray 2.55 may swallow an interrupt while it starts, or stop halfway with processes running.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # interrupts do not come here
        return
    interrupts = 0

    def count(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, count)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _session_folders() -> set[Path]:
    """Ray's folders of logs and sockets that carry this process's id in their name."""
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    return set(parent.glob(f"session_*_{os.getpid()}"))


def _stop_ray(not_ours: set[psutil.Process], grace_seconds: float) -> None:
    """Shut Ray down and see its processes end; those that do not are killed."""
    ours = [
        process
        for child in set(psutil.Process().children()) - not_ours
        for process in (child, *_descendants(child))
    ]
    with uninterrupted():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            ray.shutdown()
        # Ray does not wait for all of them: one that it has killed would stay in the list of
        # processes until this one ends.
        _, alive = psutil.wait_procs(ours, timeout=grace_seconds)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_SECONDS)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def check_memory(num_workers: int, bytes_per_worker: int = WORKER_BYTES) -> None:
    """See that the workers fit into the memory that is free now.

    Args:
        num_workers: workers that are about to start, on this machine.
        bytes_per_worker: what one of them needs, its training included.

    Raises:
        RunFailure: they do not fit; one line that says what would.
    """
    free = free_memory_bytes()
    needed = RAY_BYTES + num_workers * bytes_per_worker
    if needed <= free:
        return
    fitting = max(0, (free - RAY_BYTES) // bytes_per_worker)
    advice = f"use --num-workers {fitting}" if fitting else "use --engine loopback"
    noun = "worker needs" if num_workers == 1 else "workers need"
    raise RunFailure(
        f"{num_workers} {noun} about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free: {advice}"
    )
