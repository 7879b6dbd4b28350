"""The charts of a report: what is drawn from the lines of one or several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reports import comparison, page, units
from reports.charts import (
    Axis,
    Line,
    line_chart,
    scatter_chart,
    stacked_bars,
    tick_bytes,
    tick_number,
)
from reports.run_folder import RunFolder

_MAX_BARS = 24
# Series colours of downlink, compute, uplink, and their key in the page's style.
_PART_COLOURS = (2, 0, 1)
_PARTS_LEGEND = (
    '<p class="legend"><span class="key s2"></span>downlink <span class="key s0"></span>compute '
    '<span class="key s1"></span>uplink</p>'
)

Progress = Callable[[dict[str, Any]], float | None]


def curves(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Metric by round, by bytes and by device time, and the training loss: a card each."""
    metric_names = {units.metric_of(run.summary)[0] for run in runs}
    metric_name = units.metric_of(runs[0].summary)[0] if runs else "nme_percent"
    label = " / ".join(sorted(units.metric_label(name) for name in metric_names))
    lower = units.lower_is_better(metric_name)
    aim = "lower is better" if lower else "higher is better"
    baseline = _common_baseline(runs) if len(metric_names) == 1 else None
    cards = []

    def add(chart_id: str, title: str, note: str, x_axis: Axis, progress: Progress | None) -> None:
        lines = [_line(run, name, progress) for run, name in zip(runs, names, strict=True)]
        if not any(line.x for line in lines):
            return
        crosses = _abandoned(runs[0]) if len(runs) == 1 and progress is None else []
        if crosses:
            note += "; × on the axis: an abandoned round"
        svg = line_chart(
            chart_id,
            lines,
            x_axis,
            _metric_axis(label, lower, lines),
            description=f"{title}. {_in_words(lines, x_axis, '%')}{_baseline_words(baseline)}",
            baseline=baseline,
            crosses=crosses,
            end_labels=[f"{lines[0].y[-1]:.2f} %"] if len(lines) == 1 else (),
        )
        cards.append(page.plot(title, note, svg))

    rounds = Axis("round", tick_number, integer=True)
    add("round", f"{label} by round", aim, rounds, None)
    bytes_axis = Axis("bytes up and down, all clients together", tick_bytes, log=True)
    add("bytes", f"{label} by bytes sent", f"{aim}; logarithmic", bytes_axis, _bytes_of)
    factor, unit = _time_unit(max((_device_total(run) for run in runs), default=0.0))
    device_axis = Axis(f"virtual time on the devices, {unit}", tick_number)
    kinds = {run.is_buffered for run in runs}
    lasts = {
        False: "a round lasts as long as its slowest client",
        True: "a step comes when the buffer is full",
    }
    note = "; ".join([aim, *(words for kind, words in lasts.items() if kind in kinds)])

    def device_time(line: dict[str, Any]) -> float:
        return _device_seconds_of(line) / factor

    add("device", f"{label} by device time", note, device_axis, device_time)

    losses = [_loss_line(run, name) for run, name in zip(runs, names, strict=True)]
    if any(line.x for line in losses):
        values = [y for line in losses for y in line.y]
        log = min(values) > 0 and max(values) > 5 * min(values)
        note = "mean over the accepted replies" + ("; logarithmic" if log else "")
        svg = line_chart(
            "loss",
            losses,
            rounds,
            Axis("training loss", tick_number, log=log),
            description=f"Training loss by round. {_in_words(losses, rounds, '')}",
            end_labels=[f"{losses[0].y[-1]:.3g}"] if len(losses) == 1 else (),
        )
        cards.append(page.plot("Training loss", note, svg))
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""


