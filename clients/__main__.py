"""`python -m clients`: takes part in federated training with this machine's own images."""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import socket
import ssl
import time
from pathlib import Path
from typing import Annotated

import typer

from clients.keys import check_key, make_key
from clients.state import forget_old_runs
from clients.supernode import Supernode, node_config_text
from fedcunet.commands.errors import run_app
from fedcunet.data import DATASETS
from fedcunet.devices import PROFILES, profile_named
from fedcunet.errors import UserError
from fedcunet.processes import end_as_by_ctrl_c, host_and_port

DEFAULT_FOLDER = Path(".fedcunet/node")
STATE_DAYS = 7.0

app = typer.Typer(
    help="Federated training on this machine's own images; they never leave it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def keygen(
    key: Annotated[Path, typer.Argument(help="Where the private key goes.")] = DEFAULT_FOLDER
    / "key",
    comment: Annotated[
        str, typer.Option("--comment", help="Name of this node, for the server's list.")
    ] = socket.gethostname(),
) -> None:
    """Makes this node's key. The private part stays here, the .pub goes to the server.

    Example: python -m clients keygen
    """
    public = make_key(key, comment)
    print(f"{key}: private, stays here ({check_key(key)})")
    print(f"{public}: give this file to whoever runs the server")


@app.command()
def join(
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the server.")],
    data: Annotated[str, typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}.")],
    root: Annotated[Path, typer.Option("--root", help="Folder of the images.")],
    authority: Annotated[Path | None, typer.Option("--ca", help="The server's ca.pem.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="This node's private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no key, where the server has none.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help=f"Device profile: {', '.join(PROFILES)}.")
    ] = "phone-mid",
    part: Annotated[
        int | None, typer.Option("--partition-id", min=0, help="Which part of shared images.")
    ] = None,
    parts: Annotated[
        int | None, typer.Option("--num-partitions", min=1, help="How many parts there are.")
    ] = None,
    memory: Annotated[
        int | None, typer.Option("--memory-mb", min=1, help="Memory that training may take.")
    ] = None,
    patience: Annotated[
        float | None, typer.Option("--patience", min=0.1, help="Seconds; for ever by default.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", help="This node's own: state, log, Flower's apps.")
    ] = DEFAULT_FOLDER,
) -> None:
    """Joins a server and trains when it asks, until Ctrl-C or SIGTERM.

    Example: python -m clients join --server server.lab:9092 --ca ca.pem --key .fedcunet/node/key
    --data 300w --root DIR
    """
    # Brings torch, which a key need not wait for.
    from clients.offer import Offer

    _check_connection(server, authority, key, insecure)
    profile_named(device)
    offer = Offer.of_machine(
        data=data, root=root, device=device, part=part, parts=parts, memory=memory, folder=folder
    )
    node_config_text(offer.node_config())
    end_as_by_ctrl_c()
    forget_old_runs(offer.state_folder, STATE_DAYS)
    _say(offer.words())
    Supernode(
        server=server,
        authority=authority,
        key=key,
        node_config=offer.node_config(),
        folder=folder,
        patience_seconds=patience,
    ).mind(_say)


def _check_connection(
    server: str, authority: Path | None, key: Path | None, insecure: bool
) -> None:
    try:
        host_and_port(server, "--server")
    except ValueError as error:
        raise UserError(str(error)) from None
    if insecure:
        if authority is not None or key is not None:
            raise UserError("--insecure: expected neither --ca nor --key beside it")
        return
    if authority is None or key is None:
        raise UserError("expected --ca FILE and --key FILE (or --insecure, for a lab without TLS)")
    if not authority.is_file():
        raise UserError(f"--ca {authority}: not found; the server's ca.pem is meant")
    try:
        ssl.create_default_context(cafile=str(authority))
    except ssl.SSLError:
        raise UserError(f"--ca {authority}: expected a certificate in PEM, found none") from None
    check_key(key)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """Runs the command line."""
    run_app(app, "clients")


if __name__ == "__main__":
    main()
