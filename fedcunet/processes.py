"""Processes of Flower that our commands start: their environment, and how they are ended.

A SuperLink and a SuperNode start further processes (`flower-superexec`, and through it one for
every app), some in a session of their own; ending the first leaves the others for a while. So a
family is ended by process id, children of children included.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

# How long a process may take to end by itself.
END_SECONDS = 8.0
# Flower 1.39 looks for work once a second by default; a look costs a request on loopback.
TASK_POLL_SECONDS = "0.2"


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


def start(
    command: Sequence[str], environment: dict[str, str], *, output: int
) -> subprocess.Popen[str]:
    """Starts a process out of reach of the terminal's Ctrl-C: whoever started it ends it.

    Args:
        command: program and arguments.
        environment: all of its environment.
        output: where standard output and error go, as for `subprocess.Popen`.
    """
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def family(pid: int) -> list[psutil.Process]:
    """The process and everything that it started, itself first; empty if it has gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_family(members: Sequence[psutil.Process], seconds: float = END_SECONDS) -> None:
    """Ends processes: the first by SIGTERM, then those left, then by SIGKILL.

    Args:
        members: of `family`, taken while the first process was still there.
        seconds: how long each step may take.
    """
    if not members:
        return
    later = [child for member in members for child in family(member.pid)]
    everyone = list({process.pid: process for process in [*members, *later]}.values())
    for step in (everyone[:1], everyone):
        for process in step:
            if process.is_running():
                _signal(process, kill=False)
        psutil.wait_procs(step, timeout=seconds)
    _, left = psutil.wait_procs(everyone, timeout=0)
    for process in left:
        _signal(process, kill=True)
    psutil.wait_procs(left, timeout=seconds)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill() if kill else process.terminate()


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
