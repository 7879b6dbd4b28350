"""The picture of Figure 4: accuracy and parameters by order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcunet.files import write_atomically

SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.0), 120


def draw_orders(report: Mapping[str, Any], metric: str, path: Path) -> None:
    """Writes a PNG of Figure 4's kind: percent and convolution parameters by the order K."""
    from matplotlib.figure import Figure  # most of a second, which every command would wait

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
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
    )
