"""Attackers: who they are, what they send, that only virtual clients attack, and what becomes of it
in a round under each rule."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.attacks import (
    ATTACK_KEY,
    attack_of,
    hostile_payload,
    hostile_update,
    training_crops,
)
from clients.offer import Offer
from fedcunet.attackers import attackers_of, refuse_attackers
from fedcunet.config import RunConfig
from fedcunet.data.crops import CropBatch
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.payload import Admitted, admit, decode_own, pack
from fedcunet.payload_header import WIRE_IDS
from fedcunet.records import BadReply, Description, Reply
from fedcunet.replies import RoundReplies
from fedcunet.terms import update_payload

LAYOUT = Layout.from_tensors({"a.weight": (300,), "b.bias": (3,)}, fine={"b.bias"})
FLOAT32 = RunConfig().replace(update__codec="float32", update__bits=32)
BITS = {"float32": 32, "float16": 16, "sign": 1, "top-k": 0.5}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded updates go to the default scratch folder, which is relative."""
    monkeypatch.chdir(tmp_path)


def setting(**changes: Any) -> RunConfig:
    return FLOAT32.replace(federation__attackers=0.2, federation__attack="nan").replace(**changes)


def test_attackers_are_chosen_by_the_seed() -> None:
    config = setting(federation__clients=20)
    chosen = attackers_of(config)
    assert len(chosen) == 4
    assert set(chosen.values()) == {"nan"}
    assert set(chosen) <= set(range(20))
    assert attackers_of(config) == chosen
    assert set(attackers_of(config.replace(seed=1))) != set(chosen)
    assert attackers_of(RunConfig()) == {}
    assert len(attackers_of(setting(federation__clients=2))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"assumed_attackers": 0.5, "aggregation": "median"}, "expected 0 to less than 0.5, found"),
        ({"assumed_attackers": float("nan"), "aggregation": "median"}, "less than 0.5, found nan"),
        ({"assumed_attackers": 0.2}, "expected 0 with federation.aggregation mean"),
        ({"aggregation": "trimmed-mean"}, "expected more than 0 with federation.aggregation trim"),
        ({"aggregation": "krum"}, "expected one of mean, trimmed-mean, median, multi-krum"),
        ({"attackers": 0.2}, "expected both or none, found 0.2 and none"),
        ({"attack": "nan"}, "expected both or none, found 0.0 and nan"),
        ({"attackers": 1.2, "attack": "nan"}, "federation.attackers: expected 0 to 1"),
    ],
)
def test_settings_of_attackers_and_rules_that_make_no_sense_are_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        RunConfig().replace(**{f"federation__{key}": value for key, value in changes.items()})
    assert said in str(refusal.value)


def test_only_a_simulation_takes_a_setting_with_attackers() -> None:
    refuse_attackers(RunConfig())
    with pytest.raises(UserError, match="outside of python -m simulations, found nan"):
        refuse_attackers(setting())


def test_a_client_on_a_machine_of_its_own_never_attacks(tmp_path: Path) -> None:
    assert attack_of({ATTACK_KEY: "sign-flip", "partition-id": 3}) == "sign-flip"
    assert attack_of({"partition-id": 3}) == "none"
    offer = Offer(
        data="300w",
        root=tmp_path,
        device="laptop",
        folder=tmp_path,
        num_images=3,
        part=None,
        memory_bytes=None,
    )
    assert ATTACK_KEY not in offer.node_config()
    assert attack_of({**offer.node_config(), ATTACK_KEY: "sign-flip"}) == "none"


def test_hostile_updates_are_the_honest_one_turned_round_or_ten_times_as_long() -> None:
    update = np.array([1, -2, 0.5], dtype=np.float32)
    assert hostile_update("sign-flip", update).tolist() == [-1, 2, -0.5]
    assert hostile_update("scaled", update).tolist() == [10, -20, 5]
    for attack in ("none", "label-shift", "nan"):
        assert hostile_update(attack, update) is update


class TwoCrops:
    """Stands for the crops: two points a picture, the second of which is not labelled."""

    flip_order, size = np.arange(2), 1

    def batch(self, indices: list[int], **_: Any) -> CropBatch:
        return CropBatch(
            images_B3HW=torch.zeros(len(indices), 3, 1, 1),
            points_BK2=torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * len(indices)),
            labelled_BK=torch.tensor([[True, False]] * len(indices)),
            to_image_B23=np.zeros((len(indices), 2, 3)),
        )


