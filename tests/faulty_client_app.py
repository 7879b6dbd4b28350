"""The real client app, in which a client has the fault that its node config names as `fault`."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from clients.app import app as honest_app
from fedcunet.records import update_content


def app(message: Message, context: Context) -> Message:
    """Answers as the real app does, but for this node's fault."""
    fault = str(context.node_config.get("fault", ""))
    if message.metadata.message_type != "train" or not fault:
        return honest_app(message, context)
    if fault == "raise":
        raise ValueError("this client's disk is broken")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(600)
    if fault == "memory":
        _fill_memory()
    if fault == "garbage":
        return Message(update_content(os.urandom(5000), {"num-examples": 1}), reply_to=message)
    if fault == "codec":
        message.content["config"]["update.codec"] = "min-max"
    if fault == "bits":
        message.content["config"]["update.bits"] = 4.0
    reply = honest_app(message, context)
    if fault == "examples":
        reply.content["metrics"]["num-examples"] = 10**6
    if fault == "infinite":
        reply.content["metrics"]["loss"] = float("inf")
    return reply


def _fill_memory() -> None:
    """Asks for more than the process may have, until there is no more."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, before[1]))
    try:
        held = []
        while True:
            held.append(np.ones(2**23))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
