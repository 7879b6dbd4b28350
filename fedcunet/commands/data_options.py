"""What the data commands share: arguments, a progress bar, a line for people."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedcunet.commands.options import progress_bar
from fedcunet.data import DATASETS
from fedcunet.data.kinds import detect_kind
from fedcunet.errors import UserError

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="The folder of the data set.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help=f"Its kind ({', '.join(DATASETS)}); else told by its files."),
]
Subset = Annotated[str, typer.Option("--subset", help="A subset, or for faces one folder.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all randomness.")]


def kind_of(data: str | None, root: Path) -> str:
    """The data set's kind as given, or told by the folder's files. Raises UserError."""
    if data is None:
        return detect_kind(root)
    if data not in DATASETS:
        raise UserError(f"--data: expected one of {', '.join(DATASETS)}, found {data!r}")
    return data


@contextmanager
def progress_of(what: str) -> Iterator[Any]:
    """A bar on standard error; yields report(done, total)."""
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(line: str) -> None:
    """A line on standard error; standard output is for results."""
    sys.stderr.write(line + "\n")
