"""The pictures of Figure 4 (accuracy and parameters by order) and Figure 5 (memory by depth)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedcunet.files import write_atomically

SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.0), 120


def draw_orders(report: Mapping[str, Any], metric: str, path: Path) -> None:
    """Writes a PNG of Figure 4's kind: percent and convolution parameters by the order K."""
    rows = report["rows"]
    orders = [row["order"] for row in rows]
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(orders, [row["percent"] for row in rows], "o-", color="tab:blue")
    millions = [row["conv_parameters"] / 1e6 for row in rows]
    right.plot(orders, millions, "s--", color="tab:orange")
    left.set_xlabel(f"order K of DU-Net({rows[0]['unets']})")
    left.set_xticks(orders)
    left.set_ylabel(metric, color="tab:blue")
    right.set_ylabel("convolution parameters, millions", color="tab:orange")
    _save(figure, path)


def draw_memory(unets: Sequence[int], peak_bytes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Writes a PNG of Figure 5's kind: a line a form, peak megabytes by the number of U-Nets."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for name, peaks in peak_bytes.items():
        axes.plot(unets, [peak / 1e6 for peak in peaks], "o-", label=name)
    axes.set_xlabel("U-Nets")
    axes.set_xticks(list(unets))
    axes.set_ylabel("peak of a training step, MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
    )
