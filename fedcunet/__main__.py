"""The console script `fedcunet`."""

import os
import sys

if "--distributed" in sys.argv:
    # DDP warns of what `Team.replica` does on purpose; torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import typer

from fedcunet.commands import codecs, data, evaluate, export, machine, memory, paper, predict, train
from fedcunet.commands.errors import run_app

app = typer.Typer(
    help="Federated training of quantised densely connected U-Nets for landmark localisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(export.export)
app.command()(machine.sizes)
app.command()(memory.memory)
app.add_typer(data.app, name="data")
app.command()(codecs.codecs)
app.command()(codecs.encode)
app.command()(codecs.decode)
app.add_typer(paper.app, name="paper")
app.command()(machine.checks)


def main() -> None:
    """Runs the command line."""
    run_app(app, "fedcunet")


if __name__ == "__main__":
    main()
