"""Charts as inline SVG, drawn with matplotlib's Figure (no pyplot, no global state).

Colours leave here as CSS variables (`var(--ink)`, `var(--series-0)`, …) and text as text in the
page's own font, so that one drawing serves the light and the dark page. Lines differ in colour,
dash and marker, and carry their name at their end: nothing depends on telling colours apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis as MplAxis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports import svg, units

_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (7, 2)), (0, (2, 1.5)))

_WIDTH_INCHES = 4.8


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, and points with finite coordinates."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Axis:
    """An axis: its label, how a tick is written, logarithmic or not, ticks at integers or not."""

    label: str
    tick: Callable[[float], str]
    log: bool = False
    integer: bool = False


def tick_number(value: float) -> str:
    """A tick without needless digits: "0.5", "20"."""
    return f"{value:.6g}"


def tick_bytes(value: float) -> str:
    """A tick in bytes: "200 kB", "5 MB"."""
    return re.sub(r"\.0+ ", " ", units.size(value))


def line_chart(
    chart_id: str,
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    *,
    description: str,
    baseline: tuple[str, float] | None = None,
    crosses: Sequence[float] = (),
    end_labels: Sequence[str] = (),
) -> str:
    """Lines with their names at their ends, as one `<svg>`.

    Args:
        chart_id: Unique in the page; it goes before every id within the drawing.
        lines: What to draw; lines without points take part in the colours only.
        x_axis: Horizontal axis.
        y_axis: Vertical axis.
        description: What the picture shows, for people who cannot see it.
        baseline: Label and height of a dashed horizontal line.
        crosses: Positions of crosses on the horizontal axis.
        end_labels: Text at the end of each line; by default the names, where there are several.
    """
    labels = list(end_labels) or [line.name if len(lines) > 1 else "" for line in lines]
    labels = [label if len(label) <= 22 else f"{label[:21]}…" for label in labels]
    with svg.drawing():
        longest = max((len(label) for label in labels), default=0)
        figure, axes = _axes(3.1, right=0.975 - 0.0138 * longest)
        _scales(axes, lines, x_axis, y_axis, baseline)
        for i, line in enumerate(lines):
            axes.plot(
                line.x,
                line.y,
                color=svg.SERIES[i % svg.NUM_COLOURS],
                linestyle=_DASHES[(i // svg.NUM_COLOURS) % len(_DASHES)],
                linewidth=1.8,
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=8 if len(line.x) == 1 else 3.6 if len(line.x) <= 40 else 0,
                markeredgewidth=0,
                clip_on=False,
                zorder=3,
            )
        if baseline is not None:
            axes.axhline(baseline[1], color=svg.MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.annotate(
                baseline[0],
                (1, baseline[1]),
                xycoords=axes.get_yaxis_transform(),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=svg.MUTED,
            )
        if crosses:
            axes.plot(
                crosses,
                [0.0] * len(crosses),
                "x",
                transform=axes.get_xaxis_transform(),
                color=svg.INK,
                markersize=5,
                clip_on=False,
                zorder=4,
            )
        _label_ends(axes, lines, labels)
        return svg.to_svg(figure, chart_id, description)


def scatter_chart(
    chart_id: str,
    points: Sequence[tuple[str, float, float]],
    x_axis: Axis,
    y_axis: Axis,
    *,
    description: str,
    baseline: tuple[str, float] | None = None,
) -> str:
    """Named points (name, x, y), each with its name beside it, as one `<svg>`."""
    lines = [Line(name, (x,), (y,)) for name, x, y in points]
    return line_chart(chart_id, lines, x_axis, y_axis, description=description, baseline=baseline)


def stacked_bars(
    chart_id: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    totals: Sequence[str],
    colours: Sequence[int],
    x_axis: Axis,
    *,
    description: str,
) -> str:
    """A horizontal bar a row, stacked from its parts, its sum at the end, as one `<svg>`.

    Args:
        chart_id: Unique in the page.
        rows: Label and parts of each bar, from top to bottom.
        totals: Text at the end of each bar.
        colours: Index of the series colour of each part.
        x_axis: Horizontal axis.
        description: What the picture shows.
    """
    with svg.drawing():
        longest = max((len(label) for label, _ in rows), default=0)
        left = min(0.03 + 0.0168 * longest, 0.5)
        figure, axes = _axes(0.62 + 0.26 * len(rows), left=left, right=0.86)
        positions = range(len(rows))
        starts = [0.0] * len(rows)
        for part, colour in enumerate(colours):
            widths = [parts[part] for _, parts in rows]
            axes.barh(
                positions,
                widths,
                left=starts,
                height=0.66,
                color=svg.SERIES[colour],
                edgecolor=svg.SURFACE,
                linewidth=0.7,
                zorder=3,
            )
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for position, end, total in zip(positions, starts, totals, strict=True):
            axes.annotate(
                total,
                (end, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=svg.INK,
            )
        axes.set_yticks(positions, labels=[label for label, _ in rows], color=svg.INK)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, max([*starts, 1e-9]) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_axis.tick(value)))
        axes.set_xlabel(x_axis.label, color=svg.MUTED)
        axes.grid(visible=False, axis="y")
        return svg.to_svg(figure, chart_id, description)


def _axes(height: float, *, left: float = 0.135, right: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes: no frame but the base line, a quiet grid."""
    # 72 dots an inch, as the SVG backend has: pixels are then the drawing's own units.
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    figure.subplots_adjust(left, 0.46 / height, right, 1 - 0.12 / height)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(svg.MUTED)
    axes.grid(visible=True, color=svg.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=svg.MUTED, which="both", pad=5)
    return figure, axes


