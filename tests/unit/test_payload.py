"""The bytes of an update: exact size, what is refused and why, and that nothing ever raises."""

import contextlib
import dataclasses
import hashlib
import struct

import numpy as np
import pytest

from fedcunet.codecs import CODECS
from fedcunet.errors import UserError
from fedcunet.expected import OVERHEAD_BYTES, Expected, fine_codec
from fedcunet.layout import Layout
from fedcunet.payload import (
    Admitted,
    Refused,
    admit,
    bits_per_parameter,
    check_values,
    decode_own,
    open_vector,
    pack,
)
from fedcunet.payload_header import WIRE_IDS, Rejection

LAYOUT = Layout.from_tensors(
    {
        "stem.weight": (4, 3, 3, 3),
        "block.weight": (8, 4, 3, 3),
        "block.norm.weight": (8,),
        "block.norm.bias": (8,),
        "block.scalar": (),
        "empty": (0, 5),
        "deep.weight": (16, 8, 1, 1),
        "head.weight": (5, 16, 1, 1),
    },
    fine={"stem.weight", "block.norm.weight", "block.norm.bias", "head.weight"},
)
CODECS_AND_BITS = [(name, bits) for name, codec in CODECS.items() for bits in {codec.min_bits}] + [
    ("eden", 2),
    ("linear", 8),
]


def expected_for(codec: str = "eden", bits: float = 2, **changes: object) -> Expected:
    terms = Expected(layout=LAYOUT, run_seed=9, round=3, sender=41, codec=codec, bits=bits)
    return dataclasses.replace(terms, **changes)


def update(layout: Layout = LAYOUT) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (1e-3 * generator.standard_normal(layout.num_parameters)).astype(np.float32)


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.blake2b(content, digest_size=8).digest()


def reason_of(blob: bytes, expected: Expected) -> str:
    answer = admit(blob, expected)
    assert isinstance(answer, Rejection)
    assert answer.detail
    return answer.reason


@pytest.mark.parametrize(("codec", "bits"), CODECS_AND_BITS)
@pytest.mark.parametrize("fine_bits", [2, 8, 16, 32])
def test_a_payload_has_the_stated_length_and_its_owner_decodes_what_the_server_does(
    codec: str, bits: float, fine_bits: float
) -> None:
    expected = expected_for(codec, bits, fine_bits=fine_bits)
    blob = pack(update(), expected)
    least, most = expected.payload_limits
    assert least <= len(blob) <= most
    assert CODECS[codec].budget or least == most
    admitted = admit(blob, expected)
    assert isinstance(admitted, Admitted)
    decoded = admitted.decode()
    assert decoded.dtype == np.float32
    assert decoded.shape == (LAYOUT.num_parameters,)
    np.testing.assert_array_equal(decoded, decode_own(blob, expected))
    assert blob == pack(LAYOUT.split(update()), expected)
    assert bits_per_parameter(blob, LAYOUT) == 8 * len(blob) / LAYOUT.num_parameters


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec.budget])
@pytest.mark.parametrize("bits", [0.5, 1])
def test_a_budget_counts_header_and_fine_tensors(codec: str, bits: float) -> None:
    # A tenth of the values is fine, at 2 bits: without its bytes the length is far off.
    layout = Layout.from_tensors({"deep": (90_000,), "head": (10_000,)}, fine={"head"})
    expected = expected_for(codec, bits, layout=layout, fine_bits=2)
    blob = pack(update(layout), expected)
    assert abs(bits_per_parameter(blob, layout) - bits) < 0.01 * bits


