"""`python -m simulations run | compare | report`: federated runs of virtual clients."""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedcunet.buffered import check_buffer
from fedcunet.commands.errors import run_app
from fedcunet.config import RunConfig
from fedcunet.data import DATASETS
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held, json_text, write_atomically
from fedcunet.partitioners import deal
from fedcunet.privacy import check_accountant
from fedcunet.robust import check_breakdown
from reports.display import RunDisplay, comparison_table
from reports.report import write_comparison_report, write_run_report
from server.app import read_subsets, serve
from server.run_folders import check_comparison, chosen_folder
from simulations.engine import Engine

app = typer.Typer(
    help="Federated training of virtual clients on this machine or on a Ray cluster. "
    "A setting is a TOML file; simulations/settings/ holds some to start from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


SettingArgument = Annotated[Path, typer.Argument(help="Setting file (TOML).", show_default=False)]
SettingsArgument = Annotated[
    list[Path], typer.Argument(help="Setting files (TOML), one run each.", show_default=False)
]
DataOption = Annotated[str | None, typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}.")]
RootOption = Annotated[str | None, typer.Option("--root", help="Folder of the data set.")]
ClientsOption = Annotated[int | None, typer.Option("--clients", help="Number of clients.")]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a value: federation.partition=activity; again for more of them."
    ),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="ray: worker processes; loopback: this process alone.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", help="Ray workers; as many as processors where not given."),
]
GpusOption = Annotated[int, typer.Option("--num-gpus", help="GPUs that the workers share.")]
AddressOption = Annotated[
    str | None, typer.Option("--ray-address", help="Join this Ray cluster.", envvar="RAY_ADDRESS")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to make; by default a new one under .fedcunet/runs."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON value on standard output, and no table.")
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in --out, or the latest of this name; it ends as if not stopped.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress display.")]


@app.command()
def run(
    setting: SettingArgument,
    data: DataOption = None,
    root: RootOption = None,
    clients: ClientsOption = None,
    rounds: RoundsOption = None,
    seed: SeedOption = None,
    values: SetOption = None,
    engine: EngineOption = "ray",
    num_workers: WorkersOption = None,
    num_gpus: GpusOption = 0,
    ray_address: AddressOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Runs one setting and writes its run folder with report.html.

    Example: python -m simulations run simulations/settings/i32-w32-g32-float32.toml --rounds 5
    """
    config = _configured(setting, data, root, clients, rounds, seed, values)
    chosen = _engine(engine, num_workers, num_gpus, ray_address, config)
    folder = chosen_folder(out, setting.stem, resume=resume)
    with ExitStack() as stack, RunDisplay(quiet=quiet) as display:
        chosen.check(config)
        chosen.session(stack)
        grid = chosen.grid(config, stack)
        try:
            summary = serve(
                grid, config, out=folder, name=setting.stem, display=display, resume=resume
            )
        except RunFailure:
            if _summary_of(folder):
                write_run_report(folder)
            raise
        faults = _faults(summary)
    _print_lines(faults)
    report = write_run_report(folder)
    _print_results([summary], as_json, [summary["name"], str(folder), str(report)], summary)


@app.command()
def compare(
    settings: SettingsArgument,
    data: DataOption = None,
    root: RootOption = None,
    clients: ClientsOption = None,
    rounds: RoundsOption = None,
    seed: SeedOption = None,
    values: SetOption = None,
    engine: EngineOption = "ray",
    num_workers: WorkersOption = None,
    num_gpus: GpusOption = 0,
    ray_address: AddressOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Runs several settings one after the other; prints and writes one table.

    The folder holds a run folder for each setting, table.json and report.html.
    Example: python -m simulations compare simulations/settings/*.toml --rounds 5
    """
    names = [setting.stem for setting in settings]
    if len(set(names)) != len(names):
        raise UserError(f"settings: expected different file names, found {', '.join(names)}")
    configs = [
        _configured(setting, data, root, clients, rounds, seed, values) for setting in settings
    ]
    folder = chosen_folder(out, "compare", resume=resume)
    if resume:
        check_comparison(folder, names)
    summaries: list[dict[str, Any]] = []
    failures: dict[str, Exception] = {}
    faults: list[str] = []
    with ExitStack() as session, RunDisplay(quiet=quiet) as display:
        session.enter_context(held(folder))
        engines = [
            _engine(engine, num_workers, num_gpus, ray_address, config) for config in configs
        ]
        for name, config, chosen in zip(names, configs, engines, strict=True):
            try:
                chosen.check(config)
            except (RunFailure, UserError) as failure:
                failures[name] = failure
        if len(failures) < len(configs):
            max(engines, key=lambda one: one.num_workers).session(session)
        for name, config, chosen in zip(names, configs, engines, strict=True):
            if name in failures:
                continue
            try:
                with ExitStack() as stack:
                    grid = chosen.grid(config, stack)
                    summaries.append(
                        serve(
                            grid,
                            config,
                            out=folder / name,
                            name=name,
                            display=display,
                            resume=resume,
                        )
                    )
                    faults += [f"{name}: {line}" for line in _faults(summaries[-1])]
            except (RunFailure, UserError) as failure:  # the other settings are still worth running
                failures[name] = failure
                if isinstance(failure, RunFailure):  # else what is there is another setting's
                    summaries += _summary_of(folder / name)
    _print_lines(faults)
    what_failed = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
    if not summaries:
        all_wrong = all(isinstance(failure, UserError) for failure in failures.values())
        raise (UserError if all_wrong else RunFailure)(what_failed)
    text = json_text(summaries, indent=2) + "\n"
    write_atomically(folder / "table.json", text)
    report = write_comparison_report(folder, [folder / summary["name"] for summary in summaries])
    _print_results(summaries, as_json, [str(folder), str(report)], summaries)
    if failures:
        raise RunFailure(what_failed)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder, or folder of a comparison.")],
) -> None:
    """Writes report.html anew from a run folder or a comparison's folder."""
    table = folder / "table.json"
    if table.is_file():
        try:
            runs = [folder / row["name"] for row in json.loads(table.read_text(encoding="utf-8"))]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{table}: expected the rows of a comparison, found {type(error).__name__}: {error}"
            ) from None
        path = write_comparison_report(folder, runs)
    else:
        path = write_run_report(folder)
    print(path)


