"""A run among real nodes: who they are, where its folder goes, and who hears how far it is.

Flower starts the server app in a process of its own; what `python -m server run` asked for lies in
the server's folder, and what the app has to say goes there too.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from flwr.serverapp import Grid

from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from server.folder import Request, ServerFolder
from server.journal import JournalDisplay
from server.nodes import client_ids
from server.recorder import finished

# The request is written when Flower has said the run's id; the app may be there first.
REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.5


def run(
    serve: Callable[..., Any], grid: Grid, config: RunConfig, folder: ServerFolder, run_id: int
) -> None:
    """Runs `config` as it was asked for, and leaves a line of why if that fails.

    Args:
        serve: `server.app.serve`.
        grid: Flower's.
        config: the setting.
        folder: the server's.
        run_id: Flower's.
    """
    journal = JournalDisplay(folder.progress(run_id))
    logging.getLogger().addHandler(_JournalHandler(journal))
    try:
        request = _request(folder, run_id)
        config = RunConfig.from_flat(config.flat() | dict(request.local))
        admitted = client_ids(folder.path) if folder.has_keys() else None
        if not (request.resume and finished(request.out, config)):
            _wait_for_nodes(grid, config.federation.clients, request.wait_seconds, journal)
        serve(
            grid,
            config,
            out=request.out,
            name=request.name,
            display=journal,
            admitted=admitted,
            resume=request.resume,
        )
    except (UserError, RunFailure) as error:
        journal.fail(str(error), wrong_use=isinstance(error, UserError))
        raise
    except Exception as error:
        journal.fail(f"{type(error).__name__}: {error}", wrong_use=False)
        raise


class _JournalHandler(logging.Handler):
    """Warnings of ours reach whoever waits for the run."""

    def __init__(self, journal: JournalDisplay) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """Passes on what `fedcunet` and `server` say, and nothing of Flower's."""
        if record.name.split(".")[0] in ("fedcunet", "server"):
            self._journal.say(record.getMessage())


def _request(folder: ServerFolder, run_id: int) -> Request:
    deadline = time.monotonic() + REQUEST_SECONDS
    while time.monotonic() < deadline:
        request = folder.request(run_id)
        if request is not None:
            return request
        time.sleep(POLL_SECONDS)
    # Submitted by `flwr run`.
    name = f"flower-{run_id}"
    return Request(out=folder.path / "runs" / name, name=name, wait_seconds=0.0)


def _wait_for_nodes(grid: Grid, wanted: int, seconds: float, journal: JournalDisplay) -> None:
    """Waits until as many nodes are there as the setting has clients, or time is up."""
    deadline = time.monotonic() + seconds
    found = -1
    while True:
        before, found = found, len(list(grid.get_node_ids()))
        if found >= wanted:
            return
        if time.monotonic() >= deadline:
            journal.say(f"{found} of {wanted} nodes are there; the run begins without the others")
            return
        if found != before:
            journal.say(f"waiting for nodes: {found} of {wanted} are there")
        time.sleep(POLL_SECONDS)
