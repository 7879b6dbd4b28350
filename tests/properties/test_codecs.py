"""What every codec in the table must hold to, and what each promises beyond it."""

import functools
import hashlib

import numpy as np
import pytest

from fedcunet.codecs import CODECS, Codec, get_codec, make_seed
from fedcunet.errors import UserError

WIDTHS = (1, 2, 3, 4, 8, 11, 16, 32)
BUDGETS = (0.5, 2.25)
ALL = [
    pytest.param(codec, bits, id=f"{name}-{bits}")
    for name, codec in CODECS.items()
    for bits in (BUDGETS if codec.budget else WIDTHS)
    if codec.min_bits <= bits <= codec.max_bits
]
UNBIASED = [
    case
    for case in ALL
    if case.values[0].unbiased and case.values[1] in (1, 2, 4, 8, 32, BUDGETS[1])
]
SEED = make_seed(1, 2, 3, "test")


@functools.cache
def vectors() -> dict[str, np.ndarray]:
    """Awkward vectors by name, float32."""
    generator = np.random.default_rng(7)
    outlier = generator.standard_normal(300)
    outlier[17] = 1e30
    return {
        "empty": np.empty(0, dtype=np.float32),
        "one": np.array([-0.3], dtype=np.float32),
        "zeros": np.zeros(77, dtype=np.float32),
        "constant": np.full(130, -1e-4, dtype=np.float32),
        "odd": generator.standard_normal(63).astype(np.float32),
        "power of two": generator.standard_normal(256).astype(np.float32),
        "several blocks": generator.standard_normal(2**14 + 8261).astype(np.float32),
        "heavy tails": generator.standard_cauchy(2000).astype(np.float32),
        "denormals": np.float32(1e-42) * generator.integers(-9, 9, 100).astype(np.float32),
        "smallest": np.array([0, 2.0**-149, -(2.0**-149)], dtype=np.float32),
        "outlier": outlier.astype(np.float32),
        "largest": np.array([2.0**120, -(2.0**120), 1.0], dtype=np.float32),
    }


def round_trip(codec: Codec, vector: np.ndarray, bits: float, seed: bytes = SEED) -> np.ndarray:
    body = codec.encode(vector, bits=bits, seed=seed)
    return codec.decode(body, length=vector.size, bits=bits, seed=seed)


def squared(values: np.ndarray) -> float:
    return float(np.sum(np.square(values.astype(np.float64))))


def nmse(decoded: np.ndarray, vector: np.ndarray) -> float:
    return squared(decoded.astype(np.float64) - vector) / squared(vector)


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_every_vector_comes_back_finite_in_a_body_of_the_stated_length(
    codec: Codec, bits: float
) -> None:
    for name, vector in vectors().items():
        # Codecs that search for their step take their time; they have a test of long vectors.
        if codec.budget and vector.size > 1000 and bits != BUDGETS[1]:
            continue
        check_round_trip(codec, bits, vector, name)


