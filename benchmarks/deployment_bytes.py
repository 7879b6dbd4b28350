"""Bytes of a real round at the socket, against the payloads' sum and Flower's own count, as JSON.

    python benchmarks/deployment_bytes.py [--clients N] [--rounds R] [--out FILE]

A server with TLS and node keys and N clients run on loopback, each client through a TCP proxy that
counts what passes. A run is made for every codec; the first round, in which a client also says
what it has and fetches the app, is left out of the mean. What the clients send while they wait
(a question every 3 s, a heartbeat every 30 s) is measured before the runs, with nothing to do, and
reported apart: it depends on how long a round takes, not on what it carries.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.keys import make_key
from fedcunet.config import RunConfig
from fedcunet.data.procedural.faces import make_faces
from fedcunet.processes import free_port, host_and_port
from server import admission
from server.app import NoDisplay
from server.certificates import make_certificates
from server.flower import flwr
from server.folder import Request, ServerFolder
from server.journal import JournalReader
from server.running import Follower, submit
from server.superlink import Superlink

ROOT = Path(__file__).resolve().parent.parent
IDLE_SECONDS = 40.0
ALLOWED_SHARE, ALLOWED_BYTES = 0.03, 20_000
# Codec and bits of the updates, and bits of the model's differences on their way down; 32: whole.
CODECS: list[tuple[str, float, float]] = [
    ("float32", 32, 32),
    ("linear-nearest", 8, 32),
    ("eden", 2, 32),
    ("sign", 1, 32),
    ("trellis", 2, 2),
    ("trellis", 1, 1),
    ("trellis", 0.5, 1),
]


class CountingProxy:
    """Passes TCP connections on to a server, and counts the bytes of each direction."""

    def __init__(self, server: str) -> None:
        self._target = host_and_port(server, "server")
        self.up = self.down = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._connected, "127.0.0.1", 0)
        server = self._loop.run_until_complete(serving)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        await asyncio.gather(
            self._pass(reader, far_writer, "up"), self._pass(far_reader, writer, "down")
        )

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        try:
            while chunk := await reader.read(2**16):
                setattr(self, direction, getattr(self, direction) + len(chunk))
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def counts(self) -> tuple[int, int]:
        """Bytes up and down so far."""
        return self.up, self.down


class Quiet(NoDisplay):
    """Shows nothing but what nodes have to say."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


class Snapshots:
    """The proxies' counts at the end of each round, read off the run's own journal."""

    def __init__(self, proxies: list[CountingProxy], journal: Path) -> None:
        self._proxies, self._reader = proxies, JournalReader(journal)
        self.at_round: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for what, *arguments in self._reader.news():
                if what == "round_done":
                    counts = [proxy.counts() for proxy in self._proxies]
                    self.at_round[arguments[0]["round"]] = (time.monotonic(), counts)

    def end(self) -> None:
        """Stops watching."""
        time.sleep(0.2)
        self._over.set()
        self._thread.join()


@contextmanager
def joined_client(
    home: ServerFolder, proxy: CountingProxy, folder: Path, data: Path, part: str
) -> Iterator[None]:
    """A client that joins through the proxy."""
    key = folder / "key"
    admission.admit(home, make_key(key, folder.name), None, None)
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "clients", "join", "--server", f"127.0.0.1:{proxy.port}"),
            *("--ca", str(home.certificates.authority), "--key", str(key)),
            *("--data", "faces", "--root", str(data), "--folder", str(folder)),
            *("--partition-id", part.split("/")[0], "--num-partitions", part.split("/")[1]),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def setting(
    ways: tuple[str, float, float], data: Path, folder: Path, clients: int, rounds: int
) -> RunConfig:
    """The network of the main job, trained little: only its bytes matter here."""
    codec, bits, down = ways
    coded = {} if down == 32 else {"downlink__codec": "trellis", "downlink__bits": down}
    return RunConfig().replace(
        **coded,
        quant__bits="8,1,8",
        quant__alpha=True,
        data__root=str(data),
        training__local_epochs=0.25,
        training__batch_size=4,
        update__codec=codec,
        update__bits=bits,
        federation__clients=clients,
        federation__rounds=rounds,
        federation__timeout_seconds=600,
        federation__state_dir=str(folder / "state"),
    )


