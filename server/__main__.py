"""`python -m server`: an aggregation server for real clients, and what its operator needs.

Without a command it starts the server and minds it until Ctrl-C or SIGTERM.
"""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedcunet.commands.errors import run_app
from fedcunet.data import DATASETS
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import json_text
from fedcunet.processes import end_as_by_ctrl_c
from server import admission
from server.certificates import Certificates, make_certificates, names_of_file
from server.folder import DEFAULT_FOLDER, Request, ServerFolder, existing
from server.nodes import read_nodes
from server.run_folders import chosen_folder
from server.superlink import Superlink, is_serving

app = typer.Typer(
    help="An aggregation server for real clients, over gRPC with TLS. Without a command: start it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

FolderOption = Annotated[
    Path, typer.Option("--folder", help="Folder of the server: database, certificates, nodes.")
]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    folder: FolderOption = DEFAULT_FOLDER,
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT for clients; 0.0.0.0:PORT for all networks.")
    ] = "127.0.0.1:9092",
    control_port: Annotated[
        int,
        typer.Option(
            "--control-port",
            min=1,
            max=65535,
            help="On loopback, for the commands of this machine.",
        ),
    ] = 8000,
    health_port: Annotated[
        int,
        typer.Option(
            "--health-port", min=1, max=65535, help="On loopback, grpc.health.v1 without TLS."
        ),
    ] = 9095,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="Certificate that clients check the server against.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--cert", help="The server's.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The server's private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no node keys; on loopback only.")
    ] = False,
    exposed: Annotated[
        bool,
        typer.Option("--anyone-may-read-and-join", help="With --insecure: beyond loopback too."),
    ] = False,
) -> None:
    """Starts the server: TLS, node keys, control on loopback, database on disk.

    Example: python -m server --listen 0.0.0.0:9092
    """
    if context.invoked_subcommand is not None:
        return
    home = ServerFolder(folder)
    superlink = Superlink(
        folder=home,
        listen=listen,
        control_port=control_port,
        health_port=health_port,
        certificates=_certificates(home, authority, certificate, key, insecure),
        exposed=exposed,
    )
    end_as_by_ctrl_c()
    with superlink.running() as process:
        _say_that_it_runs(superlink)
        code = process.wait()
    raise RunFailure(f"the SuperLink ended by itself (code {code}); see {home.log}")


def _certificates(
    home: ServerFolder,
    authority: Path | None,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
) -> Certificates | None:
    """The given files, or those of the folder, or none where that was asked for."""
    given = [path for path in (authority, certificate, key) if path is not None]
    if insecure:
        if given:
            raise UserError("--insecure: expected no certificates beside it")
        return None
    if not given:
        return home.certificates
    if authority is None or certificate is None or key is None:
        raise UserError("--ca, --cert and --key: expected all three or none")
    return Certificates(authority=authority, certificate=certificate, key=key)


def _say_that_it_runs(superlink: Superlink) -> None:
    files = superlink.certificates
    print(f"listening for clients at {superlink.listen}", end="")
    if files is None:
        print(": NO TLS AND NO KEYS, anyone who reaches this port can read, change and take part")
    else:
        print(f", TLS by {files.certificate} (for {', '.join(names_of_file(files.certificate))})")
        admitted = [node for node in read_nodes(superlink.folder.path) if not node.revoked]
        print(f"clients need {files.authority} and an admitted key; {len(admitted)} are admitted")
    print(f"control on 127.0.0.1:{superlink.control_port}, log in {superlink.folder.log}; ", end="")
    print("Ctrl-C ends the server", flush=True)


