"""Who takes part in a run: every node is asked who it is, and known by its stable client id."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedcunet.config import RunConfig
from fedcunet.config.ladder import rung_texts
from fedcunet.errors import RunFailure
from fedcunet.exchange import collect
from fedcunet.records import (
    UNKNOWN_CLIENT,
    BadReply,
    Description,
    describe_content,
    read_description,
)
from fedcunet.terms import client_setting

logger = logging.getLogger(__name__)


def describe_clients(
    grid: Grid,
    timeout: float,
    admitted: Mapping[int, int] | None = None,
    *,
    num_rungs: int = 1,
) -> tuple[dict[int, Description], list[str]]:
    """Asks every node who it is; nodes that do not answer properly are left out.

    Args:
        grid: where the nodes are.
        timeout: seconds after which nobody waits for an answer.
        admitted: node -> client id, where keys were admitted; otherwise a node's own word counts.
        num_rungs: settings that a client can train by: the run's own and those of its ladder.

    Returns:
        The clients by their ids, and why nodes were left out.

    Raises:
        RunFailure: if no node is left, with the first node's words.
    """
    nodes = sorted(grid.get_node_ids())
    messages = [Message(describe_content(), node, "query", ttl=timeout) for node in nodes]
    replies = collect(
        grid,
        messages,
        timeout=timeout,
        read=lambda _, reply: read_description(reply),
        on_reply=lambda done: None,
    ).replies
    clients: dict[int, Description] = {}
    problems: list[tuple[str, str]] = []  # who, and why
    for node in nodes:
        found = replies.get(node)
        if isinstance(found, Description):
            found = _identified(found, admitted)
        if isinstance(found, Description) and found.rung >= num_rungs:
            found = BadReply(
                reason="no-such-rung", detail=f"rung {found.rung}, the ladder has {num_rungs - 1}"
            )
        if isinstance(found, Description) and found.client not in clients:
            clients[found.client] = found
        elif isinstance(found, Description):
            problems.append((f"client {found.client}", "answered twice"))
        else:
            words = found.detail if found is not None else "did not answer"
            client = (admitted or {}).get(node)
            name = f"node {node}" if client is None else f"client {client}"
            problems.append((f"{name}:", words))
    left_out = [f"{name} {words}" for name, words in problems]
    _warn(problems)
    if not clients:
        first = left_out[0] if left_out else "there are no nodes"
        raise RunFailure(f"no client can take part: {first}")
    return clients, left_out


def _warn(problems: Iterable[tuple[str, str]]) -> None:
    """A line for each reason: thousands of small devices have the same."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, words in problems:
        names[words].append(name)
    for words, (first, *others) in names.items():
        more = f" (and {len(others)} more)" if others else ""
        logger.warning("left out of the run%s: %s %s", more, first, words)


def fleet(clients: Mapping[int, Description], config: RunConfig) -> list[dict[str, Any]]:
    """How the clients of a run train: a row for each device, rung and bits of the updates.

    Returns:
        Rows with device, rung, its changes as they stand in the ladder, the number of clients,
        the most that one of them was measured to need (None: not measured), and update bits.
    """
    groups: defaultdict[tuple[str, int], list[Description]] = defaultdict(list)
    for found in clients.values():
        groups[found.device, found.rung].append(found)
    texts = rung_texts(config.federation.ladder)
    return [
        {
            "device": device,
            "rung": rung,
            "changes": "; ".join(texts[:rung]),
            "clients": len(group),
            "needed_bytes": max(found.needed_bytes for found in group) or None,
            "update_bits": client_setting(config, device, rung).update.bits,
        }
        for (device, rung), group in sorted(groups.items())
    ]


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
