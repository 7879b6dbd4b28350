"""Table 6 and Figure 5: sizes, times and memory of networks, measured without training them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedcunet.config import RunConfig
from fedcunet.data import MPII16
from fedcunet.memory import TrainingStep, measure
from fedcunet.paper.budget import Budget, row_config
from fedcunet.paper.measures import forward_seconds, packed_bytes, parameter_counts
from fedcunet.paper.tables import TABLE6

# Figure 5's three lines: the paper's two, and what low bits make of the second.
FORMS = {
    "naive float32": {"quant__bits": "32,32,32", "quant__storage": "float32"},
    "recomputing float32": {"quant__bits": "32,32,32", "quant__storage": "packed"},
    "packed 8,1,8": {
        "quant__bits": "8,1,8",
        "quant__alpha": True,
        "quant__input_quantizer": "source",
        "quant__storage": "packed",
    },
}
# Figure 5 and section 4.3: what fits into 12 GB at batch 16.
PAPER_UNETS_IN_12_GB = {"naive float32": 9, "recomputing float32": 16, "packed 8,1,8": None}


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
        "bytes_packed": packed_bytes(step.model, config, MPII16),
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
) -> dict[str, Any]:
    """Figure 5: the peak of a training step of order-1 DU-Nets, by number of U-Nets and form.

    Returns:
        `unets` (2 to `max_unets`), and for each form `peak_bytes`, the line through them
        (`bytes_a_unet`, `bytes_without`), and `unets_in_naive_9`: how many U-Nets the line puts
        into what it says 9 naive ones take, with the paper's count beside it.
    """
    torch.set_num_threads(threads)
    unets = list(range(2, max_unets + 1))
    forms: dict[str, Any] = {}
    for name, values in FORMS.items():
        peaks = []
        for count in unets:
            tell(f"{name}, {count} U-Nets")
            config = RunConfig().replace(
                model__unets=count,
                data__size=size,
                training__batch_size=batch_size,
                training__threads=threads,
                **values,  # type: ignore[arg-type]
            )
            peaks.append(measure([TrainingStep(config, MPII16.num_landmarks)], repeats=1)[0])
        slope, rest = np.polyfit(unets, [cost.peak_bytes for cost in peaks], 1)
        forms[name] = {
            "peak_bytes": [cost.peak_bytes for cost in peaks],
            "step_seconds": [cost.step_seconds for cost in peaks],
            "bytes_a_unet": float(slope),
            "bytes_without": float(rest),
            "paper_unets_in_12_gb": PAPER_UNETS_IN_12_GB[name],
        }
    naive = forms["naive float32"]
    room = naive["bytes_without"] + 9 * naive["bytes_a_unet"]
    for form in forms.values():
        form["unets_in_naive_9"] = (room - form["bytes_without"]) / form["bytes_a_unet"]
    return {"unets": unets, "forms": forms}
