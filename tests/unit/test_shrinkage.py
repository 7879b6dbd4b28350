"""The noise that coding adds is known, and the mean is shrunk by it as theory says."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from fedcunet.codecs import CODECS, make_seed
from fedcunet.codecs.base import noise_known
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.payload import Admitted, admit, pack
from fedcunet.records import Description, Reply
from fedcunet.replies import RoundReplies
from fedcunet.shrinkage import Shrinkage, shrinkage_factor
from fedcunet.terms import update_payload

TRELLIS = RunConfig().replace(
    update__codec="trellis", update__error_feedback="off", federation__shrinkage=True
)
CODED = [("trellis", 0.25), ("trellis", 1), ("trellis-even", 1), ("dithered", 0.5), ("eden", 2)]
CODED += [("hadamard-trellis", bits) for bits in (1, 2, 3, 4)] + [("float32", 32)]


def judged(
    rows_nN: np.ndarray, config: RunConfig, layout: Layout, **facts: Any
) -> tuple[np.ndarray, RoundReplies]:
    """What a round makes of clients' updates, one example each, to a model of zeros."""
    described: dict[str, Any] = {"num_examples": 1, "num_validation": 0, "num_test": 0}
    clients = range(len(rows_nN))
    replies = RoundReplies(
        config=config,
        layout=layout,
        clients={
            client: Description(
                node_id=client, client=client, device="", memory_bytes=0, **described
            )
            for client in clients
        },
        number=4,
        bytes_down=dict.fromkeys(clients, 0),
        **facts,
    )
    for client, row_N in enumerate(rows_nN):
        expected = update_payload(layout, config, replies.started.get(client, 4), client)
        blob = pack(row_N, expected)
        replies.judge(client, Reply(node_id=client, blob=blob, num_examples=1, metrics={}))
    mean_N = replies.mean(np.zeros(layout.num_parameters, np.float32), 1)
    assert isinstance(mean_N, np.ndarray)
    return mean_N, replies


def energy(values: np.ndarray) -> float:
    return float(np.square(values.astype(np.float64)).sum())


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(("name", "bits"), CODED)
def test_the_noise_that_a_codec_tells_of_is_its_squared_error(
    name: str, bits: float, with_reference: bool
) -> None:
    generator, lengths = np.random.default_rng(0), (2048, 1024, 0, 1024)
    scales = np.repeat(np.float32([1, 0.1, 1, 0.02]), lengths)
    vector = (scales * generator.standard_normal(4096)).astype(np.float32)
    reference = (0.7 * vector + 0.3 * scales * generator.standard_normal(4096)).astype(np.float32)
    told, errors, codec = np.zeros(4), np.zeros(4), noise_known(CODECS[name])
    assert codec is not None
    for number in range(5):
        seed = make_seed(number, 0, 0, "test")
        terms = {"bits": bits, "segments": lengths}
        terms |= {"reference": reference if with_reference else None}
        body = CODECS[name].encode(vector, seed=seed, **terms)
        decoded = CODECS[name].decode(body, length=4096, seed=seed, **terms)
        told += codec.noise(body, decoded, **terms)
        parts = np.split(decoded - vector, np.cumsum(lengths)[:-1])
        errors += [energy(part) for part in parts]
    if name == "float32":  # of which a prediction costs a rounding
        np.testing.assert_allclose(errors, told, atol=1e-10)
    else:
        np.testing.assert_allclose(told, errors, rtol=0.05)


def test_a_codec_that_is_biased_or_whose_rounding_cannot_be_told_says_nothing() -> None:
    unknown = {name for name, codec in CODECS.items() if noise_known(codec) is None}
    assert unknown == {
        "float16", "linear", "linear-nearest", "sign", "trellis-wiener", "qsgd", "min-max", "top-k"
    }  # fmt: skip