def test_the_payload_length_is_the_formula_worked_out_by_hand() -> None:
    # Main: 288 + 1 + 0 + 128 = 417 values in 7 blocks of 64 or more (256, 128, and 33 filled up to
    # 64): 3 scales and 448 codes of 2 bits. Fine: 108 + 8 + 8 + 80 = 204 bytes and 4 exponents.
    assert expected_for().payload_limits == 2 * (60 + (3 * 4 + 448 * 2 // 8) + (204 + 4),)
    assert OVERHEAD_BYTES == 60
    # float32 takes the fine tensors along.
    assert expected_for("float32", 32).payload_limits == 2 * (60 + 4 * (417 + 204),)


def test_the_header_stands_where_the_documentation_says() -> None:
    vector = np.float32([1.0, -2.0])
    expected = Expected(
        layout=Layout.vector(2), run_seed=5, round=6, sender=7, codec="float32", bits=32
    )
    layout_id = hashlib.blake2b(b'[["vector"], [[2]], [false]]', digest_size=8).digest()
    content = (
        b"FCUP\x01\x01\x01\x00"
        + struct.pack("<HH", 32 * 256, 32 * 256)
        + layout_id
        + struct.pack("<QIQIII", 5, 6, 7, 2, 8, 0)
        + struct.pack("<ff", 1.0, -2.0)
    )
    assert pack(vector, expected) == with_checksum(content)


def test_fine_tensors_are_coded_at_the_fine_bits_and_the_others_by_the_codec() -> None:
    vector = update()
    tensors = LAYOUT.split(vector)
    decoded = LAYOUT.split(
        decode_own(pack(vector, expected_for("sign", 1)), expected_for("sign", 1))
    )
    for name, fine in zip(LAYOUT.names, LAYOUT.fine, strict=True):
        if fine:
            step = 2.0 ** np.ceil(np.log2(np.abs(tensors[name]).max() * 128 / 127)) / 128
            assert np.abs(decoded[name] - tensors[name]).max() <= step * 1.0001
        elif tensors[name].size > 1:
            assert np.unique(np.abs(decoded[name])).size == 1
            np.testing.assert_allclose(
                np.abs(decoded[name]).max(), np.abs(tensors[name]).mean(), rtol=1e-5
            )


def test_the_same_update_packs_to_the_same_bytes_and_another_sender_to_others() -> None:
    blob = pack(update(), expected_for())
    assert blob == pack(update(), expected_for())
    for changes in ({"sender": 42}, {"round": 4}, {"run_seed": 10}):
        other = pack(update(), expected_for(**changes))
        assert other[52:-8] != blob[52:-8]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": Layout.vector(LAYOUT.num_parameters)}, "wrong-layout"),
        ({"run_seed": 8}, "wrong-seed"),
        ({"round": 2}, "wrong-round"),
        ({"sender": 40}, "wrong-sender"),
        ({"codec": "linear"}, "wrong-codec"),
        ({"fine_bits": 32}, "wrong-codec"),
        ({"bits": 3}, "wrong-bits"),
        ({"fine_bits": 7}, "wrong-bits"),
    ],
)
def test_a_whole_payload_that_is_not_the_expected_one_is_refused_with_its_reason(
    changes: dict[str, object], reason: str
) -> None:
    assert reason_of(pack(update(), expected_for()), expected_for(**changes)) == reason


def test_a_payload_that_is_not_whole_is_refused_with_its_reason() -> None:
    expected = expected_for()
    blob = pack(update(), expected)
    assert reason_of(b"", expected) == "too-short"
    assert reason_of(blob[:59], expected) == "too-short"
    assert reason_of(blob[:-1], expected) == "wrong-length"
    assert reason_of(blob + b"\0", expected) == "wrong-length"
    assert reason_of(b"PK" + blob[2:], expected) == "bad-magic"
    assert reason_of(blob[:4] + b"\x02" + blob[5:], expected) == "bad-version"
    assert reason_of(blob[:-1] + bytes([blob[-1] ^ 1]), expected) == "bad-checksum"
    longer = bytearray(blob[:-8] + b"\0\0")
    struct.pack_into("<I", longer, 48, struct.unpack_from("<I", blob, 48)[0] + 2)
    assert reason_of(with_checksum(bytes(longer)), expected) == "wrong-length"


@pytest.mark.parametrize(("codec", "bits"), CODECS_AND_BITS)
def test_any_changed_byte_of_a_payload_is_refused(codec: str, bits: float) -> None:
    layout = Layout.from_tensors({"a": (5,), "b": (3,)}, fine={"b"})
    expected = expected_for(codec, bits, layout=layout)
    blob = pack(update(layout), expected)
    for position in range(len(blob)):
        for change in (1, 0x80, 0xFF):
            changed = bytearray(blob)
            changed[position] ^= change
            assert isinstance(admit(bytes(changed), expected), Rejection), position


