"""Options and steps that the commands on networks share."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedcunet.data import DATASETS, AnnotationSet, load
from fedcunet.errors import UserError

ModelOption = Annotated[
    str, typer.Option("--model", help="Kind of network: dunet, or stacked (hourglasses).")
]
UnetsOption = Annotated[int, typer.Option("--unets", help="Number of U-Nets, n.")]
OrderOption = Annotated[
    int | None,
    typer.Option(
        "--order", help="K of a DU-Net's order-K connectivity.", show_default="1; of one U-Net 0"
    ),
]
SupervisionsOption = Annotated[
    int, typer.Option("--supervisions", help="Number of U-Nets with a head; 0: all.")
]
IterativeOption = Annotated[
    bool, typer.Option("--iterative", help="A second, refined pass through the same U-Nets.")
]
GradientScaleOption = Annotated[
    str, typer.Option("--gradient-scale", help="A scale a channel, or a tensor.")
]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="rmsprop, sgd, adam.")]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Of torch.")]
DataOption = Annotated[
    str,
    typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}; several to train on: lsp+mpii."),
]
RootOption = Annotated[
    str, typer.Option("--root", help="Folder of the data set; of several: DIR1,DIR2.")
]
FlipTestOption = Annotated[
    bool,
    typer.Option(
        "--flip-test", help="Predict from the mean of each crop's and its mirror's heatmaps."
    ),
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="A checkpoint file of this program.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
BoxesOption = Annotated[
    str, typer.Option("--boxes", help="Faces: landmarks (square box x 1.25), given, ground-truth.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def order_of(model: str, unets: int, order: int | None) -> int:
    """The order as given, else 1, the paper's; a single U-Net has order 0 only.

    Says so on standard error if an order was given for a network that has none.
    """
    if model == "stacked" and order is not None:
        print("--order has no effect with --model stacked", file=sys.stderr)
    return int(unets > 1) if order is None else order


def progress_bar(console: Console) -> Progress:
    """A bar that is there while it moves, and only on a terminal; add_task says of what."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def load_subset(
    data: str, root: str, subset: str, boxes: str, console: Console | None = None
) -> AnnotationSet:
    """The subset, its problems told on standard error. Raises UserError if it is empty."""
    found = load(data, root, subset, boxes=boxes)
    console = console or Console(stderr=True, highlight=False)
    for problem in found.problems[:5]:
        console.print(f"{subset}: {problem}", markup=False, soft_wrap=True)
    if len(found.problems) > 5:
        console.print(f"{subset}: {len(found.problems) - 5} more; see fedcunet data check")
    if not found.annotations:
        raise UserError(f"{root}: subset '{subset}' of {data} has no images")
    return found
