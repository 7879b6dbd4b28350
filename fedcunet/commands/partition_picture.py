"""A partition as a picture: sizes above, what the images show and which joints are labelled below.

A column is a client. Few clients stand in their order with figures in the fields; many are sorted
by their main label and size, so that a map of a thousand columns still shows who holds what.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcunet.errors import UserError
from fedcunet.files import write_atomically

_FEW = 16  # clients with figures in their fields
# Rows of a map; the rarest labels share the last.
_MAX_LABELS = {"sources": 20, "categories": 21, "activities": 12}


def draw_partition(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Writes the picture of the rows of `fedcunet data partition --json`.

    Raises:
        UserError: the file cannot be written.
    """
    rows = _ordered(rows)
    maps = [
        (name, *_shares(rows, name))
        for name in ("sources", "categories", "activities")
        if any(row[name] for row in rows)
    ]
    maps = [one for one in maps if len(one[1]) > 1] or maps[:1]
    groups = list(rows[0]["visibility"])
    share_GC = np.array([[row["visibility"][name] for row in rows] for name in groups])
    if (share_GC < 1).any():
        maps.append(("labelled landmarks", groups, share_GC))
    heights = [2.2, *(0.5 + 0.24 * len(names) for _, names, _ in maps)]
    width = 11.0
    figure = Figure(figsize=(width, sum(heights) + 0.7 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize=12)
    _draw_sizes(axes[0], rows)
    for axis, (name, names, share_LC) in zip(axes[1:], maps, strict=True):
        _draw_map(figure, axis, name, names, share_LC)
    few = len(rows) <= _FEW
    for axis in axes:
        axis.set_xlim(-0.5, len(rows) - 0.5)
        axis.tick_params(labelsize=8)
        if few:
            axis.set_xticks(range(len(rows)), [str(row["client"]) for row in rows])
    axes[-1].set_xlabel("client" if few else "clients, by their main label and size", fontsize=9)

    def write(target: Path) -> None:
        figure.savefig(target, format=path.suffix[1:].lower(), dpi=130)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(rows) <= _FEW:
        return rows

    kind = "categories" if any(row["categories"] for row in rows) else "activities"

    def place(row: dict[str, Any]) -> tuple[list[str], int]:
        main = [
            max(row[name], key=lambda label: (row[name][label], label), default="")
            for name in ("sources", kind)
        ]
        return main, -row["images"]

    return sorted(rows, key=place)


def _shares(rows: list[dict[str, Any]], key: str) -> tuple[list[str], np.ndarray]:
    """Names of labels, and the share (L, C) of each in each client's images."""
    totals: dict[str, int] = {}
    for row in rows:
        for name, count in row[key].items():
            totals[name] = totals.get(name, 0) + count
    largest = sorted(totals, key=lambda name: (-totals[name], name))
    most = _MAX_LABELS[key]
    names = largest if len(largest) <= most else largest[: most - 1]
    share_LC = np.array([[row[key].get(name, 0) / row["images"] for row in rows] for name in names])
    rest = [name for name in largest if name not in set(names)]
    if rest:
        rest_C = [sum(row[key].get(name, 0) for name in rest) / row["images"] for row in rows]
        share_LC = np.vstack([share_LC, rest_C])
        names = [*names, f"{len(rest)} others"]
    return names, share_LC


def _draw_sizes(axis: Axes, rows: list[dict[str, Any]]) -> None:
    images_C = np.array([row["images"] for row in rows])
    held_C = np.array([row["validation_images"] + row["test_images"] for row in rows])
    places = np.arange(len(rows))
    few = len(rows) <= _FEW
    width = 0.8 if few else 1.0
    axis.bar(places, images_C - held_C, width, color="#3b6ea5", label="to train on")
    if held_C.any():
        axis.bar(places, held_C, width, images_C - held_C, color="#e0a030", label="kept back")
        axis.legend(fontsize=8, frameon=False)
    if few:
        for place, count in zip(places, images_C, strict=True):
            axis.text(float(place), float(count), f"{count}", ha="center", va="bottom", fontsize=8)
        axis.margins(y=0.15)
    else:
        low, median, high = np.quantile(images_C, (0.1, 0.5, 0.9))
        axis.axhline(median, color="black", linewidth=0.8)
        if images_C.max() > 20 * images_C.min():
            axis.set_yscale("log")
            axis.set_ylim(bottom=0.5)  # a bar of one image is one too
        axis.set_title(
            f"median {median:.0f} (line), 10 % below {low:.0f}, 10 % above {high:.0f}", fontsize=9
        )
    axis.set_ylabel("images", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_map(
    figure: Figure, axis: Axes, name: str, names: list[str], share_LC: np.ndarray
) -> None:
    image = axis.imshow(
        share_LC, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis"
    )
    axis.set_yticks(range(len(names)), [one if len(one) < 34 else one[:33] + "…" for one in names])
    if name == "labelled landmarks":
        axis.set_title("share of labelled landmarks", fontsize=9)
    else:
        axis.set_title(f"share of {name} in a client's images", fontsize=9)
    if share_LC.shape[1] <= _FEW:
        for label, client in zip(*np.nonzero(share_LC), strict=True):
            value = share_LC[label, client]
            colour = "black" if value > 0.6 else "white"
            axis.text(
                client, label, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color=colour,
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axis, ticks=(0, 0.5, 1), pad=0.01)
    bar.ax.set_yticklabels(("0", "50 %", "100 %"), fontsize=8)