@pytest.mark.parametrize(("codec", "bits"), CODECS_AND_BITS)
def test_no_mutation_or_truncation_makes_admission_or_decoding_raise(
    codec: str, bits: float
) -> None:
    layout = Layout.from_tensors({"a": (90,), "b": (3,), "c": (40,)}, fine={"b"})
    expected = expected_for(codec, bits, layout=layout)
    blob = pack(update(layout), expected)
    generator = np.random.default_rng(1)
    admitted = 0
    for trial in range(300):
        changed = bytearray(blob[: generator.integers(len(blob))] if trial % 3 == 0 else blob)
        if changed:
            for position in generator.integers(0, len(changed), generator.integers(1, 6)):
                changed[position] = generator.integers(256)
        mutated = bytes(changed)
        if trial % 2 and len(mutated) >= 8:
            mutated = with_checksum(mutated[:-8])
        for answer in (admit(mutated, expected), open_vector(mutated)):
            if isinstance(answer, Admitted):
                admitted += 1
                with contextlib.suppress(Refused):
                    check_values(answer.decode(), limit=1e30)
    assert admitted, "no mutation got as far as decoding"


def test_bytes_that_are_no_payload_never_raise() -> None:
    generator = np.random.default_rng(2)
    for trial in range(300):
        noise = generator.bytes(int(generator.integers(0, 200)))
        blob = with_checksum(b"FCUP\x01" + noise) if trial % 2 else noise
        assert isinstance(admit(blob, expected_for()), Rejection)
        assert isinstance(open_vector(blob), Rejection)


def test_a_header_that_claims_billions_of_values_is_refused_before_anything_is_allocated() -> None:
    expected = Expected(
        layout=Layout.vector(2**32 - 1), run_seed=0, round=0, sender=0, codec="sign", bits=1
    )
    small = pack(
        np.ones(8, dtype=np.float32), dataclasses.replace(expected, layout=Layout.vector(8))
    )
    forged = bytearray(small[:-8])
    forged[12:20] = expected.layout.layout_id
    struct.pack_into("<I", forged, 40, 2**32 - 1)
    answer = open_vector(with_checksum(bytes(forged)))
    assert isinstance(answer, Rejection)
    assert answer.reason == "wrong-length"


def test_scales_that_no_encoder_makes_decode_to_values_that_the_check_refuses() -> None:
    for name, bits in (("eden", 1), ("sign", 1)):
        expected = expected_for(name, bits, layout=Layout.vector(64))
        for scale, reason in ((np.nan, "not-finite"), (np.inf, "not-finite"), (3e38, "too-large")):
            forged = bytearray(pack(np.ones(64, dtype=np.float32), expected)[:-8])
            struct.pack_into("<f", forged, 52, scale)
            admitted = admit(with_checksum(bytes(forged)), expected)
            assert isinstance(admitted, Admitted)
            problem = check_values(admitted.decode(), limit=10.0)
            assert problem is not None
            assert problem.reason == reason or (name == "eden" and problem.reason == "not-finite")


def test_values_are_checked_for_finiteness_magnitude_and_norm() -> None:
    vector = np.float32([3.0, -4.0])
    assert check_values(vector, limit=4.0) is None
    assert check_values(vector, limit=4.0, norm_limit=5.0) is None
    assert check_values(np.empty(0, dtype=np.float32), limit=0.0) is None
    for values, limits, reason in (
        (vector, {"limit": 3.9}, "too-large"),
        (vector, {"limit": 4.0, "norm_limit": 4.9}, "too-large"),
        (np.float32([0, np.nan]), {"limit": 9.0}, "not-finite"),
        (np.float32([0, -np.inf]), {"limit": np.inf}, "not-finite"),
    ):
        problem = check_values(values, **limits)
        assert problem is not None
        assert problem.reason == reason


def test_updates_of_wrong_shape_or_not_finite_are_not_packed() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(621,\)"):
        pack(np.zeros(3, dtype=np.float32), expected_for())
    bad = update()
    bad[200] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        pack(bad, expected_for())
    tensors = LAYOUT.split(update())
    with pytest.raises(ValueError, match=r"differ in: deep\.weight"):
        pack(
            {name: part for name, part in tensors.items() if name != "deep.weight"}, expected_for()
        )
    with pytest.raises(ValueError, match=r"'empty' has shape \(1,\), not \(0, 5\)"):
        pack(tensors | {"empty": np.zeros(1)}, expected_for())


def test_flatten_split_gather_and_scatter_agree() -> None:
    vector = update()
    tensors = LAYOUT.split(vector)
    assert {name: part.shape for name, part in tensors.items()} == dict(
        zip(LAYOUT.names, LAYOUT.shapes, strict=True)
    )
    np.testing.assert_array_equal(LAYOUT.flatten(tensors), vector)
    main, fine = LAYOUT.gather(vector, fine=False), LAYOUT.gather(vector, fine=True)
    assert (main.size, fine.size) == (417, 204)
    np.testing.assert_array_equal(main[:288], tensors["block.weight"].reshape(-1))
    np.testing.assert_array_equal(LAYOUT.scatter(main, fine), vector)


