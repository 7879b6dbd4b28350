"""The commands `paper table1 ...`: the question of a table, asked anew, beside its figures."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from fedcunet.commands.options import BoxesOption, JsonOption
from fedcunet.data import DATASETS, AnnotationSet
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.paper.anew import Listener, make_table
from fedcunet.paper.budget import Budget
from fedcunet.paper.machine import measure_depths, measure_networks
from fedcunet.paper.pictures import draw_orders
from fedcunet.paper.report import (
    METRICS,
    TextTable,
    depths_table,
    full_size_parameters,
    markdown_lines,
    number,
    paper_name,
    remarks,
    sizes_table,
    text_tables,
)
from fedcunet.paper.running import RowResult
from fedcunet.paper.tables import TABLE6_SOURCE, TABLES, Table
from fedcunet.sweep import draw_figure

app = typer.Typer(
    help="Ask the question of a table of the paper anew, at a small scale, beside its figures.",
    no_args_is_help=True,
)
DEFAULTS = Budget()


def _command(table: Table) -> Callable[..., None]:
    """The command of one table."""

    def command(
        data: Annotated[
            str, typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}.")
        ] = DEFAULTS.data,
        root: Annotated[str, typer.Option("--root", help="Its folder.")] = DEFAULTS.root,
        boxes: BoxesOption = DEFAULTS.boxes,
        limit_train: Annotated[
            int, typer.Option("--limit-train", help="Training images, evenly spread; 0: all.")
        ] = DEFAULTS.limit_train,
        limit_test: Annotated[
            int, typer.Option("--limit-test", help="Test images, evenly spread; 0: all.")
        ] = DEFAULTS.limit_test,
        size: Annotated[
            int, typer.Option("--size", help="Side of the crops, n x 64.")
        ] = DEFAULTS.size,
        epochs: Annotated[
            int, typer.Option("--epochs", help="Passes over the training images.")
        ] = DEFAULTS.epochs,
        unets: Annotated[
            int | None,
            typer.Option(
                "--unets",
                help="U-Nets of the smallest network; the others shrink in proportion.",
                show_default=str(table.small_unets),
            ),
        ] = None,
        max_unets: Annotated[
            int | None, typer.Option("--max-unets", help="Leave out rows with more U-Nets.")
        ] = None,
        batch_size: Annotated[
            int, typer.Option("--batch-size", help="Examples a step.")
        ] = DEFAULTS.batch_size,
        learning_rate: Annotated[
            float, typer.Option("--learning-rate", help="The first, of all rows.")
        ] = DEFAULTS.learning_rate,
        optimizer: Annotated[
            str, typer.Option("--optimizer", help="rmsprop, sgd, adam.")
        ] = DEFAULTS.optimizer,
        schedule: Annotated[
            str, typer.Option("--schedule", help="paper, constant, cosine, or 30:0.2,60:0.5")
        ] = DEFAULTS.schedule,
        input_quantizer: Annotated[
            str, typer.Option("--input-quantizer", help="source, ranged or paper.")
        ] = DEFAULTS.input_quantizer,
        storage: Annotated[
            str,
            typer.Option("--storage", help="Of rows with low-bit inputs: float32, or packed."),
        ] = "packed" if table.key == "table5" else "float32",
        seeds: Annotated[str, typer.Option("--seeds", help="Each row once a seed: 0,1,2")] = "0",
        threads: Annotated[int, typer.Option("--threads", help="Of torch.")] = DEFAULTS.threads,
        out: Annotated[
            Path | None,
            typer.Option(
                "--out",
                help="Folder; a second call goes on from it.",
                show_default=f".fedcunet/paper/{table.key}",
            ),
        ] = None,
        counts_only: Annotated[
            bool, typer.Option("--counts-only", help="Only count parameters; train nothing.")
        ] = False,
        as_json: JsonOption = False,
    ) -> None:
        if counts_only:
            _print_counts([table], as_json)
            return
        budget = Budget(
            data=data,
            root=root,
            boxes=boxes,
            limit_train=limit_train,
            limit_test=limit_test,
            size=size,
            epochs=epochs,
            unets=unets,
            max_unets=max_unets,
            batch_size=batch_size,
            learning_rate=learning_rate,
            optimizer=optimizer,
            schedule=schedule,
            input_quantizer=input_quantizer,
            storage=storage,
            seeds=_seeds(seeds),
            threads=threads,
        )
        folder = out or Path(".fedcunet/paper") / table.key
        with _listener(folder) as listener:
            report = make_table(
                table, budget, folder, with_memory=table.key == "table5", listener=listener
            )
        if table.key == "fig4":
            draw_orders(report, METRICS[report["metric"]], folder / "fig4.png")
        _print_report(report, folder, as_json)

    command.__doc__ = (
        f"{table.source}: {table.question} Trains each network, or takes it up from --out.\n\n"
        f"Example: fedcunet paper {table.key} --limit-train 240 --epochs 4 --size 64"
    )
    return command


for _table in TABLES.values():
    app.command(_table.key)(_command(_table))


@app.command()
def networks(as_json: JsonOption = False) -> None:
    """Counts the convolution parameters of every network, at the paper's size; trains nothing.

    Example: fedcunet paper networks
    """
    _print_counts(list(TABLES.values()), as_json)


_SizeOption = Annotated[int, typer.Option("--size", help="Side of the crops, n x 64.")]
_BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Examples a step.")]
_ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Of torch.")]
_OutOption = Annotated[Path, typer.Option("--out", help="Folder of the results.")]
# Every table takes these; what nothing is trained for does without them.
_DataOption = Annotated[
    str | None, typer.Option("--data", help="No effect: nothing is trained here.")
]
_RootOption = Annotated[
    str | None, typer.Option("--root", help="No effect: nothing is trained here.")
]
_EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="No effect: nothing is trained here.")
]


@app.command()
def table6(
    size: _SizeOption = 256,
    batch_size: _BatchOption = 2,
    threads: _ThreadsOption = DEFAULTS.threads,
    max_unets: Annotated[
        int | None, typer.Option("--max-unets", help="Only count networks with more U-Nets.")
    ] = None,
    out: _OutOption = Path(".fedcunet/paper/table6"),
    data: _DataOption = None,
    root: _RootOption = None,
    epochs: _EpochsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Table 6, section 4.5: parameters and model size beside the paper's; speed measured here.

    Nothing is trained: the networks are as large as the paper's, and freshly made. packed is the
    length of the file of `fedcunet export`, with float16 weights where they are not binary.

    Example: fedcunet paper table6 --size 128
    """
    _say_unused(data, root, epochs)
    rows = measure_networks(
        size=size, batch_size=batch_size, threads=threads, max_unets=max_unets, tell=_tell
    )
    settings = {"size": size, "batch_size": batch_size, "threads": threads}
    report = {"table": "table6", "source": TABLE6_SOURCE, "budget": settings, "rows": rows}
    notes = [
        f"times: {size}x{size}, batch {batch_size}, {threads} thread; the paper gives none",
        "the paper's MB are MiB by its own figures (15.9 M parameters and BatchNorm: 62.6)",
    ]
    _finish(report, sizes_table(rows), notes, out, as_json)


