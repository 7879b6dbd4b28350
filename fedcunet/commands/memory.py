"""The command `memory`: what a training step really takes, beside naive float32."""

import json
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.machine import (
    IterativeOption,
    JsonOption,
    ModelOption,
    OrderOption,
    warn_of_order,
)
from fedcunet.config import RunConfig
from fedcunet.memory import compare_with_naive


def memory(
    model: ModelOption = "dunet",
    unets: Annotated[int, typer.Option("--unets", help="Number of U-Nets, n.")] = 4,
    order: OrderOption = None,
    iterative: IterativeOption = False,
    landmarks: Annotated[int, typer.Option("--landmarks", help="68: faces, 16: MPII.")] = 16,
    size: Annotated[int, typer.Option("--size", help="Side of the crops, n x 64.")] = 256,
    batch: Annotated[int, typer.Option("--batch", help="Examples of a step.")] = 4,
    bits: Annotated[str, typer.Option("--bits", help="Inputs, weights, gradients.")] = "8,1,8",
    alpha: Annotated[bool, typer.Option("--alpha", help="A scale for each filter.")] = False,
    input_quantizer: Annotated[
        str | None,
        typer.Option(
            "--input-quantizer",
            help="paper, ranged or source.",
            show_default="source with packed storage, else ranged",
        ),
    ] = None,
    gradient_scale: Annotated[
        str, typer.Option("--gradient-scale", help="A scale a channel, or a tensor.")
    ] = "channel",
    storage: Annotated[
        str, typer.Option("--storage", help="float32 (plain autograd), or packed.")
    ] = "float32",
    optimizer: Annotated[str, typer.Option("--optimizer", help="rmsprop, sgd, adam.")] = "rmsprop",
    threads: Annotated[int, typer.Option("--threads", help="Of torch.")] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed steps; the shortest counts.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measures a training step on the CPU, and the same network's naive float32 step beside it.

    Bytes are those of torch's allocator: peak = what stays from step to step (parameters,
    optimiser, batch) + the high-water mark of the step; saved = what the forward pass leaves for
    the backward pass. Packed storage saves most with --input-quantizer source; with another
    quantiser the maps it keeps are floats.
    """
    warn_of_order(model, order)
    if input_quantizer is None:
        input_quantizer = "source" if storage == "packed" else "ranged"
    config = RunConfig().replace(
        model__kind=model,
        model__unets=unets,
        model__order=1 if order is None else order,
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
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = compare_with_naive(config, landmarks, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    if as_json:
        print(json.dumps(result))
        return
    naive = result["naive_float32"]
    assert isinstance(naive, dict)
    table = Table(box=None)
    for title in ("", f"{bits} {storage}", "naive float32", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    for name in ("peak", "saved", "static"):
        own, other = result[f"{name}_bytes"], naive[f"{name}_bytes"]
        assert isinstance(own, int)
        table.add_row(f"{name} MB", f"{own / 1e6:.1f}", f"{other / 1e6:.1f}", f"{own / other:.3f}")
    table.add_row(
        "step seconds",
        f"{result['step_seconds']:.3f}",
        f"{naive['step_seconds']:.3f}",
        f"{result['step_ratio']:.2f}",
    )
    Console().print(table)
