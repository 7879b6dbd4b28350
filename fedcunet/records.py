"""What server and clients send each other, as Flower records.

One message carries one blob: a model on the way down, an update on the way up. Flower 1.39 pays
480 bytes and two requests for every named array, so tensors never travel one by one; and the
`stype` of a blob is our own, so that Flower's averaging refuses it instead of averaging bytes.

Readers take nothing on trust: `read_update` turns anything that is not one of our updates into a
`BadReply` with a reason that the round loop can count.
"""

from __future__ import annotations

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

ARRAYS_KEY = "arrays"
CONFIG_KEY = "config"
METRICS_KEY = "metrics"
NUM_EXAMPLES_KEY = "num-examples"
NUM_VALIDATION_KEY, NUM_TEST_KEY = "num-validation-examples", "num-test-examples"
MEMORY_KEY, NEEDED_KEY, RUNG_KEY = "memory-bytes", "needed-bytes", "rung"

# The one array in the record: its name, and how its bytes are to be understood.
MODEL_NAME = "model"
MODEL_STYPE = "fedcunet.model.v2"
UPDATE_NAME = "update"
UPDATE_STYPE = "fedcunet.update.v2"

# Flower's codes of errors (flwr.common.constant.ErrorCode, 1.39).
CLIENT_APP_RAISED = 2
MESSAGE_UNAVAILABLE, REPLY_UNAVAILABLE, NODE_UNAVAILABLE = 3, 4, 5
CLIENT_APP_CRASHED = 8
# Our own: the client has nothing that the differences in the message start from.
NEEDS_SNAPSHOT = 1001
CLIENT_APP_HUNG = 1002
OUT_OF_MEMORY = 1003

# Outcomes of an error reply; any other code is `error-reply`: the client app said why.
OUTCOMES = {
    MESSAGE_UNAVAILABLE: "unreachable",
    REPLY_UNAVAILABLE: "unreachable",
    NODE_UNAVAILABLE: "unreachable",
    CLIENT_APP_CRASHED: "crashed",
    NEEDS_SNAPSHOT: "needs-snapshot",
    CLIENT_APP_HUNG: "hung",
    OUT_OF_MEMORY: "out-of-memory",
}
# Those that the machines decided: the setting and its seed do not repeat them.
MACHINE_FAULTS = frozenset({"unreachable", "crashed", "hung", "out-of-memory"})

# Outcome of a virtual client whose device does not answer: nothing is sent to it.
UNAVAILABLE = "unavailable"
# Outcomes of clients from which nothing came: they are waited for.
SILENT = frozenset({UNAVAILABLE, "no-reply", "unreachable", "hung"})
# What a client with data of its own says: under which id it was admitted is the server's to know.
UNKNOWN_CLIENT = -1

# More examples than any client has: a count decides a client's weight in the mean.
MAX_EXAMPLES = 10**7
MAX_METRICS = 64
MAX_METRIC = 1e30  # no sum of so small ones over clients and examples overflows
MAX_SECONDS = 1e9  # of a metric that ends so; beside more a virtual clock would stand still
MAX_NAME_LENGTH = 64
MAX_DETAIL_LENGTH = 300

ConfigScalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A well-formed reply to a train message; its blob is still to be admitted."""

    node_id: int
    blob: bytes
    num_examples: int
    metrics: dict[str, int | float]  # in their ranges; without the number of examples


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReply:
    """A well-formed reply to an evaluate message."""

    num_bytes: int  # of its figures and their names
    num_examples: int
    metrics: dict[str, int | float]  # finite; without the number of examples


@dataclass(frozen=True, kw_only=True, slots=True)
class BadReply:
    """Why a reply cannot be used.

    `reason` is what `clients.jsonl` has as the outcome, words joined by hyphens; `detail` is one
    line for people.
    """

    reason: str
    detail: str
    num_bytes: int = 0  # of a payload that is not kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a node says of itself when it is asked."""

    node_id: int  # Flower's, for sending only
    client: int  # the stable id: the partition in a simulation; or UNKNOWN_CLIENT
    num_examples: int
    num_validation: int  # images that it keeps back to evaluate the model on
    num_test: int  # and to evaluate the final model on
    device: str  # name of its device profile
    memory_bytes: int  # what its training may take
    needed_bytes: int = 0  # what it was measured to take; 0: not measured
    rung: int = 0  # of the setting's ladder


def describe_content() -> RecordDict:
    """Content of the question to a node who it is."""
    return RecordDict({CONFIG_KEY: ConfigRecord({})})


def description_content(
    client: int,
    num_examples: int,
    device: str,
    *,
    num_validation: int = 0,
    num_test: int = 0,
    memory_bytes: int = 0,
    needed_bytes: int = 0,
    rung: int = 0,
) -> RecordDict:
    """Content of the answer to `describe_content`."""
    record = ConfigRecord(
        {
            "client": client,
            NUM_EXAMPLES_KEY: num_examples,
            NUM_VALIDATION_KEY: num_validation,
            NUM_TEST_KEY: num_test,
            "device": device,
            MEMORY_KEY: memory_bytes,
            NEEDED_KEY: needed_bytes,
            RUNG_KEY: rung,
        }
    )
    return RecordDict({CONFIG_KEY: record})


