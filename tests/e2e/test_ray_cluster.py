"""The Ray engine on a cluster of two nodes, both on this machine, that know nothing of our code."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcunet.processes import Family, free_port

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from fedcunet.records import model_content, update_content
from flwr.app import Message
from flwr.clientapp import ClientApp
from simulations.ray_grid import RayGrid

app = ClientApp()

@app.train()
def train(message, context):
    import time
    import clients.state, fedcunet, ray, simulations
    time.sleep(0.5)
    files = [module.__file__ for module in (clients, fedcunet, simulations)]
    said = json.dumps([ray.get_runtime_context().get_node_id(), *files])
    return Message(update_content(said.encode(), {"num-examples": 1}), reply_to=message)

with RayGrid(app, [{}] * 4, {}, num_workers=2, ray_address=sys.argv[1]) as grid:
    messages = [Message(model_content(bytes(100_000), {}), node, "train") for node in range(1, 5)]
    replies = grid.send_and_receive(messages, timeout=100)
    print(json.dumps([json.loads(reply.content["arrays"]["update"].data) for reply in replies]))
"""


def start_node(folder: Path, *options: str) -> Family:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    ports = [f"--dashboard-agent-listen-port={free_port()}", f"--node-manager-port={free_port()}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Family.start(
        [*command, *ports, "--object-store-memory=100000000", *options],
        {**environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)},
        subprocess.DEVNULL,
    )


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster with two nodes of one processor each."""
    # Not pytest's folder: the names of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    port = free_port()
    address = f"127.0.0.1:{port}"
    nodes = []
    try:
        head = [f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        nodes.append(start_node(folder, "--head", *head))
        wait_for_nodes(address, 1)
        nodes.append(start_node(folder, f"--address={address}"))
        wait_for_nodes(address, 2)
        yield address
    finally:
        for node in reversed(nodes):
            node.end()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(address: str, count: int) -> None:
    """Wait until the cluster has so many nodes."""
    import ray

    for _ in range(240):
        try:
            client = ray._raylet.GcsClient(address=address)
            alive = [one for one in client.get_all_node_info().values() if one.state == 0]
        except Exception:  # it does not listen yet
            alive = []
        if len(alive) >= count:
            return
        time.sleep(0.5)
    pytest.fail(f"the cluster at {address} has {len(alive)} of {count} nodes after two minutes")


@pytest.mark.timeout(600)  # two nodes and a driver start: half a minute on a quiet machine
def test_two_nodes_share_the_clients_and_run_the_code_that_ray_sent(
    cluster: str, tmp_path: Path
) -> None:
    driver = subprocess.run(
        [sys.executable, "-c", SCRIPT, cluster],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=200,
        check=True,
    )
    replies: list[Any] = json.loads(driver.stdout)
    assert len(replies) == 4
    assert len({node for node, *_ in replies}) == 2
    for _, *files in replies:
        assert all("runtime_resources" in file for file in files), files
