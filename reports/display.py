"""Live progress of a federated run, on standard error: standard output is for results.

On a terminal a panel is kept up to date in place; elsewhere (a pipe, CI) each round is one line.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reports import comparison, units

_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class _Run:
    """What the display knows of the run that it shows."""

    name: str
    num_rounds: int
    metric_name: str
    baseline_percent: float | None
    started: float
    round: int = 0
    rounds_seen: int = 0
    abandoned: int = 0
    clients_done: int = 0
    clients_total: int = 0
    replies: Counter[str] = field(default_factory=Counter)
    scores: list[tuple[int, float]] = field(default_factory=list)
    client_figures: str = ""  # of the clients' own last evaluation
    privacy: str = ""  # spent so far
    bytes_up: float | None = None
    bytes_down: float | None = None
    round_started: float = 0.0

    def best(self) -> tuple[int, float] | None:
        """Round and value of the best metric so far."""
        if not self.scores:
            return None
        sign = 1 if units.lower_is_better(self.metric_name) else -1
        return min(self.scores, key=lambda score: sign * score[1])

    def seconds_left(self, now: float) -> float | None:
        """Time left by the mean length of the rounds seen, None before the first."""
        if not self.rounds_seen:
            return None
        mean = (self.round_started - self.started) / self.rounds_seen
        left = mean * max(self.num_rounds - self.round, 0) - (now - self.round_started)
        return max(left, 0.0)


class RunDisplay:
    """Progress of one run after another; a context manager that always restores the terminal.

    `begin`, any number of `client_done` and `round_done`, then `end`, for each run. Rounds count
    from 1; a line of round 0 (an evaluation before training) is shown but not counted as a round.

    Args:
        quiet: Show nothing at all.
        console: Where to write; standard error by default.
        clock: Seconds from an arbitrary start; for tests.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._clock = clock
        self._run: _Run | None = None
        self._live: Live | None = None

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            run = self._run
            if run is not None and not self._quiet:
                elapsed = units.seconds(self._clock() - run.started)
                self._stop_live()
                self._print(f"{run.name}: stopped after round {run.round}, {elapsed}")
        finally:
            self._stop_live()
            self._run = None

    def begin(
        self,
        setting_name: str,
        num_rounds: int,
        metric_name: str,
        baseline_percent: float | None = None,
    ) -> None:
        """Start showing a run; `baseline_percent` is the metric of predicting the mean shape."""
        self._stop_live()
        now = self._clock()
        name = units.printable(setting_name, 60)
        baseline = units.number(baseline_percent)
        self._run = _Run(name, num_rounds, metric_name, baseline, now, round_started=now)
        if self._quiet:
            return
        if self._console.is_terminal:
            # Results that are printed meanwhile must stay on standard output.
            self._live = Live(
                get_renderable=self._panel,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
            )
            self._live.start()
        else:
            label = units.metric_label(metric_name)
            self._print(
                f"{name}: {num_rounds} rounds, mean shape {label} {units.percent(baseline)}"
            )

    def client_done(self, round: int, done: int, total: int) -> None:
        """`done` of the `total` clients of `round` have replied or failed."""
        if self._run is not None:
            self._run.clients_done, self._run.clients_total = done, total

    def round_done(self, line: Mapping[str, Any]) -> None:
        """Show a line of `metrics.jsonl`."""
        run = self._run
        if run is None:
            return
        run.round = units.whole(line.get("round"))
        run.rounds_seen += run.round > 0
        run.round_started = self._clock()
        run.clients_done = 0
        run.abandoned += line.get("outcome") == "abandoned"
        score = units.number(line.get("metric"))
        if score is not None:
            run.scores.append((run.round, score))
        run.client_figures = units.client_figures(line) or run.client_figures
        run.privacy = units.privacy_figures(line)
        replies = line.get("replies")
        counts = dict(replies) if isinstance(replies, Mapping) else {}
        counts.setdefault("accepted", units.whole(line.get("accepted")))
        counts = Counter({str(reason): units.whole(count) for reason, count in counts.items()})
        run.replies.update(counts)
        if num_up := units.whole(line.get("clients_up")):
            run.bytes_up = units.whole(line.get("bytes_up")) / num_up
        if num_down := units.whole(line.get("clients_down")):
            run.bytes_down = units.whole(line.get("bytes_down")) / num_down
        if self._live is None and not self._quiet:
            self._print(_round_text(run, line, counts, self._clock()))

    def say(self, text: str) -> None:
        """A line beside the run: what its clients or its server have to say."""
        if not self._quiet:
            self._print(units.printable(text, 400))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Close the run with one line of its result."""
        run, self._run = self._run, None
        self._stop_live()
        if run is None or self._quiet:
            return
        name, value = units.metric_of(summary)
        parts = [
            f"{run.name}: {units.printable(summary.get('outcome', 'ended'), 40)}",
            f"{units.metric_label(name)} {units.percent(value)}"
            f" (mean shape {units.percent(summary.get('mean_shape_percent'))})",
            f"{units.size(summary.get('bytes_up_per_client_round'))} up"
            f" {units.size(summary.get('bytes_down_per_client_round'))} down a client and round",
            units.seconds(summary.get("seconds")),
        ]
        if tested := units.client_figures(summary, "client_test"):
            parts.insert(2, f"clients' own test {tested}")
        if spent := units.privacy_figures(summary):
            parts.insert(-1, spent)
        if attackers := units.attackers(summary):
            parts.insert(-1, f"attackers: {attackers}")
        self._print(" | ".join(parts))

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print(self, text: str) -> None:
        # As `Text` and soft-wrapped: names may hold what rich takes for markup, and a line in a
        # log stays one line.
        self._console.print(Text(text), soft_wrap=True)

    def _panel(self) -> RenderableType:
        run = self._run
        return Text("") if run is None else _panel(run, self._clock(), self._console)


def _round_text(run: _Run, line: Mapping[str, Any], counts: Mapping[str, int], now: float) -> str:
    """One plain line for a finished round."""
    parts = [f"{run.name}: round {run.round}/{run.num_rounds}"]
    if line.get("outcome") == "abandoned":
        parts.append(f"abandoned ({units.printable(line.get('reason') or 'no reason given', 80)})")
    replies = f"accepted {counts['accepted']}, rejected {_num_rejected(counts)}"
    parts.append(replies + (f", unavailable {away}" if (away := counts["unavailable"]) else ""))
    score, best = units.number(line.get("metric")), run.best()
    if score is not None and best is not None:
        label = units.metric_label(run.metric_name)
        parts.append(f"{label} {units.percent(score)} (best {units.percent(best[1])})")
    if own := units.client_figures(line):
        parts.append(f"clients' own {own}")
    if run.privacy:
        parts.append(run.privacy)
    parts.append(f"{units.size(run.bytes_up)} up {units.size(run.bytes_down)} down a client")
    parts.append(f"{units.clock(now - run.started)} elapsed, {_left(run, now)} left")
    return " | ".join(parts)


def _num_rejected(counts: Mapping[str, int]) -> int:
    return sum(comparison.rejected({"replies": counts}).values())


def _left(run: _Run, now: float) -> str:
    left = run.seconds_left(now)
    return units.MISSING if left is None else units.clock(left)


def _panel(run: _Run, now: float, console: Console) -> Panel:
    """The live panel: progress bars of rounds and clients above the figures of the last round."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    running = min(run.round + 1, run.num_rounds)
    grid.add_row("rounds", _bar(run.round, run.num_rounds, f"{run.round} of {run.num_rounds} done"))
    clients = f"{run.clients_done} of {run.clients_total or units.MISSING} done"
    grid.add_row("clients", _bar(run.clients_done, run.clients_total, clients))
    grid.add_row(units.metric_label(run.metric_name), _score(run, console))
    if run.client_figures:
        grid.add_row("clients' own", Text(run.client_figures))
    if run.privacy:
        grid.add_row("privacy", Text(run.privacy))
    replies = Text.assemble((f"{run.replies['accepted']} accepted", "green"))
    num_rejected = _num_rejected(run.replies)
    replies.append(f"  {num_rejected} rejected", "red" if num_rejected else "dim")
    reasons = list(comparison.rejected({"replies": run.replies}).items())
    if reasons:
        listed = ", ".join(f"{units.printable(reason, 30)} {n}" for reason, n in reasons[:4])
        replies.append(f" ({listed})", "dim")
    if away := run.replies["unavailable"]:
        replies.append(f"  {away} unavailable", "dim")
    if run.abandoned:
        replies.append(f"  {units.counted(run.abandoned, 'round')} abandoned", "yellow")
    grid.add_row("replies", replies)
    sent = f"{units.size(run.bytes_up)} up  {units.size(run.bytes_down)} down"
    grid.add_row("bytes", Text.assemble(sent, (" per client and round", "dim")))
    elapsed = f"{units.clock(now - run.started)} elapsed"
    grid.add_row("time", Text.assemble(elapsed, (f"  about {_left(run, now)} left", "dim")))
    title = Text.assemble(" ", (run.name, "bold"), f"  round {running} of {run.num_rounds} ")
    return Panel(
        Group(grid), title=title, title_align="left", box=box.ROUNDED, width=min(console.width, 92)
    )


