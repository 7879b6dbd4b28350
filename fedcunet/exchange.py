"""Messages out over a Flower Grid, and their replies back."""

import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedcunet.records import NODE_UNAVAILABLE, error_reply

Read = TypeVar("Read")

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5


class Collected(NamedTuple, Generic[Read]):
    """What came of messages to nodes."""

    replies: dict[int, Read]  # by the id of the node that was asked
    not_sent: set[int]  # nodes that the grid took no message to; their replies are errors
    guard_fired: bool  # whether the wall-clock guard ended the wait


def collect(
    grid: Grid,
    messages: list[Message],
    *,
    timeout: float,
    read: Callable[[int, Message], Read],
    on_reply: Callable[[int], None],
) -> Collected[Read]:
    """Sends the messages, one to a node, and gathers the replies until all are there.

    A reply belongs to the node whose message it answers, whoever made it: where a node has gone,
    or its reply was lost, Flower 1.39's SuperLink answers in its own name.

    Args:
        grid: where the nodes are.
        messages: one to each node.
        timeout: seconds of the wall-clock guard.
        read: makes of each reply, with the node that was asked, what is kept of it.
        on_reply: called with the number of replies so far.
    """
    waiting: dict[str, int] = {}  # message -> node
    replies: dict[int, Read] = {}
    for message, message_id in zip(messages, _push(grid, messages), strict=True):
        node = message.metadata.dst_node_id
        if message_id:
            waiting[message_id] = node
        else:
            text = "no message to this node was taken: it has left, or all are too large together"
            replies[node] = read(node, error_reply(message, text, code=NODE_UNAVAILABLE))
    not_sent = set(replies)
    begin = time.monotonic()
    pause = POLL_SECONDS
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            asked = waiting.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                replies[asked] = read(asked, reply)
                on_reply(len(replies))
        if waiting and time.monotonic() - begin > timeout:
            # Our own engines stop working on what nobody waits for; Flower's grid lets it expire.
            getattr(grid, "forget", lambda message_ids: None)(waiting)
            return Collected(replies, not_sent, guard_fired=True)
        # Our own engines wait inside of a pull; a real server would answer twenty a second.
        pause = POLL_SECONDS if arrived else min(1.3 * pause, LONGEST_POLL_SECONDS)
        if not arrived:
            time.sleep(pause)
    return Collected(replies, not_sent, guard_fired=False)


def _push(grid: Grid, messages: list[Message]) -> list[str]:
    """The messages' ids in their order, empty for those that the grid did not take.

    So they come from our own engines and from a deployment. Of Flower's own grids (1.39) the one
    in memory leaves out what it did not take, and the one over HTTP gives none where all together
    is too large; both write the ids into the messages.
    """
    message_ids = list(grid.push_messages(messages))
    if len(message_ids) == len(messages):
        return message_ids
    taken = set(message_ids)
    own = [message.metadata.message_id for message in messages]
    return [message_id if message_id in taken else "" for message_id in own]
