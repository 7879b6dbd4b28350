"""Charts of the reports: labels and ticks."""

from __future__ import annotations

import itertools
import re

import pytest

from reports.charts import Axis, Line, line_chart, tick_bytes, tick_number


def test_labels_at_the_ends_of_lines_are_kept_apart() -> None:
    lines = [Line(f"name{i}", (1.0, 2.0), (9.0, 5.0 + i / 1000)) for i in range(4)]
    svg = line_chart(
        "c", lines, Axis("round", tick_number), Axis("NME", tick_number), description="d"
    )
    heights = sorted(
        float(y) for y in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>name\d</text>', svg)
    )
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) > 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tick_bytes(200_000), "200 kB"),
        (tick_bytes(5e6), "5 MB"),
        (tick_number(0.5), "0.5"),
    ],
)
def test_ticks_are_written_without_needless_digits(text: str, expected: str) -> None:
    assert text == expected
