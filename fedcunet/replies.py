"""The replies of one round: admitted or refused with a reason, summed, and told in lines."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fedcunet.aggregation import MeanAccumulator, statistics_at, statistics_mask
from fedcunet.config import RunConfig
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.payload import Admitted, Refused, admit, bits_per_parameter, check_values
from fedcunet.payload_header import Reason, Rejection
from fedcunet.records import SILENT, BadReply, Description, Reply
from fedcunet.robust import aggregate, breakdown
from fedcunet.shrinkage import Shrinkage
from fedcunet.terms import client_setting, rounded_up, staleness_factor, update_payload
from fedcunet.update_file import UpdateFile

MAX_STATISTIC = 1e9  # a BatchNorm mean moves less in a round, and a variance's logarithm too
# Outcomes that no honest client of this version has: it was an attacker's, and the updates that are
# left hold one attacker fewer.
NEVER_HONEST = {*get_args(Reason), "malformed-reply", "bad-metrics"} - {"too-large"}


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
    rung: int  # of the setting's ladder
    update_bits: float  # that it was told
    metrics: dict[str, int | float]  # as the client reported them


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLine:
    """What became of one round: a line of `metrics.jsonl`."""

    round: int
    outcome: Literal["committed", "abandoned"]
    reason: str
    replies: dict[str, int]  # accepted, and a count of each reason
    train_loss: float | None  # mean of the accepted that tell one, weighted by examples
    bytes_up: int
    bytes_down: int
    clients_up: int  # that sent bytes of an update
    clients_down: int  # to which bytes of the model went
    device_seconds: float  # of the slowest client that was waited for
    seconds: float  # wall time without evaluation
    aggregate_seconds: float  # of it, decoding the updates and adding them up
    learning_rate: float
    reproducible: bool  # False if the wall-clock guard or a machine's fault decided anything
    privacy: dict[str, float | None] = field(default_factory=dict)  # spent so far, where it is on


def without_excess(reply: Reply | BadReply, expected: Expected) -> Reply | BadReply:
    """The reply, as it arrives; a payload that is too long is not kept until it is its turn."""
    if isinstance(reply, Reply) and len(reply.blob) > expected.payload_limits[1]:
        result = admit(reply.blob, expected)
        if isinstance(result, Rejection):
            size = len(reply.blob)
            return BadReply(reason=result.reason, detail=result.detail, num_bytes=size)
    return reply


@dataclass(kw_only=True, slots=True)
class RoundReplies:
    """The replies of one round while they are judged and added up."""

    config: RunConfig
    layout: Layout
    clients: Mapping[int, Description]  # by client id
    number: int  # of the round
    bytes_down: Mapping[int, int]  # by client id
    # The prediction of a client's update that both sides know, (N,), or None.
    reference: Callable[[int], np.ndarray | None] = lambda client: None
    # In which round a client began, where that was not this one (buffered.py).
    started: Mapping[int, int] = field(default_factory=dict)
    # By round: BatchNorm statistics, in the vector's order, of the model that clients began from;
    # of a round that is left out, those of the model that the mean goes to.
    first_statistics: Mapping[int, np.ndarray] = field(default_factory=dict)
    lines: list[ClientLine] = field(default_factory=list)
    admitted: dict[int, tuple[Admitted, int]] = field(default_factory=dict)  # client -> examples
    shrinkage: Shrinkage | None = field(init=False)  # where the setting asks for it
    statistics_at: np.ndarray = field(init=False)  # their positions in the vector
    moves: dict[int, np.ndarray] = field(default_factory=dict)  # by round; of `mean`

    def __post_init__(self) -> None:
        self.shrinkage = Shrinkage(self.layout) if self.config.federation.shrinkage else None
        self.statistics_at = statistics_at(self.layout)

    def judge(self, client: int, reply: Reply | BadReply | None) -> None:
        """Admits the client's reply, or notes why not. Called in the order of the client ids."""
        if reply is None:
            self._note(client, "no-reply", "nothing came before the wall-clock guard")
            return
        if isinstance(reply, BadReply):
            self._note(client, reply.reason, reply.detail, num_bytes=reply.num_bytes)
            return
        number = self.started.get(client, self.number)
        expected = update_payload(self.layout, self._setting(client), number, client)
        result = admit(reply.blob, expected)
        known = self.clients[client].num_examples
        deadline = self.config.federation.deadline_seconds
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

    def _setting(self, client: int) -> RunConfig:
        """What the client was told."""
        known = self.clients[client]
        return client_setting(self.config, known.device, known.rung)

    def _note(
        self,
        client: int,
        outcome: str,
        detail: str,
        reply: Reply | None = None,
        *,
        num_bytes: int = 0,
    ) -> None:
        blob = reply.blob if reply else b""
        self.lines.append(
            ClientLine(
                round=self.number,
                client=client,
                outcome=outcome,
                detail=detail,
                num_examples=reply.num_examples if reply else 0,
                bytes_up=len(blob) or num_bytes,
                bytes_down=self.bytes_down[client],
                bits_per_parameter=bits_per_parameter(blob, self.layout),
                device=self.clients[client].device,
                rung=self.clients[client].rung,
                update_bits=self._setting(client).update.bits,
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

    def mean(self, state_N: np.ndarray, needed: int) -> np.ndarray | str:
        """The mean of the admitted updates to `state_N`, or what the setting's rule takes for it.

        Parameters take steps. BatchNorm statistics are measurements: they go to where the clients
        came, from whichever model these began (`first_statistics`).

        An update whose values cannot be taken is refused here; `needed` must remain, and as many
        as the rule needs. Otherwise the text says why there is none.
        """
        rule = self.config.federation.aggregation
        begin_S = state_N[self.statistics_at]
        self.moves = {number: found - begin_S for number, found in self.first_statistics.items()}
        if len(self.admitted) >= needed and rule == "mean":
            mixture = not self.config.privacy.enabled
            total = MeanAccumulator(self.layout, state_N, mixture=mixture)
            self._add_all(total)
            if len(self.admitted) >= needed:
                mean_N = total.mean()
                if self.shrinkage is not None:
                    self.shrinkage.shrink(mean_N, total.weight)
                return self._shortened(mean_N, total.weight)
        elif len(self.admitted) >= needed:
            folder = Path(self.config.federation.scratch_dir)
            with UpdateFile(folder, self.layout.num_parameters) as updates:
                self._add_all(updates)
                if len(self.admitted) >= needed:
                    attackers = self._num_attackers()
                    too_few = breakdown(rule, attackers, len(updates))
                    return too_few or aggregate(rule, updates, attackers, self.layout, state_N)
        return f"{len(self.admitted)} updates accepted, the quorum is {needed}"

    def _shortened(self, mean_N: np.ndarray, weight: float) -> np.ndarray:
        """The mean with a step as short as stale updates make it; statistics are no steps."""
        fresh = sum(num_examples for _, num_examples in self.admitted.values())
        if self.started and weight < fresh:
            mean_N[~statistics_mask(self.layout)] *= np.float32(weight / fresh)
        return mean_N

    def _num_attackers(self) -> int:
        """How many of the admitted updates are taken to be attackers'."""
        asked = rounded_up(self.config.federation.assumed_attackers, len(self.lines))
        refused = sum(line.outcome in NEVER_HONEST for line in self.lines)
        return max(0, asked - refused)

    def _add_all(self, total: MeanAccumulator | UpdateFile) -> None:
        """Adds the admitted updates in the order of the client ids, whoever was admitted first."""
        masks = self._parameter_masks()
        for client in sorted(self.admitted):
            self._add(client, total, masks)

    def _add(
        self,
        client: int,
        total: MeanAccumulator | UpdateFile,
        masks: Sequence[np.ndarray | None],
    ) -> None:
        """Adds a client's update to `total`, or refuses it. Keeps none of its decoded values."""
        update, num_examples = self.admitted[client]
        reference = self.reference(client)
        try:
            bodies = update.decode_bodies(reference)
            refused = self._refusal(bodies, masks)
        except Refused as error:
            refused = error.rejection
        if refused is not None:
            self._reject(client, refused)
        else:
            # With privacy every client counts the same: one must not move the mean further.
            weight = 1.0 if self.config.privacy.enabled else float(num_examples)
            weight *= staleness_factor(self.number - self.started.get(client, self.number))
            total.add_parts(self._moved(client, self.layout.places(*bodies)), weight)
            if self.shrinkage is not None:
                self.shrinkage.add(update.noise(bodies, reference), weight)

    def _moved(
        self, client: int, parts: Iterable[tuple[slice, np.ndarray]]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """A client's update whose statistics lead from the state to where the client came."""
        move_S = self.moves.get(self.started.get(client, self.number))
        if move_S is None or not move_S.any():
            yield from parts
            return
        for place, values in parts:
            first, last = self.statistics_at.searchsorted([place.start, place.stop])
            if first < last:
                values = values.copy()
                values[self.statistics_at[first:last] - place.start] += move_S[first:last]
            yield place, values

    def _parameter_masks(self) -> list[np.ndarray | None]:
        """For both bodies of an update: where values are no statistics, None if nowhere else."""
        is_parameter_N = ~statistics_mask(self.layout)
        masks = (self.layout.gather(is_parameter_N, fine=fine) for fine in (False, True))
        return [None if mask.all() else mask for mask in masks]

    def _refusal(
        self, bodies: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
    ) -> Rejection | None:
        """Why the values of a decoded update cannot be taken, or None."""
        limit = self.config.federation.max_update_norm or math.inf
        # Statistics have units of their own and say nothing of a step.
        parameters = [
            body if mask is None else body[mask] for body, mask in zip(bodies, masks, strict=True)
        ]
        return check_values(*bodies, limit=MAX_STATISTIC) or check_values(
            *parameters, limit=limit, norm_limit=limit
        )

    def line(
        self,
        reason: str,
        rate: float,
        *,
        seconds: float,
        aggregate_seconds: float,
        reproducible: bool,
    ) -> RoundLine:
        """The round in figures."""
        accepted = [line for line in self.lines if line.outcome == "accepted"]
        told = [line for line in accepted if "loss" in line.metrics]
        weights = [line.num_examples for line in told]
        losses = [line.metrics["loss"] for line in told]
        deadline = self.config.federation.deadline_seconds
        waited = [line.metrics.get("device-seconds", 0.0) for line in self.lines]
        # Who does not come in time, or not at all, is waited for until the deadline.
        if deadline and any(line.outcome in SILENT for line in self.lines):
            waited.append(deadline)
        slowest = max(waited, default=0.0)
        return RoundLine(
            round=self.number,
            outcome="abandoned" if reason else "committed",
            reason=reason,
            replies=dict(Counter(line.outcome for line in self.lines)),
            train_loss=float(np.average(losses, weights=weights)) if told else None,
            bytes_up=sum(line.bytes_up for line in self.lines),
            bytes_down=sum(line.bytes_down for line in self.lines),
            clients_up=sum(line.bytes_up > 0 for line in self.lines),
            clients_down=sum(line.bytes_down > 0 for line in self.lines),
            device_seconds=float(min(slowest, deadline) if deadline else slowest),
            seconds=seconds,
            aggregate_seconds=aggregate_seconds,
            learning_rate=rate,
            reproducible=reproducible,
        )