def _bar(done: int, total: int, text: str) -> Table:
    """A progress bar of fixed width and its text."""
    row = Table.grid(padding=(0, 2))
    row.add_column(width=30)
    row.add_column(no_wrap=True)
    bar = ProgressBar(max(total, 1), done, width=30, complete_style="cyan")
    row.add_row(bar, Text(text))
    return row


def _score(run: _Run, console: Console) -> Text:
    """Last and best metric, the baseline, and the course so far in block characters."""
    baseline = f"  mean shape {units.percent(run.baseline_percent)}"
    best = run.best()
    if best is None:
        return Text.assemble(("not evaluated yet", "dim"), (baseline, "dim"))
    text = Text.assemble(
        (units.percent(run.scores[-1][1]), "bold"),
        f"  best {units.percent(best[1])} (round {best[0]})",
        (baseline, "dim"),
    )
    if not console.options.ascii_only and len(run.scores) > 1:
        text.append(f"  {_sparkline([score for _, score in run.scores][-20:])}", "cyan")
    return text


def _sparkline(values: Sequence[float]) -> str:
    """Block characters for the values, the lowest block for the smallest."""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)


def comparison_table(summaries: Sequence[Mapping[str, Any]]) -> Group:
    """The summaries of several runs as tables for the terminal.

    A column a run; up to four stand side by side, which fits 80 characters, the others below.
    """
    heading, *figures = comparison.columns(summaries)
    tables = []
    for start in range(0, len(summaries), comparison.SIDE_BY_SIDE):
        part = slice(start, start + comparison.SIDE_BY_SIDE)
        table = Table(box=box.SIMPLE_HEAD, header_style="", pad_edge=False)
        table.add_column(Text(heading.title, "bold"))
        for name in heading.cells[part]:
            table.add_column(Text(name, "bold"), justify="right", overflow="fold")
        for figure in figures:
            label = Text.assemble(figure.title, (f" {figure.note}", "dim"))
            table.add_row(label, *(Text(cell) for cell in figure.cells[part]))
        tables.append(table)
    return Group(*tables)
