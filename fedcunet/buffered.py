"""Buffered asynchronous aggregation on the devices' virtual clock: nobody waits for stragglers.

After Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), AISTATS
2022: a fixed number of clients is at work all the time; the server takes a step as soon as it has
admitted answers of `buffer-size` of them, and weights each by how many steps it is old. What
differs: free places are filled when the server steps, not at each answer, so that who is at work
follows from the setting's seed and the virtual clock alone; and no client answers twice in a step.

A round here is a step of the server. A client starts from the model of one round and its answer
may count in a later one; its payload says the round in which it started.
"""

import heapq
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.records import Reply
from fedcunet.replies import RoundReplies
from fedcunet.rounds import Exchange, Server
from fedcunet.saved import Saved
from fedcunet.terms import num_wanted


@dataclass(order=True, frozen=True, slots=True)
class _Answer:
    """A client's answer on its way: when it arrives on the virtual clock, and what it is."""

    seconds: float
    client: int
    started: int = field(compare=False)  # the round
    reply: Reply = field(compare=False)
    bytes_down: int = field(compare=False)


@dataclass(kw_only=True, slots=True)
class BufferedServer(Server):
    """A server that steps when its buffer is full."""

    clock: float = 0.0  # seconds
    at_work: list[_Answer] = field(default_factory=list)  # a heap by arrival

    def _check_clients(self) -> None:
        """As of `Server`; of a run that goes on, answers of clients that are gone are dropped."""
        check_buffer(self.config, len(self.clients))
        self.at_work = [answer for answer in self.at_work if answer.client in self.clients]
        heapq.heapify(self.at_work)

    def run_round(self, round_number: int) -> None:
        """Fills the free places, waits until `buffer-size` answers are admitted, steps.

        What fails or is refused fills no place of the buffer: it costs no other client's update.
        """
        begin, began = time.perf_counter(), self.clock
        rate = self.learning_rate(round_number)
        self._begin_round(round_number, {answer.started for answer in self.at_work})
        chosen, exchange = self._fill(round_number, rate)
        wanted = self.config.federation.buffer_size
        sent = {answer.client: answer.bytes_down for answer in self.at_work}
        judged = RoundReplies(
            config=self.config,
            layout=self.layout,
            clients=self.clients,
            number=round_number,
            bytes_down=exchange.bytes_down | Counter(sent),
            started={answer.client: answer.started for answer in self.at_work},
            first_statistics=self.first_statistics,
        )
        for client in chosen:
            reply = exchange.replies.get(client)
            if not isinstance(reply, Reply):
                judged.judge(client, reply)
        # Where many do not answer, fewer may be at work: the server steps with these.
        while self.at_work and len(judged.admitted) < wanted:
            answer = heapq.heappop(self.at_work)
            self.clock = max(self.clock, answer.seconds)
            judged.judge(answer.client, answer.reply)
        judged.lines.sort(key=lambda line: line.client)
        # Who answers when is computed from what clients report; measured compute varies.
        known = self.config.federation.seconds_per_example > 0
        self._end_round(
            judged,
            rate,
            wanted=wanted,
            begin=begin,
            reproducible=known and exchange.reproducible,
            device_seconds=self.clock - began,
        )

    def _fill(self, round_number: int, rate: float) -> tuple[list[int], Exchange]:
        """Asks clients to work until as many are as the setting's fraction says.

        The place of one that does not answer, or fails, stays free until the server steps.

        Returns:
            Who was asked, and what came: the answers among it are at work.
        """
        busy = {answer.client for answer in self.at_work}
        free = [client for client in sorted(self.clients) if client not in busy]
        count = num_wanted(self.config, len(self.clients)) - len(busy)
        generator = np.random.default_rng([self.config.seed, round_number, 0])
        chosen = sorted(generator.permutation(free)[: max(count, 0)].tolist())
        exchange = self._train(round_number, chosen, rate)
        for client in chosen:
            reply = exchange.replies.get(client)
            if isinstance(reply, Reply):
                self.downlink.delivered(client)
                arrival = self.clock + float(reply.metrics.get("device-seconds", 0.0))
                down = exchange.bytes_down[client]
                heapq.heappush(self.at_work, _Answer(arrival, client, round_number, reply, down))
        return chosen, exchange

    def saved(self) -> dict[str, Saved]:
        """As of `Server`, with the answers that are on their way."""
        tensors: dict[str, np.ndarray] = {}
        answers: list[dict[str, Any]] = []
        for answer in sorted(self.at_work):
            values = {name: getattr(answer, name) for name in ("seconds", "client", "started")}
            values["bytes_down"] = answer.bytes_down
            reply = answer.reply
            tensors[f"blob-{answer.client}"] = np.frombuffer(reply.blob, dtype=np.uint8)
            values["reply"] = [reply.node_id, reply.num_examples, reply.metrics]
            answers.append(values)
            tensors[f"statistics-{answer.started}"] = self.first_statistics[answer.started]
        facts = {"clock": self.clock, "answers": answers}
        # The zero-argument form does not work in a class with slots that dataclass makes anew.
        return Server.saved(self) | {"at-work": Saved(tensors, facts)}

    def restore(self, parts: Mapping[str, Saved]) -> None:
        """As of `Server`."""
        Server.restore(self, parts)
        saved = parts["at-work"]
        self.clock = saved.facts["clock"]
        self.at_work = []
        self.first_statistics = {
            values["started"]: saved.tensors[f"statistics-{values['started']}"]
            for values in saved.facts["answers"]
        }
        for values in saved.facts["answers"]:
            node_id, num_examples, metrics = values["reply"]
            blob = saved.tensors[f"blob-{values['client']}"].tobytes()
            reply = Reply(node_id=node_id, blob=blob, num_examples=num_examples, metrics=metrics)
            place = (values["seconds"], values["client"], values["started"])
            heapq.heappush(self.at_work, _Answer(*place, reply, values["bytes_down"]))


def check_buffer(config: RunConfig, num_clients: int) -> None:
    """Raises UserError if the buffer would never fill: fewer clients are at work."""
    count, federation = num_wanted(config, num_clients), config.federation
    if federation.mode == "buffered" and count < federation.buffer_size:
        raise UserError(
            f"federation.buffer-size: expected at most {count}, the clients that are at work "
            f"({federation.fraction:g} of {num_clients}, federation.fraction), found "
            f"{federation.buffer_size}"
        )
