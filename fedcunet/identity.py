"""Who a process is to Flower, and ids of messages and runs, for engines of our own.

The only file that touches `flwr.supercore`, which Flower does not promise to keep.
"""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message, Metadata
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def with_message_id(message: Message, message_id: str) -> Message:
    """`message` under another id, its content shared.

    Flower leaves the id to whatever carries the message, and gives it no setter.
    """
    old = message.metadata
    metadata = Metadata(
        run_id=old.run_id,
        message_id=message_id,
        src_node_id=old.src_node_id,
        dst_node_id=old.dst_node_id,
        reply_to_message_id=old.reply_to_message_id,
        group_id=old.group_id,
        created_at=old.created_at,
        ttl=old.ttl,
        message_type=old.message_type,
        src_task_id=old.src_task_id,
        dst_task_id=old.dst_task_id,
    )
    if message.has_error():
        return Message(metadata=metadata, error=message.error)  # type: ignore[call-overload,no-any-return]
    return Message(metadata=metadata, content=message.content)  # type: ignore[call-overload,no-any-return]


def set_task_identity(run_id: int, node_id: int, task_id: int = 1) -> None:
    """Say who this process is: building a Flower message needs it. One per process, not thread."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id


@contextmanager
def task_identity(run_id: int, node_id: int, task_id: int = 1) -> Iterator[None]:
    """Be another node for the duration of a `with` block, and then again who we were."""
    try:
        before = (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id)
    except RuntimeError:  # nobody yet
        before = None
    set_task_identity(run_id, node_id, task_id)
    try:
        yield
    finally:
        if before is not None:
            set_task_identity(*before)


def make_run(run_id: int) -> Run:
    """Flower's description of a run that has nothing but its id."""
    return Run.create_empty(run_id)
