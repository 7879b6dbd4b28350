"""A run's progress as lines of a file, so that another process can show it live.

The server app runs inside Flower's processes; `python -m server run` waits in a terminal. The app
writes each call to its display as a line, and the command repeats the calls on a display of its
own.
"""

import json
from pathlib import Path
from typing import Any


class JournalDisplay:
    """A display that writes what it is to show.

    Args:
        path: file of the lines; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def begin(self, *arguments: Any) -> None:
        """As a display's."""
        self._write("begin", *arguments)

    def client_done(self, *arguments: Any) -> None:
        """As a display's."""
        self._write("client_done", *arguments)

    def round_done(self, line: dict[str, Any]) -> None:
        """As a display's."""
        self._write("round_done", line)

    def end(self, summary: dict[str, Any]) -> None:
        """As a display's."""
        self._write("end", summary)

    def say(self, text: str) -> None:
        """A line for people."""
        self._write("say", text)

    def fail(self, text: str, *, wrong_use: bool) -> None:
        """Why the run failed."""
        self._write("fail", text, wrong_use)

    def _write(self, what: str, *arguments: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([what, *arguments]) + "\n")


class JournalReader:
    """Reads the lines that have been added since the last call.

    Args:
        path: file of the lines; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def news(self) -> list[list[Any]]:
        """The new whole lines, each `[what, *arguments]`."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