def _configured(
    setting: Path,
    data: str | None,
    root: str | None,
    clients: int | None,
    rounds: int | None,
    seed: int | None,
    values: list[str] | None,
) -> RunConfig:
    """The setting with the options that were given."""
    if data is not None and root is None:
        raise UserError(f"--data {data}: expected --root DIR beside it, found none")
    config = (
        RunConfig.from_toml(setting)
        .replace(
            data__name=data,
            data__root=root,
            federation__clients=clients,
            federation__rounds=rounds,
            seed=seed,
        )
        .with_values(values or [])
    )
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Reads both subsets and divides the images as the clients will.

    Raises:
        UserError: images or clients are few, or the setting is one that a run would refuse.
    """
    federation = config.federation
    train_set, _ = read_subsets(config)
    deal(train_set.annotations, federation, num_clients=federation.clients, seed=config.seed)
    check_breakdown(config, federation.clients)
    check_buffer(config, federation.clients)
    check_accountant(config.privacy)


def _engine(
    name: str, num_workers: int | None, num_gpus: int, ray_address: str | None, config: RunConfig
) -> Engine:
    of_environment = os.environ.get("RAY_ADDRESS")
    for option, value in (
        ("--num-workers", num_workers),
        ("--num-gpus", num_gpus or None),
        ("--ray-address", ray_address if ray_address != of_environment else None),
    ):
        if name == "loopback" and value is not None:
            raise UserError(f"--engine loopback: expected no {option}, found {value}")
    available = len(os.sched_getaffinity(0))
    return Engine(
        name=name,
        num_workers=(
            min(available, config.federation.clients) if num_workers is None else num_workers
        ),
        num_gpus=num_gpus,
        ray_address=ray_address,
    )


def _summary_of(folder: Path) -> list[dict[str, Any]]:
    """The summary of a run that came to its end without a committed round, or nothing."""
    path = folder / "summary.json"
    return [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def _faults(summary: dict[str, Any]) -> list[str]:
    """The workers that were replaced, a line for each reason."""
    found = summary["workers_replaced"]
    return [f"workers replaced: {count} ({reason})" for reason, count in sorted(found.items())]


def _print_lines(lines: list[str]) -> None:
    """To standard error: standard output belongs to the results."""
    for line in lines:
        print(line, file=sys.stderr)


def _print_results(
    summaries: list[dict[str, Any]], as_json: bool, places: list[str], value: Any
) -> None:
    """The table and where things lie, or one JSON value."""
    if as_json:
        print(json_text(value, indent=2))
        return
    console = Console()
    console.print(comparison_table(summaries))
    console.print(f"report: {places[-1]}", soft_wrap=True, highlight=False)


def main() -> None:
    """Runs the command line."""
    run_app(app, "simulations")


if __name__ == "__main__":
    main()
