"""What the two engines of our own share: a Flower Grid whose nodes are virtual."""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message, RecordDict, UserConfig
from flwr.serverapp import Grid

from fedcunet.identity import make_run, set_task_identity, with_message_id
from fedcunet.records import NODE_UNAVAILABLE, error_reply
from simulations.tasks import Node

# The server's own id; virtual clients are numbered from 1.
SERVER_NODE_ID = 0

# How long one pull waits for a reply before it returns with none.
PULL_SECONDS = 2.0


class LocalGrid(Grid):
    """A Grid over virtual nodes 1 to N; an engine says only how messages are answered.

    An engine implements `_accept`, `_advance` and `_drop`.
    """

    def __init__(
        self, node_configs: Sequence[UserConfig], run_config: UserConfig, run_id: int = 1
    ) -> None:
        """Number the nodes and take the server's identity for this process.

        Args:
            node_configs: one for each node; `partition-id` (node id - 1) and `num-partitions`
                are added where they are missing.
            run_config: what every app finds in its context.
            run_id: the run that all messages belong to.
        """
        self._run = make_run(run_id)
        self._nodes = {
            number: Node(
                run_id=run_id,
                node_id=number,
                node_config={
                    "partition-id": number - 1,
                    "num-partitions": len(node_configs),
                    **config,
                },
                run_config=run_config,
            )
            for number, config in enumerate(node_configs, start=1)
        }
        self._replies: dict[str, Message] = {}  # finished and not yet pulled, by the message's id
        set_task_identity(run_id, SERVER_NODE_ID)

    @abstractmethod
    def _accept(self, message: Message, node: Node) -> None:
        """Queue a message that has its id; must return at once."""

    @abstractmethod
    def _advance(self, message_ids: set[str], wait_seconds: float) -> None:
        """Do some work, or wait for some, towards the replies to `message_ids`.

        Finished replies go to `_finish`. Must return after `wait_seconds`, or one message.
        """

    @abstractmethod
    def _drop(self, message_ids: set[str]) -> None:
        """Stop working on these messages."""

    def _finish(self, message_id: str, reply: Message) -> None:
        self._replies[message_id] = with_message_id(reply, str(uuid.uuid4()))

    def set_run(self, run: Any) -> None:
        """Take Flower's description of the run; the messages keep the run id of the start."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Flower's older way to build a message; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes, 1 to N."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids, in the same order; nothing runs yet.

        A message to a node that does not exist is answered with an error.
        """
        message_ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message_ids.append(message_id)
            stamped = with_message_id(message, message_id)
            node = self._nodes.get(message.metadata.dst_node_id)
            if node is None:
                text = f"there is no node {message.metadata.dst_node_id}"
                self._finish(message_id, error_reply(stamped, text, code=NODE_UNAVAILABLE))
            else:
                self._accept(stamped, node)
        return message_ids

    def pull_messages(
        self, message_ids: Iterable[str], *, wait_seconds: float = PULL_SECONDS
    ) -> list[Message]:
        """The replies to these messages that are ready, each once.

        This call is what moves the work on: call it again until all replies are there. It waits
        if none is: for so long a caller that pauses between pulls leaves no worker idle.
        """
        wanted = set(message_ids)
        self._advance(wanted, wait_seconds)
        return [self._replies.pop(name) for name in list(self._replies) if name in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and pull their replies, in the order in which they finish.

        After `timeout` seconds what has not been answered is dropped: nobody else has the ids.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        try:
            while waiting and (deadline is None or time.monotonic() < deadline):
                left = PULL_SECONDS if deadline is None else deadline - time.monotonic()
                pulled = self.pull_messages(waiting, wait_seconds=min(left, PULL_SECONDS))
                waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
                replies += pulled
        finally:
            self.forget(waiting)
        return replies

    def forget(self, message_ids: Iterable[str]) -> None:
        """Give up on messages, as a round does with those that missed its deadline.

        Not part of Flower's Grid. Without it, they would hold up the messages after them.
        """
        forgotten = set(message_ids)
        for message_id in forgotten:
            self._replies.pop(message_id, None)
        self._drop(forgotten)
