"""A Flower Grid in one process: no Ray, no ports, one client after the other.

It is there for tests, for small runs and for debugging: a breakpoint in the client app works,
and an interrupt arrives in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from flwr.app import ArrayRecord, Message, RecordDict, UserConfig

from simulations.local_grid import LocalGrid
from simulations.tasks import ClientCall, Node, load_client_app, run_client_app, torch_threads


class LoopbackGrid(LocalGrid):
    """Answers messages in the order in which they were pushed, one with every pull."""

    def __init__(
        self,
        client_app: ClientCall | str,
        node_configs: Sequence[UserConfig],
        run_config: UserConfig,
        run_id: int = 1,
        *,
        threads_per_client: int = 1,
    ) -> None:
        """Load the client app; see `LocalGrid` for nodes and configs.

        Args:
            client_app: a Flower ClientApp or an import string such as "clients.app:app".
            node_configs: one for each virtual client.
            run_config: what every app finds in its context.
            run_id: the run that all messages belong to.
            threads_per_client: torch's threads while a client runs.
        """
        super().__init__(node_configs, run_config, run_id)
        self._client_app = load_client_app(client_app)
        self._threads = threads_per_client
        self._queue: dict[str, tuple[Message, Node]] = {}  # by message id, in order of arrival

    def _accept(self, message: Message, node: Node) -> None:
        self._queue[message.metadata.message_id] = (_own_copy(message), node)

    def _advance(self, message_ids: set[str], wait_seconds: float) -> None:
        # Replies that are ready go out first; then one message a call, so that the caller can
        # show progress and keep its deadline in between.
        if not message_ids.isdisjoint(self._replies):
            return
        message_id = next((name for name in self._queue if name in message_ids), None)
        if message_id is None:
            return
        message, node = self._queue.pop(message_id)
        with torch_threads(self._threads):
            self._finish(message_id, run_client_app(self._client_app, message, node))

    def _drop(self, message_ids: set[str]) -> None:
        for message_id in message_ids:
            self._queue.pop(message_id, None)


def _own_copy(message: Message) -> Message:
    """`message` with records of its own, so that no client can change another's, or the server's.

    The bytes of arrays are shared: they cannot be changed.
    """
    content = RecordDict()
    for key, record in message.content.items():
        content[key] = (
            ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else deepcopy(record)
        )
    message.content = content
    return message
