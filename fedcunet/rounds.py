"""The round loop over a Flower Grid: select, push, pull, admit, aggregate, commit.

Rounds are counted from 1. Clients are known by their stable ids, never by Flower's node ids;
they are sampled, and their updates summed, in the order of these ids, so that the result does not
depend on who answers first.
"""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedcunet.aggregation import MeanAccumulator, ServerOptimizer, statistics_mask
from fedcunet.client_evaluation import ClientEvaluation, ClientScore, judge
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure
from fedcunet.payload import (
    Admitted,
    Expected,
    Layout,
    Refused,
    Rejection,
    admit,
    bits_per_parameter,
    check_values,
    pack,
)
from fedcunet.records import (
    UNKNOWN_CLIENT,
    BadReply,
    ConfigScalar,
    Description,
    Reply,
    describe_content,
    model_content,
    read_description,
    read_evaluation,
    read_update,
)

logger = logging.getLogger(__name__)

SERVER = 0  # sender of the model's payload; clients send as their id + 1
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5
MAX_STATISTIC = 1e9  # a BatchNorm statistic moves less in a round

# Config keys of train and evaluate messages beside those of the setting.
ROUND, LEARNING_RATE, CLIENT, ACKNOWLEDGED, TOKEN = (
    "round",
    "learning-rate",
    "client",
    "acknowledged-round",
    "run-token",
)
# What a client's own machine decides, and no server: these keys are never sent.
LOCAL_KEYS = (
    "data.root",
    "data.cache-bytes",
    "data.cache-dir",
    "data.disk-cache-bytes",
    "federation.state-dir",
    "federation.measured-dir",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientLine:
    """What became of one client in one round: a line of `clients.jsonl`."""

    round: int
    client: int
    outcome: str  # accepted, or the reason why not
    detail: str
    num_examples: int
    bytes_up: int
    bytes_down: int
    bits_per_parameter: float
    device: str  # name of its device profile
    metrics: dict[str, int | float]  # as the client reported them


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLine:
    """What became of one round: a line of `metrics.jsonl`."""

    round: int
    outcome: Literal["committed", "abandoned"]
    reason: str
    replies: dict[str, int]  # accepted, and a count of each reason
    train_loss: float | None  # mean of the accepted clients', weighted by examples
    bytes_up: int
    bytes_down: int
    device_seconds: float  # of the slowest client that was waited for
    seconds: float  # wall time without evaluation
    learning_rate: float
    reproducible: bool  # False if the wall-clock guard decided who was late


class RoundObserver(Protocol):
    """Who watches a run: the display, the run folder."""

    def client_done(self, round_number: int, done: int, total: int) -> None:
        """Called at each reply of a round."""

    def round_done(
        self,
        line: RoundLine,
        clients: list[ClientLine],
        state_N: np.ndarray,
        evaluation: ClientEvaluation | None,
    ) -> None:
        """Called after a round with the global state, which a committed round has changed.

        `evaluation` is the clients' own, None where none was due or none keeps images for it.
        """


@dataclass(kw_only=True, slots=True)
class Server:
    """State of the federation between rounds."""

    grid: Grid
    config: RunConfig
    layout: Layout
    state_N: np.ndarray
    learning_rate: Callable[[int], float]  # of a round's clients
    token: str  # names this run where clients keep their state
    observer: RoundObserver
    optimizer: ServerOptimizer = field(init=False)
    clients: dict[int, Description] = field(default_factory=dict)  # by client id
    acknowledged: dict[int, int] = field(default_factory=dict)  # client -> last accepted round
    admitted: Mapping[int, int] | None = None  # node -> client id, where keys were admitted
    left_out: list[str] = field(default_factory=list)  # why nodes do not take part
    is_statistic_N: np.ndarray = field(init=False)  # BatchNorm's running means and variances

    def __post_init__(self) -> None:
        federation = self.config.federation
        self.is_statistic_N = statistics_mask(self.layout)
        self.optimizer = ServerOptimizer(
            self.layout,
            federation.server_optimizer,
            learning_rate=federation.server_learning_rate,
            momentum=federation.server_momentum,
            clamp_latent=self.config.quant.spec().weight_bits != 32,
        )

    def run(self) -> None:
        """All rounds of the setting. Raises RunFailure if no client can be reached."""
        self.clients, self.left_out = describe_clients(
            self.grid, self.config.federation.timeout_seconds, self.admitted
        )
        for round_number in range(1, self.config.federation.rounds + 1):
            self.run_round(round_number)

    def run_round(self, round_number: int) -> None:
        """One round; the observer gets its outcome."""
        begin = time.perf_counter()
        config = self.config
        selected, wanted = select(sorted(self.clients), config, round_number)
        rate = self.learning_rate(round_number)
        model_blob = pack(self.state_N, model_payload(self.layout, config.seed, round_number))
        messages = self._messages(model_blob, selected, round_number, rate)
        replies, guard_fired = collect(
            self.grid,
            messages,
            timeout=config.federation.timeout_seconds,
            on_reply=lambda done: self.observer.client_done(round_number, done, len(messages)),
        )
        round_ = _Round(server=self, number=round_number, bytes_down=len(model_blob))
        for client in selected:
            round_.judge(client, replies.get(self.clients[client].node_id))
        needed = max(1, math.ceil(config.federation.quorum * wanted))
        reason = round_.aggregate(needed)
        line = round_.line(reason, rate, time.perf_counter() - begin, not guard_fired)
        evaluation = self._evaluate(round_number) if evaluation_due(config, round_number) else None
        self.observer.round_done(line, round_.lines, self.state_N, evaluation)

    def _evaluate(self, round_number: int) -> ClientEvaluation | None:
        """Has every client that keeps images for it evaluate the model after a round on them."""
        asked = [client for client in sorted(self.clients) if self.clients[client].num_validation]
        if not asked:
            return None
        model_blob = pack(self.state_N, model_payload(self.layout, self.config.seed, round_number))
        messages = []
        for client in asked:
            content = model_content(model_blob, self._shared(round_number) | {CLIENT: client})
            node = self.clients[client].node_id
            messages.append(Message(content, node, "evaluate", group_id=str(round_number)))
        replies, _ = collect(
            self.grid,
            messages,
            timeout=self.config.federation.timeout_seconds,
            on_reply=lambda done: self.observer.client_done(round_number, done, len(messages)),
        )
        return ClientEvaluation(
            scores=tuple(
                self._score(
                    client,
                    replies.get(self.clients[client].node_id),
                    round_number,
                    bytes_down=len(model_blob),
                )
                for client in asked
            )
        )

    def _score(
        self, client: int, message: Message | None, round_number: int, *, bytes_down: int
    ) -> ClientScore:
        """What became of one client's evaluation."""
        num_examples, num_bytes, percent = 0, 0, None
        if message is None:
            outcome, detail = "no-reply", "nothing came before the wall-clock guard"
        elif isinstance(reply := read_evaluation(message), BadReply):
            outcome, detail = reply.reason, reply.detail
        else:
            num_examples, num_bytes = reply.num_examples, reply.num_bytes
            outcome, detail = judge(
                reply.metrics, num_examples, self.clients[client].num_validation
            )
            percent = float(reply.metrics["percent"]) if outcome == "accepted" else None
        return ClientScore(
            round=round_number,
            client=client,
            outcome=outcome,
            detail=detail,
            num_examples=num_examples,
            percent=percent,
            bytes_up=num_bytes,
            bytes_down=bytes_down,
        )

    def _shared(self, round_number: int) -> dict[str, ConfigScalar]:
        """What every message of a round carries beside the model."""
        values: dict[str, ConfigScalar] = {
            key: value for key, value in self.config.flat().items() if key not in LOCAL_KEYS
        }
        return values | {ROUND: round_number, TOKEN: self.token}

    def _messages(
        self, model_blob: bytes, selected: list[int], round_number: int, rate: float
    ) -> list[Message]:
        shared = self._shared(round_number) | {LEARNING_RATE: rate}
        messages = []
        # The largest first: with few workers nobody waits long for the last one.
        for client in sorted(selected, key=lambda one: -self.clients[one].num_examples):
            own = {CLIENT: client, ACKNOWLEDGED: self.acknowledged.get(client, 0)}
            content = model_content(model_blob, shared | own)
            node = self.clients[client].node_id
            # Nobody waits longer: a node that comes back later must not train for nothing.
            ttl = self.config.federation.timeout_seconds
            messages.append(Message(content, node, "train", ttl=ttl, group_id=str(round_number)))
        return messages


@dataclass(kw_only=True, slots=True)
class _Round:
    """The replies of one round while they are judged and added up."""

    server: Server
    number: int
    bytes_down: int
    lines: list[ClientLine] = field(default_factory=list)
    admitted: dict[int, tuple[Admitted, int]] = field(default_factory=dict)  # client -> examples

    def judge(self, client: int, message: Message | None) -> None:
        """Admits the client's reply, or notes why not. Called in the order of the client ids."""
        if message is None:
            self._note(client, "no-reply", "nothing came before the wall-clock guard")
            return
        reply = read_update(message)
        if isinstance(reply, BadReply):
            self._note(client, reply.reason, reply.detail)
            return
        config = self.server.config
        expected = update_payload(self.server.layout, config, self.number, client)
        result = admit(reply.blob, expected)
        known = self.server.clients[client].num_examples
        deadline = config.federation.deadline_seconds
        seconds = reply.metrics.get("device-seconds", 0.0)
        outcome, detail = "accepted", ""
        if isinstance(result, Rejection):
            outcome, detail = result.reason, result.detail
        elif reply.num_examples != known:
            outcome = "bad-num-examples"
            detail = f"said {reply.num_examples} examples, described itself with {known}"
        elif deadline and seconds > deadline:
            outcome = "late"
            detail = f"{seconds:.1f} s on its device, {deadline:g} s are given"
        else:
            self.admitted[client] = (result, reply.num_examples)
        self._note(client, outcome, detail, reply)

    def _note(self, client: int, outcome: str, detail: str, reply: Reply | None = None) -> None:
        blob = reply.blob if reply else b""
        self.lines.append(
            ClientLine(
                round=self.number,
                client=client,
                outcome=outcome,
                detail=detail,
                num_examples=reply.num_examples if reply else 0,
                bytes_up=len(blob),
                bytes_down=self.bytes_down,
                bits_per_parameter=bits_per_parameter(blob, self.server.layout),
                device=self.server.clients[client].device,
                metrics=reply.metrics if reply else {},
            )
        )

    def _reject(self, client: int, rejection: Rejection) -> None:
        for index, line in enumerate(self.lines):
            if line.client == client:
                self.lines[index] = dataclasses.replace(
                    line, outcome=rejection.reason, detail=rejection.detail
                )
        del self.admitted[client]

    def aggregate(self, needed: int) -> str:
        """Commits the mean of the admitted updates; returns why it did not, or nothing."""
        server = self.server
        if len(self.admitted) < needed:
            return f"{len(self.admitted)} updates accepted, the quorum is {needed}"
        total = MeanAccumulator(server.layout, server.state_N)
        for client, (update, num_examples) in list(self.admitted.items()):
            try:
                vector_N = update.decode()
                refused = self._refusal(vector_N)
            except Refused as error:
                refused = error.rejection
            if refused is not None:
                self._reject(client, refused)
            else:
                total.add(vector_N, num_examples)
        if len(self.admitted) < needed:
            return f"{len(self.admitted)} updates accepted, the quorum is {needed}"
        new_N = server.optimizer.step(server.state_N, total.mean())
        if not np.isfinite(new_N).all():
            return "the next model would not be finite"
        server.state_N = new_N
        for client in self.admitted:
            server.acknowledged[client] = self.number
        return ""

    def _refusal(self, vector_N: np.ndarray) -> Rejection | None:
        """Why the values of a decoded update cannot be taken, or None."""
        server = self.server
        limit = server.config.federation.max_update_norm or math.inf
        # Variances behind unscaled ternary weights run to thousands; they say nothing of a step.
        return check_values(vector_N, MAX_STATISTIC) or check_values(
            vector_N[~server.is_statistic_N], limit, norm_limit=limit
        )

    def line(self, reason: str, rate: float, seconds: float, reproducible: bool) -> RoundLine:
        """The round in figures."""
        accepted = [line for line in self.lines if line.outcome == "accepted"]
        weights = [line.num_examples for line in accepted]
        losses = [line.metrics.get("loss", math.nan) for line in accepted]
        waited = [line.metrics.get("device-seconds", 0.0) for line in accepted]
        deadline = self.server.config.federation.deadline_seconds
        if any(line.outcome == "late" for line in self.lines):
            waited.append(deadline)
        return RoundLine(
            round=self.number,
            outcome="abandoned" if reason else "committed",
            reason=reason,
            replies=dict(Counter(line.outcome for line in self.lines)),
            train_loss=float(np.average(losses, weights=weights)) if accepted else None,
            bytes_up=sum(line.bytes_up for line in self.lines),
            bytes_down=sum(line.bytes_down for line in self.lines),
            device_seconds=float(max(waited, default=0.0)),
            seconds=seconds,
            learning_rate=rate,
            reproducible=reproducible,
        )


def evaluation_due(config: RunConfig, round_number: int) -> bool:
    """Whether the model is evaluated after a round, by the server and by the clients."""
    federation = config.federation
    return round_number % federation.evaluate_every == 0 or round_number == federation.rounds


def model_payload(layout: Layout, run_seed: int, round_number: int) -> Expected:
    """What the model's payload of a round is: float32, the same bytes to all clients."""
    return Expected(
        layout=layout,
        run_seed=run_seed,
        round=round_number,
        sender=SERVER,
        codec="float32",
        bits=32,
        fine_bits=32,
    )


def update_payload(layout: Layout, config: RunConfig, round_number: int, client: int) -> Expected:
    """What the payload of a client's update in a round is."""
    return Expected(
        layout=layout,
        run_seed=config.seed,
        round=round_number,
        sender=client + 1,
        codec=config.update.payload_codec,
        bits=config.update.bits,
        fine_bits=config.update.fine_bits,
    )


def select(clients: list[int], config: RunConfig, round_number: int) -> tuple[list[int], int]:
    """The clients of a round in the order of their ids, and how many updates are wanted.

    Which ones follows from the seed, the round and the ids alone.
    """
    wanted = max(1, round(config.federation.fraction * len(clients)))
    count = min(len(clients), math.ceil(wanted * config.federation.over_selection))
    generator = np.random.default_rng([config.seed, round_number, 0])
    return sorted(generator.permutation(clients)[:count].tolist()), wanted


def describe_clients(
    grid: Grid, timeout: float, admitted: Mapping[int, int] | None = None
) -> tuple[dict[int, Description], list[str]]:
    """Asks every node who it is; nodes that do not answer properly are left out.

    Args:
        grid: where the nodes are.
        timeout: seconds after which nobody waits for an answer.
        admitted: node -> client id, where keys were admitted; otherwise a node's own word counts.

    Returns:
        The clients by their ids, and why nodes were left out.

    Raises:
        RunFailure: if no node is left, with the first node's words.
    """
    nodes = sorted(grid.get_node_ids())
    messages = [Message(describe_content(), node, "query", ttl=timeout) for node in nodes]
    replies, _ = collect(grid, messages, timeout=timeout, on_reply=lambda done: None)
    clients: dict[int, Description] = {}
    problems = []
    for node in nodes:
        found = read_description(replies[node]) if node in replies else None
        if isinstance(found, Description):
            found = _identified(found, admitted)
        if isinstance(found, Description) and found.client not in clients:
            clients[found.client] = found
        elif isinstance(found, Description):
            problems.append(f"client {found.client} answered twice")
        else:
            words = found.detail if found is not None else "did not answer"
            client = (admitted or {}).get(node)
            name = f"node {node}" if client is None else f"client {client}"
            problems.append(f"{name}: {words}")
    for problem in problems:
        logger.warning("left out of the run: %s", problem)
    if not clients:
        first = problems[0] if problems else "there are no nodes"
        raise RunFailure(f"no client can take part: {first}")
    return clients, problems


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
