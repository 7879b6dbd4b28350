"""A SuperNode for this machine's data: started, minded and ended.

Flower's own words go to `supernode.log` in the node's folder; what the person here must know is
said in one line each.
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clients.listener import Listener
from clients.reach import Answer, probe
from fedcunet.errors import RunFailure, UserError
from fedcunet.processes import Family, flower_command, flower_environment, free_port

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
# A node that has lived this long was well: the next pause is a short one again.
WELL_SECONDS = 120.0

NOT_ADMITTED = (
    "{server} does not admit this node's key; whoever runs the server can: "
    "python -m server admit-node {key}.pub"
)
NOT_ANY_MORE = "{server} has taken back the admission of this node's key"
# What the port's answer means for good: nothing that trying again would change.
HOPELESS: Mapping[Answer, str] = {
    "stranger": "{server} shows no certificate for that name by {authority} ({details})",
    "wants TLS": "{server} wants TLS: expected --ca and --key, found --insecure",
    "has no TLS": "{server} has no TLS ({details}); expected --insecure, or another port",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Supernode:
    """How a node joins.

    Attributes:
        server: HOST:PORT.
        authority: certificate to check the server against; None for no TLS.
        key: the node's private key; None without TLS.
        node_config: what the client app finds about this machine.
        folder: the node's own: Flower's home, state, log.
        patience_seconds: how long to try a server that cannot be reached; None for ever.
    """

    server: str
    authority: Path | None
    key: Path | None
    node_config: Mapping[str, str | int]
    folder: Path
    patience_seconds: float | None

    def command(self) -> list[str]:
        """The command line of Flower's SuperNode."""
        if self.authority is None or self.key is None:
            security = ["--insecure"]
        else:
            security = [
                *("--root-certificates", str(self.authority.resolve())),
                *("--auth-supernode-private-key", str(self.key.resolve())),
            ]
        return [
            flower_command("flower-supernode"),
            *security,
            *("--superlink", self.server),
            *("--host", "127.0.0.1"),
            *("--port", str(free_port())),
            *("--node-config", node_config_text(self.node_config)),
        ]

    def mind(self, say: Callable[[str], None]) -> None:
        """Keeps a node running; after an accident again, after ever longer pauses.

        Args:
            say: takes a line for people.

        Raises:
            RunFailure: the server refuses this node, or could not be reached in time.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            self._wait_for_server(say)
            began = time.monotonic()
            code = self._run_once(say)
            if time.monotonic() - began > WELL_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            say(f"the node ended (code {code}, see {self._log}); again in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @property
    def _log(self) -> Path:
        return self.folder / "supernode.log"

    def _run_once(self, say: Callable[[str], None]) -> int:
        """A SuperNode until it ends; raises RunFailure if the server refused it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        listener = Listener(server=self.server, is_reachable=self._is_reachable, say=say)
        with self._log.open("a", encoding="utf-8") as log, self._running() as process:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                listener.hear(line)
                if listener.refused:
                    break
            else:
                process.wait()
        if listener.refused:
            text = NOT_ANY_MORE if listener.joined else NOT_ADMITTED
            raise RunFailure(text.format(server=self.server, key=self.key))
        return int(process.returncode)

    @contextmanager
    def _running(self) -> Iterator[subprocess.Popen[str]]:
        """The SuperNode for the duration of a `with` block; all its children end with it."""
        home = self.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        started = Family.start(self.command(), flower_environment(home), subprocess.PIPE)
        try:
            yield started.process
        finally:
            started.end()
            if started.process.stdout is not None:
                started.process.stdout.close()

    def _is_reachable(self) -> bool:
        return probe(self.server, self.authority)[0] != "away"

    def _wait_for_server(self, say: Callable[[str], None]) -> None:
        """Waits until the server answers as it should.

        Raises:
            RunFailure: it never will, or did not in time.
        """
        pause, began, said = FIRST_PAUSE_SECONDS, time.monotonic(), False
        while True:
            answer, details = probe(self.server, self.authority)
            if answer == "ready":
                return
            if answer != "away":
                raise RunFailure(
                    HOPELESS[answer].format(
                        server=self.server, authority=self.authority, details=details
                    )
                )
            if not said:
                say(f"{self.server} cannot be reached ({details}); trying again until it is there")
                said = True
            left = (self.patience_seconds or float("inf")) - (time.monotonic() - began)
            if left <= 0:
                raise RunFailure(
                    f"{self.server} could not be reached in {self.patience_seconds:g} s ({details})"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def node_config_text(values: Mapping[str, str | int]) -> str:
    """The values as Flower's `--node-config` takes them.

    Raises:
        UserError: a text holds a double quote or a backslash, which Flower cannot take.
    """
    parts = []
    for key, value in values.items():
        if isinstance(value, str) and ('"' in value or "\\" in value):
            raise UserError(f"{key}: expected no double quote and no backslash, found {value}")
        parts.append(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}")
    return " ".join(parts)
