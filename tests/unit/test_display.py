"""The live display and the printed table."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from reports import units
from reports.comparison import is_float32
from reports.display import RunDisplay, comparison_table

ESCAPE = "\x1b"


def console(*, terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    """A console that writes into memory."""
    out = io.StringIO()
    made = Console(
        file=out,
        force_terminal=terminal,
        width=width,
        highlight=False,
        color_system="standard" if terminal else None,
        # Not this process's: CI and pytest set TERM, COLUMNS and the like.
        _environ={"TERM": "xterm"},
    )
    return made, out


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl`: 8 clients asked, one of them late."""
    return {
        "round": number,
        "outcome": "committed",
        "reason": "",
        "accepted": 7,
        "replies": {"accepted": 7, "late": 1},
        "metric_name": "nme_percent",
        "metric": 30.0 / number,
        "bytes_up": 8 * 33_100,
        "bytes_down": 8 * 424_000,
        "clients_up": 8,
        "clients_down": 8,
        **changes,
    }


def summary(name: str, bits: float, nme: float = 8.1, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "outcome": "completed",
        "metric_name": "nme_percent",
        "nme_percent": nme,
        "mean_shape_percent": 17.9,
        "bytes_up_per_client_round": 226_000 * bits / 8,
        "bytes_down_per_client_round": 904_000,
        "bits_per_parameter_up": bits,
        "model_bytes": 61_000,
        "seconds": 95.0,
        "replies": {"accepted": 150, "late": 3, "checksum": 1},
        **changes,
    }


def printed(render: object, width: int = 120) -> str:
    made, out = console(terminal=False, width=width)
    made.print(render)
    return out.getvalue()


def test_a_device_that_is_away_is_not_rejected_and_was_sent_nothing() -> None:
    made, out = console(terminal=False, width=100)
    with RunDisplay(console=made, clock=Clock()) as display:
        display.begin("i8-w1", 4, "nme_percent", 17.9)
        away = {"accepted": 4, "unavailable": 4}
        display.round_done(line(1, replies=away, clients_up=4, clients_down=4))
        panel = printed(display._panel())
    assert "4 accepted  0 rejected  4 unavailable" in panel
    assert "accepted 4, rejected 0, unavailable 4 | " in out.getvalue()
    assert "66.2 kB up 848 kB down a client" in out.getvalue()


def test_without_a_terminal_each_round_is_one_plain_line() -> None:
    made, out = console(terminal=False, width=40)
    clock = Clock()
    with RunDisplay(console=made, clock=clock) as display:
        display.begin("i8-w1", 4, "nme_percent", 17.9)
        for number in (1, 2):
            display.client_done(number, 8, 8)
            clock.now += 10
            display.round_done(line(number))
        display.end(summary("i8-w1", 2.19))
    lines = out.getvalue().splitlines()
    assert lines[0] == "i8-w1: 4 rounds, mean shape NME 17.90 %"
    assert lines[2] == (
        "i8-w1: round 2/4 | accepted 7, rejected 1 | NME 15.00 % (best 15.00 %) | "
        "33.1 kB up 424 kB down a client | 0:20 elapsed, 0:20 left"
    )
    assert lines[3].startswith("i8-w1: completed | NME 8.10 % (mean shape 17.90 %)")
    assert len(lines) == 4
    assert ESCAPE not in out.getvalue()


def test_the_clients_own_evaluation_is_shown_where_there_was_one() -> None:
    figures = {
        "client_mean_percent": 12.0,
        "client_worst_percent": 30.25,
        "client_tenth_percent": 20.5,
        "client_spread_percent": 6.0,
    }
    words = "12.00 % (worst 30.25 %, worst tenth 20.50 %, spread 6.00 %)"
    made, out = console(terminal=False)
    with RunDisplay(console=made) as display:
        display.begin("s", 2, "nme_percent", None)
        display.round_done(line(1, **figures))
        display.round_done(line(2))
    lines = out.getvalue().splitlines()
    assert f"clients' own {words}" in lines[1]
    assert "clients' own" not in lines[2]
    made, _ = console(terminal=True)
    with RunDisplay(console=made) as display:
        display.begin("s", 2, "nme_percent", None)
        assert "clients' own" not in printed(display._panel())
        display.round_done(line(1, **figures))
        assert words in printed(display._panel())


def test_an_abandoned_round_says_why_and_shows_no_metric() -> None:
    made, out = console(terminal=False)
    with RunDisplay(console=made) as display:
        display.begin("s", 2, "nme_percent", None)
        display.round_done(line(1, outcome="abandoned", reason="3 of 6", metric=None))
    text = out.getvalue().splitlines()[1]
    assert "abandoned (3 of 6)" in text
    assert "NME" not in text


