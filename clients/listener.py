"""What Flower's SuperNode prints, in plain words for the person at this machine."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Say = Callable[[str], None]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(kw_only=True, slots=True)
class Listener:
    """Turns Flower's lines into ours.

    Attributes:
        server: HOST:PORT.
        is_reachable: asks the server's port.
        say: takes a line for people.
        joined: whether the server has taken this node.
        refused: whether it does not, or not any more.
        away: whether the server could not be reached when we last looked.
    """

    server: str
    is_reachable: Callable[[], bool]
    say: Say
    joined: bool = False
    refused: bool = False
    away: bool = False
    _round: str = ""

    def hear(self, line: str) -> None:
        """Takes one line of the SuperNode or of a process that it started."""
        text = _COLOUR.sub("", line).strip()
        for pattern, react in _REACTIONS:
            found = pattern.search(text)
            if found is not None:
                react(self, found)
                return

    def _on_joined(self, _: re.Match[str]) -> None:
        self.joined = True
        self.say(f"joined {self.server}, waiting for rounds")

    def _on_refused(self, _: re.Match[str]) -> None:
        self.refused = True

    def _on_end(self, _: re.Match[str]) -> None:
        # Nobody here asked it to end: Flower's node ends itself when its key is turned away.
        self.refused = self.joined

    def _on_retry(self, _: re.Match[str]) -> None:
        # Its own child prints the same while it starts, so the port has the last word.
        if not self.away and not self.is_reachable():
            self.away = True
            self.say(f"{self.server} cannot be reached; trying again until it is there")

    def _on_back(self, _: re.Match[str]) -> None:
        if self.away:
            self.away = False
            self.say(f"{self.server} is there again, joined")

    def _on_round(self, found: re.Match[str]) -> None:
        self._round = found[1]

    def _on_receive(self, found: re.Match[str]) -> None:
        doing = "evaluating" if found[1] == "evaluate" else "training"
        asked = found[1] == "query"
        self.say("asked what this node has" if asked else f"round {self._round}: {doing}")

    def _on_sent(self, _: re.Match[str]) -> None:
        self.say("answer sent")

    def _on_problem(self, found: re.Match[str]) -> None:
        self.say(f"this node's app says: {found[1]}")


# Flower 1.39's words and ours from the client app. The first that fits counts.
_REACTIONS: Sequence[tuple[re.Pattern[str], Callable[[Listener, re.Match[str]], None]]] = (
    (re.compile(r"SuperNode ID: "), Listener._on_joined),
    (re.compile(r"Failed to activate SuperNode"), Listener._on_refused),
    (re.compile(r"SuperNode terminated gracefully"), Listener._on_end),
    (re.compile(r"Connection attempt failed"), Listener._on_retry),
    (re.compile(r"Connection successful after"), Listener._on_back),
    (re.compile(r"\[RUN \d+, ROUND (\w+)\]"), Listener._on_round),
    (re.compile(r"Receiving: (\w+)"), Listener._on_receive),
    (re.compile(r"Sent successfully"), Listener._on_sent),
    (re.compile(r"^(refused: .*)"), Listener._on_problem),
    (re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception): .*)"), Listener._on_problem),
)
