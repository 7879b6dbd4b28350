"""Processes of Flower that our commands start: their environment, and how they are ended.

A SuperLink and a SuperNode start further processes (`flower-superexec`, and through it one for
every app), some in a session of their own; ending the first leaves the others for a while.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

# How long a process may take to end by itself.
END_SECONDS = 8.0
# Flower 1.39 looks for work once a second by default; a look costs a request on loopback.
TASK_POLL_SECONDS = "0.2"
MARK_VARIABLE = "FEDCUNET_FAMILY"


def flower_command(name: str) -> str:
    """Path of a script of Flower (`flwr`, `flower-superlink`, ...) beside this Python."""
    return str(Path(sys.executable).with_name(name))


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """What Flower's processes find in their environment.

    Args:
        home: the folder that Flower keeps apps and connections in, `FLWR_HOME`.
        more: further variables.
    """
    # Flower starts its scripts by name.
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    defaults = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_SECONDS}
    fixed = {
        "FLWR_HOME": str(home.resolve()),
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }
    return {**defaults, **os.environ, **fixed, **more}


@dataclass(frozen=True, slots=True)
class Family:
    """A process and all that it started, however far away they have moved.

    Attributes:
        process: the first one.
        mark: value of an environment variable that all of them inherit: a child whose parent has
            gone, or that leads a session of its own, is still found by it.
    """

    process: subprocess.Popen[str]
    mark: str

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str], output: int) -> "Family":
        """Starts a process out of reach of the terminal's Ctrl-C: whoever started it ends it.

        Args:
            command: program and arguments.
            environment: all of its environment.
            output: where standard output and error go, as for `subprocess.Popen`.
        """
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            command,
            env={**environment, MARK_VARIABLE: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        return cls(process, mark)

    def members(self) -> list[psutil.Process]:
        """Those that are running now."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def end(self, seconds: float = END_SECONDS) -> None:
        """Ends the first process, then those that are left, then by force.

        Args:
            seconds: how long each step may take.
        """
        with uninterrupted():
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                members = self.members()
                for member in members:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(signal_number)
                psutil.wait_procs(members, timeout=seconds)
            self.process.wait()


def end_as_by_ctrl_c() -> None:
    """From now on SIGTERM, and SIGHUP of a terminal that closes, end this process as Ctrl-C does.

    What is ignored, as SIGHUP is under nohup, stays so.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for one in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, interrupt)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No second signal stops what must be brought to its end, which must not be long."""
    if threading.current_thread() is not threading.main_thread():  # signals do not reach it
        yield
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.signal(one, signal.SIG_IGN) for one in ends}
    try:
        yield
    finally:
        for signal_number, handler in before.items():
            # None: it was not installed by Python, and cannot be put back.
            signal.signal(signal_number, signal.SIG_DFL if handler is None else handler)


def _mark_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(MARK_VARIABLE, ""))
    except (psutil.Error, OSError):  # gone, or another user's
        return ""


def free_port() -> int:
    """A TCP port of loopback that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def host_and_port(text: str, what: str) -> tuple[str, int]:
    """`("example.org", 9092)` of "example.org:9092"; an IPv6 address stands in brackets.

    Args:
        text: as the user gave it.
        what: name of the option, for the message.

    Raises:
        ValueError: it is something else.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{what}: expected HOST:PORT, found '{text}'")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """The inverse of `host_and_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
