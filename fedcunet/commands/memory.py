"""The command `memory`: what a training step really takes, beside naive float32."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.options import (
    DeviceOption,
    GradientScaleOption,
    IterativeOption,
    JsonOption,
    ModelOption,
    OptimizerOption,
    OrderOption,
    ThreadsOption,
    UnetsOption,
    order_of,
)
from fedcunet.config import RunConfig, check_range
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.measured import NotMeasured, resident_growth
from fedcunet.memory import compare_with_naive, naive
from fedcunet.sweep import (
    PAPER_FIGURE_5,
    DepthLine,
    draw_figure,
    sweep_depths,
    sweep_settings,
)

SWEEP_DIR = Path(".fedcunet/memory")


def memory(
    model: ModelOption = "dunet",
    unets: UnetsOption = 4,
    order: OrderOption = None,
    iterative: IterativeOption = False,
    landmarks: Annotated[int, typer.Option("--landmarks", help="68: faces, 16: MPII.")] = 16,
    size: Annotated[int, typer.Option("--size", help="Side of the crops, n x 64.")] = 256,
    batch: Annotated[int, typer.Option("--batch", help="Examples of a step.")] = 4,
    bits: Annotated[
        str | None,
        typer.Option("--bits", help="Inputs, weights, gradients.", show_default="8,1,8"),
    ] = None,
    alpha: Annotated[bool, typer.Option("--alpha", help="A scale for each filter.")] = False,
    input_quantizer: Annotated[
        str | None,
        typer.Option(
            "--input-quantizer",
            help="source, ranged or paper.",
            show_default="source",
        ),
    ] = None,
    gradient_scale: GradientScaleOption = "channel",
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="float32 (plain autograd), packed or frugal.",
            show_default="float32",
        ),
    ] = None,
    optimizer: OptimizerOption = "rmsprop",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed steps; the shortest counts.")
    ] = 3,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident/--no-resident",
            help="CPU: the growth of a fresh process's high-water mark as well.",
        ),
    ] = True,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="All settings, and memory by number of U-Nets.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Sweep: folder of sweep.json and fig5.png.",
            show_default=str(SWEEP_DIR),
        ),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            "--depths",
            help="Sweep: numbers of U-Nets to measure for Fig. 5.",
            show_default="2,3,4",
        ),
    ] = None,
    figure_batch: Annotated[
        int | None,
        typer.Option(
            "--figure-batch", help="Sweep: examples of a step in Fig. 5.", show_default="16"
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", min=0.01, help="Sweep: GB that Fig. 5 is to fit.", show_default="12"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measures a training step, and the same network's naive float32 step beside it.

    Bytes are those of torch's allocator: peak = what stays from step to step (parameters,
    optimiser, batch) + the high-water mark of the step; saved = what the forward pass leaves for
    the backward pass. With an --input-quantizer other than source the maps that packed storage
    keeps are floats. On the CPU the growth of a fresh process's high-water mark over one step
    stands beside the allocator's figure for the same growth.

    With --sweep: a table of all settings, and the paper's Fig. 5; their bits and storage are its
    own.
    """
    if sweep:
        given = {
            "--bits": bits is not None,
            "--alpha": alpha,
            "--input-quantizer": input_quantizer is not None,
            "--storage": storage is not None,
            "--no-resident": not resident,
        }
        _refuse(given, "expected without --sweep, which measures settings of its own")
    else:
        of_sweep = {
            "--out": out, "--depths": depths, "--figure-batch": figure_batch, "--budget": budget,
        }  # fmt: skip
        given = {name: value is not None for name, value in of_sweep.items()}
        _refuse(given, "expected with --sweep")
    bits = "8,1,8" if bits is None else bits
    storage = "float32" if storage is None else storage
    input_quantizer = "source" if input_quantizer is None else input_quantizer
    config = RunConfig().replace(
        model__kind=model,
        model__unets=unets,
        model__order=order_of(model, unets, order),
        model__iterative=iterative,
        data__size=size,
        training__batch_size=batch,
        training__optimizer=optimizer,
        training__threads=threads,
        quant__bits=bits,
        quant__alpha=alpha,
        quant__input_quantizer=input_quantizer,
        quant__gradient_scale=gradient_scale,
        quant__storage=storage,
    )
    numbers = _depths("2,3,4" if depths is None else depths)
    figure_batch = 16 if figure_batch is None else figure_batch
    check_range("--figure-batch", figure_batch, 1, 4096)
    deep = config.replace(training__batch_size=figure_batch)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if sweep:
            folder = SWEEP_DIR if out is None else out
            _sweep(
                config,
                landmarks,
                folder,
                repeats=repeats,
                device=device,
                depths=numbers,
                deep=deep,
                budget_bytes=1e9 * (12 if budget is None else budget),
                as_json=as_json,
            )
            return
        result = compare_with_naive(config, landmarks, repeats=repeats, device=device)
    finally:
        torch.set_num_threads(before)
    if resident and torch.device(device).type == "cpu":
        _add_growth(result, config, landmarks)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(_table(result, f"{bits} {storage}"))


def _refuse(given: dict[str, bool], why: str) -> None:
    """Refuses the first of the options that were given."""
    for name in given:
        if given[name]:
            raise UserError(f"{name}: {why}")