def read_description(message: Message) -> Description | BadReply:
    """The description in `message`, or why there is none; never raises, whatever came."""
    try:
        if message.has_error():
            return _error(message.error)
        _check_keys(message.content, {CONFIG_KEY})
        record = dict(message.content[CONFIG_KEY].items())
        client, count = record.get("client"), record.get(NUM_EXAMPLES_KEY)
        if type(client) is not int or not UNKNOWN_CLIENT <= client < 2**31:
            return _bad("malformed-reply", f"client id: found {client!r}, expected 0 to 2^31 - 1")
        counts = []
        for key in (MEMORY_KEY, NEEDED_KEY, RUNG_KEY):
            found = record.get(key)
            if type(found) is not int or not 0 <= found < 2**63:
                return _bad("malformed-reply", f"{key}: found {found!r}, expected a whole number")
            counts.append(found)
        memory_bytes, needed_bytes, rung = counts
        if type(count) is not int or not 1 <= count <= MAX_EXAMPLES:
            return _bad("bad-num-examples", f"found {count!r}, expected 1 to {MAX_EXAMPLES}")
        held_back = []
        for key in (NUM_VALIDATION_KEY, NUM_TEST_KEY):
            held = record.get(key, 0)
            if type(held) is not int or not 0 <= held <= MAX_EXAMPLES:
                return _bad("bad-num-examples", f"found {held!r}, expected 0 to {MAX_EXAMPLES}")
            held_back.append(held)
        return Description(
            node_id=message.metadata.src_node_id,
            client=client,
            num_examples=count,
            num_validation=held_back[0],
            num_test=held_back[1],
            device=one_line(str(record.get("device", "")))[:MAX_NAME_LENGTH],
            memory_bytes=memory_bytes,
            needed_bytes=needed_bytes,
            rung=rung,
        )
    except Exception as error:
        return _bad("malformed-reply", f"{type(error).__name__}: {error}")


def model_content(model_blob: bytes, config: Mapping[str, ConfigScalar]) -> RecordDict:
    """Content of a train or evaluate message: the model's bytes and what to do with them."""
    return RecordDict(
        {
            ARRAYS_KEY: _blob_record(MODEL_NAME, MODEL_STYPE, model_blob),
            CONFIG_KEY: ConfigRecord(dict(config)),
        }
    )


def update_content(update_blob: bytes, metrics: Mapping[str, int | float]) -> RecordDict:
    """Content of the reply: the update's bytes and `metrics`, `num-examples` among them."""
    return RecordDict(
        {
            ARRAYS_KEY: _blob_record(UPDATE_NAME, UPDATE_STYPE, update_blob),
            METRICS_KEY: MetricRecord(dict(metrics)),
        }
    )


def evaluation_content(metrics: Mapping[str, int | float]) -> RecordDict:
    """Content of the reply to an evaluate message: `metrics`, `num-examples` among them."""
    return RecordDict({METRICS_KEY: MetricRecord(dict(metrics))})


def read_model(message: Message) -> tuple[bytes, dict[str, ConfigScalar]]:
    """The model's bytes and the config of a train or evaluate message.

    Raises:
        ValueError: the message is not one of `model_content`; the text says in what.
    """
    content = message.content
    _check_keys(content, {ARRAYS_KEY, CONFIG_KEY})
    blob = _read_blob(content[ARRAYS_KEY], MODEL_NAME, MODEL_STYPE)
    record = content[CONFIG_KEY]
    if not isinstance(record, ConfigRecord):
        raise ValueError(f"record '{CONFIG_KEY}' is a {type(record).__name__}, not a ConfigRecord")
    config: dict[str, ConfigScalar] = {}
    for name, value in record.items():
        # Flower also allows lists and bytes here; our config has neither.
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"config value '{name}' is a {type(value).__name__}, not a scalar")
        config[name] = value
    return blob, config


def read_update(message: Message) -> Reply | BadReply:
    """The update in `message`, or why there is none; never raises, whatever came."""
    try:
        return _read_update(message)
    # Also for what no check foresees: one client's reply must never end the run.
    except Exception as error:
        return _bad("malformed-reply", f"{type(error).__name__}: {error}")


def _read_update(message: Message) -> Reply | BadReply:
    if message.has_error():
        return _error(message.error)
    content = message.content
    _check_keys(content, {ARRAYS_KEY, METRICS_KEY})
    blob = _read_blob(content[ARRAYS_KEY], UPDATE_NAME, UPDATE_STYPE)
    figures = _read_metrics(content[METRICS_KEY])
    if isinstance(figures, BadReply):
        return figures
    num_examples, metrics = figures
    return Reply(
        node_id=message.metadata.src_node_id,
        blob=blob,
        num_examples=num_examples,
        metrics=metrics,
    )


