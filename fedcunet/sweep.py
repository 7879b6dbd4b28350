"""Training memory of many settings beside naive float32, and of many depths: the paper's Fig. 5.

Tang et al., ECCV 2018, Fig. 5: with 12 GB and batches of 16, naive training fits 9 U-Nets and the
memory-efficient form 16.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fedcunet.config import QuantConfig, RunConfig, Scalar
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.measured import NotMeasured, measure_need
from fedcunet.memory import TrainingStep, measure, naive, ratios

# Levels of storage, the reference first; a further one in QuantConfig is swept as well.
LEVELS: tuple[str, ...] = get_args(get_type_hints(QuantConfig)["storage"])
BITS = ("8,1,8", "6,1,6", "4,1,4")
NAIVE, RECOMPUTED = "float32", "float32 recomputed"
PAPER_FIGURE_5 = {NAIVE: 9, RECOMPUTED: 16}  # U-Nets in 12 GB at batch 16


def quant_values(bits: str, storage: str) -> dict[str, Scalar]:
    """Changes of a RunConfig for these bit widths and this storage; binary weights have alpha."""
    values: dict[str, Scalar] = {"quant__bits": bits, "quant__storage": storage}
    if bits.split(",")[1] != "32":
        values["quant__alpha"] = True
    return values


def settings() -> dict[str, dict[str, Scalar]]:
    """The rows of the table by name: changes of a RunConfig."""
    rows = {
        NAIVE: quant_values("32,32,32", "float32"),
        RECOMPUTED: quant_values("32,32,32", "packed"),
    }
    for level in LEVELS:
        rows |= {f"{bits.replace(',', '-')} {level}": quant_values(bits, level) for bits in BITS}
    return rows


def swept(config: RunConfig, values: Mapping[str, Scalar]) -> RunConfig:
    """The setting of a row or line: of `config`'s quantisation the scale of gradients alone."""
    return naive(config).replace(quant__gradient_scale=config.quant.gradient_scale, **values)


def lines() -> dict[str, dict[str, Scalar]]:
    """The lines of the figure by name: changes of a RunConfig."""
    rows = settings()
    packed = [level for level in LEVELS if level != "float32"]
    return {name: rows[name] for name in (NAIVE, RECOMPUTED, *(f"8-1-8 {p}" for p in packed))}


def sweep_settings(
    config: RunConfig, num_landmarks: int, *, repeats: int = 3, device: str = "cpu"
) -> list[dict[str, Any]]:
    """A row for each setting: its name, the keys of `StepCost`, and its ratios to naive float32.

    All are measured in this process, their timed steps in turns. A setting that the network
    cannot have has "refused", why, and no figures.

    Args:
        config: network, crop size, batch, optimiser and scale of gradients.
        num_landmarks: K of the heatmaps.
        repeats: timed steps of each.
        device: torch's name of the device.
    """
    rows: list[dict[str, Any]] = []
    steps: list[TrainingStep] = []
    for name, values in settings().items():
        row: dict[str, Any] = {"setting": name}
        try:
            steps.append(TrainingStep(swept(config, values), num_landmarks, device))
        except UserError as error:  # a storage that is not for this network
            row["refused"] = str(error)
        rows.append(row)
    costs = measure(steps, repeats=repeats)
    measured_rows = [row for row in rows if "refused" not in row]
    for row, cost in zip(measured_rows, costs, strict=True):
        row |= asdict(cost) | ratios(cost, costs[0])
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthLine:
    """Peak bytes of a setting by number of U-Nets, and the deepest network that fits.

    Attributes:
        name: of the setting.
        measured: number of U-Nets -> peak bytes.
        not_measured: number of U-Nets -> why.
        bytes_per_unet: slope through the two deepest measured points.
        linearity_error: how far the shallowest measured point lies from the line through the two
            deepest ones, over its own height; None with fewer than three points.
        deepest: number of U-Nets that fits the budget by this line.
        deepest_is: "measured" where that many, and one more, were measured; else "extrapolated".
    """

    name: str
    measured: dict[int, int]
    not_measured: dict[int, str]
    bytes_per_unet: float
    linearity_error: float | None
    deepest: int
    deepest_is: str

    def at(self, unets: float) -> float:
        """Bytes of the line at this number of U-Nets."""
        last = max(self.measured)
        return self.measured[last] + (unets - last) * self.bytes_per_unet