def test_no_payload_claims_more_noise_than_it_brings() -> None:
    vector = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    codec = CODECS["trellis"]
    body = bytearray(codec.encode(vector, bits=1, seed=b"s"))
    body[7] += 2  # the greatest bits of S: times 2^32
    with np.errstate(all="raise"):
        assert codec.noise(bytes(body), vector, bits=1) == pytest.approx([energy(vector)])
        assert codec.noise(bytes(body), np.zeros_like(vector), bits=1) == [0]


@pytest.mark.parametrize("name", ["eden", "hadamard-trellis"])
def test_no_scale_claims_more_noise_than_the_update_brings(name: str) -> None:
    vector = np.random.default_rng(1).standard_normal(512).astype(np.float32)
    codec = CODECS[name]
    body = codec.encode(vector, bits=1, seed=b"s")
    forged = np.float32(1e6).tobytes() + body[4:]  # the scale of the only block
    terms: dict[str, Any] = {"bits": 1, "segments": (500, 12)}
    bound = [energy(vector[:500]), energy(vector[500:])]
    assert noise_known(codec).noise(forged, vector, **terms) == pytest.approx(bound)


@pytest.mark.parametrize("correlation", [0, 0.9])
@pytest.mark.parametrize("bits", [0.5, 1])
def test_the_squared_error_of_the_mean_falls_as_theory_says(
    bits: float, correlation: float
) -> None:
    count, layout = 10, Layout.from_tensors({"a": (2500,), "b": (1500,)})
    config = TRELLIS.replace(update__bits=bits)
    errors, told = np.zeros(2), 0.0
    for seed in range(2):
        generator = np.random.default_rng(seed)
        own_nN = generator.standard_normal((count, 4000))
        rows_nN = np.sqrt(correlation) * generator.standard_normal(4000)
        rows_nN = (rows_nN + np.sqrt(1 - correlation) * own_nN).astype(np.float32)
        meant_N = rows_nN.astype(np.float64).mean(0)
        shrunk_N, replies = judged(rows_nN, config, layout)
        mean_N = np.mean([admitted.decode() for admitted, _ in replies.admitted.values()], axis=0)
        errors += [energy(mean_N - meant_N), energy(shrunk_N - meant_N)]
        # Wiener's: the energy that is meant, by its share in what is decoded.
        meant, noise = energy(meant_N), energy(mean_N - meant_N)
        told += noise * meant / (meant + noise)
    assert errors[1] == pytest.approx(told, rel=0.05)
    # n·V for one bit: 0.39 → 0.39/1.39; correlated means are far above the noise.
    assert errors[1] / errors[0] < (0.97 if correlation else {0.5: 0.5, 1: 0.75}[bits])


def test_float32_updates_are_not_changed_by_a_bit() -> None:
    layout = Layout.from_tensors({"a": (50,), "b": (3,)}, fine={"b"})
    rows_nN = np.random.default_rng(2).standard_normal((3, 53)).astype(np.float32)
    exact = RunConfig().replace(update__codec="float32", update__bits=32)
    shrunk_N, _ = judged(rows_nN, exact.replace(federation__shrinkage=True), layout)
    assert shrunk_N.tobytes() == judged(rows_nN, exact, layout)[0].tobytes()


def test_the_factor_is_that_of_james_and_stein_and_never_negative() -> None:
    assert shrinkage_factor(3, 10, 100) == pytest.approx(1 - 0.98 * 0.3)
    assert shrinkage_factor(30, 10, 100) == 0
    assert shrinkage_factor(30, 0, 100) == 0


def test_each_tensor_is_shrunk_by_its_own_noise_and_statistics_are_left_alone() -> None:
    layout = Layout.from_tensors(
        {"a": (4,), "n.running_mean": (4,), "n.running_var": (4,), "two": (2,), "c": (4,)}
    )
    shrinkage = Shrinkage(layout)
    shrinkage.add(np.array([8.0, 8, 8, 8, 0]), 3)
    shrinkage.add(np.array([16.0, 16, 16, 16, 0]), 1)
    # Noise (9·8 + 16)/16 = 5.5, energy 4·4: 1 - 2/4·5.5/16.
    shrunk_N = shrinkage.shrink(np.full(18, 2, np.float32), 4)
    assert shrunk_N.tolist() == pytest.approx([1.65625] * 4 + [2] * 14)


