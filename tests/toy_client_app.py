"""A client app without learning, for tests of the engines.

It does what the message's config says under `do`; the default is to answer with bytes that depend
on all that a client gets.
"""

import hashlib
import os
import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedcunet.records import read_model, update_content

app = ClientApp()


class Unreadable:
    """Can be pickled, and fails when it is read."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """What pickle is to call: int("no number")."""
        return int, ("no number",)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer, fail, die or dawdle."""
    model, config = read_model(message)
    do = config.get("do", "answer")
    if do == "raise":
        raise ValueError("first line\nsecond line")
    if do == "gorge":
        torch.empty(2**50)
    if do == "exit":
        raise SystemExit(3)
    if do == "die":
        os._exit(7)
    if do == "sleep":
        time.sleep(60)
    if do == "nap":
        time.sleep(0.3)
    if do == "spoil":
        message.content["config"]["do"] = "raise"
        del message.content["arrays"]
    if do == "nothing":
        return None  # type: ignore[return-value]
    where = sorted(context.node_config.items()), sorted(context.run_config.items())
    seen = hashlib.sha256(model + repr((where, sorted(config.items()))).encode()).digest()
    if do == "where":
        seen = f"{Path.cwd()}|{os.getpid()}|{torch.get_num_threads()}".encode()
    metrics = {"num-examples": context.node_id, "loss": 1.0 / context.node_id}
    if do == "large":
        seen = bytes(500_000)
    if do == "flood":
        seen = bytes(20 * 2**20)
    reply = Message(update_content(seen, metrics), reply_to=message)
    if do == "lambda":
        reply.extra = lambda: None
    if do == "unreadable":
        reply.extra = Unreadable()
    return reply