def test_the_best_is_the_lowest_error_or_the_highest_share() -> None:
    for metric_name, best in (("nme_percent", "4.00"), ("pck_percent", "9.00")):
        made, out = console(terminal=False)
        with RunDisplay(console=made) as display:
            display.begin("s", 3, metric_name, 17.9)
            for number, score in enumerate((9.0, 4.0, 6.0), start=1):
                display.round_done(line(number, metric=score))
        assert f"6.00 % (best {best} %)" in out.getvalue()


def test_on_a_terminal_a_panel_shows_clients_replies_bytes_and_time_left() -> None:
    made, out = console(terminal=True)
    clock = Clock()
    with RunDisplay(console=made, clock=clock) as display:
        display.begin("i8-w1", 4, "nme_percent", 17.9)
        clock.now = 30
        display.round_done(line(1))
        display.client_done(2, 5, 8)
        clock.now = 40
        panel = display._panel()
        display.end(summary("i8-w1", 2.19))
    text = printed(panel)
    for part in (
        "i8-w1  round 2 of 4",
        "1 of 4 done",
        "5 of 8 done",
        "30.00 %  best 30.00 % (round 1)  mean shape 17.90 %",
        "7 accepted  1 rejected (late 1)",
        "33.1 kB up  424 kB down per client and round",
        "0:40 elapsed  about 1:20 left",
    ):
        assert part in text
    assert "completed" in out.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_is_restored_when_a_run_breaks_off(error: type[BaseException]) -> None:
    made, out = console(terminal=True)
    display = RunDisplay(console=made)

    def run() -> None:
        with display:
            display.begin("s", 4, "nme_percent", 17.9)
            display.round_done(line(1))
            raise error

    with pytest.raises(error):
        run()
    text = out.getvalue()
    assert f"{ESCAPE}[?25l" in text
    assert text.rindex(f"{ESCAPE}[?25h") > text.rindex(f"{ESCAPE}[?25l")
    assert "s: stopped after round 1" in text
    assert display._live is None


def test_a_second_run_follows_the_first_in_one_display() -> None:
    made, out = console(terminal=True)
    with RunDisplay(console=made) as display:
        for name in ("first", "second"):
            display.begin(name, 1, "nme_percent", 17.9)
            display.round_done(line(1))
            display.end(summary(name, 2.19))
    assert "first: completed" in out.getvalue()
    assert "second: completed" in out.getvalue()
    assert "stopped" not in out.getvalue()


def test_quiet_writes_nothing() -> None:
    made, out = console(terminal=True)
    with RunDisplay(quiet=True, console=made) as display:
        display.begin("s", 1, "nme_percent", 17.9)
        display.client_done(1, 1, 8)
        display.round_done(line(1))
        display.end(summary("s", 2.19))
    assert out.getvalue() == ""