def _scales(
    axes: Axes,
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    baseline: tuple[str, float] | None,
) -> None:
    """Limits, scales, ticks and labels of both axes."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y] + ([baseline[1]] if baseline else [])
    low, high = _scale(axes.set_xscale, axes.xaxis, x_axis, xs)
    axes.set_xlim(low, high)
    low, high = _scale(axes.set_yscale, axes.yaxis, y_axis, ys)
    axes.set_ylim(low, high)
    axes.set_xlabel(x_axis.label, color=svg.MUTED)
    axes.set_ylabel(y_axis.label, color=svg.MUTED)


def _scale(
    set_scale: Callable[[str], object], ticks: MplAxis, axis: Axis, values: Sequence[float]
) -> tuple[float, float]:
    """Set scale and ticks of one axis; its limits, with room around the values."""
    if axis.log and values and min(values) > 0:
        set_scale("log")
        low, high = min(values), max(values)
        margin = max(high / low, 1.5) ** 0.06
        span = high / low * margin**2
        near, far = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0)
        ticks.set_major_locator(
            LogLocator(subs=near if span < 12 else far if span < 150 else (1.0,))
        )
        ticks.set_minor_locator(NullLocator())
        limits = low / margin, high * margin
    else:
        high = max([*values, 0.0])
        ticks.set_major_locator(MaxNLocator(5, integer=axis.integer))
        limits = 0.0, high * 1.06 if high > 0 else 1.0
    # After the scale, which brings a formatter of its own.
    ticks.set_major_formatter(FuncFormatter(lambda value, _: axis.tick(value)))
    return limits


def _label_ends(axes: Axes, lines: Sequence[Line], labels: Sequence[str]) -> None:
    """Write each label at its line's last point, pushed apart vertically where they would meet."""
    ends = []
    for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
        if label and line.x:
            x, y = axes.transData.transform((line.x[-1], line.y[-1]))
            ends.append([y, x, i, label])
    ends.sort(key=lambda end: end[0])
    line_height = 11.0
    heights = [end[0] for end in ends]
    for _ in range(50):
        for lower in range(len(heights) - 1):
            overlap = heights[lower] + line_height - heights[lower + 1]
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    for (y, x, i, label), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            xycoords="figure pixels",
            xytext=(7, height - y),
            textcoords="offset points",
            va="center",
            color=svg.SERIES[i % svg.NUM_COLOURS],
            fontweight="bold",
            annotation_clip=False,
        )