@app.command()
def certs(
    names: Annotated[
        list[str] | None,
        typer.Option("--name", help="DNS name or IP address that clients use; again for more."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long they hold.")] = 365,
    folder: FolderOption = DEFAULT_FOLDER,
) -> None:
    """Makes a certificate authority for a lab and the server's certificate.

    Loopback is always among the names. Clients get ca.pem and nothing else.
    Example: python -m server certs --name server.lab --name 192.168.1.20
    """
    files = make_certificates(folder / "certificates", names or [], days)
    print(f"{files.certificate}: for {', '.join(names_of_file(files.certificate))}, {days} days")
    print(f"{files.authority}: give this file to the clients")
    print(f"{files.authority.with_name('ca.key')}: needed for new certificates only; keep it away")


@app.command(name="admit-node")
def admit_node(
    key: Annotated[Path, typer.Argument(help="Public key of the node (.pub).")],
    client: Annotated[
        int | None,
        typer.Option("--client", min=0, max=2**31 - 1, help="Client id; else the next free one."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="For people.")] = None,
    folder: FolderOption = DEFAULT_FOLDER,
) -> None:
    """Admits a node by its public key; the server must run.

    Example: python -m server admit-node phone.pub --client 0
    """
    node = admission.admit(existing(folder), key, client, name)
    print(f"client {node.client}: {node.name}, {node.fingerprint}, admitted")


@app.command(name="revoke-node")
def revoke_node(
    which: Annotated[str, typer.Argument(help="Client id, name or fingerprint.")],
    folder: FolderOption = DEFAULT_FOLDER,
) -> None:
    """Takes a node's admission back at once and for good; a new key can have its client id."""
    node = admission.revoke(existing(folder), which)
    print(f"client {node.client}: {node.name}, {node.fingerprint}, revoked")


@app.command()
def nodes(
    folder: FolderOption = DEFAULT_FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Lists the admitted and revoked nodes, and which are there."""
    rows = admission.overview(existing(folder))
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    for row in rows:
        print(f"client {row['client']:>3}  {row['status']:<8}  {row['name']}  {row['fingerprint']}")
    if not rows:
        print("no node has been admitted yet")


@app.command()
def health(folder: FolderOption = DEFAULT_FOLDER) -> None:
    """Says whether the server is ready (grpc.health.v1); exit code 1 if not."""
    address = existing(folder).address().health
    if not is_serving(address):
        raise RunFailure(f"{address}: not serving")
    print(f"{address}: serving")


@app.command()
def run(
    setting: Annotated[Path, typer.Argument(help="Setting file (TOML).")],
    data: Annotated[
        str | None, typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}.")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option("--root", help="Its folder here: the test images are the server's."),
    ] = None,
    clients: Annotated[int | None, typer.Option("--clients", help="Nodes to wait for.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")] = None,
    values: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the setting; again for more.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for as many nodes as clients.")
    ] = 60.0,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or the latest.")
    ] = False,
    folder: FolderOption = DEFAULT_FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Runs a setting on the nodes that are there, and shows it as a simulation is shown.

    Example: python -m server run simulations/settings/i8-w2-g8-sign.toml --clients 2 --rounds 5
    """
    # These bring torch, which the other commands do not wait for.
    from fedcunet.attackers import refuse_attackers
    from fedcunet.config import RunConfig
    from fedcunet.terms import refuse_availability
    from reports.display import RunDisplay, comparison_table
    from reports.report import write_run_report
    from server.running import Follower, submit

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
    refuse_attackers(config)
    refuse_availability(config)
    home = existing(folder)
    request = Request(
        out=chosen_folder(out, setting.stem, resume=resume),
        name=setting.stem,
        wait_seconds=wait,
        resume=resume,
    )
    end_as_by_ctrl_c()
    with RunDisplay(quiet=quiet) as display:
        run_id = submit(home, config, request)
        summary = Follower(folder=home, run_id=run_id, display=display).follow()
    report = write_run_report(request.out)
    if as_json:
        print(json_text(summary, indent=2))
        return
    console = Console()
    console.print(comparison_table([summary]))
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


def main() -> None:
    """Runs the command line."""
    run_app(app, "server")


if __name__ == "__main__":
    main()