def check_round_trip(codec: Codec, bits: float, vector: np.ndarray, name: str) -> None:
    """One coding and decoding, whole and in segments, of a vector that must stay as it is."""
    before = vector.copy()
    for segments in ((), (0, vector.size // 3, 0, vector.size - vector.size // 3)):
        body = codec.encode(vector, bits=bits, seed=SEED, segments=segments)
        assert isinstance(body, bytes)
        least, most = codec.body_limits(length=vector.size, bits=bits, segments=segments)
        assert least <= len(body) <= most, name
        assert codec.budget or least == most
        decoded = codec.decode(body, length=vector.size, bits=bits, seed=SEED, segments=segments)
        assert decoded.dtype == np.float32
        assert decoded.shape == vector.shape
        assert np.isfinite(decoded).all(), name
        assert body == codec.encode(vector, bits=bits, seed=SEED, segments=segments)
    np.testing.assert_array_equal(vector, before)


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_zeros_come_back_as_zeros(codec: Codec, bits: float) -> None:
    assert not round_trip(codec, np.zeros(200, dtype=np.float32), bits).any()


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_the_length_of_a_body_is_what_was_asked_for(codec: Codec, bits: float) -> None:
    for length in (
        1,
        2,
        63,
        64,
        65,
        1000,
        *((2**17 + 77,) if codec.budget else (2**14, 2**14 + 1)),
    ):
        vector = np.random.default_rng(length).standard_normal(length).astype(np.float32)
        body = codec.encode(vector, bits=bits, seed=SEED)
        least, most = codec.body_limits(length=length, bits=bits)
        assert least <= len(body) <= most
        if codec.budget:
            # Within 1 % of the budget, where it is not a matter of the head alone.
            assert length < 2**17 or abs(8 * len(body) / length - bits) < 0.01 * bits
            continue
        # Nothing like padding to a power of two of the whole.
        per_scale = 512 if codec.name == "qsgd" else 2**14
        assert 8 * len(body) <= bits * (length + 63) + 8 * 4 * (length // per_scale + 9)


def peaked(kind: str) -> np.ndarray:
    """40 tensors of 500 values, of which a few carry the energy, as steps that bfloat16 takes."""
    generator = np.random.default_rng(11)
    scales = np.repeat(np.exp(generator.normal(0, 0.7, 40)), 500)
    gaussian = generator.standard_normal(20_000)
    values = {
        "half zeros": gaussian * (generator.random(20_000) < 0.5),
        "a tenth is not zero": gaussian * (generator.random(20_000) < 0.1),
        "dead filters": gaussian * np.repeat(generator.random(800) < 0.4, 25),
        "some tensors are sparse": gaussian * (np.arange(20_000) < 10_000)
        + gaussian * (generator.random(20_000) < 0.05),
        "Laplace cubed": generator.laplace(size=20_000) ** 3,
        "a mixture of scales": gaussian * np.exp(1.5 * generator.standard_normal(20_000)),
    }[kind]
    return (values * scales).astype(np.float32)


@pytest.mark.parametrize("name", ["trellis", "trellis-wiener", "dithered"])
@pytest.mark.parametrize(
    "kind",
    [
        "half zeros",
        "a tenth is not zero",
        "dead filters",
        "some tensors are sparse",
        "Laplace cubed",
        "a mixture of scales",
    ],
)
def test_budgets_are_met_where_few_values_carry_the_energy(name: str, kind: str) -> None:
    codec, segments = CODECS[name], (500,) * 40
    vector = peaked(kind)
    gaussian = np.random.default_rng(12).standard_normal(20_000).astype(np.float32)
    for bits in (0.5, 1, 2):
        body = codec.encode(vector, bits=bits, seed=SEED, segments=segments)
        assert abs(8 * len(body) / vector.size - bits) < 0.05 * bits
        decoded = codec.decode(body, length=20_000, bits=bits, seed=SEED, segments=segments)
        # Such values are worth no more bits than Gaussian ones of the same energy, of which
        # Wiener's factor does not know all.
        most = 1.3 if codec.unbiased else 1.5
        assert nmse(decoded, vector) < most * nmse(round_trip(codec, gaussian, bits), gaussian)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.6])
def test_no_budget_is_missed_where_a_tensor_goes_down_to_a_share(share: float) -> None:
    """Of one sparse tensor: its step must not leap where the share begins."""
    generator = np.random.default_rng(14)
    values = generator.standard_normal(20_000) * (generator.random(20_000) < share)
    vector = values.astype(np.float32)
    for bits in (0.4, 0.5, 0.7, 1):
        body = CODECS["trellis"].encode(vector, bits=bits, seed=SEED)
        assert abs(8 * len(body) / vector.size - bits) < 0.03 * bits, bits


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_even_steps_reach_beyond_values_of_which_most_are_zero(share: float) -> None:
    generator = np.random.default_rng(13)
    vector = (generator.standard_normal(3000) * (generator.random(3000) < share)).astype(np.float32)
    body = CODECS["trellis-even"].encode(vector, bits=0.25, seed=SEED)
    assert len(body) <= CODECS["trellis-even"].body_limits(length=3000, bits=0.25)[1]


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_a_body_of_another_length_is_refused(codec: Codec, bits: float) -> None:
    vector = np.ones(100, dtype=np.float32)
    body = codec.encode(vector, bits=bits, seed=SEED)
    for wrong in (body[:-1], body + b"\0", b""):
        with pytest.raises(ValueError, match=None if codec.budget else r"has .* bytes, not"):
            codec.decode(wrong, length=100, bits=bits, seed=SEED)


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_any_body_of_the_right_length_decodes_or_is_refused(codec: Codec, bits: float) -> None:
    length, segments = 100, (60, 0, 40)
    _, size = codec.body_limits(length=length, bits=bits, segments=segments)
    generator = np.random.default_rng(5)
    signalling = (b"\1\0\xa0\x7f" * size)[:size]  # float32's NaN that warns when it is cast
    made = (generator.bytes(size) for _ in range(20))
    for body in (b"\0" * size, b"\xff" * size, signalling, *made):
        try:
            decoded = codec.decode(body, length=length, bits=bits, seed=SEED, segments=segments)
        except ValueError:
            assert codec.budget
        else:
            assert decoded.shape == (length,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e37])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_values_that_are_not_finite_or_too_large_are_refused(codec: Codec, bad: float) -> None:
    vector = np.ones(50, dtype=np.float32)
    vector[31] = bad
    with pytest.raises(ValueError, match="the first at index 31"):
        codec.encode(vector, bits=codec.min_bits, seed=SEED)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_not_a_float_vector_or_disagrees_with_segments_is_refused(codec: Codec) -> None:
    bits = codec.min_bits
    for wrong in (np.ones((2, 2), dtype=np.float32), np.ones(3, dtype=np.int64)):
        with pytest.raises(ValueError, match="takes a vector of floating point"):
            codec.encode(wrong, bits=bits, seed=SEED)
    if codec.name in ("float16", "linear", "linear-nearest", "sign"):
        with pytest.raises(ValueError, match="segments sum to 3"):
            codec.encode(np.ones(4, dtype=np.float32), bits=bits, seed=SEED, segments=(1, 2))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_bits_that_a_codec_lacks_are_a_user_error_with_its_range(codec: Codec) -> None:
    within = () if codec.budget else (codec.min_bits + 0.5,)
    for bits in (0, 33, codec.min_bits - 1, codec.max_bits + 8, *within):
        with pytest.raises(UserError, match=rf"codec '{codec.name}' must be .*{codec.min_bits:g}"):
            codec.encode(np.ones(4, dtype=np.float32), bits=bits, seed=SEED)