def trade_off(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Final metric against bytes up, a point a run; empty where fewer than two have both."""
    points = []
    for run, name in zip(runs, names, strict=True):
        value = units.metric_of(run.summary)[1]
        up = units.number(run.summary.get("bytes_up_per_client_round"))
        if value is not None and up:
            points.append((name, up, value))
    metric_names = {units.metric_of(run.summary)[0] for run in runs}
    if len(points) < 2 or len(metric_names) > 1:
        return ""
    metric_name = metric_names.pop()
    label, lower = units.metric_label(metric_name), units.lower_is_better(metric_name)
    baseline = _common_baseline(runs)
    words = "; ".join(f"{name}: {units.size(x)}, {units.percent(y)}" for name, x, y in points)
    svg = scatter_chart(
        "tradeoff",
        points,
        Axis("bytes up, a client and round", tick_bytes, log=True),
        Axis(f"final {label}, %", tick_number),
        description=f"Final {label} by bytes up. {words}{_baseline_words(baseline)}",
        baseline=baseline,
    )
    corner = "lower left" if lower else "upper left"
    return page.plot(f"Final {label} by bytes up", f"{corner} is better; logarithmic", svg)


def device_bars(run: RunFolder) -> str:
    """Device seconds of a mean reply by client, or by profile where clients are many."""
    if not any(sum(client.device_parts()) for client in run.clients):
        return ""
    if len(run.clients) <= _MAX_BARS:
        title = "Device time by client"
        rows = [(f"{c.client[:12]}  {c.device}", c.device_parts()) for c in run.clients]
    else:
        title = "Device time by profile"
        rows = [
            (device, _mean_parts([c for c in run.clients if c.device == device]))
            for device in sorted({c.device for c in run.clients})[:_MAX_BARS]
        ]
    return _bars("clients", title, rows)


def setting_bars(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Device seconds of a mean reply by setting."""
    rows = [
        (name if len(name) <= 24 else f"{name[:23]}…", _mean_parts(run.clients))
        for run, name in zip(runs, names, strict=True)
    ]
    return _bars("settings", "Device time by setting", rows) if any(sum(p) for _, p in rows) else ""


def _bars(chart_id: str, title: str, rows: list[tuple[str, tuple[float, float, float]]]) -> str:
    words = "; ".join(
        f"{label}: downlink {units.seconds(p[0])}, compute {units.seconds(p[1])}, uplink "
        f"{units.seconds(p[2])}"
        for label, p in rows
    )
    factor, unit = _time_unit(max((sum(parts) for _, parts in rows), default=0.0))
    svg = stacked_bars(
        chart_id,
        [(label, [part / factor for part in parts]) for label, parts in rows],
        [units.seconds(sum(parts)) for _, parts in rows],
        _PART_COLOURS,
        Axis(f"virtual time of a mean reply, {unit}", tick_number),
        description=f"{title}. {words}",
    )
    return page.plot(title, "a mean reply, virtual", _PARTS_LEGEND + svg)


def _time_unit(longest: float) -> tuple[float, str]:
    """Unit of an axis that reaches to `longest` seconds, and its seconds."""
    if longest >= 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest >= 180 else (1.0, "seconds")


def _mean_parts(clients: Sequence[Any]) -> tuple[float, float, float]:
    """Mean seconds over all replies of some clients: downlink, compute, uplink."""
    count = max(sum(c.timed for c in clients), 1)
    return (
        sum(c.device_downlink for c in clients) / count,
        sum(c.device_compute for c in clients) / count,
        sum(c.device_uplink for c in clients) / count,
    )


def _line(run: RunFolder, name: str, progress: Progress | None) -> Line:
    """Metric of the evaluated rounds, by round or by what has added up until then.

    Rounds that were abandoned or not evaluated have no point, but what they cost adds up.
    """
    xs, ys, total = [], [], 0.0
    for line in run.rounds:
        total += (progress(line) if progress else None) or 0.0
        score = units.number(line.get("metric"))
        x = units.number(line.get("round")) if progress is None else total
        # The evaluation before the first round has cost nothing: no place on a scale of costs.
        if score is not None and x is not None and (progress is None or x > 0):
            xs.append(x)
            ys.append(score)
    return Line(name, tuple(xs), tuple(ys))


def _loss_line(run: RunFolder, name: str) -> Line:
    points = [
        (units.number(line.get("round")), units.number(line.get("train_loss")))
        for line in run.rounds
    ]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return Line(name, tuple(x for x, _ in known), tuple(y for _, y in known))


def _bytes_of(line: dict[str, Any]) -> float:
    return (units.number(line.get("bytes_up")) or 0.0) + (units.number(line.get("bytes_down")) or 0)


def _device_seconds_of(line: dict[str, Any]) -> float:
    return units.number(line.get("device_seconds")) or 0.0


def _device_total(run: RunFolder) -> float:
    return sum(_device_seconds_of(line) for line in run.rounds)


def _abandoned(run: RunFolder) -> list[float]:
    rounds = (line for line in run.rounds if line.get("outcome") == "abandoned")
    return [x for x in (units.number(line.get("round")) for line in rounds) if x is not None]


def _metric_axis(label: str, lower: bool, lines: Sequence[Line]) -> Axis:
    """Logarithmic for errors that fall several times over: the first rounds would hide the rest."""
    values = [y for line in lines for y in line.y]
    log = lower and min(values) > 0 and max(values) > 4 * min(values)
    return Axis(f"{label}, %{' (logarithmic)' if log else ''}", tick_number, log=log)


def _common_baseline(runs: Sequence[RunFolder]) -> tuple[str, float] | None:
    """The mean shape's line, where all runs that have one agree."""
    known = {units.number(run.summary.get("mean_shape_percent")) for run in runs} - {None}
    values = [value for value in known if value is not None]
    if not values or max(values) - min(values) > 0.005:
        return None
    return f"mean shape {values[0]:.1f} %", values[0]


def _in_words(lines: Sequence[Line], axis: Axis, unit: str) -> str:
    parts = [
        f"{line.name}: from {line.y[0]:.3g} {unit} at {axis.tick(line.x[0])} to {line.y[-1]:.3g} "
        f"{unit} at {axis.tick(line.x[-1])}"
        for line in lines
        if line.x
    ]
    return f"Across: {axis.label}. " + "; ".join(parts)


def _baseline_words(baseline: tuple[str, float] | None) -> str:
    return f". Dashed line: {baseline[0]}" if baseline else ""


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """Printable, distinct names of the runs."""
    return comparison.setting_names([run.summary for run in runs])
