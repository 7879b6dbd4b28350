"""The round loop over a Flower Grid: select, push, pull, admit, aggregate, commit.

Rounds are counted from 1. Clients are known by their stable ids, never by Flower's node ids;
they are sampled, and their updates summed, in the order of these ids, so that the result does not
depend on who answers first.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedcunet.aggregation import ServerOptimizer, statistics_at
from fedcunet.client_evaluation import ClientEvaluation, evaluation_of, held_back
from fedcunet.config import RunConfig
from fedcunet.downlink import Downlink
from fedcunet.errors import UserError
from fedcunet.exchange import collect
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.privacy import PrivacyAccountant
from fedcunet.records import (
    UNAVAILABLE,
    BadReply,
    ConfigScalar,
    Description,
    Reply,
    is_machine_fault,
    model_content,
    read_evaluation,
    read_update,
)
from fedcunet.replies import ClientLine, RoundLine, RoundReplies, without_excess
from fedcunet.robust import check_breakdown
from fedcunet.roster import describe_clients
from fedcunet.saved import Saved
from fedcunet.terms import (
    ACKNOWLEDGED,
    BYTES_DOWN,
    CLIENT,
    LEARNING_RATE,
    LOCAL_KEYS,
    PART,
    ROUND,
    TEST,
    TOKEN,
    VALIDATION,
    WANTED,
    client_setting,
    evaluation_due,
    is_available,
    num_wanted,
    own_values,
    rounded_up,
    select,
    update_payload,
)

logger = logging.getLogger(__name__)


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

    def save(self, parts: dict[str, Saved]) -> None:
        """Called at the start and after `round_done` with all that `Server.restore` needs."""

    def tested(self, evaluation: ClientEvaluation | None) -> None:
        """Called at the end with the clients' test of the final model, None where there is none."""


@dataclass(kw_only=True, slots=True)
class Exchange:
    """What went to the clients and came from them in one round, by client id."""

    replies: dict[int, Reply | BadReply] = field(default_factory=dict)
    bytes_down: Counter[int] = field(default_factory=Counter)
    reproducible: bool = True  # False: time or a machine decided something, not the setting


