"""One message through one client app: what every engine does at the client's end."""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict, UserConfig

from fedcunet.errors import RunFailure, is_out_of_memory
from fedcunet.identity import task_identity
from fedcunet.records import CLIENT_APP_RAISED, OUT_OF_MEMORY, error_reply, one_line

logger = logging.getLogger(__name__)

# A Flower ClientApp is called like this; any function with this signature will do.
ClientCall = Callable[[Message, Context], Message]

# The folder that holds `clients`, `server` and `simulations`: they are not installed.
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A virtual client as its app sees itself."""

    run_id: int
    node_id: int
    node_config: UserConfig
    run_config: UserConfig


def load_client_app(client_app: ClientCall | str) -> ClientCall:
    """The client app behind an import string such as "clients.app:app", or itself.

    Raises:
        RunFailure: it cannot be imported; one line that says why.
    """
    if not isinstance(client_app, str):
        return client_app
    module, _, attribute = client_app.partition(":")
    if not module or not attribute.isidentifier():
        raise RunFailure(f"client app '{client_app}': expected the form 'module:attribute'")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        loaded: ClientCall = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise RunFailure(
            f"client app '{client_app}' cannot be loaded: {describe(error)}"
        ) from error
    if not callable(loaded):
        raise RunFailure(f"client app '{client_app}' is a {type(loaded).__name__}, not a ClientApp")
    return loaded


def run_client_app(client_app: ClientCall, message: Message, node: Node) -> Message:
    """The app's reply to `message`; whatever goes wrong in it becomes an error reply.

    The app gets an empty state every time, on every engine: what a client keeps between rounds
    is in its own files, because a worker process that dies takes all else with it.
    """
    context = Context(
        run_id=node.run_id,
        node_id=node.node_id,
        node_config=dict(node.node_config),
        state=RecordDict(),
        run_config=dict(node.run_config),
    )
    try:
        with task_identity(node.run_id, node.node_id):
            reply = client_app(message, context)
    # An app that calls sys.exit() has failed; it does not decide when the run ends.
    except (Exception, SystemExit) as error:
        logger.debug("client %d failed", node.node_id, exc_info=True)
        code = OUT_OF_MEMORY if is_out_of_memory(error) else CLIENT_APP_RAISED
        return error_reply(message, describe(error), code=code)
    if not isinstance(reply, Message):
        return error_reply(message, f"the client app returned {type(reply).__name__}, no Message")
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        return error_reply(message, "the client app's message is no reply to the one it got")
    return reply


def describe(error: BaseException) -> str:
    """`error` on one line: its type, what it says and in which line of code it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return one_line(f"{type(error).__name__}: {error}"[: 250 - len(where)] + where)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch compute with `num_threads` threads in a `with` block.

    The number decides the order of some sums, and so the bytes of the result: every engine runs
    clients with the number that the config names, whatever the machine has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