@pytest.mark.parametrize("fine", [set(), {"a"}, {"a", "b"}])
def test_layouts_of_one_kind_of_tensor_work(fine: set[str]) -> None:
    layout = Layout.from_tensors({"a": (70,), "b": (2, 3)}, fine=fine)
    expected = expected_for("linear", 8, layout=layout)
    blob = pack(update(layout), expected)
    assert len(blob) == OVERHEAD_BYTES + 76 + 2
    np.testing.assert_allclose(decode_own(blob, expected), update(layout), atol=1e-4)


def test_layout_ids_differ_by_name_shape_order_and_mark() -> None:
    layouts = [
        Layout.from_tensors({"a": (2, 3), "b": (1,)}),
        Layout.from_tensors({"a": (3, 2), "b": (1,)}),
        Layout.from_tensors({"b": (1,), "a": (2, 3)}),
        Layout.from_tensors({"a": (2, 3), "c": (1,)}),
        Layout.from_tensors({"a": (2, 3), "b": (1,)}, fine={"b"}),
    ]
    assert len({layout.layout_id for layout in layouts}) == len(layouts)
    assert layouts[0].layout_id == Layout.from_tensors({"a": (2, 3), "b": (1,)}).layout_id


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no such tensor.*conv"):
        Layout.from_tensors({"a": (1,)}, fine={"conv"})
    with pytest.raises(ValueError, match="negative"):
        Layout.vector(-1)
    with pytest.raises(ValueError, match="more than"):
        Layout.vector(2**32)
    with pytest.raises(ValueError, match="twice"):
        Layout(names=("a", "a"), shapes=((1,), (1,)), fine=(False, False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"bits": 9}, "from 1 to 8"),
        ({"bits": 33}, "from 1 to 8"),
        ({"fine_bits": 1}, "fine bits"),
        ({"fine_bits": 17}, "fine bits"),
        ({"fine_bits": 7.5}, "whole number"),
        ({"run_seed": -1}, "seed must be in"),
        ({"round": 2**32}, "round must be in"),
        ({"sender": 2**64}, "sender must be in"),
    ],
)
def test_terms_that_no_payload_can_meet_are_a_user_error(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        expected_for(**changes)


def test_the_fine_codec_follows_the_bits_and_float32() -> None:
    assert fine_codec("eden", 2, 8) == ("linear", 8)
    assert fine_codec("eden", 2, 16) == ("float16", 16)
    assert fine_codec("eden", 2, 32) == ("float32", 32)
    assert fine_codec("float32", 32, 8) == ("float32", 32)
    assert fine_codec("eden", 2, 0) == ("linear", 8)
    assert fine_codec("trellis", 0.5, 0) == ("trellis-even", 2)
    assert fine_codec("trellis", 0.25, 4) == ("linear", 4)


def test_every_codec_has_a_number_of_its_own_on_the_wire() -> None:
    assert set(WIRE_IDS) == set(CODECS)
    assert len(set(WIRE_IDS.values())) == len(WIRE_IDS)
    # Given numbers stay: payloads are kept in files.
    assert WIRE_IDS["float32"] == 1
    assert WIRE_IDS["eden"] == 6


def test_a_vector_payload_opens_from_its_bytes_alone() -> None:
    vector = np.random.default_rng(3).standard_normal(500).astype(np.float32)
    for codec, bits in CODECS_AND_BITS:
        terms = Expected(
            layout=Layout.vector(500), run_seed=2**63, round=0, sender=0, codec=codec, bits=bits
        )
        blob = pack(vector, terms)
        opened = open_vector(blob)
        assert isinstance(opened, Admitted)
        np.testing.assert_array_equal(opened.decode(), decode_own(blob, terms))
    model = open_vector(pack(update(), expected_for()))
    assert isinstance(model, Rejection)
    assert model.reason == "wrong-layout"


def test_an_own_payload_of_other_terms_is_our_mistake_and_says_so() -> None:
    with pytest.raises(ValueError, match="own payload: wrong-round"):
        decode_own(pack(update(), expected_for()), expected_for(round=5))
