"""matplotlib figures as inline SVG of a page: its font, its colours, ids of their own."""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

NUM_COLOURS = 6

# Stand-ins that the SVG backend writes as they are, replaced by CSS variables afterwards.
INK, MUTED, GRID, SURFACE = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#00001{i}" for i in range(NUM_COLOURS))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SURFACE: "var(--card)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}

_FONT: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcunet",
    "font.size": 9,
    "text.parse_math": False,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's settings for the charts, and quiet about letters that its own font lacks."""
    with matplotlib.rc_context(_FONT), warnings.catch_warnings():
        # The browser's font draws the text; matplotlib's is used for measuring only.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure, chart_id: str, description: str) -> str:
    """The figure as an `<svg>`: scalable, described, with ids and colours of the page."""
    buffer = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    opening = (
        f'<svg class="chart" role="img" aria-label="{html.escape(description)}" '
        f'xmlns="http://www.w3.org/2000/svg" {view_box[0]}>'
    )
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids must be unique in the page, and references follow them.
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{chart_id}-", svg)
    svg = svg.replace("xlink:href", "href")
    # The family is the page's, and a style for `*` would reach the whole page.
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    return re.sub(r"#0000[0-9]{2}\b", lambda m: _VARIABLES.get(m[0], m[0]), svg)