@dataclass(kw_only=True, slots=True)
class Server:
    """State of the federation between rounds."""

    grid: Grid
    config: RunConfig
    layout: Layout
    state_N: np.ndarray
    learning_rate: Callable[[int], float]  # of a round's clients
    token: str  # names this run where clients keep their state
    inference_model: Callable[[np.ndarray], bytes]  # the state as a packed file, to evaluate
    observer: RoundObserver
    optimizer: ServerOptimizer = field(init=False)
    downlink: Downlink = field(init=False)
    accountant: PrivacyAccountant | None = field(init=False)
    clients: dict[int, Description] = field(default_factory=dict)  # by client id
    acknowledged: dict[int, int] = field(default_factory=dict)  # client -> last accepted round
    admitted: Mapping[int, int] | None = None  # node -> client id, where keys were admitted
    left_out: list[str] = field(default_factory=list)  # why nodes do not take part
    round: int = 0  # the last one that has ended
    # By round: BatchNorm statistics, in the vector's order, of the models that clients began from.
    first_statistics: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        federation = self.config.federation
        self.accountant = PrivacyAccountant(self.config) if self.config.privacy.enabled else None
        self.optimizer = ServerOptimizer(
            self.layout,
            federation.server_optimizer,
            learning_rate=federation.server_learning_rate,
            momentum=federation.server_momentum,
            clamp_latent=self.config.quant.has_latent_weights,
        )
        self.downlink = Downlink(self.config, self.layout, self.state_N)

    def run(self) -> None:
        """The rounds that are left.

        Raises:
            RunFailure: no client can be reached.
            UserError: they are too few for the setting.
        """
        self.clients, self.left_out = describe_clients(
            self.grid,
            self.config.federation.timeout_seconds,
            self.admitted,
            num_rungs=len(self.config.rungs()),
        )
        self._check_clients()
        num_rounds = self.config.federation.rounds
        self.observer.save(self.saved())  # the clients' state has its name from the start
        for round_number in range(self.round + 1, num_rounds + 1):
            self.run_round(round_number)
            self.round = round_number
            self.observer.save(self.saved())
        self.observer.tested(self._evaluate(num_rounds, TEST))

    def _check_clients(self) -> None:
        """Raises UserError if the clients that are there are too few."""
        check_breakdown(self.config, len(self.clients))

    def saved(self) -> dict[str, Saved]:
        """What `restore` needs, after a round."""
        acknowledged = sorted(self.acknowledged.items())
        facts = {"round": self.round, "token": self.token, "acknowledged": acknowledged}
        parts = {
            # "state" until variances were logarithms: such a run is not resumed.
            "server": Saved({"vector": self.state_N}, facts),
            "optimizer": self.optimizer.saved(),
            "downlink": self.downlink.saved(),
        }
        return parts if self.accountant is None else parts | {"privacy": self.accountant.saved()}

    def restore(self, parts: Mapping[str, Saved]) -> None:
        """Goes on after the round that was saved, with the clients' state under its token."""
        server = parts["server"]
        self.state_N = server.tensors["vector"]
        self.round, self.token = server.facts["round"], server.facts["token"]
        self.acknowledged = dict(server.facts["acknowledged"])
        self.optimizer.restore(parts["optimizer"])
        self.downlink.restore(parts["downlink"])
        if self.accountant is not None:
            self.accountant.restore(parts["privacy"])

    def run_round(self, round_number: int) -> None:
        """One round; the observer gets its outcome."""
        begin = time.perf_counter()
        config = self.config
        selected, wanted = select(sorted(self.clients), config, round_number)
        rate = self.learning_rate(round_number)
        self._begin_round(round_number)
        exchange = self._train(round_number, selected, rate)
        judged = RoundReplies(
            config=config,
            layout=self.layout,
            clients=self.clients,
            number=round_number,
            bytes_down=exchange.bytes_down,
            reference=self.downlink.reference,
            first_statistics=self.first_statistics,
        )
        for client in selected:
            reply = exchange.replies.get(client)
            if isinstance(reply, Reply):
                self.downlink.delivered(client)
            judged.judge(client, reply)
        self._end_round(
            judged, rate, wanted=wanted, begin=begin, reproducible=exchange.reproducible
        )

    def _begin_round(self, round_number: int, busy: Collection[int] = ()) -> None:
        """The round's model for the clients; its statistics, and those of rounds still at work."""
        self.downlink.begin_round(round_number, self.state_N)
        self.first_statistics = {number: self.first_statistics[number] for number in busy}
        visible_N = self.downlink.visible_N
        self.first_statistics[round_number] = visible_N[statistics_at(self.layout)]

    def _end_round(
        self,
        judged: RoundReplies,
        rate: float,
        *,
        wanted: int,
        begin: float,
        reproducible: bool,
        device_seconds: float | None = None,
    ) -> None:
        """Commits what was judged, evaluates, and tells the observer.

        Args:
            judged: the replies of the round.
            rate: the clients' learning rate.
            wanted: number of updates, of which the quorum is a share.
            begin: when the round began, by `time.perf_counter`.
            reproducible: whether only the setting decided what was judged.
            device_seconds: on the virtual clock; None: until the slowest of the clients was there.
        """
        round_number = judged.number
        needed = max(1, rounded_up(self.config.federation.quorum, wanted))
        answered = time.perf_counter()
        reason = self._commit(round_number, judged, needed)
        done = time.perf_counter()
        line = judged.line(
            reason,
            rate,
            seconds=done - begin,
            aggregate_seconds=done - answered,
            reproducible=reproducible,
        )
        if device_seconds is not None:
            line = dataclasses.replace(line, device_seconds=device_seconds)
        if self.accountant is not None:
            asked = [one.client for one in judged.lines if one.outcome != UNAVAILABLE]
            self.accountant.count(asked, [] if reason else list(judged.admitted), wanted)
            line = dataclasses.replace(line, privacy=self.accountant.figures())
        due = evaluation_due(self.config, round_number)
        evaluation = self._evaluate(round_number, VALIDATION) if due else None
        self.observer.round_done(line, judged.lines, self.state_N, evaluation)

    def _train(self, round_number: int, selected: list[int], rate: float) -> Exchange:
        """Has the clients train; one that lost what it had of the model gets a snapshot at once.

        A virtual client whose device does not answer gets nothing, and does not train.
        """
        exchange = Exchange()
        parcels = {}
        for client in selected:
            device = self.clients[client].device
            if is_available(self.config, round_number, client, device):
                parcels[client] = self.downlink.parcel(client)
            else:
                detail = "its device did not answer (federation.availability)"
                exchange.replies[client] = BadReply(reason=UNAVAILABLE, detail=detail)
        self._exchange(exchange, parcels, round_number, rate)
        lost = [
            client
            for client, reply in exchange.replies.items()
            if isinstance(reply, BadReply)
            and reply.reason == "needs-snapshot"
            # Who says so of a whole model says so of the next one too.
            and not self.downlink.got_snapshot(client)
        ]
        if lost:
            parcels = {client: self.downlink.snapshot(client) for client in sorted(lost)}
            self._exchange(exchange, parcels, round_number, rate)
        return exchange

    def _exchange(
        self, exchange: Exchange, parcels: Mapping[int, bytes], round_number: int, rate: float
    ) -> None:
        """Sends each client its parcel and reads the replies."""
        timeout = self.config.federation.timeout_seconds
        exchange.bytes_down.update({client: len(parcel) for client, parcel in parcels.items()})
        messages = self._messages(parcels, exchange.bytes_down, round_number, rate)
        client_of = {self.clients[client].node_id: client for client in parcels}
        collected = collect(
            self.grid,
            messages,
            timeout=timeout,
            read=lambda node, reply: without_excess(
                read_update(reply), self._payload(client_of[node], round_number)
            ),
            on_reply=lambda done: self.observer.client_done(round_number, done, len(messages)),
        )
        exchange.reproducible &= not collected.guard_fired
        for client, parcel in parcels.items():
            node = self.clients[client].node_id
            if node in collected.not_sent:
                exchange.bytes_down[client] -= len(parcel)
            exchange.replies.pop(client, None)
            if node in collected.replies:
                reply = exchange.replies[client] = collected.replies[node]
                exchange.reproducible &= not is_machine_fault(reply)

    def _payload(self, client: int, round_number: int) -> Expected:
        """What a client's payload must be."""
        known = self.clients[client]
        setting = client_setting(self.config, known.device, known.rung)
        return update_payload(self.layout, setting, round_number, client)

    def _commit(self, round_number: int, judged: RoundReplies, needed: int) -> str:
        """Takes the mean of the admitted updates; returns why it did not, or nothing."""
        base_N = self.downlink.base(self.state_N)
        mean_N = judged.mean(base_N, needed)
        if isinstance(mean_N, str):
            return mean_N
        new_N = self.optimizer.step(base_N, mean_N)
        if not np.isfinite(new_N).all():
            return "the next model would not be finite"
        self.state_N = new_N
        for client in judged.admitted:
            self.acknowledged[client] = judged.started.get(client, round_number)
        return ""

    def _evaluate(self, round_number: int, part: str) -> ClientEvaluation | None:
        """Has every client that keeps such images evaluate the model after a round on them."""
        held = held_back(self.clients, self.config, part)
        if not held:
            return None
        try:
            model_blob = self.inference_model(self.state_N)
        except UserError as error:  # training has driven its values beyond what the file can hold
            logger.warning("the clients cannot evaluate round %d: %s", round_number, error)
            return None
        shared = self._shared(round_number) | {PART: part}
        timeout = self.config.federation.timeout_seconds
        messages = []
        for client, (node, _) in held.items():
            content = model_content(model_blob, shared | {CLIENT: client})
            message = Message(content, node, "evaluate", ttl=timeout, group_id=str(round_number))
            messages.append(message)
        collected = collect(
            self.grid,
            messages,
            timeout=timeout,
            read=lambda _, reply: read_evaluation(reply),
            on_reply=lambda done: self.observer.client_done(round_number, done, len(messages)),
        )
        return evaluation_of(
            collected.replies,
            held,
            collected.not_sent,
            part=part,
            round=round_number,
            model_bytes=len(model_blob),
        )

    def _shared(self, round_number: int) -> dict[str, ConfigScalar]:
        """What every message of a round carries beside the model."""
        values: dict[str, ConfigScalar] = {
            key: value for key, value in self.config.flat().items() if key not in LOCAL_KEYS
        }
        return values | {ROUND: round_number, TOKEN: self.token}

    def _messages(
        self,
        parcels: Mapping[int, bytes],
        bytes_down: Mapping[int, int],
        round_number: int,
        rate: float,
    ) -> list[Message]:
        wanted = num_wanted(self.config, len(self.clients))
        shared = self._shared(round_number) | {LEARNING_RATE: rate, WANTED: wanted}
        messages = []
        # The largest first: with few workers nobody waits long for the last one.
        for client in sorted(parcels, key=lambda one: -self.clients[one].num_examples):
            known = self.clients[client]
            own = own_values(self.config, known.device, known.rung) | {
                CLIENT: client,
                ACKNOWLEDGED: self.acknowledged.get(client, 0),
                BYTES_DOWN: bytes_down[client],
            }
            content = model_content(parcels[client], shared | own)
            node = known.node_id
            # Nobody waits longer: a node that comes back later must not train for nothing.
            ttl = self.config.federation.timeout_seconds
            messages.append(Message(content, node, "train", ttl=ttl, group_id=str(round_number)))
        return messages
