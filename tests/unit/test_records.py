"""Records refuse all that is not one of our messages, and say why."""

import math
from typing import Any

import numpy as np
import pytest

from fedcunet import identity
from fedcunet.records import (
    BadReply,
    Reply,
    error_reply,
    model_content,
    read_evaluation,
    read_model,
    read_update,
    update_content,
)

from flwr.app import (  # isort: skip  (after fedcunet.environment)
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)

BLOB = bytes(range(256))
METRICS = {"num-examples": 3, "loss": 0.5, "steps": 7}


@pytest.fixture(autouse=True)
def server_identity() -> None:
    identity.set_task_identity(1, 0)


def ask(content: RecordDict | None = None) -> Message:
    """A train message to node 5."""
    content = model_content(BLOB, {"round": 1}) if content is None else content
    return Message(content, dst_node_id=5, message_type="train")


def reply_with(**changes: Any) -> Message:
    """A good reply, with whole records replaced, added or (None) removed."""
    content = update_content(BLOB, METRICS)
    for key, record in changes.items():
        if record is None:
            del content[key]
        else:
            content[key] = record
    return Message(content, reply_to=ask())


def blob_array(**changes: Any) -> Array:
    fields = {"dtype": "uint8", "shape": (256,), "stype": "fedcunet.update.v2", "data": BLOB}
    return Array(**{**fields, **changes})


def metrics(**changes: Any) -> MetricRecord:
    return MetricRecord({**METRICS, **changes})


def test_a_train_message_comes_out_as_it_went_in() -> None:
    config = {"round": 3, "learning-rate": 0.25, "codec": "eden", "feedback": True}
    blob, found = read_model(ask(model_content(BLOB, config)))
    assert blob == BLOB
    assert found == config
    assert [type(value) for value in found.values()] == [int, float, str, bool]


def test_an_update_comes_out_as_it_went_in() -> None:
    assert read_update(reply_with()) == Reply(
        node_id=5, blob=BLOB, num_examples=3, metrics={"loss": 0.5, "steps": 7}
    )


def test_an_empty_blob_can_be_carried() -> None:
    reply = read_update(Message(update_content(b"", METRICS), reply_to=ask()))
    assert isinstance(reply, Reply)
    assert reply.blob == b""


def test_the_blob_is_one_array_that_flower_refuses_to_turn_into_numbers() -> None:
    content = update_content(BLOB, METRICS)
    (array,) = content["arrays"].values()
    assert (array.dtype, array.shape, array.data) == ("uint8", (256,), BLOB)
    with pytest.raises(TypeError):
        array.numpy()


def test_records_survive_flowers_own_serialisation() -> None:
    # What a real SuperLink does to a record: to bytes, with its children apart, and back.
    record = update_content(BLOB, METRICS)["arrays"]
    array = record["update"]
    chunks = {key: type(chunk).inflate(chunk.deflate()) for key, chunk in array.slice_array()}
    back = Array.inflate(array.deflate(), children=chunks)
    content = update_content(BLOB, METRICS)
    content["arrays"] = ArrayRecord({"update": back})
    assert isinstance(read_update(Message(content, reply_to=ask())), Reply)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"arrays": None}, "malformed-reply", "records are ['metrics']"),
        ({"metrics": None}, "malformed-reply", "records are ['arrays']"),
        ({"config": ConfigRecord({"a": 1})}, "malformed-reply", "records are"),
        ({"arrays": ConfigRecord({"a": 1})}, "malformed-reply", "not an ArrayRecord"),
        ({"metrics": ConfigRecord(METRICS)}, "malformed-reply", "not a MetricRecord"),
        ({"arrays": ArrayRecord()}, "malformed-reply", "0 arrays"),
        ({"arrays": ArrayRecord({"model": blob_array()})}, "malformed-reply", "1 arrays"),
        (
            {"arrays": ArrayRecord({"update": blob_array(), "more": blob_array()})},
            "malformed-reply",
            "2 arrays",
        ),
        (
            {"arrays": ArrayRecord({"update": blob_array(stype="fedcunet.model.v2")})},
            "malformed-reply",
            "of type 'fedcunet.model.v2'",
        ),
        (
            {"arrays": ArrayRecord({"update": Array(np.zeros(3, np.uint8))})},
            "malformed-reply",
            "of type 'numpy.ndarray'",
        ),
        (
            {"arrays": ArrayRecord({"update": blob_array(dtype="float32")})},
            "malformed-reply",
            "says float32",
        ),
        (
            {"arrays": ArrayRecord({"update": blob_array(shape=(255,))})},
            "malformed-reply",
            "holds 256 bytes",
        ),
        (
            {"arrays": ArrayRecord({"update": blob_array(shape=(16, 16))})},
            "malformed-reply",
            "says uint8 (16, 16)",
        ),
        ({"metrics": MetricRecord({"loss": 0.5})}, "bad-num-examples", "found None"),
        ({"metrics": metrics(loss=math.nan)}, "bad-metrics", "'loss' is nan"),
        ({"metrics": metrics(loss=math.inf)}, "bad-metrics", "'loss' is inf"),
        ({"metrics": metrics(loss=[0.5, 0.25])}, "bad-metrics", "'loss' is [0.5, 0.25]"),
        ({"metrics": metrics(loss=-1e300)}, "bad-metrics", "'loss' is -1e+300"),
        ({"metrics": metrics(**{"device-seconds": 1e300})}, "bad-metrics", "expected 0 to 1e+09"),
        ({"metrics": metrics(**{"device-seconds": -1})}, "bad-metrics", "expected 0 to 1e+09"),
        ({"metrics": metrics(**{"x" * 65: 1})}, "bad-metrics", "too long"),
        ({"metrics": metrics(**{f"m{i}": i for i in range(64)})}, "bad-metrics", "67 metrics"),
    ],
)
def test_a_malformed_reply_is_counted_with_a_reason(
    changes: dict[str, Any], reason: str, detail: str
) -> None:
    bad = read_update(reply_with(**changes))
    assert isinstance(bad, BadReply)
    assert bad.reason == reason
    assert detail in bad.detail


