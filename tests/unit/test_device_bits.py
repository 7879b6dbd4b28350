"""Bits of updates by device: what is told, admitted, refused, and that the mean stays right."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedcunet import terms
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.payload import pack
from fedcunet.records import description_content, read_model, update_content
from tests.made_rounds import Watcher, made_server

LAYOUT = Layout.from_tensors({"a.weight": (60, 60), "b.bias": (5,)}, fine={"b.bias"})
MIXED = RunConfig().replace(
    update__codec="eden",
    update__bits=4,
    update__bits_by_device="phone-low:1,phone-mid:2",
    federation__rounds=1,
)
DEVICES = ("phone-low", "phone-mid@1GB", "laptop", "phone-low@900MB")
BITS = (1.0, 2.0, 4.0, 1.0)
EXAMPLES = (10, 20, 30, 40)


def run(config: RunConfig, updates_CN: np.ndarray, **lies: float) -> Watcher:
    """A round of four clients that send these updates with the bits that they were told.

    Args:
        config: the setting.
        updates_CN: of each client.
        lies: `client_2=1` has client 2 send another number of bits.
    """

    def client_app(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            content = description_content(client, EXAMPLES[client], DEVICES[client])
            return Message(content, reply_to=message)
        values = read_model(message)[1]
        own = {key: value for key, value in values.items() if "." in key or key == "seed"}
        told = RunConfig.from_flat(own)
        assert told.update.bits == BITS[client] or not config.update.bits_by_device
        told = told.replace(update__bits=lies.get(f"client_{client}", told.update.bits))
        expected = terms.update_payload(LAYOUT, told, int(values["round"]), client)
        metrics: dict[str, Any] = {"num-examples": EXAMPLES[client], "loss": 1.0}
        return Message(
            update_content(pack(updates_CN[client], expected), metrics), reply_to=message
        )

    watcher = Watcher()
    made_server(client_app, config, watcher, layout=LAYOUT).run()
    return watcher


def test_each_client_sends_and_is_admitted_with_the_bits_of_its_device(
    generator: np.random.Generator,
) -> None:
    updates_CN = generator.normal(0, 1, (4, LAYOUT.num_parameters)).astype(np.float32)
    lines = run(MIXED, updates_CN).clients
    assert [line.outcome for line in lines] == ["accepted"] * 4
    assert [line.update_bits for line in lines] == list(BITS)
    # Header and scales make some more.
    assert [line.bits_per_parameter for line in lines] == pytest.approx(BITS, abs=0.35)
    # What goes down is the same for all.
    assert len({line.bytes_down for line in lines}) == 1
    plain = run(MIXED.replace(update__bits_by_device=""), updates_CN).clients
    assert {line.update_bits for line in plain} == {4.0}
    assert plain[0].bytes_down == lines[0].bytes_down


def test_a_client_that_sends_other_bits_than_it_was_told_is_refused() -> None:
    updates_CN = np.ones((4, LAYOUT.num_parameters), dtype=np.float32)
    lines = run(MIXED, updates_CN, client_0=4, client_2=2).clients
    outcomes = {line.client: line.outcome for line in lines}
    assert outcomes == {0: "wrong-bits", 1: "accepted", 2: "wrong-bits", 3: "accepted"}
    assert "bits in 1/256 1024, expected 256" in lines[0].detail


def test_the_mean_of_mixed_bits_is_unbiased_and_weighted_by_examples_alone(
    generator: np.random.Generator,
) -> None:
    updates_CN = generator.normal(0, 1, (4, LAYOUT.num_parameters)).astype(np.float32)
    true_N = np.average(updates_CN, axis=0, weights=EXAMPLES)
    main = slice(0, 3600)  # the others are coded by their 8 bits whatever the device
    found = [run(MIXED.replace(seed=seed), updates_CN).states[0][main] for seed in range(40)]
    once, mean = (np.linalg.norm(one - true_N[main]) for one in (found[0], np.mean(found, axis=0)))
    # Errors of 40 seeds cancel as those of unbiased codes do: to 1/√40 of one's.
    assert mean < 1.3 * once / 40**0.5
    # The two clients of 1 bit move the mean as far as their examples say, no less.
    low_N = np.average(updates_CN[[0, 3]], axis=0, weights=(10, 40))[main]
    share = (np.mean(found, axis=0) @ low_N) / (true_N[main] @ low_N)
    assert share == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phone-low", "update.bits-by-device: expected profile:bits,profile:bits, found"),
        ("phone-low:", "update.bits-by-device: expected profile:bits,profile:bits, found"),
        ("phone-low:two", "found 'phone-low:two'"),
        ("phone-low:1,", "found ''"),
        ("phone:1", "update.bits-by-device: unknown device profile 'phone'"),
        ("phone-low@1GB:1", "expected a profile without its memory, found 'phone-low@1GB'"),
        ("phone-low:1,phone-low:2", "profile 'phone-low' is given twice"),
        ("phone-low:99", "update.bits-by-device, phone-low: "),
        ("phone-low:nan", "update.bits-by-device, phone-low: "),
    ],
)
def test_what_are_no_bits_by_device_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        RunConfig().replace(update__bits_by_device=text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_codec_of_one_width_takes_no_other_by_device() -> None:
    sign = RunConfig().replace(update__codec="sign", update__bits=1)
    with pytest.raises(UserError, match=r"update\.bits-by-device, phone-low: "):
        sign.replace(update__bits_by_device="phone-low:2")