def fit_line(
    name: str, measured: dict[int, int], not_measured: dict[int, str], budget_bytes: float
) -> DepthLine | None:
    """The line through measured points; None with fewer than two."""
    if len(measured) < 2:
        return None
    depths = sorted(measured)
    *_, before, last = depths
    slope = (measured[last] - measured[before]) / (last - before)
    error = None
    if len(depths) > 2:
        first = measured[depths[0]]
        error = (measured[last] + (depths[0] - last) * slope - first) / first
    fitting = [depth for depth in depths if measured[depth] <= budget_bytes]
    if fitting and len(fitting) < len(depths):
        deepest = max(fitting)
        known = deepest + 1 in measured
    else:
        deepest, known = -1, False
    if not known:
        # What fits to the byte fits.
        deepest = max(0, math.floor(last + (budget_bytes - measured[last]) / slope + 1e-9))
    return DepthLine(
        name=name,
        measured=measured,
        not_measured=not_measured,
        bytes_per_unet=slope,
        linearity_error=error,
        deepest=deepest,
        deepest_is="measured" if known else "extrapolated",
    )


def sweep_depths(
    config: RunConfig,
    num_landmarks: int,
    depths: Sequence[int],
    budget_bytes: float,
    *,
    device: str = "cpu",
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[DepthLine]:
    """The lines of Fig. 5, each point in a fresh process that is limited to the free memory.

    Args:
        config: network but for its depth, crop size, batch, optimiser and scale of gradients.
        num_landmarks: K of the heatmaps.
        depths: numbers of U-Nets to measure, ascending; the first that does not fit is the last.
        budget_bytes: what the deepest network is to fit.
        device: torch's name of the device.
        progress: called with a line of text for each point.
    """
    for name, values in lines().items():
        measured: dict[int, int] = {}
        not_measured: dict[int, str] = {}
        for unets in depths:
            order = min(config.model.order, unets - 1)
            try:
                deep = config.replace(model__unets=unets, model__order=order)
                setting = swept(deep, values)
                measured[unets] = measure_need(setting, num_landmarks, device).peak_bytes
                progress(f"{name}, {unets} U-Nets: {measured[unets] / 1e6:.1f} MB")
            except (NotMeasured, UserError) as failure:
                not_measured |= {deeper: str(failure) for deeper in depths if deeper >= unets}
                progress(f"{name}, {unets} U-Nets: {failure}")
                break
        line = fit_line(name, measured, not_measured, budget_bytes)
        if line is not None:
            yield line


def draw_figure(path: Path, lines: Sequence[DepthLine], title: str, budget_bytes: float) -> None:
    """Fig. 5 as a PNG: circles are measured, dashed is extrapolated."""
    from matplotlib.figure import Figure  # most of a second, which every command would wait

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        colour = f"C{index}"
        depths = sorted(line.measured)
        label = f"{line.name}: {line.deepest} U-Nets fit ({line.deepest_is})"
        axes.plot(depths, [line.measured[d] / 1e9 for d in depths], "o-", color=colour, label=label)
        far = max(line.deepest, depths[-1])
        beyond = [depths[-1], far]
        axes.plot(beyond, [line.at(depth) / 1e9 for depth in beyond], "--", color=colour)
    axes.axhline(budget_bytes / 1e9, color="grey", linewidth=1)
    axes.set(
        xlabel="U-Nets",
        ylabel="peak of a training step, GB",
        title=title,
        ylim=(0, 1.1 * budget_bytes / 1e9),
    )
    axes.legend(fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