def test_shifted_labels_show_each_landmark_where_another_one_is() -> None:
    honest = training_crops("none", TwoCrops(), [5, 6]).batch([0, 1])  # type: ignore[arg-type]
    wrong = training_crops("label-shift", TwoCrops(), [5, 6]).batch([0, 1])  # type: ignore[arg-type]
    assert honest.points_BK2[1].tolist() == [[1, 2], [3, 4]]
    assert wrong.points_BK2[1].tolist() == [[3, 4], [1, 2]]
    assert wrong.labelled_BK.tolist() == [[False, True]] * 2


def judged(payloads: Sequence[bytes | BadReply | None], config: RunConfig) -> RoundReplies:
    """The payloads of clients 0, 1, … with 1, 2, … examples, judged as a round's replies."""
    clients = {
        client: Description(
            node_id=client + 1,
            client=client,
            num_examples=client + 1,
            num_validation=0,
            num_test=0,
            device="",
            memory_bytes=0,
        )
        for client in range(len(payloads))
    }
    replies = RoundReplies(
        config=config,
        layout=LAYOUT,
        clients=clients,
        number=1,
        bytes_down=dict.fromkeys(clients, 0),
    )
    for client, blob in enumerate(payloads):
        facts: dict[str, Any] = {"num_examples": client + 1, "metrics": {"loss": 1.0}}
        well_formed = isinstance(blob, bytes)
        reply = Reply(node_id=client + 1, blob=blob, **facts) if well_formed else blob
        replies.judge(client, reply)
    return replies


def payload(client: int, update: np.ndarray, config: RunConfig = FLOAT32) -> bytes:
    return pack(update.astype(np.float32), update_payload(LAYOUT, config, 1, client))


@pytest.mark.parametrize("codec", WIRE_IDS)
def test_the_nan_attack_passes_as_a_payload_of_any_codec_and_its_values_are_refused(
    codec: str, generator: np.random.Generator
) -> None:
    config = RunConfig().replace(update__codec=codec, update__bits=BITS.get(codec, 4))
    expected = update_payload(LAYOUT, config, 1, 0)
    blob = pack(generator.normal(size=303).astype(np.float32), expected)
    hostile = hostile_payload("nan", blob)
    assert isinstance(admit(hostile, expected), Admitted)
    assert len(hostile) == len(blob)
    replies = judged([hostile], config)
    assert replies.mean(np.zeros(303, np.float32), 1) == "0 updates accepted, the quorum is 1"
    assert replies.lines[0].outcome in ("not-finite", "undecodable", "too-large")
    if codec == "float32":
        assert replies.lines[0].outcome == "not-finite"
    assert hostile_payload("scaled", blob) is blob


def test_the_rule_of_the_setting_decides_and_the_mean_does_not_withstand() -> None:
    updates = [np.full(303, value) for value in (1.0, 2.0, 3.0, 2.0, -50.0)]
    payloads = [payload(client, update) for client, update in enumerate(updates)]
    found = {}
    for rule in ("mean", "trimmed-mean", "median", "multi-krum", "norm-clipping"):
        config = FLOAT32.replace(
            federation__aggregation=rule,
            federation__assumed_attackers=0.0 if rule == "mean" else 0.2,
        )
        mean_N = judged(payloads, config).mean(np.zeros(303, np.float32), 5)
        assert isinstance(mean_N, np.ndarray), mean_N
        found[rule] = float(mean_N[0])
    assert found["mean"] == pytest.approx((1 + 4 + 9 + 8 - 250) / 15)
    assert found["trimmed-mean"] == pytest.approx((1 + 2 + 2) / 3)
    assert found["median"] == 2
    assert found["multi-krum"] == 2
    # Shortened to the median norm, that of the value 2; the examples still count.
    assert found["norm-clipping"] == pytest.approx((1 + 4 + 6 + 8 - 10) / 15)