def read_evaluation(message: Message) -> EvaluationReply | BadReply:
    """The figures in the reply to an evaluate message, or why there are none; never raises."""
    try:
        if message.has_error():
            return _error(message.error)
        _check_keys(message.content, {METRICS_KEY})
        record = message.content[METRICS_KEY]
        figures = _read_metrics(record)
        if isinstance(figures, BadReply):
            return figures
        num_examples, metrics = figures
        return EvaluationReply(
            num_bytes=record.count_bytes(), num_examples=num_examples, metrics=metrics
        )
    except Exception as error:
        return _bad("malformed-reply", f"{type(error).__name__}: {error}")


def _read_metrics(record: object) -> tuple[int, dict[str, int | float]] | BadReply:
    """The number of examples and the other metrics, all of them finite and no larger than sane."""
    if not isinstance(record, MetricRecord):
        raise ValueError(f"record '{METRICS_KEY}' is a {type(record).__name__}, not a MetricRecord")
    if len(record) > MAX_METRICS:
        return _bad("bad-metrics", f"{len(record)} metrics, at most {MAX_METRICS} are taken")
    metrics: dict[str, int | float] = {}
    for name, value in record.items():
        if name == NUM_EXAMPLES_KEY:
            continue
        if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH:
            return _bad("bad-metrics", f"the name {str(name)[:20]!r}... is too long")
        if not _is_number(value) or not math.isfinite(value):  # type: ignore[arg-type]
            return _bad("bad-metrics", f"metric '{name}' is {value!r}, not a finite number")
        low, high = (0, MAX_SECONDS) if name.endswith("seconds") else (-MAX_METRIC, MAX_METRIC)
        if not low <= value <= high:  # type: ignore[operator]
            return _bad("bad-metrics", f"'{name}' is {value!r}, expected {low:g} to {high:g}")
        metrics[name] = value  # type: ignore[assignment]
    num_examples = record.get(NUM_EXAMPLES_KEY)
    # A float, even 3.0, is not a count; NaN would pass every comparison that is written badly.
    if type(num_examples) is not int or not 1 <= num_examples <= MAX_EXAMPLES:
        return _bad("bad-num-examples", f"found {num_examples!r}, expected 1 to {MAX_EXAMPLES}")
    return num_examples, metrics


def is_machine_fault(reply: object) -> bool:
    """Whether a machine, not the setting, decided that there is no update."""
    return isinstance(reply, BadReply) and reply.reason in MACHINE_FAULTS


def error_reply(message: Message, text: str, *, code: int = CLIENT_APP_RAISED) -> Message:
    """The reply that says in one line, `text`, why there is no answer to `message`."""
    return Message(Error(code, one_line(text)), reply_to=message)


def one_line(text: str) -> str:
    """`text` on one line, cut at 300 characters, safe to print on a terminal."""
    line = " ".join(text[: 10 * MAX_DETAIL_LENGTH].split())[:MAX_DETAIL_LENGTH]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _blob_record(name: str, stype: str, blob: bytes) -> ArrayRecord:
    array = Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)
    return ArrayRecord({name: array})


def _check_keys(content: RecordDict, expected: set[str]) -> None:
    found = set(content)
    if found != expected:
        raise ValueError(f"records are {sorted(found)}, expected {sorted(expected)}")


def _read_blob(record: object, name: str, stype: str) -> bytes:
    """The bytes of the only array in `record`, every field that describes them checked."""
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"record '{ARRAYS_KEY}' is a {type(record).__name__}, not an ArrayRecord")
    if set(record) != {name}:
        raise ValueError(f"{len(record)} arrays {sorted(record)[:3]}, expected ['{name}']")
    array = record[name]
    if array.stype != stype:
        raise ValueError(f"array '{name}' is of type {array.stype!r}, expected '{stype}'")
    if not isinstance(array.data, bytes):
        raise ValueError(f"array '{name}' holds a {type(array.data).__name__}, not bytes")
    # Flower compares neither with the data, and over gRPC the shape may come as any sequence.
    if array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise ValueError(
            f"array '{name}' says {array.dtype} {tuple(array.shape)}, holds {len(array.data)} bytes"
        )
    return array.data


def _error(error: Error) -> BadReply:
    """What became of a message that was answered with an error."""
    words = _error_words(error.reason or "")
    if not words or error.code not in (*OUTCOMES, CLIENT_APP_RAISED):
        words = f"code {error.code}: {words}".removesuffix(": ")
    return _bad(OUTCOMES.get(error.code, "error-reply"), words)


def _error_words(reason: str) -> str:
    """What a client app's exception said, without Flower's `<class '...'>:<'...'>` around it."""
    found = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", reason, flags=re.DOTALL)
    if found is None:
        return reason
    return found[2] if found[1] in ("UserError", "RunFailure") else f"{found[1]}: {found[2]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad(reason: str, detail: str) -> BadReply:
    return BadReply(reason=reason, detail=one_line(detail))
