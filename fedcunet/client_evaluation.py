"""What the clients say of the global model on the images that each keeps back.

A client's answer is a percentage and a number of images, which must be the one of its description.
One bad answer costs itself only; but percentage and number are the client's own word, and one that
lies about both moves the mean as far as it likes (the tenth and the spread count clients).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedcunet.config import RunConfig
from fedcunet.records import BadReply, Description, EvaluationReply
from fedcunet.terms import TEST

MAX_PERCENT = 1e6  # an untrained network's NME runs to hundreds


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientScore:
    """What became of one client's evaluation: a line of `client_evaluations.jsonl`."""

    round: int
    client: int
    outcome: str  # accepted, or the reason why not
    detail: str
    num_examples: int
    percent: float | None  # the metric on its own images
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientEvaluation:
    """The clients' evaluation of the model after one round."""

    part: str  # validation, or test: of the final model
    scores: tuple[ClientScore, ...]  # in the order of the client ids

    @property
    def bytes_up(self) -> int:
        """Of all answers."""
        return sum(score.bytes_up for score in self.scores)

    @property
    def bytes_down(self) -> int:
        """Of all models that were sent for evaluation."""
        return sum(score.bytes_down for score in self.scores)

    @property
    def outcomes(self) -> dict[str, int]:
        """Number of accepted answers, and of each reason why not."""
        return dict(Counter(score.outcome for score in self.scores))

    def figures(self, *, lower_is_better: bool) -> dict[str, Any]:
        """The figures of `metrics.jsonl` and `summary.json`; None where no answer was accepted.

        Those of the test of the final model begin with `client_test_` instead of `client_`.

        The mean is weighted by the clients' images. `client_tenth_percent` is the value that the
        worst tenth of the clients does not reach (linear between clients), and
        `client_spread_percent` the standard deviation over the clients, each counting once.
        """
        accepted = [score for score in self.scores if score.percent is not None]
        percent_C = np.array([score.percent for score in accepted], dtype=np.float64)
        names = ("mean", "worst", "tenth", "spread")
        values: Sequence[float | None] = [None] * len(names)
        if accepted:
            weights = [score.num_examples for score in accepted]
            values = [
                float(np.average(percent_C, weights=weights)),
                float(percent_C.max() if lower_is_better else percent_C.min()),
                float(np.quantile(percent_C, 0.9 if lower_is_better else 0.1)),
                float(percent_C.std()),
            ]
        prefix = "client_test" if self.part == TEST else "client"
        figures = {f"{prefix}_{n}_percent": v for n, v in zip(names, values, strict=True)}
        return figures | {
            "client_tests" if self.part == TEST else "client_evaluations": self.outcomes,
            "evaluation_bytes_up": self.bytes_up,
            "evaluation_bytes_down": self.bytes_down,
        }


def held_back(
    clients: Mapping[int, Description], config: RunConfig, part: str
) -> dict[int, tuple[int, int]]:
    """The clients that keep images of a part back, with their nodes and the number of images.

    Where the setting keeps none back there are none, whatever a client says.
    """
    federation = config.federation
    if not (federation.test_fraction if part == TEST else federation.validation_fraction):
        return {}
    found = {
        client: (known.node_id, known.num_test if part == TEST else known.num_validation)
        for client, known in sorted(clients.items())
    }
    return {client: (node, count) for client, (node, count) in found.items() if count}


def evaluation_of(
    answers: Mapping[int, EvaluationReply | BadReply],
    held: Mapping[int, tuple[int, int]],
    not_sent: Collection[int],
    *,
    part: str,
    round: int,
    model_bytes: int,
) -> ClientEvaluation:
    """What came of asking the clients of `held` to evaluate a model.

    Args:
        answers: by node.
        held: of `held_back`.
        not_sent: nodes that the model did not go to.
        part: VALIDATION or TEST.
        round: of the model.
        model_bytes: its length.
    """
    scores = [
        score_of(
            answers.get(node),
            round=round,
            client=client,
            expected=count,
            bytes_down=0 if node in not_sent else model_bytes,
        )
        for client, (node, count) in held.items()
    ]
    return ClientEvaluation(part=part, scores=tuple(scores))


def score_of(
    reply: EvaluationReply | BadReply | None,
    *,
    round: int,
    client: int,
    expected: int,
    bytes_down: int,
) -> ClientScore:
    """What became of one client's evaluation.

    Args:
        reply: what came, None if nothing did.
        round: of the model.
        client: who was asked.
        expected: the number of images that the client said it keeps back.
        bytes_down: of the model that was sent.
    """
    num_examples, num_bytes, percent = 0, 0, None
    if reply is None:
        outcome, detail = "no-reply", "nothing came before the wall-clock guard"
    elif isinstance(reply, BadReply):
        outcome, detail = reply.reason, reply.detail
    else:
        num_examples, num_bytes = reply.num_examples, reply.num_bytes
        outcome, detail = _judge(reply.metrics, num_examples, expected)
        percent = float(reply.metrics["percent"]) if outcome == "accepted" else None
    return ClientScore(
        round=round,
        client=client,
        outcome=outcome,
        detail=detail,
        num_examples=num_examples,
        percent=percent,
        bytes_up=num_bytes,
        bytes_down=bytes_down,
    )


def _judge(metrics: Mapping[str, int | float], num_examples: int, expected: int) -> tuple[str, str]:
    """Outcome and detail of a well-formed answer: accepted, or why it cannot be used."""
    if num_examples != expected:
        return (
            "bad-num-examples",
            f"said {num_examples} examples, described itself with {expected}",
        )
    percent = metrics.get("percent")
    if percent is None or not 0 <= percent <= MAX_PERCENT:
        return "bad-metrics", f"metric 'percent': expected 0 to {MAX_PERCENT:g}, found {percent!r}"
    return "accepted", ""
