"""The server's folder: what `python -m server` keeps, and how its other commands find it.

```
certificates/   ca.pem, ca.key, server.pem, server.key
flower/         Flower's home: connections, apps of the runs
superlink.db    nodes, runs and messages; what makes a restart harmless
nodes.json      who was admitted, and under which client id
address.json    where the running server listens
runs/           of each run what was asked for and how far it is
superlink.log
```
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedcunet.config import Scalar
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import write_atomically
from server.certificates import Certificates

# Tells the server app, which Flower starts, whose run it is.
FOLDER_VARIABLE = "FEDCUNET_SERVER_FOLDER"
CONNECTION = "fedcunet"  # the name of our server in Flower's list of connections
DEFAULT_FOLDER = Path(".fedcunet/server")


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        fleet: HOST:PORT for clients.
        control: HOST:PORT on loopback for the commands of this machine and Flower's own processes.
        health: HOST:PORT on loopback for `grpc.health.v1`, without TLS.
        authority: certificate to check the server against, or None where there is no TLS.
        pid: process of the SuperLink.
    """

    fleet: str
    control: str
    health: str
    authority: str | None
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked for beside the setting.

    Attributes:
        out: run folder.
        name: of the run.
        wait_seconds: how long to wait for as many nodes as the setting has clients.
        resume: go on with the run that `out` holds.
        local: what the setting says of this machine alone; clients never get it.
    """

    out: Path
    name: str
    wait_seconds: float
    resume: bool = False
    local: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerFolder:
    """Paths of one server's folder."""

    path: Path

    @property
    def certificates(self) -> Certificates:
        """The certificates that `python -m server certs` makes."""
        return Certificates.in_folder(self.path / "certificates")

    @property
    def flower_home(self) -> Path:
        """Flower's home."""
        return self.path / "flower"

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.path / "superlink.db"

    @property
    def log(self) -> Path:
        """What the SuperLink and the server apps print."""
        return self.path / "superlink.log"

    def make(self) -> None:
        """Makes the folder, open to its owner only: the database holds models and run tokens."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)  # `server certs` may have made it
        self.flower_home.mkdir(exist_ok=True)

    def write_address(self, address: Address) -> None:
        """Says where the server listens, to our commands and to Flower's."""
        connection: dict[str, Any] = {"address": address.control}
        if address.authority is None:
            connection["insecure"] = True
        else:
            connection["root-certificates"] = address.authority
        connections = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        write_atomically(self.flower_home / "config.toml", tomli_w.dumps(connections))
        write_atomically(self.path / "address.json", json.dumps(asdict(address)) + "\n")

    def address(self) -> Address:
        """Where the server listens. Raises RunFailure if none was started from this folder."""
        path = self.path / "address.json"
        try:
            return Address(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunFailure(
                f"server folder {self.path}: no server has been started from it; "
                "start one with `python -m server`"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise RunFailure(f"{path}: cannot be read: {error}") from None

    def has_keys(self) -> bool:
        """Whether the running server takes admitted keys only: it does wherever it has TLS."""
        return self.address().authority is not None

    def forget_address(self) -> None:
        """Says that the server has ended."""
        (self.path / "address.json").unlink(missing_ok=True)

    def write_request(self, run_id: int, request: Request) -> None:
        """Tells the server app of that run what Flower cannot pass on."""
        values = asdict(request) | {"out": str(request.out.resolve())}
        write_atomically(self.path / "runs" / f"{run_id}.json", json.dumps(values) + "\n")

    def request(self, run_id: int) -> Request | None:
        """The request of that run; None while there is none."""
        try:
            text = (self.path / "runs" / f"{run_id}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        values = json.loads(text)
        return Request(**values | {"out": Path(values["out"])})

    def progress(self, run_id: int) -> Path:
        """The file in which the server app says how far it is."""
        return self.path / "runs" / f"{run_id}.progress.jsonl"


def folder_of_environment() -> ServerFolder | None:
    """The folder of the server that started this process; None in Flower's own simulation."""
    path = os.environ.get(FOLDER_VARIABLE)
    return ServerFolder(Path(path)) if path else None


def existing(path: Path) -> ServerFolder:
    """The server's folder. Raises UserError if there is none."""
    if not path.is_dir():
        raise UserError(f"server folder {path}: not found; `python -m server` makes it")
    return ServerFolder(path)