@pytest.mark.parametrize("rule", ["mean", "trimmed-mean", "median", "multi-krum", "norm-clipping"])
def test_the_result_does_not_depend_on_who_was_admitted_first(
    rule: str, generator: np.random.Generator
) -> None:
    config = FLOAT32.replace(
        federation__aggregation=rule,
        federation__assumed_attackers=0.0 if rule == "mean" else 0.2,
    )
    payloads = [payload(client, generator.normal(size=303)) for client in range(7)]
    state = np.zeros(303, dtype=np.float32)
    in_order = judged(payloads, config).mean(state, 7)
    replies = judged(payloads, config)
    replies.admitted = dict(reversed(replies.admitted.items()))
    turned = replies.mean(state, 7)
    assert isinstance(in_order, np.ndarray)
    assert in_order.tolist() == turned.tolist()  # type: ignore[union-attr]


def of_others(client: int, round_number: int = 1, **changes: Any) -> bytes:
    """The payload of another setting or round."""
    config = FLOAT32.replace(**changes)
    expected = update_payload(LAYOUT, config, round_number, client)
    return pack(np.ones(303, np.float32), expected)


RUBBISH: dict[str, Callable[[int], bytes | BadReply | None]] = {
    "not-finite": lambda client: hostile_payload("nan", of_others(client)),
    "too-short": lambda client: b"",
    "bad-version": lambda client: of_others(client)[:4] + b"?" + of_others(client)[5:],
    "wrong-layout": lambda client: pack(
        np.ones(5, np.float32), update_payload(Layout.vector(5), FLOAT32, 1, client)
    ),
    "wrong-seed": lambda client: of_others(client, seed=9),
    "wrong-round": lambda client: of_others(client, 2),
    "wrong-sender": lambda client: of_others(client + 1),
    "wrong-codec": lambda client: of_others(client, update__codec="float16", update__bits=16),
    "malformed-reply": lambda client: BadReply(reason="malformed-reply", detail=""),
    "bad-metrics": lambda client: BadReply(reason="bad-metrics", detail=""),
}
MAYBE_HONEST: dict[str, Callable[[int], bytes | BadReply | None]] = {
    "no-reply": lambda client: None,
    "error-reply": lambda client: BadReply(reason="error-reply", detail=""),
    "too-large": lambda client: payload(client, np.full(303, 1e9)),
}


@pytest.mark.parametrize("reason", [*RUBBISH, *MAYBE_HONEST])
def test_attackers_who_sent_what_no_honest_client_sends_are_not_assumed_again_among_the_others(
    reason: str, generator: np.random.Generator
) -> None:
    # Of eight, two attackers are assumed: Krum needs seven updates. Two that send rubbish leave
    # six, of which none is an attacker's: three are enough.
    config = FLOAT32.replace(
        federation__aggregation="multi-krum", federation__assumed_attackers=0.2
    )
    sent = (RUBBISH | MAYBE_HONEST)[reason]
    blobs = [sent(k) if k < 2 else payload(k, generator.normal(size=303)) for k in range(8)]
    replies = judged(blobs, config)
    found = replies.mean(np.zeros(303, dtype=np.float32), 4)
    assert [line.outcome for line in replies.lines] == [reason] * 2 + ["accepted"] * 6
    if reason in RUBBISH:
        assert isinstance(found, np.ndarray)
    else:  # those two may have been honest: the round is given up
        assert found == "multi-krum against 2 attackers needs 7 updates, found 6"


def test_decoded_updates_are_what_the_rules_see(generator: np.random.Generator) -> None:
    config = RunConfig().replace(federation__aggregation="median")
    payloads = [payload(client, generator.normal(size=303), config) for client in range(3)]
    decoded = [
        decode_own(blob, update_payload(LAYOUT, config, 1, client))
        for client, blob in enumerate(payloads)
    ]
    found = judged(payloads, config).mean(np.zeros(303, np.float32), 3)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == np.median(decoded, axis=0).tolist()


def test_with_privacy_every_client_counts_the_same() -> None:
    payloads = [payload(client, np.full(303, value)) for client, value in enumerate((1.0, 4.0))]
    state = np.zeros(303, dtype=np.float32)
    for clip_norm, expected in ((0.0, (1 * 1 + 2 * 4) / 3), (1.0, 2.5)):
        replies = judged(payloads, FLOAT32.replace(privacy__clip_norm=clip_norm))
        assert replies.mean(state, 2) == pytest.approx(np.full(303, expected))