def test_by_default_everything_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay() as display:
        display.begin("s", 1, "nme_percent", 17.9)
        display.round_done(line(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "round 1/1" in captured.err


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_neither_markup_nor_escape_sequences(terminal: bool) -> None:
    made, out = console(terminal=terminal)
    with RunDisplay(console=made) as display:
        display.begin(f"[red]x{ESCAPE}]0;title\x07", 1, "nme_percent", 17.9)
        display.round_done(line(1, outcome="abandoned", reason=f"[/red]{ESCAPE}[2J"))
        display.end(summary("s", 2.19, outcome=f"{ESCAPE}[2J"))
    assert "[red]x" in out.getvalue()
    assert f"{ESCAPE}]0;" not in out.getvalue()
    assert f"{ESCAPE}[2J" not in out.getvalue()


def test_a_line_without_figures_does_not_break_the_display() -> None:
    for terminal in (True, False):
        made, _ = console(terminal=terminal)
        with RunDisplay(console=made) as display:
            display.client_done(1, 0, 0)
            display.round_done({})
            display.begin("s", 0, "nme_percent", None)
            display.client_done(1, 0, 0)
            display.round_done({"round": None, "metric": "x", "replies": 3})
            printed(display._panel())
            display.end({})


def rows(table_text: str) -> dict[str, str]:
    """Text of a printed row by the first words of it."""
    lines = [text.strip() for text in table_text.splitlines() if text.strip()]
    return {text.split("  ")[0]: text for text in lines}


def test_the_comparison_table_sets_figures_against_baseline_and_float32() -> None:
    runs = [summary("float32", 32.0, nme=6.4), summary("eden2", 2.0)]
    table = rows(printed(comparison_table(runs), width=80))
    assert table["NME final model"].split()[-4:] == ["6.40", "%", "8.10", "%"]
    assert table["Mean shape baseline"].count("17.90 %") == 2
    assert table["Better by than mean shape"].split()[-4:] == ["64.2", "%", "54.7", "%"]
    assert table["Bytes up a client, a round"].split()[-4:] == ["904", "kB", "56.5", "kB"]
    assert table["Fewer up than float32"].split()[-2:] == ["1.00×", "16.0×"]
    assert table["Bits up per parameter"].split()[-2:] == ["32.00", "2.00"]
    assert table["Model at its weight bits"].count("61.0 kB") == 2
    assert table["Time of this run"].count("1 min 35 s") == 2
    assert table["Rejected replies"].split()[-2:] == ["4", "4"]


def test_the_comparison_table_leaves_out_what_no_run_knows() -> None:
    text = printed(comparison_table([summary("eden2", 2.0)]))
    assert "than float32" not in text
    assert "Device time" not in text
    known = printed(comparison_table([summary("eden2", 2.0, device_seconds_per_round=12.5)]))
    assert "12.5 s" in known


def test_more_than_four_runs_fit_a_narrow_terminal_in_several_tables() -> None:
    runs = [summary(f"[b]run{i}", 2.0, nme=105.0 + i) for i in range(9)]
    lines = printed(comparison_table(runs), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    names = [text.split()[1:] for text in lines if "[b]run" in text]
    assert names == [[f"[b]run{i}" for i in part] for part in (range(4), range(4, 8), [8])]
    scores = [text.split()[3::2] for text in lines if text.startswith(" NME ")]
    assert [float(cell) for row in scores for cell in row] == [105.0 + i for i in range(9)]


def test_two_metrics_in_one_table_are_told_apart() -> None:
    pose = summary("pose", 2.0, metric_name="pckh_percent", pckh_percent=61.0)
    pose["mean_shape_percent"] = 20.0
    text = printed(comparison_table([summary("face", 2.0), pose]))
    assert "8.10 % NME" in text
    assert "61.00 % PCKh" in text
    assert "+41.0 points" in text


def test_the_float32_run_is_known_by_its_codec_else_by_its_bits() -> None:
    assert is_float32({"setting": {"update.codec": "float32"}})
    assert not is_float32({"setting": {"update.codec": "eden"}, "bits_per_parameter_up": 32})
    assert is_float32({"bits_per_parameter_up": 32.01})
    assert not is_float32({})


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (units.size, 999, "999 B"),
        (units.size, 999.6, "1.00 kB"),
        (units.size, 33_149, "33.1 kB"),
        (units.size, 904_000, "904 kB"),
        (units.size, 999_600, "1.00 MB"),
        (units.size, float("nan"), "–"),
        (units.size, "7", "–"),
        (units.seconds, 0.314, "0.31 s"),
        (units.seconds, 59.94, "59.9 s"),
        (units.seconds, 59.96, "1 min 00 s"),
        (units.seconds, 185, "3 min 05 s"),
        (units.seconds, 7620, "2 h 07 min"),
        (units.clock, 3727.4, "1:02:07"),
        (units.percent, 6.414, "6.41 %"),
        (units.percent, None, "–"),
        (units.percent, True, "–"),
        (units.ratio, 14.25, "14.2×"),
        (units.number, 10**400, None),
    ],
)
def test_numbers_are_written_in_human_units(
    write: Callable[[Any], Any], value: object, expected: str | None
) -> None:
    assert write(value) == expected


def test_improvement_is_a_share_of_an_error_and_points_of_a_share() -> None:
    assert units.improvement("nme_percent", 8.95, 17.9) == pytest.approx(50)
    assert units.improvement("nme_percent", 20.0, 10.0) == pytest.approx(-100)
    assert units.improvement("pck_percent", 61.0, 20.0) == pytest.approx(41)
    assert units.improvement("nme_percent", 8.0, 0.0) is None
    assert units.improvement("nme_percent", None, 17.9) is None


def test_privacy_and_attackers_are_shown_where_there_are_any() -> None:
    spent = {"epsilon": 3.214, "epsilon_server": None, "delta": 1e-5}
    words = "ε 3.21 (to the server ∞) at δ 1e-05"
    made, out = console(terminal=False)
    display = RunDisplay(console=made)
    display.begin("private", 2, "nme_percent", 17.9)
    display.round_done(line(1, **spent))
    display.round_done(line(2))
    display.end(summary("private", 2, attackers={"nan": 2}, **spent))
    first, second, last = out.getvalue().splitlines()[1:]
    assert words in first
    assert "ε" not in second
    assert f"{words} | attackers: 2 nan" in last
    table = printed(comparison_table([summary("a", 2), summary("b", 2, attackers={"nan": 2})]))
    assert "2 nan" in table
    assert "Privacy" not in table
    assert "to the server" in printed(comparison_table([summary("a", 2, **spent)]))
