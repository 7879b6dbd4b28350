"""Table 6 and Figure 5: sizes, times and memory of networks, measured without training them."""

from collections.abc import Callable
from typing import Any

import torch

from fedcunet.config import RunConfig
from fedcunet.data import MPII16
from fedcunet.measured import NotMeasured
from fedcunet.memory import TrainingStep, measure
from fedcunet.paper.budget import Budget, row_config
from fedcunet.paper.measures import exported_bytes, forward_seconds, parameter_counts
from fedcunet.paper.tables import TABLE6
from fedcunet.sweep import NAIVE, PAPER_FIGURE_5, DepthLine, fit_line, sweep_depths

PAPER_BYTES = 12e9


def measure_networks(
    *, size: int, batch_size: int, threads: int, max_unets: int | None, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of Table 6: the paper's figures, and ours for the networks that this program has.

    The networks are as large as the paper's and freshly made; times are of one step, an image.

    Args:
        size: side of the crops.
        batch_size: of the timed step.
        threads: of torch.
        max_unets: networks with more are only counted, not run.
        tell: is told which network is measured.
    """
    torch.set_num_threads(threads)
    rows = []
    for entry in TABLE6:
        found: dict[str, Any] = {
            "key": entry.key,
            "name": entry.name,
            "paper": {"parameters_millions": entry.parameters_millions, "MB": entry.megabytes},
        }
        if entry.row is not None:
            tell(entry.name)
            budget = Budget(size=size, batch_size=batch_size, threads=threads)
            config = row_config(entry.row, entry.row.unets, budget)
            runs = max_unets is None or entry.row.unets <= max_unets
            found |= _network(config, runs=runs)
        rows.append(found)
    return rows


def _network(config: RunConfig, *, runs: bool) -> dict[str, Any]:
    step = TrainingStep(config, MPII16.num_landmarks)
    convolutions, parameters, state_bytes = parameter_counts(step.model)
    found: dict[str, Any] = {
        "conv_parameters": convolutions,
        "parameters": parameters,
        "bytes_float32": state_bytes,
        "bytes_packed": exported_bytes(step.model, config, MPII16),
    }
    if runs:
        (cost,) = measure([step], repeats=1)
        batch = config.training.batch_size
        found["train_seconds_per_image"] = cost.step_seconds / batch
        found["peak_bytes"] = cost.peak_bytes
        found["test_seconds_per_image"] = forward_seconds(
            step.model, config.data.size, batch_size=batch, repeats=2
        )
    return found


def measure_depths(
    *, max_unets: int, size: int, batch_size: int, threads: int, tell: Callable[[str], None]
) -> tuple[list[DepthLine], float]:
    """Figure 5 of order-1 DU-Nets, scaled to this machine: the lines of `fedcunet.sweep`.

    Returns:
        The lines from 2 to `max_unets` U-Nets, and the budget that they are held against: the
        bytes that the line of naive float32 says 9 U-Nets take, which are the paper's 12 GB.

    Raises:
        NotMeasured: not even the two smallest naive networks fit into the memory that is free.
    """
    config = RunConfig().replace(
        data__size=size, training__batch_size=batch_size, training__threads=threads
    )
    depths = range(2, max_unets + 1)
    found = list(sweep_depths(config, MPII16.num_landmarks, depths, PAPER_BYTES, progress=tell))
    if not found or found[0].name != NAIVE:
        raise NotMeasured("figure 5: fewer than two naive networks fit into the free memory")
    room = found[0].at(PAPER_FIGURE_5[NAIVE])
    refitted = [fit_line(line.name, line.measured, line.not_measured, room) for line in found]
    return [line for line in refitted if line is not None], room