def _depths(text: str) -> list[int]:
    parts = text.replace(" ", "").split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) != len(parts) or len(numbers) < 2 or numbers != sorted(set(numbers)):
        raise UserError(f"--depths: expected ascending whole numbers such as 2,3,4, found '{text}'")
    for number in numbers:
        check_range("--depths", number, 1, 64)
    return numbers


def _add_growth(result: dict[str, Any], config: RunConfig, landmarks: int) -> None:
    """The process's growth in a step beside the allocator's, for the setting and naive float32.

    Both are over what is there before the first step; where the system cannot say, they are None
    and "resident_note" says why.
    """
    for figures, setting in ((result, config), (result["naive_float32"], naive(config))):
        figures |= {"resident_growth_bytes": None, "allocator_growth_bytes": None}
        try:
            found = resident_growth(setting, landmarks)
        except NotMeasured as failure:
            figures["resident_note"] = str(failure)
            continue
        figures["resident_growth_bytes"] = found["growth_bytes"]
        figures["allocator_growth_bytes"] = figures["peak_bytes"] - found["static_before_bytes"]


def _table(result: dict[str, Any], title: str) -> Table:
    reference = result["naive_float32"]
    table = Table(box=None)
    for heading in ("", title, "naive float32", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"peak": "peak", "saved": "saved", "static": "static"}
    rows |= {"resident_growth": "process growth", "allocator_growth": "  by the allocator"}
    for key, name in rows.items():
        own, other = result.get(f"{key}_bytes"), reference.get(f"{key}_bytes")
        if own is not None and other is not None:
            cells = f"{own / 1e6:.1f}", f"{other / 1e6:.1f}", f"{own / other:.3f}"
            table.add_row(f"{name} MB", *cells)
    own, other = result["step_seconds"], reference["step_seconds"]
    table.add_row("step seconds", f"{own:.3f}", f"{other:.3f}", f"{result['step_ratio']:.2f}")
    for figures in (result, reference):
        if "resident_note" in figures:
            table.caption = f"process growth: {figures['resident_note']}"
    return table


def _sweep(
    config: RunConfig,
    landmarks: int,
    folder: Path,
    *,
    repeats: int,
    device: str,
    depths: list[int],
    deep: RunConfig,
    budget_bytes: float,
    as_json: bool,
) -> None:
    """Measures all settings and Fig. 5, writes sweep.json and fig5.png, prints the tables."""
    rows = sweep_settings(config, landmarks, repeats=repeats, device=device)
    result: dict[str, Any] = {
        "model": {"kind": config.model.kind, "order": config.model.order, "landmarks": landmarks},
        "size": config.data.size,
        "device": device,
        "threads": config.training.threads,
        "settings": {
            "unets": config.model.unets,
            "batch": config.training.batch_size,
            "rows": rows,
        },
    }
    lines = list(
        sweep_depths(
            deep,
            landmarks,
            depths,
            budget_bytes,
            device=device,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
    )
    result["figure_5"] = {
        "batch": deep.training.batch_size,
        "budget_bytes": budget_bytes,
        "paper_unets_in_12_gb": PAPER_FIGURE_5,
        "lines": [asdict(line) for line in lines],
    }
    title = f"{config.data.size}×{config.data.size}, batch {deep.training.batch_size}"
    draw_figure(folder / "fig5.png", lines, title, budget_bytes)
    write_atomically(folder / "sweep.json", json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(_settings_table(rows))
    console.print(_depth_table(lines, depths, deep.training.batch_size, budget_bytes))
    console.print(f"{folder}: sweep.json, fig5.png", highlight=False)


def _settings_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    table.add_column("setting", no_wrap=True)
    for heading in ("peak MB", "saved MB", "static MB", "ratio", "step s", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["setting"], "refused")
            table.caption = row["refused"]
            continue
        table.add_row(
            row["setting"],
            *(f"{row[f'{key}_bytes'] / 1e6:.1f}" for key in ("peak", "saved", "static")),
            f"{row['peak_ratio']:.3f}",
            f"{row['step_seconds']:.3f}",
            f"{row['step_ratio']:.2f}",
        )
    return table


def _depth_table(lines: list[DepthLine], depths: list[int], batch: int, budget: float) -> Table:
    """Peaks by number of U-Nets, and the deepest network that fits; ~ is not measured."""
    table = Table(
        title=f"\nFig. 5: peak MB by number of U-Nets, batch {batch}",
        caption="~: along the line through the two deepest networks measured; "
        "off: how far the shallowest one lies from it",
        box=None,
    )
    table.add_column("setting", no_wrap=True)
    for heading in (*map(str, depths), "each", "off", f"fit {budget / 1e9:g} GB"):
        table.add_column(heading, justify="right")
    for line in lines:
        points = (line.measured.get(depth) for depth in depths)
        error = line.linearity_error
        table.add_row(
            line.name,
            *("–" if bytes_ is None else f"{bytes_ / 1e6:.0f}" for bytes_ in points),
            f"{line.bytes_per_unet / 1e6:.1f}",
            "–" if error is None else f"{error:+.1%}",
            f"{'~' if line.deepest_is == 'extrapolated' else ''}{line.deepest}",
        )
    return table
