"""A real federation under field conditions, in network namespaces of this machine, as JSON.

    sudo .venv/bin/python benchmarks/field.py [--only PART] [--out FILE]

Server, two clients and a stranger get a network namespace each, joined by a bridge; nothing
reaches the machine's own network. The clients' links are slowed in both directions by `tc`
(token bucket; with `--delay-ms` netem as well, where the kernel has it). Needs root, `ip` and `tc`.

speeds     seconds of a round at 10 and 1 Mbit/s: float32, signs up, one bit both ways
unplugged  a client's link goes down in mid-round and comes back after it
restart    the SuperLink is killed in mid-run and started again with its database; the run is
           resumed, and its final model compared with that of a run that nobody disturbed
stranger   somebody in a namespace of their own tries every port of the server
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVER, STRANGER, CLIENTS = "fedcunet-server", "fedcunet-stranger", ("fedcunet-1", "fedcunet-2")
ADDRESS = "10.77.0.1"
WAIT_SECONDS = 600.0
SETTING = """
seed = 3
[model]
unets = 1
order = 0
[quant]
bits = "8,1,8"
alpha = true
[training]
batch-size = 4
local-epochs = 0.5
[federation]
clients = 2
quorum = 0.5
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def inside(namespace: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


@contextmanager
def network() -> Iterator[None]:
    """The namespaces and their links; all gone at the end."""
    everyone = (SERVER, STRANGER, *CLIENTS)
    try:
        for name in everyone:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SERVER, "link", "add", "bridge", "type", "bridge")
        ip("-n", SERVER, "addr", "add", f"{ADDRESS}/24", "dev", "bridge")
        ip("-n", SERVER, "link", "set", "bridge", "up")
        for number, name in enumerate((STRANGER, *CLIENTS), start=10):
            ip("-n", SERVER, "link", "add", f"to-{number}", "type", "veth",
               "peer", "name", "eth0", "netns", name)  # fmt: skip
            ip("-n", SERVER, "link", "set", f"to-{number}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in everyone:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def slow_down(megabits: float, delay_ms: float) -> None:
    """Limits both directions of each client's link."""
    ends = [(name, "eth0") for name in CLIENTS]
    ends += [(SERVER, f"to-{number}") for number in range(11, 11 + len(CLIENTS))]
    for namespace, device in ends:
        kind = ["netem", "delay", f"{delay_ms}ms", "rate", f"{megabits}mbit"]
        if not delay_ms:
            kind = ["tbf", "rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms"]
        subprocess.run(
            inside(namespace, "tc", "qdisc", "replace", "dev", device, "root", *kind), check=True
        )


class Talker:
    """A command in a namespace whose lines are kept with the seconds since the script's start."""

    began = time.monotonic()

    def __init__(self, namespace: str, *words: str) -> None:
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            inside(namespace, sys.executable, "-m", *words),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._name = f"{namespace} {words[0]}"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = f"{time.monotonic() - self.began:6.1f} s  {line.rstrip()}"
            self.lines.append(text)
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)
            self._queue.put(line)
        self._queue.put(None)

    def forget(self) -> None:
        """Lines so far are not waited for."""
        while not self._queue.empty():
            self._queue.get()

    def wait_for(self, text: str) -> bool:
        """Whether a line with `text` comes before the end of the command."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (line := self._queue.get(timeout=max(deadline - time.monotonic(), 0.1))) is not None:
            if text in line:
                return True
        return False

    def code(self) -> int:
        return self._process.wait(WAIT_SECONDS)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)


class Field:
    """Folder, keys and processes of a federation in the namespaces."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.home = str(folder / "server")
        self.data = str(folder / "faces")
        (folder / "field.toml").write_text(SETTING)
        python = [sys.executable, "-m"]
        for words in (
            ["fedcunet", "data", "make", "faces", "--out", self.data, "--num-train", "24",
             "--num-test", "8"],
            ["server", "certs", "--folder", self.home, "--name", ADDRESS],
            *(["clients", "keygen", str(folder / name / "key")] for name in CLIENTS),
        ):  # fmt: skip
            subprocess.run([*python, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def talker(self, namespace: str, *words: str) -> Talker:
        talker = Talker(namespace, *words)
        self._stack.callback(talker.end)
        return talker

    def server(self) -> Talker:
        server = self.talker(SERVER, "server", "--folder", self.home, "--listen", f"{ADDRESS}:9092")
        server.wait_for("Ctrl-C ends")
        return server

    def clients(self) -> list[Talker]:
        joined = []
        for part, name in enumerate(CLIENTS):
            key = self.folder / name / "key"
            admit = inside(SERVER, sys.executable, "-m", "server", "admit-node", f"{key}.pub")
            subprocess.run([*admit, "--folder", self.home], cwd=ROOT, check=True)
            client = self.talker(
                name, "clients", "join", "--server", f"{ADDRESS}:9092", "--key", str(key),
                "--ca", f"{self.home}/certificates/ca.pem", "--data", "faces", "--root", self.data,
                "--folder", str(key.parent), "--partition-id", str(part), "--num-partitions", "2",
            )  # fmt: skip
            joined.append(client)
        for client in joined:
            client.wait_for("joined")
        return joined

    def run(self, name: str, rounds: int, values: Sequence[str], *more: str) -> Talker:
        options = [word for value in values for word in ("--set", value)]
        return self.talker(
            SERVER, "server", "run", str(self.folder / "field.toml"), "--folder", self.home,
            "--data", "faces", "--root", self.data, "--rounds", str(rounds),
            "--out", str(self.folder / name), "--wait", "120", *options, *more,
        )  # fmt: skip

    def final_hash(self, name: str) -> str | None:
        """Of the model a run ended with; None where it did not end."""
        path = self.folder / name / "summary.json"
        return json.loads(path.read_text())["checkpoint_sha256"] if path.exists() else None

    def rounds(self, name: str) -> list[dict[str, Any]]:
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


SIGN = ["update.codec=sign", "update.bits=1"]
BOTH_WAYS = ["update.codec=trellis", "update.bits=1", "downlink.codec=trellis", "downlink.bits=1"]
WAYS = {"float32": ["update.codec=float32", "update.bits=32"], "sign": SIGN, "trellis": BOTH_WAYS}


def speeds(field: Field, delay_ms: float) -> list[dict[str, Any]]:
    """Seconds of the second round, in which nothing but the models travels."""
    rows = []
    for megabits in (10.0, 1.0):
        slow_down(megabits, delay_ms)
        for codec, values in WAYS.items():
            name = f"{codec}-{megabits:g}"
            field.run(name, 2, [*values, "federation.timeout-seconds=600"]).code()
            line = field.rounds(name)[1]
            row = {"megabits_per_second": megabits, "codec": codec}
            row |= {key: line[key] for key in ("seconds", "outcome", "replies")}
            rows.append(
                row | {"bytes_up": line["bytes_up"] / 2, "bytes_down": line["bytes_down"] / 2}
            )
    slow_down(1000, 0)
    return rows


def unplugged(field: Field, clients: list[Talker]) -> dict[str, Any]:
    """A client's link goes down in round 2 and comes back after it."""
    clients[1].forget()  # it may have been in a round 2 before
    run = field.run("unplugged", 6, [*SIGN, "federation.timeout-seconds=75"])
    clients[1].wait_for("round 2: training")
    ip("-n", CLIENTS[1], "link", "set", "eth0", "down")
    run.wait_for("round 2/6")
    ip("-n", CLIENTS[1], "link", "set", "eth0", "up")
    code = run.code()
    kept = ("round", "outcome", "replies", "seconds")
    rounds = [{key: line[key] for key in kept} for line in field.rounds("unplugged")]
    return {"exit_code": code, "rounds": rounds, "display": run.lines, "client": clients[1].lines}


def restart(field: Field, server: Talker, clients: list[Talker]) -> dict[str, Any]:
    """The SuperLink is killed in mid-run; then a run of its own after the restart."""
    run = field.run("killed", 4, [*SIGN, "federation.timeout-seconds=120"])
    run.wait_for("round 1/4")
    clients[0].wait_for("round 2: training")
    address = json.loads((Path(field.home) / "address.json").read_text())
    os.kill(address["pid"], signal.SIGKILL)
    code_of_server = server.code()
    again = field.server()
    code = run.code()
    rounds_before = len(field.rounds("killed"))
    resumed = field.run("killed", 4, [*SIGN, "federation.timeout-seconds=120"], "--resume")
    code_resumed = resumed.code()
    undisturbed = field.run("undisturbed", 4, [*SIGN, "federation.timeout-seconds=120"])
    code_undisturbed = undisturbed.code()
    return {
        "server": server.lines,
        "server_exit_code": code_of_server,
        "server_again": again.lines,
        "run_exit_code": code,
        "run": run.lines,
        "rounds_before_the_resume": rounds_before,
        "resumed_exit_code": code_resumed,
        "resumed": resumed.lines,
        "rounds": field.rounds("killed"),
        "undisturbed_exit_code": code_undisturbed,
        "hash": field.final_hash("killed"),
        "undisturbed_hash": field.final_hash("undisturbed"),
        "clients": [client.lines for client in clients],
    }


PORTS = {9092: "fleet", 8000: "control and runtime", 9095: "health"}


def stranger(field: Field) -> dict[str, str]:
    """What the server answers to somebody in another namespace."""
    script = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close(); print('open')\n"
        "except OSError as error: print(error.strerror or error)\n"
    )
    found = {}
    for port, what in PORTS.items():
        command = inside(STRANGER, sys.executable, "-c", script, ADDRESS, str(port))
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{what} ({port})"] = done.stdout.strip()
    key = field.folder / "stranger" / "key"
    made = [sys.executable, "-m", "clients", "keygen", str(key)]
    subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    words = ["clients", "join", "--server", f"{ADDRESS}:9092", "--data", "faces", "--root",
             field.data, "--folder", str(key.parent)]  # fmt: skip
    for name, more in (
        ("with a key of its own", ["--ca", f"{field.home}/certificates/ca.pem", "--key", str(key)]),
        ("without TLS", ["--insecure"]),
    ):
        talker = field.talker(STRANGER, *words, *more)
        found[f"fleet, {name}"] = f"exit {talker.code()}: {talker.lines[-1]}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("speeds", "unplugged", "restart", "stranger"))
    parser.add_argument("--delay-ms", type=float, default=0, help="needs the kernel's netem")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # everything is ended and removed
    with tempfile.TemporaryDirectory() as name, network(), ExitStack() as stack:
        field = Field(Path(name), stack)
        server = field.server()
        clients = field.clients()
        parts: dict[str, Callable[[], Any]] = {
            "stranger": lambda: stranger(field),
            "restart": lambda: restart(field, server, clients),
            "unplugged": lambda: unplugged(field, clients),
            "speeds": lambda: speeds(field, arguments.delay_ms),
        }
        chosen = [arguments.only] if arguments.only else list(parts)
        results = {}
        for part in chosen:
            results[part] = parts[part]()
            print(json.dumps({part: results[part]}), file=sys.stderr, flush=True)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
