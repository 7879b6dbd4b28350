"""Who may take part: the table of admitted keys, each with a client id of its own.

Flower gives the node of each key a number, and a revoked key never gets one again (1.39). What a
client keeps between rounds, and its place in every sum, goes by the client id, which a machine
keeps when it comes with a new key.
"""

import base64
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.records import one_line


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmittedNode:
    """One key that may, or once might, take part.

    Attributes:
        client: stable id.
        node_id: Flower's number for it since it was last admitted.
        name: for people; the comment in the key file if no other was given.
        key: public key in OpenSSH's form, without the comment.
        fingerprint: SHA-256 of the key, as `ssh-keygen -l` shows it.
        admitted: when, UTC.
        revoked: whether it may not take part any more.
    """

    client: int
    node_id: int
    name: str
    key: str
    fingerprint: str
    admitted: str
    revoked: bool = False


def read_nodes(folder: Path) -> list[AdmittedNode]:
    """The table of a server's folder, empty if there is none; by client id."""
    path = folder / "nodes.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return sorted((AdmittedNode(**row) for row in rows), key=lambda node: node.client)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_nodes(folder: Path, nodes: Sequence[AdmittedNode]) -> None:
    """Replaces the table."""
    rows = [asdict(node) for node in nodes]
    write_atomically(folder / "nodes.json", json.dumps(rows, indent=2) + "\n")


def client_ids(folder: Path) -> dict[int, int]:
    """Flower's node number -> client id of those that may take part."""
    return {node.node_id: node.client for node in read_nodes(folder) if not node.revoked}


def read_public_key(path: Path) -> tuple[str, str, str]:
    """Key, fingerprint and comment of a public key file of `python -m clients keygen`.

    Raises:
        UserError: the file is not an OpenSSH public key on one of NIST's curves, as Flower wants.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
        if "PRIVATE KEY" in text:
            raise UserError(f"key {path}: is the private one, which stays with the client")
        found = serialization.load_ssh_public_key(text.encode())
    except FileNotFoundError:
        raise UserError(f"key {path}: not found") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"key {path}: expected an OpenSSH public key: {error}") from None
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise UserError(f"key {path}: expected ECDSA (`python -m clients keygen`), found another")
    kind, body, *comment = text.split(maxsplit=2)
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(body)).digest()).decode()
    return f"{kind} {body}", f"SHA256:{digest.rstrip('=')}", one_line(" ".join(comment))


def place_for(nodes: Sequence[AdmittedNode], key: str, client: int | None) -> int:
    """The client id that a new key gets.

    Args:
        nodes: the table.
        key: public key.
        client: the id that was asked for: a free one, or that of a revoked key, whose place the
            new one takes; the next that was never given if None.

    Raises:
        UserError: the key is known already, or the id is another key's.
    """
    known = next((node for node in nodes if node.key == key), None)
    if known is not None and known.revoked:
        raise UserError(
            f"key {known.fingerprint}: was revoked, and Flower takes a revoked key never again; "
            f"a new one can have its place by --client {known.client}"
        )
    if known is not None:
        raise UserError(f"key {known.fingerprint}: is admitted already, as client {known.client}")
    if client is None:
        return max((node.client for node in nodes), default=-1) + 1
    holder = next((node for node in nodes if node.client == client and not node.revoked), None)
    if holder is not None:
        raise UserError(f"--client {client}: is the id of {holder.name} ({holder.fingerprint})")
    return client


def with_node(nodes: Sequence[AdmittedNode], node: AdmittedNode) -> list[AdmittedNode]:
    """The table with `node` in it, in place of the row of the same key."""
    rows = [other for other in nodes if other.key != node.key]
    return sorted([*rows, node], key=lambda row: row.client)


def revoked(nodes: Sequence[AdmittedNode], which: str) -> AdmittedNode:
    """The one admitted node named by client id, name or fingerprint, marked as revoked.

    Raises:
        UserError: none or several fit.
    """
    fitting = [
        node
        for node in nodes
        if not node.revoked and which in (str(node.client), node.name, node.fingerprint)
    ]
    if len(fitting) != 1:
        known = ", ".join(f"{node.client} ({node.name})" for node in nodes if not node.revoked)
        raise UserError(
            f"node '{which}': {len(fitting)} admitted nodes fit, expected one; "
            f"there are {known or 'none'}"
        )
    return replace(fitting[0], revoked=True)


def now() -> str:
    """The time for `admitted`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