def measure(
    home: ServerFolder, config: RunConfig, out: Path, proxies: list[CountingProxy], idle: float
) -> dict[str, Any]:
    """Bytes of one run, a client and round; `idle` is what polling costs, in bytes a second."""
    run_id = submit(home, config, Request(out=out, name=out.name, wait_seconds=120))
    snapshots = Snapshots(proxies, home.progress(run_id))
    Follower(folder=home, run_id=run_id, display=Quiet()).follow()
    snapshots.end()
    lines = [json.loads(line) for line in (out / "clients.jsonl").read_text().splitlines()]
    later = [line for line in lines if line["round"] > 1]
    rounds = config.federation.rounds - 1
    first, last = snapshots.at_round[1], snapshots.at_round[config.federation.rounds]
    moved = [sum(after) - sum(before) for before, after in zip(first[1], last[1], strict=True)]
    seconds = (last[0] - first[0]) / rounds
    per = 1 / (rounds * len(proxies))
    payload = sum(line["bytes_up"] + line["bytes_down"] for line in later) * per
    socket = sum(moved) * per
    overhead = socket - idle * seconds - payload
    traffic = flwr(home, ["list"], ["--run-id", str(run_id)])["runs"][0]["network-traffic"]
    allowed = ALLOWED_SHARE * payload + ALLOWED_BYTES
    return {
        "codec": config.update.codec,
        "bits": config.update.bits,
        "downlink_bits": config.downlink.bits if config.downlink.codec == "trellis" else 32,
        "payload_up": sum(line["bytes_up"] for line in later) * per,
        "payload_down": sum(line["bytes_down"] for line in later) * per,
        "payload": payload,
        "flower_messages": traffic["total-bytes"] / (len(proxies) * config.federation.rounds),
        "socket": socket,
        "polling": idle * seconds,
        "overhead": overhead,
        "allowed_overhead": allowed,
        "fits": overhead <= allowed,
        "seconds_per_round": seconds,
        "first_round_extra": sum(map(sum, first[1])) / len(proxies) - socket,
    }


def idle_rate(proxies: list[CountingProxy]) -> float:
    """Bytes a second and client while there is nothing to do."""
    before, began = [sum(proxy.counts()) for proxy in proxies], time.monotonic()
    time.sleep(IDLE_SECONDS)
    moved = sum(sum(proxy.counts()) for proxy in proxies) - sum(before)
    return moved / len(proxies) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="2 or more")
    parser.add_argument("--codec", help="only this one of the codecs")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # everything is ended and removed
    results = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        data = folder / "faces"
        make_faces(data, num_train=24, num_test=4, seed=0)
        home = ServerFolder(folder / "server")
        server = Superlink(
            folder=home,
            listen=f"127.0.0.1:{free_port()}",
            control_port=free_port(),
            health_port=free_port(),
            certificates=make_certificates(home.path / "certificates", [], 2),
        )
        stack.enter_context(server.running())
        proxies = [CountingProxy(server.listen) for _ in range(arguments.clients)]
        for part, proxy in enumerate(proxies):
            parts = f"{part}/{arguments.clients}"
            client = joined_client(home, proxy, folder / f"client-{part}", data, parts)
            stack.enter_context(client)
        while sum(row["status"] == "online" for row in admission.overview(home)) < len(proxies):
            time.sleep(1)
        idle = idle_rate(proxies)
        chosen = [row for row in CODECS if arguments.codec in (None, row[0])]
        for number, ways in enumerate(chosen):
            for proxy in proxies:
                proxy.up = proxy.down = 0
            config = setting(ways, data, folder, arguments.clients, arguments.rounds)
            row = measure(home, config, folder / f"run-{number}", proxies, idle)
            print(json.dumps(row), file=sys.stderr, flush=True)
            results.append(row)
    text = json.dumps(
        {"clients": arguments.clients, "polling_bytes_per_second": idle, "results": results},
        indent=1,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
