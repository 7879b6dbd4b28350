"""Admitting and revoking nodes: Flower's list and our table of client ids, changed together."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedcunet.errors import RunFailure
from fedcunet.files import held
from server.flower import flwr
from server.folder import ServerFolder
from server.nodes import (
    AdmittedNode,
    now,
    place_for,
    read_nodes,
    read_public_key,
    revoked,
    with_node,
    write_nodes,
)


def admit(
    folder: ServerFolder, key_file: Path, client: int | None, name: str | None
) -> AdmittedNode:
    """Admits the key in `key_file` under the id `client`, or under the next one.

    Raises:
        UserError: the key is none, is admitted already, or the id is taken.
        RunFailure: there is no server, it takes no keys, or it refuses this one.
    """
    if not folder.has_keys():
        raise RunFailure("the server runs without TLS and so without keys: nodes need no admission")
    key, fingerprint, comment = read_public_key(key_file)
    with _table_held(folder):
        table = read_nodes(folder.path)
        place = place_for(table, key, client)
        answer = flwr(folder, ["supernode", "register", str(key_file)])
        node = AdmittedNode(
            client=place,
            node_id=int(answer["node-id"]),
            name=name or comment or key_file.stem,
            key=key,
            fingerprint=fingerprint,
            admitted=now(),
        )
        write_nodes(folder.path, with_node(table, node))
    return node


def revoke(folder: ServerFolder, which: str) -> AdmittedNode:
    """Takes back the admission of the node named by client id, name or fingerprint.

    Raises:
        UserError: none or several fit.
        RunFailure: there is no server, or it refuses.
    """
    with _table_held(folder):
        table = read_nodes(folder.path)
        node = revoked(table, which)
        flwr(folder, ["supernode", "unregister", str(node.node_id)])
        write_nodes(folder.path, with_node(table, node))
    return node


def _table_held(folder: ServerFolder) -> AbstractContextManager[None]:
    """Lets one command at a time change the table; the folder itself the running server holds."""
    return held(folder.flower_home, wait=True)


def overview(folder: ServerFolder) -> list[dict[str, Any]]:
    """The table with what Flower knows of each node: online, offline, admitted or revoked."""
    answer = flwr(folder, ["supernode", "list"])
    status = {int(row["node-id"]): str(row["status"]) for row in answer["nodes"]}
    rows = []
    for node in read_nodes(folder.path):
        found = "revoked" if node.revoked else status.get(node.node_id, "unknown")
        found = "admitted" if found == "registered" else found
        rows.append(asdict(node) | {"status": found})
    return rows