@pytest.mark.parametrize(
    "count", [0, -9, 10**7 + 1, 10**18, 10**400, 3.0, math.nan, math.inf, [3], []]
)
def test_an_unbelievable_number_of_examples_is_refused(count: Any) -> None:
    bad = read_update(reply_with(metrics=metrics(**{"num-examples": count})))
    assert isinstance(bad, BadReply)
    assert bad.reason == "bad-num-examples"


def test_an_error_reply_is_told_from_a_malformed_one_and_kept_to_one_printable_line() -> None:
    bad = read_update(error_reply(ask(), "first\nsecond\x1b[2J" + "x" * 5000))
    assert isinstance(bad, BadReply)
    assert bad.reason == "error-reply"
    assert bad.detail.startswith("first second?[2Jxxx")
    assert len(bad.detail) <= 300


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "error-reply"),  # Flower's LOAD_CLIENT_APP_EXCEPTION
        (2, "error-reply"),
        (3, "unreachable"),
        (4, "unreachable"),
        (5, "unreachable"),
        (8, "crashed"),
        (1001, "needs-snapshot"),
        (1002, "hung"),
        (1003, "out-of-memory"),
        (9999, "error-reply"),
    ],
)
def test_an_error_is_counted_by_what_its_code_says(code: int, reason: str) -> None:
    message = error_reply(ask(), "why", code=code)
    detail = f"code {code}: why" if code in (1, 9999) else "why"
    assert read_update(message) == BadReply(reason=reason, detail=detail)
    assert read_evaluation(message) == BadReply(reason=reason, detail=detail)
    silent = error_reply(ask(), "", code=code)
    assert read_update(silent) == BadReply(reason=reason, detail=f"code {code}")


@pytest.mark.parametrize("thing", [None, b"bytes", RecordDict(), object()])
def test_what_is_no_message_at_all_is_malformed(thing: Any) -> None:
    bad = read_update(thing)
    assert isinstance(bad, BadReply)
    assert bad.reason == "malformed-reply"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (RecordDict(), "records are"),
        (update_content(BLOB, METRICS), "records are"),
        (
            RecordDict(
                {
                    "arrays": ArrayRecord({"model": blob_array()}),
                    "config": ConfigRecord({"round": 1}),
                }
            ),
            "expected 'fedcunet.model.v2'",
        ),
        (model_content(BLOB, {"round": [1, 2]}), "config value 'round' is a list"),  # type: ignore[dict-item]
        (model_content(BLOB, {"round": b"1"}), "config value 'round' is a bytes"),  # type: ignore[dict-item]
    ],
)
def test_a_client_refuses_what_is_no_train_message(content: RecordDict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_model(ask(content))


def test_another_identity_ends_with_its_block() -> None:
    with identity.task_identity(1, 9):
        assert ask().metadata.src_node_id == 9
    assert ask().metadata.src_node_id == 0


def test_a_new_message_id_changes_nothing_else() -> None:
    message = ask()
    stamped = identity.with_message_id(message, "abc")
    assert message.metadata.message_id == ""
    assert stamped.metadata.message_id == "abc"
    assert stamped.content is message.content
    ours, theirs = vars(stamped.metadata), vars(message.metadata)
    assert {key for key in theirs if ours[key] != theirs[key]} == {"_message_id"}