def test_a_stale_update_brings_the_noise_of_its_weight_and_the_step_stays_shorter() -> None:
    layout = Layout.from_tensors({"a": (3000,)})
    rows_nN = np.random.default_rng(3).standard_normal((2, 3000)).astype(np.float32)
    buffered = TRELLIS.replace(federation__mode="buffered", update__bits=1)
    shrunk_N, replies = judged(rows_nN, buffered, layout, started={0: 1})
    weights = (0.5, 1.0)  # 1/sqrt(1 + 3)
    mean_N, noise = np.zeros(3000), 0.0
    for client, weight in enumerate(weights):
        bodies = replies.admitted[client][0].decode_bodies()
        mean_N += weight / 1.5 * bodies[0]
        noise += (weight / 1.5) ** 2 * replies.admitted[client][0].noise(bodies).item()
    factor = shrinkage_factor(noise, energy(mean_N), 3000)
    assert 0.5 < factor < 0.9
    np.testing.assert_allclose(shrunk_N, 0.75 * factor * mean_N, rtol=1e-4)


def test_with_privacy_all_updates_bring_their_noise_equally() -> None:
    layout = Layout.from_tensors({"a": (3000,)})
    rows_nN = np.random.default_rng(4).standard_normal((3, 3000)).astype(np.float32)
    private = TRELLIS.replace(update__bits=1, privacy__clip_norm=100.0)
    shrunk_N, replies = judged(rows_nN, private, layout)
    updates = [admitted for admitted, _ in replies.admitted.values()]
    noise = sum(one.noise(one.decode_bodies()).item() for one in updates) / 9
    mean_N = sum(one.decode() for one in updates) / 3
    factor = shrinkage_factor(noise, energy(mean_N), 3000)
    np.testing.assert_allclose(shrunk_N, factor * mean_N, rtol=1e-4, atol=1e-6)


def test_tensors_whose_codec_cannot_tell_are_left_as_they_are() -> None:
    layout = Layout.from_tensors({"a": (500,), "fine": (100,)}, fine={"fine"})
    rows_nN = np.random.default_rng(5).standard_normal((2, 600)).astype(np.float32)
    eden = RunConfig().replace(update__bits=1)  # the fine tensors by `linear`
    mean_N, _ = judged(rows_nN, eden, layout)
    shrunk_N, _ = judged(rows_nN, eden.replace(federation__shrinkage=True), layout)
    assert energy(shrunk_N[:500]) < 0.9 * energy(mean_N[:500])
    assert shrunk_N[500:].tobytes() == mean_N[500:].tobytes()


def test_no_second_vector_is_made() -> None:
    length = 400_000
    layout = Layout.from_tensors({"a": (length,)})
    expected = update_payload(layout, TRELLIS.replace(update__bits=1), 4, 0)
    update = admit(pack(np.ones(length, np.float32), expected), expected)
    assert isinstance(update, Admitted)
    bodies = update.decode_bodies()
    shrinkage, mean_N = Shrinkage(layout), np.ones(length, np.float32)
    tracemalloc.start()
    try:
        shrinkage.add(update.noise(bodies), 1)
        shrinkage.shrink(mean_N, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mean_N[0] < 0.9
    assert peak < 4 * length


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"federation__aggregation": "median"},
            "federation.shrinkage: expected federation.aggregation mean, found median",
        ),
        (
            {"update__error_feedback": "auto", "federation__rounds": 8},
            "expected update.error-feedback off, found auto, which feeds back in this setting",
        ),
        ({"update__codec": "qsgd", "update__bits": 4}, "trellis-even, dithered"),
        ({"update__codec": "top-k", "update__bits": 0.5}, "can tell (float32, eden, trellis,"),
    ],
)
def test_a_setting_in_which_the_noise_cannot_be_told_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        TRELLIS.replace(**changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
