"""Each fault of clients and of the driver once, in whole runs of the real apps: what it costs.

A full disk at a checkpoint is in test_simulation.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from clients.attacks import ATTACK_KEY
from fedcunet.config import RunConfig
from reports.report import write_run_report
from server.app import NoDisplay, serve
from simulations.engine import Engine
from simulations.loopback import LoopbackGrid

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
APP = "tests.faulty_client_app:app"
FACES = {"afw": [f"{n}_1.jpg" for n in range(24)], "helen/testset": ["1_1.jpg", "2_1.jpg"]}

# The fault of a client (faulty_client_app.py; `nan` is an attack), its outcome, words of its line.
FAULTS = {
    "raise": ("error-reply", "ValueError: this client's disk is broken"),
    "kill": ("crashed", "the worker process died"),
    "hang": ("hung", "no reply within 20 s"),
    "memory": ("out-of-memory", "MemoryError"),
    "garbage": ("bad-magic", "the first bytes are"),
    "nan": ("not-finite", "values are not finite"),
    "infinite": ("bad-metrics", "metric 'loss' is inf"),
    "examples": ("bad-num-examples", "said 1000000 examples"),
    "codec": ("wrong-codec", "codec number"),
    "bits": ("wrong-bits", "bits in 1/256"),
}
NUM_HONEST = 2


@pytest.fixture
def setting(make_300w: Callable[..., Path], tmp_path: Path, measured_dir: Path) -> RunConfig:
    """A client for each fault and honest ones, a round of all."""
    return RunConfig().replace(
        model__unets=1,
        model__order=0,
        data__name="300w",
        data__root=str(make_300w(FACES)),
        update__codec="eden",
        update__bits=2,
        federation__clients=NUM_HONEST + len(FAULTS),
        federation__rounds=1,
        federation__fraction=1.0,
        federation__quorum=0.1,
        federation__partition="iid",
        federation__client_timeout_seconds=20.0,
        federation__state_dir=str(tmp_path / "clients"),
        federation__measured_dir=str(measured_dir),
    )


def nodes(config: RunConfig, faults: list[str]) -> list[dict[str, Any]]:
    """Node configs: the honest clients first."""
    local = {"data.root": config.data.root, "federation.state-dir": config.federation.state_dir}
    return [local] * NUM_HONEST + [
        local | ({ATTACK_KEY: "nan"} if fault == "nan" else {"fault": fault}) for fault in faults
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(600)
def test_every_fault_of_a_client_costs_its_own_update_and_is_counted_by_its_kind(
    shared_ray: None, setting: RunConfig, tmp_path: Path
) -> None:
    from simulations.ray_grid import RayGrid

    out = tmp_path / "run"
    seconds = setting.federation.client_timeout_seconds
    flat = setting.flat()
    with RayGrid(APP, nodes(setting, list(FAULTS)), flat, message_seconds=seconds) as grid:
        summary = serve(grid, setting, out=out, name="run", display=NoDisplay())
    assert summary["replies"] == {
        "accepted": NUM_HONEST,
        **{outcome: 1 for outcome, _ in FAULTS.values()},
    }
    assert summary["rounds_committed"] == 1
    assert sum(summary["workers_replaced"].values()) >= 2 + 1  # killed twice, hung once
    found = {line["client"]: line for line in lines_of(out / "clients.jsonl")}
    for client, (outcome, words) in enumerate(FAULTS.values(), start=NUM_HONEST):
        assert (found[client]["outcome"], words in found[client]["detail"]) == (outcome, True)
    assert not lines_of(out / "metrics.jsonl")[0]["reproducible"]
    page = write_run_report(out).read_text()
    assert all(outcome in page for outcome, _ in FAULTS.values())

    # The round is as if the others had only said that they fail.
    failing = LoopbackGrid(APP, nodes(setting, ["raise"] * len(FAULTS)), flat)
    calm = serve(failing, setting, out=tmp_path / "calm", name="calm", display=NoDisplay())
    assert calm["replies"] == {"accepted": NUM_HONEST, "error-reply": len(FAULTS)}
    assert calm["checkpoint_sha256"] == summary["checkpoint_sha256"]
    assert lines_of(tmp_path / "calm" / "metrics.jsonl")[0]["reproducible"]


def test_a_driver_that_is_killed_loses_no_committed_round(
    setting: RunConfig, tmp_path: Path
) -> None:
    setting = setting.replace(federation__clients=3, federation__rounds=4)
    (tmp_path / "setting.toml").write_text(tomli_w.dumps(setting.nested()))
    engine = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None)
    with ExitStack() as stack:
        grid = engine.grid(setting, stack)
        through = serve(grid, setting, out=tmp_path / "a", name="a", display=NoDisplay())

    out = tmp_path / "killed"
    words = [sys.executable, "-m", "simulations", "run", str(tmp_path / "setting.toml")]
    words += ["--engine", "loopback", "--out", str(out)]
    with subprocess.Popen(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    ) as driver:
        lines = out / "metrics.jsonl"
        while driver.poll() is None and (not lines.exists() or not lines.read_text()):
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()

    with ExitStack() as stack:
        grid = engine.grid(setting, stack)
        summary = serve(grid, setting, out=out, name="a", display=NoDisplay(), resume=True)
    assert summary["checkpoint_sha256"] == through["checkpoint_sha256"]
    assert summary["replies"] == {"accepted": 12}
