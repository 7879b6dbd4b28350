"""A real server and real clients on loopback: TLS, node keys, one result with the simulation."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from clients.keys import make_key
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure
from fedcunet.processes import free_port
from server import admission
from server.app import NoDisplay, serve
from server.certificates import make_certificates
from server.folder import Request, ServerFolder
from server.running import Follower, submit
from server.superlink import Superlink, is_serving
from simulations.engine import Engine

pytestmark = [pytest.mark.superlink, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
FACES = {
    "afw": [f"{n}_1.jpg" for n in range(5)],
    "helen/trainset": [f"{n}_{k}.jpg" for n in range(3) for k in (1, 2)],
    "helen/testset": [f"{n}_1.jpg" for n in range(10, 14)],
}


class Watcher(NoDisplay):
    """Keeps what a display is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.rounds: list[dict[str, Any]] = []

    def round_done(self, line: dict[str, Any]) -> None:
        self.rounds.append(line)

    def say(self, text: str) -> None:
        self.said.append(text)


class Lab:
    """A server in a folder of the test, and clients that join it."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.home = ServerFolder(folder / "server")
        self.server = Superlink(
            folder=self.home,
            listen=f"127.0.0.1:{free_port()}",
            control_port=free_port(),
            health_port=free_port(),
            certificates=make_certificates(self.home.path / "certificates", [], 2),
        )

    def key(self, name: str) -> Path:
        path = self.folder / name / "key"
        make_key(path, name)
        return path

    @contextmanager
    def client(self, key: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "clients", "join", "--server", self.server.listen]
        command += ["--ca", str(self.home.certificates.authority), "--key", str(key)]
        command += ["--data", "300w", "--root", str(self.data), "--folder", str(key.parent), *more]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()
                process.wait(30)

    def processes(self) -> list[str]:
        """Processes of Flower that work for this lab, by their homes."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME", "").startswith(str(self.folder)):
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        return found


def loopback_hash(config: RunConfig, out: Path) -> str:
    engine = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None)
    with ExitStack() as stack:
        grid = engine.grid(config, stack)
        summary = serve(grid, config, out=out, name="loopback", display=NoDisplay())
    return str(summary["checkpoint_sha256"])


def test_two_clients_with_keys_give_the_simulations_model_and_nobody_else_gets_in(
    make_300w: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lab = Lab(tmp_path, make_300w(FACES))
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="8,1,8",
        quant__alpha=True,
        data__name="300w",
        data__root=str(lab.data),
        training__batch_size=4,
        training__optimizer="adam",
        update__codec="sign",
        update__bits=1,
        update__error_feedback="on",
        federation__clients=2,
        federation__rounds=2,
        federation__timeout_seconds=600,
        federation__state_dir=str(tmp_path / "state"),
    )
    keys = [lab.key("first"), lab.key("second")]
    request = Request(out=tmp_path / "run", name="deployed", wait_seconds=100)
    watcher = Watcher()
    with lab.server.running(), ExitStack() as stack:
        assert is_serving(lab.home.address().health)
        for client, key in enumerate(keys):
            admitted = admission.admit(lab.home, key.with_name("key.pub"), None, None)
            assert (admitted.client, admitted.name) == (client, ("first", "second")[client])
            stack.enter_context(
                lab.client(key, "--partition-id", str(client), "--num-partitions", "2")
            )
        stranger = stack.enter_context(lab.client(lab.key("stranger")))
        summary = Follower(
            folder=lab.home, run_id=submit(lab.home, config, request), display=watcher
        ).follow()
        # A port with TLS is no use to a client without.
        with grpc.insecure_channel(lab.server.listen) as channel:
            ready = grpc.channel_ready_future(channel)
            with pytest.raises(grpc.FutureTimeoutError):
                ready.result(timeout=3)
            ready.cancel()
        words, _ = stranger.communicate(timeout=60)
        status = {row["name"]: row["status"] for row in admission.overview(lab.home)}
    assert stranger.returncode == 1
    assert "does not admit this node's key" in words
    assert status == {"first": "online", "second": "online"}
    assert summary["replies"] == {"accepted": 4}
    assert [line["outcome"] for line in watcher.rounds] == ["committed", "committed"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint",
        "clients.jsonl",
        "config.toml",
        "examples.npz",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    ]
    assert summary["checkpoint_sha256"] == loopback_hash(config, tmp_path / "loopback")
    assert lab.processes() == []
    with pytest.raises(RunFailure, match="no server has been started"):
        lab.home.address()
