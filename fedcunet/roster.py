"""Who takes part in a run: every node is asked who it is, and known by its stable client id."""

import dataclasses
import logging
from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedcunet.errors import RunFailure
from fedcunet.exchange import collect
from fedcunet.records import (
    UNKNOWN_CLIENT,
    BadReply,
    Description,
    describe_content,
    read_description,
)

logger = logging.getLogger(__name__)


def describe_clients(
    grid: Grid, timeout: float, admitted: Mapping[int, int] | None = None
) -> tuple[dict[int, Description], list[str]]:
    """Asks every node who it is; nodes that do not answer properly are left out.

    Args:
        grid: where the nodes are.
        timeout: seconds after which nobody waits for an answer.
        admitted: node -> client id, where keys were admitted; otherwise a node's own word counts.

    Returns:
        The clients by their ids, and why nodes were left out.

    Raises:
        RunFailure: if no node is left, with the first node's words.
    """
    nodes = sorted(grid.get_node_ids())
    messages = [Message(describe_content(), node, "query", ttl=timeout) for node in nodes]
    replies, _ = collect(grid, messages, timeout=timeout, on_reply=lambda done: None)
    clients: dict[int, Description] = {}
    problems = []
    for node in nodes:
        found = read_description(replies[node]) if node in replies else None
        if isinstance(found, Description):
            found = _identified(found, admitted)
        if isinstance(found, Description) and found.client not in clients:
            clients[found.client] = found
        elif isinstance(found, Description):
            problems.append(f"client {found.client} answered twice")
        else:
            words = found.detail if found is not None else "did not answer"
            client = (admitted or {}).get(node)
            name = f"node {node}" if client is None else f"client {client}"
            problems.append(f"{name}: {words}")
    for problem in problems:
        logger.warning("left out of the run: %s", problem)
    if not clients:
        first = problems[0] if problems else "there are no nodes"
        raise RunFailure(f"no client can take part: {first}")
    return clients, problems


def _identified(found: Description, admitted: Mapping[int, int] | None) -> Description | BadReply:
    """The description under the id by which the node was admitted, or why it has none."""
    client = found.client if admitted is None else admitted.get(found.node_id, UNKNOWN_CLIENT)
    if client == UNKNOWN_CLIENT:
        return BadReply(
            reason="no-client-id", detail="neither its key was admitted nor is it a part"
        )
    if found.client not in (UNKNOWN_CLIENT, client):
        detail = f"admitted as client {client}, says that it is client {found.client}"
        return BadReply(reason="wrong-client-id", detail=detail)
    return dataclasses.replace(found, client=client)
