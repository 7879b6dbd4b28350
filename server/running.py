"""Submitting a run to the server of this machine, and following it to its end."""

import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import tomli_w

from fedcunet.config import RunConfig, Scalar
from fedcunet.config.tables import unflat
from fedcunet.errors import RunFailure, UserError
from fedcunet.processes import uninterrupted
from fedcunet.terms import LOCAL_KEYS
from server.flower import flwr
from server.folder import Request, ServerFolder
from server.journal import JournalReader

# The root of the repository, which is the Flower app that is submitted.
APP = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
# Each look at Flower's list of runs starts a process; the journal says almost everything.
STATUS_SECONDS = 15.0
# How long a server may take to come back before the run counts as ended.
SILENT_SECONDS = 120.0
# How long Flower may take to note the end of a run whose app has said its last word.
END_SECONDS = 60.0


class Display(Protocol):
    """Where progress is shown; see `server.app.Display`."""

    def begin(
        self,
        setting_name: str,
        num_rounds: int,
        metric_name: str,
        baseline_percent: float | None,
    ) -> None: ...
    def client_done(self, round: int, done: int, total: int) -> None: ...
    def round_done(self, line: dict[str, Any]) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...


def submit(folder: ServerFolder, config: RunConfig, request: Request) -> int:
    """Gives the setting and this repository's apps to the server; returns the run's id.

    Flower gives the setting to every node; what is this machine's own business goes another way,
    with the request.

    Raises:
        RunFailure: the server does not take it.
    """
    flat = config.flat()
    local = {key: _absolute(key, flat.pop(key)) for key in LOCAL_KEYS}
    with tempfile.TemporaryDirectory() as scratch:  # others may submit at the same time
        setting = Path(scratch) / "setting.toml"
        setting.write_text(tomli_w.dumps(unflat(flat, "setting")), encoding="utf-8")
        answer = flwr(folder, ["run", str(APP)], ["--run-config", str(setting)])
    run_id = int(answer["run-id"])
    folder.write_request(run_id, replace(request, local=local))
    return run_id


def _absolute(key: str, value: Scalar) -> Scalar:
    """A path that means the same in another process's folder; another value as it is."""
    return str(Path(str(value)).resolve()) if key.endswith(("-dir", ".root")) else value


@dataclass(kw_only=True, slots=True)
class Follower:
    """Follows one run.

    Attributes:
        folder: the server's.
        run_id: Flower's.
        display: shows what the run says.
        summary: of the run, once it has ended well.
        failure: why it failed, in its own words, and whether by wrong use.
    """

    folder: ServerFolder
    run_id: int
    display: Display
    summary: dict[str, Any] | None = None
    failure: tuple[str, bool] | None = None

    def follow(self) -> dict[str, Any]:
        """Shows the run until its end and returns its summary; an interrupt stops the run.

        Raises:
            UserError, RunFailure: as the run itself ended.
        """
        try:
            self._watch()
        except KeyboardInterrupt:
            stop(self.folder, self.run_id)
            raise
        if self.failure is not None:
            text, wrong_use = self.failure
            raise (UserError if wrong_use else RunFailure)(text)
        assert self.summary is not None
        return self.summary

    def _watch(self) -> None:
        reader = JournalReader(self.folder.progress(self.run_id))
        last_status = last_answer = time.monotonic()
        while self.summary is None and self.failure is None:
            for what, *arguments in reader.news():
                self._show(what, arguments)
            if time.monotonic() - last_status > STATUS_SECONDS:
                ended = _ended(self.folder, self.run_id)
                last_status = time.monotonic()
                last_answer = last_answer if ended is None else last_status
                if last_status - last_answer > SILENT_SECONDS:
                    ended = "nobody answers in the server's place any more"
                if ended:
                    for what, *arguments in reader.news():
                        self._show(what, arguments)
                    if self.summary is None and self.failure is None:
                        text = f"the run ended without a word: {ended}"
                        self.failure = (f"{text}; --resume goes on after its last round", False)
            time.sleep(POLL_SECONDS)
        self._agree_with_flower()

    def _agree_with_flower(self) -> None:
        """Waits until Flower has noted the end; its word counts if it saw the run fail."""
        deadline = time.monotonic() + END_SECONDS
        while not (ended := _ended(self.folder, self.run_id)):
            if time.monotonic() > deadline:
                ended = "Flower did not note its end"
                break
            time.sleep(POLL_SECONDS)
        if self.failure is None and "completed" not in ended:
            self.failure = (f"Flower says of the run: {ended}", False)

    def _show(self, what: str, arguments: list[Any]) -> None:
        if what == "fail":
            self.failure = (arguments[0], arguments[1])
            return
        if what == "end":
            self.summary = arguments[0]
        getattr(self.display, what)(*arguments)


def _ended(folder: ServerFolder, run_id: int) -> str | None:
    """Flower's status of a run that has ended; empty while it goes on, None if nobody answers."""
    try:
        runs = flwr(folder, ["list"], ["--run-id", str(run_id)])["runs"]
    except RunFailure:
        return None  # the server is being restarted, or has gone: what it last said still counts
    status = str(runs[0]["status"]) if runs else "unknown to the server"
    details = str(runs[0].get("status-details", "")) if runs else ""
    done = status.startswith("finished") or not runs
    return f"{status} {details}".strip() if done else ""


def stop(folder: ServerFolder, run_id: int) -> None:
    """Stops a run; a second interrupt meanwhile does no harm."""
    with uninterrupted(), contextlib.suppress(RunFailure):
        flwr(folder, ["stop", str(run_id)])