def test_an_unknown_codec_is_a_user_error_that_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown codec 'edem'.*float32, float16.*eden"):
        get_codec("edem")


def test_the_table_holds_each_codec_under_its_own_name() -> None:
    assert {name: codec.name for name, codec in CODECS.items()} == {name: name for name in CODECS}


@pytest.mark.parametrize(("codec", "bits"), ALL)
def test_a_reference_takes_part_in_both_directions(codec: Codec, bits: float) -> None:
    generator = np.random.default_rng(3)
    reference = generator.standard_normal(500).astype(np.float32)
    vector = reference + np.float32(1e-3) * generator.standard_normal(500).astype(np.float32)
    body = codec.encode(vector, bits=bits, seed=SEED, reference=reference)
    decoded = codec.decode(body, length=500, bits=bits, seed=SEED, reference=reference)
    difference = round_trip(codec, vector - reference, bits)
    if codec.budget:
        # What is said of the reference takes a part of the budget.
        error = nmse(decoded - reference, vector - reference)
        assert error < 1.2 * nmse(difference, vector - reference)
        return
    np.testing.assert_allclose(decoded, reference + difference, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "linear-nearest"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_linear_gives_back_values_on_its_grid_exactly(name: str, bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    numbers = np.random.default_rng(bits).integers(-most, most + 1, 400)
    numbers[[0, 200]] = most
    for exponent in (-130, -30, 0, 100):
        scales = np.repeat([2.0**exponent, 2.0 ** (exponent + 5)], 200)
        vector = (numbers * scales * 2.0 ** -(bits - 1)).astype(np.float32)
        if np.frexp(np.abs(vector[vector != 0]).min())[1] < -126 and exponent < -100:
            continue  # Finer than float32's own denormals.
        body = CODECS[name].encode(vector, bits=bits, seed=SEED, segments=(200, 200))
        decoded = CODECS[name].decode(body, length=400, bits=bits, seed=SEED, segments=(200, 200))
        np.testing.assert_array_equal(decoded, vector)


def test_linear_steps_are_at_most_one_step_and_nearest_at_most_half() -> None:
    vector = np.random.default_rng(0).standard_cauchy(3000).astype(np.float32)
    for name, most in (("linear", 1.0), ("linear-nearest", 0.5)):
        for bits in (2, 4, 8):
            largest = np.abs(vector).max() / (1 - 2.0 ** -(bits - 1))
            step = 2.0 ** np.ceil(np.log2(largest)) * 2.0 ** -(bits - 1)
            error = np.abs(round_trip(CODECS[name], vector, bits) - vector)
            assert error.max() <= most * step * 1.0001


def test_sign_gives_back_equal_magnitudes_exactly_and_takes_zero_as_positive() -> None:
    vector = np.repeat(np.float32([0.3, -2e-5]), 50)
    vector[::3] *= -1
    body = CODECS["sign"].encode(vector, bits=1, seed=SEED, segments=(50, 50))
    decoded = CODECS["sign"].decode(body, length=100, bits=1, seed=SEED, segments=(50, 50))
    np.testing.assert_array_equal(decoded, vector)
    np.testing.assert_array_equal(
        round_trip(CODECS["sign"], np.float32([0.0, -3.0]), 1), np.float32([1.5, -1.5])
    )


def test_float32_is_exact_and_float16_gives_back_halves_exactly() -> None:
    generator = np.random.default_rng(2)
    vector = generator.standard_cauchy(1000).astype(np.float32)
    np.testing.assert_array_equal(round_trip(CODECS["float32"], vector, 32), vector)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_trip(CODECS["float16"], halves, 16), halves)
    small = (1e-6 * generator.standard_normal(1000)).astype(np.float32)
    assert nmse(round_trip(CODECS["float16"], small, 16), small) < 1e-7


def spiky(length: int) -> np.ndarray:
    """One value that dwarfs the others: what a single Hadamard round cannot hide."""
    vector = np.random.default_rng(5).standard_normal(length).astype(np.float32)
    vector[length // 3] = 300.0
    return vector


@pytest.mark.parametrize(("codec", "bits"), UNBIASED)
@pytest.mark.parametrize("kind", ["heavy", "spiky"])
def test_unbiased_codecs_are_right_on_average_over_the_seeds(
    codec: Codec, bits: float, kind: str
) -> None:
    # Codecs that search for their step are slower on so few values.
    length, num_seeds = (200, 40) if codec.budget else (650, 300)
    generator = np.random.default_rng(4)
    vector = {
        "heavy": generator.standard_t(2, length),
        "spiky": spiky(length),
    }[kind].astype(np.float32)
    errors = np.stack(
        [
            round_trip(codec, vector, bits, make_seed(0, 0, client, "test")).astype(np.float64)
            - vector
            for client in range(num_seeds)
        ]
    )
    small = np.arange(length) != length // 3
    variance = np.square(errors[:, small]).mean()
    # Independent errors without bias leave variance / num_seeds; rounding to float32 adds a little.
    mean_error = np.square(errors[:, small].mean(axis=0)).mean()
    assert mean_error <= 1.3 * variance / num_seeds + 1e-13 * np.square(vector).max()


@pytest.mark.parametrize(("codec", "bits"), [case for case in UNBIASED if case.values[1] < 16])
def test_errors_of_two_clients_with_the_same_update_are_uncorrelated(
    codec: Codec, bits: float
) -> None:
    vector = np.random.default_rng(6).standard_normal(20_000).astype(np.float32)
    one, two = (
        round_trip(codec, vector, bits, make_seed(0, 1, client, "update")) - vector
        for client in (0, 1)
    )
    correlation = np.dot(one, two) / np.sqrt(squared(one) * squared(two))
    assert abs(correlation) < 5 / np.sqrt(20_000)
    same = round_trip(codec, vector, bits, make_seed(0, 1, 0, "update")) - vector
    np.testing.assert_array_equal(one, same)


def test_seeds_differ_in_every_part_and_cannot_be_confused() -> None:
    seeds = {
        make_seed(*parts, purpose)
        for parts in ((1, 23, 4), (12, 3, 4), (1, 2, 34), (0, 0, 0))
        for purpose in ("update", "fine")
    }
    assert len(seeds) == 8
    assert all(len(seed) == 16 for seed in seeds)


def test_bodies_of_codecs_without_floating_point_products_stay_as_they_are() -> None:
    # A change here breaks payloads that were written before: it needs a new payload version.
    vector = (np.arange(-50, 51) ** 3 / 7).astype(np.float32)
    bodies = b"".join(
        CODECS[name].encode(vector, bits=bits, seed=SEED, segments=(40, 61))
        for name, bits in (("float16", 16), ("linear", 3), ("linear-nearest", 5), ("sign", 1))
    )
    assert hashlib.sha256(bodies).hexdigest() == GOLDEN_BODIES


GOLDEN_BODIES = "e8d167bc1cba71a61759b082952d220ab02ec987fae5cee275b24b39c9388ad7"
