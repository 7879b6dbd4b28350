"""Messages out over a Flower Grid, and their replies back."""

import time
from collections.abc import Callable

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5


def collect(
    grid: Grid,
    messages: list[Message],
    *,
    timeout: float,
    on_reply: Callable[[int], None],
) -> tuple[dict[int, Message], bool]:
    """Sends the messages and gathers the replies by node id until all are there.

    Returns:
        The replies, and whether the wall-clock guard of `timeout` seconds ended the wait.
    """
    waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    replies: dict[int, Message] = {}
    begin = time.monotonic()
    done, pause = 0, POLL_SECONDS
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            waiting.discard(reply.metadata.reply_to_message_id)
            replies[reply.metadata.src_node_id] = reply
            done += 1
            on_reply(done)
        if waiting and time.monotonic() - begin > timeout:
            # Our own engines stop working on what nobody waits for; Flower's grid lets it expire.
            getattr(grid, "forget", lambda message_ids: None)(waiting)
            return replies, True
        # Our own engines wait inside of a pull; a real server would answer twenty a second.
        pause = POLL_SECONDS if arrived else min(1.3 * pause, LONGEST_POLL_SECONDS)
        if not arrived:
            time.sleep(pause)
    return replies, False
