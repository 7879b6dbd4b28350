"""The headline figures of one or several runs: the same rows for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports import units

# Up to so many runs are shown side by side, a column a run: it fits a narrow screen.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Column:
    """A column of the comparison: a heading, its unit or note, and a cell a run."""

    title: str
    note: str
    cells: tuple[str, ...]


def rejected(summary: Mapping[str, Any]) -> dict[str, int]:
    """Counted reasons of a summary's rejected replies, most frequent first.

    Of a device that was not available there is no reply to reject.
    """
    replies = summary.get("replies")
    if not isinstance(replies, Mapping):
        return {}
    fine = ("accepted", "unavailable")
    counts = {str(k): units.whole(v) for k, v in replies.items() if k not in fine}
    return dict(sorted(((k, n) for k, n in counts.items() if n), key=lambda p: (-p[1], p[0])))


def is_float32(summary: Mapping[str, Any]) -> bool:
    """True if the run sent float32 updates: the codec of its setting, else about 32 bits each."""
    setting = summary.get("setting")
    if isinstance(setting, Mapping) and "update.codec" in setting:
        return bool(setting["update.codec"] == "float32")
    bits = units.number(summary.get("bits_per_parameter_up"))
    return bits is not None and 31 < bits < 33


def setting_names(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A printable and distinct name for every run."""
    names: list[str] = []
    for i, summary in enumerate(summaries):
        name = units.printable(summary.get("name") or f"run {i + 1}", 60)
        names.append(name if name not in names else f"{name} ({i + 1})")
    return names


def columns(summaries: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of the comparison, first the names of the settings."""
    metrics = [units.metric_of(s) for s in summaries]
    labels = list(dict.fromkeys(units.metric_label(name) for name, _ in metrics))
    reference = next((s for s in summaries if is_float32(s)), None)
    float32_up = units.number((reference or {}).get("bytes_up_per_client_round"))

    def fewer(summary: Mapping[str, Any]) -> str:
        up = units.number(summary.get("bytes_up_per_client_round"))
        return units.ratio(float32_up / up if float32_up and up else None)

    def score(name: str, value: float | None) -> str:
        label = f" {units.metric_label(name)}" if len(labels) > 1 and value is not None else ""
        return units.percent(value) + label

    def better(summary: Mapping[str, Any], name: str, value: float | None) -> str:
        return units.improvement_text(name, value, units.number(summary.get("mean_shape_percent")))

    def column(title: str, note: str, cells: Sequence[str]) -> Column:
        return Column(title, note, tuple(cells))

    table = [
        column("Setting", "", setting_names(summaries)),
        column(" / ".join(labels), "final model", [score(*metric) for metric in metrics]),
        column(
            "Mean shape",
            "baseline",
            [units.percent(s.get("mean_shape_percent")) for s in summaries],
        ),
        column(
            "Better by",
            "than mean shape",
            [better(s, *m) for s, m in zip(summaries, metrics, strict=True)],
        ),
        column(
            "Rounds", "committed", [units.plain(s.get("rounds_committed"), 0) for s in summaries]
        ),
        column(
            "Bytes up",
            "a client, a round",
            [units.size(s.get("bytes_up_per_client_round")) for s in summaries],
        ),
        column("Fewer up", "than float32", [fewer(s) for s in summaries]),
        column(
            "Bytes down",
            "a client, a round",
            [units.size(s.get("bytes_down_per_client_round")) for s in summaries],
        ),
        column(
            "Bits up",
            "per parameter",
            [units.plain(s.get("bits_per_parameter_up")) for s in summaries],
        ),
        column(
            "Model", "at its weight bits", [units.size(s.get("model_bytes")) for s in summaries]
        ),
        column(
            "Training peak",
            "memory of a step",
            [units.size(s.get("training_peak_bytes")) for s in summaries],
        ),
        column(
            "Training peak",
            "to naive float32",
            [units.plain(s.get("training_peak_ratio"), 3) for s in summaries],
        ),
        column(
            "Balance index",
            "NME² · memory · size",
            [units.plain(s.get("balance_index")) for s in summaries],
        ),
        column("Time", "of this run", [units.seconds(s.get("seconds")) for s in summaries]),
        column(
            "Device time",
            "per round",
            [units.seconds(s.get("device_seconds_per_round")) for s in summaries],
        ),
        column("Rejected", "replies", [str(sum(rejected(s).values())) for s in summaries]),
        column("Attackers", "clients", [units.attackers(s) or units.MISSING for s in summaries]),
        column("Privacy", "spent", [units.privacy_figures(s) or units.MISSING for s in summaries]),
    ]
    # A column in which no run has a value says nothing.
    return [c for c in table if any(cell != units.MISSING for cell in c.cells)]
