"""A small layout, clients that answer for it, a server over them, and who watches it."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedcunet import terms
from fedcunet.client_evaluation import ClientEvaluation
from fedcunet.config import RunConfig
from fedcunet.downlink import Visible, receive
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import description_content, read_model, update_content
from fedcunet.replies import ClientLine, RoundLine
from fedcunet.rounds import Server
from fedcunet.saved import Saved
from simulations.loopback import LoopbackGrid
from simulations.tasks import ClientCall

LAYOUT = Layout.from_tensors({"a.weight": (40,), "b.bias": (3,)}, fine={"b.bias"})
CONFIG = RunConfig().replace(
    update__codec="float32", update__bits=32, federation__rounds=2, federation__clients=4
)
EXAMPLES = (10, 20, 30, 40)
# Of a parcel with one payload: 4 + 1 + 1 + 2 + 16, and the payload's length.
HEAD_BYTES = 24 + 4

Reply = Callable[[int, int, np.ndarray, Message], RecordDict | None]


def no_model() -> Visible:
    raise AssertionError("a whole model needs no other")


class Watcher:
    """Keeps what the round loop tells."""

    def __init__(self) -> None:
        self.lines: list[RoundLine] = []
        self.clients: list[ClientLine] = []
        self.states: list[np.ndarray] = []
        self.evaluations: list[ClientEvaluation | None] = []
        self.tests: list[ClientEvaluation | None] = []

    def client_done(self, round_number: int, done: int, total: int) -> None:
        assert 1 <= done <= total

    def round_done(
        self,
        line: RoundLine,
        clients: list[ClientLine],
        state_N: np.ndarray,
        evaluation: ClientEvaluation | None,
    ) -> None:
        self.evaluations.append(evaluation)
        self.lines.append(line)
        self.clients += clients
        self.states.append(state_N.copy())

    def save(self, parts: dict[str, Saved]) -> None:
        self.saved = parts

    def tested(self, evaluation: ClientEvaluation | None) -> None:
        self.tests.append(evaluation)


def honest(client: int, round_number: int, model: np.ndarray, message: Message) -> RecordDict:
    """The update `client + 1` everywhere."""
    return reply(client, round_number, np.full(43, client + 1.0, dtype=np.float32))


def reply(client: int, round_number: int, update: np.ndarray, **metrics: Any) -> RecordDict:
    expected = terms.update_payload(LAYOUT, CONFIG, round_number, client)
    values = {"num-examples": EXAMPLES[client], "loss": 1.0, "device-seconds": 1.0} | metrics
    return update_content(pack(update, expected), values)


def error(*_: Any) -> RecordDict:
    raise ValueError("the disk is full")


class Leaving(LoopbackGrid):
    """Node 3 has left when messages of one kind are sent: they are not taken, and have no id."""

    kind = "train"

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [
            "" if self.is_left(message) else super(Leaving, self).push_messages([message])[0]
            for message in messages
        ]

    def is_left(self, message: Message) -> bool:
        return message.metadata.message_type == self.kind and message.metadata.dst_node_id == 3


def made_server(
    client_app: ClientCall,
    config: RunConfig,
    watcher: Watcher,
    *,
    kind: type[Server] = Server,
    layout: Layout = LAYOUT,
    clients: int = 4,
    grid: type[LoopbackGrid] = LoopbackGrid,
) -> Server:
    """A server over virtual clients that answer as `client_app`; the model starts from zeros."""
    return kind(
        grid=grid(client_app, [{}] * clients, {}),
        config=config,
        layout=layout,
        state_N=np.zeros(layout.num_parameters, dtype=np.float32),
        learning_rate=lambda number: 0.1,
        token="t",
        inference_model=np.ndarray.tobytes,
        observer=watcher,
    )


def run(
    odd: Reply | None = None,
    config: RunConfig = CONFIG,
    grid: type[LoopbackGrid] = LoopbackGrid,
    **changes: Any,
) -> tuple[Watcher, Server]:
    """Two rounds of four clients, of which client 2 answers as `odd` says."""

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            content = description_content(client, EXAMPLES[client], "laptop")
            return Message(content, reply_to=message)
        blob, values = read_model(message)
        number = int(values["round"])
        received = receive(blob, CONFIG, LAYOUT, number, held=None, first=no_model)
        answer = odd if odd is not None and client == 2 else honest
        content = answer(client, number, received.visible.state_N, message)
        return Message(content, reply_to=message)

    config = config.replace(**changes)
    watcher = Watcher()
    server = made_server(client_app, config, watcher, grid=grid)
    server.run()
    return watcher, server