@app.command()
def fig5(
    max_unets: Annotated[int, typer.Option("--max-unets", min=3, help="From 2 to this many.")] = 5,
    size: _SizeOption = 128,
    batch_size: _BatchOption = 4,
    threads: _ThreadsOption = DEFAULTS.threads,
    out: _OutOption = Path(".fedcunet/paper/fig5"),
    data: _DataOption = None,
    root: _RootOption = None,
    epochs: _EpochsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Figure 5, section 4.3: measured training memory by number of U-Nets, naive and recomputing.

    Nothing is trained: a step of each network on a made-up batch, each in a process of its own.
    It is the figure of `fedcunet memory --sweep`, with 9 naive U-Nets in place of its --budget.

    Example: fedcunet paper fig5 --max-unets 4 --size 64
    """
    _say_unused(data, root, epochs)
    lines, room = measure_depths(
        max_unets=max_unets, size=size, batch_size=batch_size, threads=threads, tell=_tell
    )
    settings = {"size": size, "batch_size": batch_size, "threads": threads}
    report: dict[str, Any] = {"table": "fig5", "source": "Figure 5, section 4.3"}
    report |= {"budget": settings, "room_bytes": room, "lines": [asdict(line) for line in lines]}
    title = f"{size}x{size}, batch {batch_size}"
    draw_figure(out / "fig5.png", lines, title, room)
    notes = [
        f"order 1, {title}, {threads} thread; MB: peak of a step",
        "in naive 9: U-Nets that fit where 9 naive ones do, ~ by the line through the two deepest "
        "networks measured; paper: 9 and 16 in 12 GB at 256x256, batch 16",
    ]
    _finish(report, depths_table(lines, range(2, max_unets + 1)), notes, out, as_json)


def _say_unused(data: str | None, root: str | None, epochs: int | None) -> None:
    given = {"--data": data, "--root": root, "--epochs": epochs}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        print(f"{', '.join(unused)}: no effect, nothing is trained here", file=sys.stderr)


def _tell(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr)


def _finish(
    report: dict[str, Any], table: TextTable, notes: list[str], out: Path, as_json: bool
) -> None:
    """Writes table.json and table.md of what was measured, and prints one of them."""
    write_atomically(out / "table.json", json.dumps(report, indent=1) + "\n")
    lines = [f"- {note}" for note in notes]
    write_atomically(out / "table.md", "\n".join([*markdown_lines(table), *lines]) + "\n")
    if as_json:
        print(json.dumps(report))
        return
    _print(table)
    for note in notes:
        Console(highlight=False).print(note, markup=False)
    print(f"{out}: table.json, table.md")


def _print_counts(tables: list[Table], as_json: bool) -> None:
    found: list[dict[str, Any]] = [
        {
            "table": table.key,
            "name": paper_name(row),
            "conv_parameters": full_size_parameters(table, row),
            "paper_millions": row.parameters_millions,
        }
        for table in tables
        for row in table.rows
    ]
    if as_json:
        print(json.dumps(found))
        return
    rows = []
    for entry in found:
        own, paper = entry["conv_parameters"] / 1e6, entry["paper_millions"]
        shown = number(own, 3), number(paper, 1), number(paper and own / paper, 3)
        rows.append((entry["table"], entry["name"], *shown))
    columns = ("where", "network", "ours, M", "paper, M", "ours / paper")
    _print(TextTable(title="Convolution parameters", columns=columns, rows=tuple(rows)))


def _print_report(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    for table in text_tables(report):
        _print(table)
        print()
    console = Console(highlight=False)
    for line in remarks(report):
        console.print(line, markup=False)
    console.print(f"{folder}: table.json, table.md", markup=False, soft_wrap=True)


def _print(table: TextTable) -> None:
    shown = RichTable(title=table.title or None, box=None, padding=(0, 1, 0, 0))
    for place, column in enumerate(table.columns):
        words = not any(row[place].lstrip("-")[:1].isdigit() for row in table.rows)
        shown.add_column(column, justify="left" if place == 0 or words else "right")
    for row in table.rows:
        shown.add_row(*row)
    Console(highlight=False).print(shown)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds: expected whole numbers such as 0,1,2, found '{text}'") from None


@contextmanager
def _listener(folder: Path) -> Iterator[Listener]:
    """Progress on standard error: a bar on a terminal, and a line for each row."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=600,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("loading", total=None)

        def problems(found: AnnotationSet) -> None:
            for problem in found.problems[:3]:
                console.print(f"{found.subset}: {problem}", markup=False, soft_wrap=True)

        def step(name: str, epoch: int, loss: float, work: float) -> None:
            del epoch
            progress.update(bar, advance=work, description=f"{name} loss {loss:.4f}")

        def row(name: str, result: RowResult, found: bool) -> None:
            console.print(
                f"{name}: {result.metric} {result.percent:.2f}, {result.train_seconds:.0f} s, "
                f"{result.train_images_per_second:.1f} images/s"
                f"{' (was there)' if found else ''}",
                markup=False,
                soft_wrap=True,
            )

        try:
            yield Listener(
                problems=problems,
                plan=lambda total, done: progress.update(bar, total=total, completed=done),
                step=step,
                row=row,
                memory=lambda name: _tell(f"the training step's memory of {name}"),
            )
        except KeyboardInterrupt:
            console.print(
                f"{folder}: the same command goes on from here", markup=False, soft_wrap=True
            )
            raise
