"""A SuperLink with sound defaults: start it, wait until it is ready, mind it, end it."""

import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held
from fedcunet.processes import (
    Family,
    flower_command,
    flower_environment,
    host_and_port,
    joined,
)
from server.certificates import Certificates
from server.folder import FOLDER_VARIABLE, Address, ServerFolder

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
HEALTH_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Superlink:
    """How a SuperLink is to listen.

    Attributes:
        folder: the server's.
        listen: HOST:PORT for clients.
        control_port: on loopback, for our commands and Flower's own processes.
        health_port: on loopback.
        certificates: None for no TLS, and so no node authentication.
        exposed: whether listening beyond loopback without TLS was asked for in words.
    """

    folder: ServerFolder
    listen: str
    control_port: int
    health_port: int
    certificates: Certificates | None
    exposed: bool = False

    def check(self) -> None:
        """Raises UserError if it must not or cannot be started so."""
        try:
            host, port = host_and_port(self.listen, "--listen")
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.certificates is not None:
            self.certificates.check()
        elif not is_loopback(host) and not self.exposed:
            raise UserError(
                f"--listen {self.listen} --insecure: without TLS everybody on the way can read and "
                "change models and updates, and anybody can take part; expected TLS, or "
                "--anyone-may-read-and-join if that is what you want"
            )
        ports = [port, self.control_port, self.health_port]
        if len(set(ports)) < len(ports):
            raise UserError(f"ports: expected three different ones, found {ports}")
        for where, number in zip((host, LOOPBACK, LOOPBACK), ports, strict=True):
            _check_free(where, number)

    def command(self) -> list[str]:
        """The command line of Flower's SuperLink."""
        if self.certificates is None:
            security = ["--insecure"]
        else:
            files = self.certificates
            security = [
                *("--ssl-ca-certfile", str(files.authority.resolve())),
                *("--ssl-certfile", str(files.certificate.resolve())),
                *("--ssl-keyfile", str(files.key.resolve())),
                "--enable-supernode-auth",
            ]
        return [
            flower_command("flower-superlink"),
            *security,
            *("--fleet-api-type", "grpc-rere"),
            *("--fleet-api-address", self.listen),
            *("--host", LOOPBACK),
            *("--port", str(self.control_port)),
            *("--health-server-address", joined(LOOPBACK, self.health_port)),
            *("--database", str(self.folder.database.resolve())),
            "--disable-runtime-dependency-installation",
        ]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """The SuperLink, ready, for the duration of a `with` block; all its children end with it.

        Raises:
            UserError: see `check`, or another server is running from the folder.
            RunFailure: it ended instead of getting ready; the line says where its words are.
        """
        self.check()
        self.folder.make()
        with held(self.folder.path):
            yield from self._started()

    def _started(self) -> Iterator[subprocess.Popen[str]]:
        environment = flower_environment(
            self.folder.flower_home, **{FOLDER_VARIABLE: str(self.folder.path.resolve())}
        )
        with self.folder.log.open("a", encoding="utf-8") as log:
            started = Family.start(self.command(), environment, log.fileno())
        process = started.process
        try:
            health = joined(LOOPBACK, self.health_port)
            self._wait_until_ready(process, health)
            authority = self.certificates.authority.resolve() if self.certificates else None
            self.folder.write_address(
                Address(
                    fleet=self.listen,
                    control=joined(LOOPBACK, self.control_port),
                    health=health,
                    authority=str(authority) if authority else None,
                    pid=process.pid,
                )
            )
            yield process
        finally:
            self.folder.forget_address()
            started.end()

    def _wait_until_ready(self, process: subprocess.Popen[str], health: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_serving(health):
            if process.poll() is not None:
                raise RunFailure(f"the SuperLink ended at its start: {last_words(self.folder.log)}")
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"the SuperLink was not ready after {START_SECONDS:g} s; see {self.folder.log}"
                )
            time.sleep(0.1)


def is_serving(health: str) -> bool:
    """Whether `grpc.health.v1` at that address answers SERVING."""
    with grpc.insecure_channel(health) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def last_words(log: Path, num_lines: int = 3) -> str:
    """The last lines of a log that say something, on one line."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return " | ".join([line for line in lines if line][-num_lines:]) or "it said nothing"


def _check_free(host: str, port: int) -> None:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        kind, address = infos[0][0], infos[0][4]
        with socket.socket(kind, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise UserError(f"{joined(host, port)}: cannot listen there: {error.strerror}") from None
