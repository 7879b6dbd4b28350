"""Flower's command line, asked in JSON."""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from fedcunet.errors import RunFailure
from fedcunet.processes import flower_command, flower_environment
from server.folder import CONNECTION, ServerFolder

COMMAND_SECONDS = 180.0


def flwr(folder: ServerFolder, words: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """Runs `flwr WORDS fedcunet MORE --format json` against the server of `folder`.

    Raises:
        RunFailure: Flower refused, in its words, or the server does not answer.
    """
    folder.address()  # says so if no server is running
    command = [flower_command("flwr"), *words, CONNECTION, *more, "--format", "json"]
    try:
        done = subprocess.run(
            command,
            env=flower_environment(folder.flower_home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunFailure(
            f"the server at {folder.address().control} did not answer in {COMMAND_SECONDS:g} s"
        ) from None
    answer = _json_in(done.stdout)
    if done.returncode or not answer.get("success", False):
        said = str(answer.get("error-message") or done.stderr or done.stdout)
        raise RunFailure(f"flwr {words[0]}: {' '.join(said.split())[-500:]}")
    return answer


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object in Flower's output, which may say something in words before it."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        found = json.loads(text[start:])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
