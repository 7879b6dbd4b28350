"""The trellis codec's own promises: limits, tables, trellises, parts and states."""

import hashlib
import itertools

import numpy as np
import pytest

from fedcunet.codecs import CODECS, make_seed
from fedcunet.codecs.allocation import Statistics, Tensors
from fedcunet.codecs.densities import NUM_CLASSES, SHAPES, class_weights, table_of
from fedcunet.codecs.entropy import (
    FrequencyTable,
    LaneDecoder,
    _read_states,
    _state_words,
    encode_lanes,
)
from fedcunet.codecs.escapes import escapes_length, pack_escapes, unpack_escapes
from fedcunet.codecs.rangecoder import RangeDecoder, RangeEncoder
from fedcunet.codecs.thinning import WHOLE, kept_values
from fedcunet.codecs.trellis import TrellisCodec, _Job
from fedcunet.codecs.viterbi import NUM_STATES, next_states, search

SEED = make_seed(1, 2, 3, "test")


def gaussian(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal(length).astype(np.float32)


def coded(codec: TrellisCodec, vector: np.ndarray, bits: float, **terms: object) -> np.ndarray:
    body = codec.encode(vector, bits=bits, seed=SEED, **terms)
    return codec.decode(body, length=vector.size, bits=bits, seed=SEED, **terms)


def energy(values: np.ndarray) -> float:
    return float(np.square(values.astype(np.float64)).sum())


@pytest.mark.parametrize(("bits", "most"), [(0.5, 0.11), (1, 0.1), (4, 0.1)])
def test_the_rate_is_near_the_limit_of_an_unbiased_codec(bits: float, most: float) -> None:
    vector = gaussian(2**17)
    codec = CODECS["trellis"]
    body = codec.encode(vector, bits=bits, seed=SEED)
    decoded = codec.decode(body, length=vector.size, bits=bits, seed=SEED)
    nmse = energy(decoded - vector) / energy(vector)
    gap = 8 * len(body) / vector.size - 0.5 * np.log2(1 + 1 / nmse)
    assert 0 < gap < most


def test_tensors_of_different_scale_cost_what_their_scale_asks_for() -> None:
    vector, lengths = gaussian(60_000), (20_000, 20_000, 20_000)
    vector *= np.repeat(np.float32([1, 0.1, 0.01]), 20_000)
    body = CODECS["trellis"].encode(vector, bits=2, seed=SEED, segments=lengths)
    terms = {"length": 60_000, "bits": 2, "seed": SEED, "segments": lengths}
    error = np.square(CODECS["trellis"].decode(body, **terms) - vector).reshape(3, -1).mean(axis=1)
    # The same error for those far above the step, less for the weakest.
    assert 0.7 * error[0] < error[1] < error[0]
    assert error[2] < 0.5 * error[1]
    even = coded(CODECS["trellis-even"], vector, 2, segments=lengths)
    share = np.square(even - vector).reshape(3, -1).mean(axis=1) * [1, 100, 10_000]
    np.testing.assert_allclose(share, share[0], rtol=0.25)


def test_weak_tensors_cost_few_bits_and_err_little() -> None:
    vector, lengths = gaussian(64_000), (16_000, 48_000)
    vector *= np.repeat(np.float32([1, 0.02]), lengths)
    decoded = coded(CODECS["trellis"], vector, 0.25, segments=lengths)
    # A floor of 0.15 bit for each weak value would leave 0.55 of the 1 bit of the strong ones.
    assert energy(decoded - vector) < 0.7 * energy(vector)


def test_values_of_which_a_share_is_coded_come_back_right_on_average() -> None:
    vector, lengths = gaussian(3000), (1000, 2000)
    vector *= np.repeat(np.float32([1, 0.05]), lengths)
    total, num_seeds, zeros = np.zeros(3000), 40, 0
    for number in range(num_seeds):
        terms = {"bits": 0.5, "seed": make_seed(number, 0, 0, "test"), "segments": lengths}
        body = CODECS["trellis"].encode(vector, **terms)
        decoded = CODECS["trellis"].decode(body, length=3000, **terms)
        zeros += int((decoded == 0).sum())
        total += decoded
    assert zeros > 0.2 * num_seeds * 3000
    slope = [
        float(mean @ part / (part @ part))
        for mean, part in zip(
            np.split(total / num_seeds, [1000]), np.split(vector, [1000]), strict=True
        )
    ]
    np.testing.assert_allclose(slope, 1, atol=0.06)


def test_a_tensor_of_a_few_large_values_is_coded_whole() -> None:
    # By its deviation, of which the many small values decide, a share of it would do.
    vector, lengths = gaussian(40_000), (20_000, 20_000)
    vector[20_000:] *= np.float32(1e-3)
    vector[20_000::200] = 30
    for number in range(3):
        terms = {"bits": 0.5, "seed": make_seed(number, 0, 0, "test"), "segments": lengths}
        body = CODECS["trellis"].encode(vector, **terms)
        decoded = CODECS["trellis"].decode(body, length=40_000, **terms)
        assert (decoded[20_000::200] > 10).all()


def test_a_class_that_there_is_none_of_is_refused() -> None:
    one = np.ones(1, dtype=np.int64)
    tensors = Tensors(
        coded=one, classes=one * NUM_CLASSES, shapes=one, octaves=one * 0, factors=one * 0
    )
    content = tensors.to_bytes(one, "unbiased", has_reference=False)
    with pytest.raises(ValueError, match=f"class {NUM_CLASSES}, there are {NUM_CLASSES}"):
        Tensors.from_bytes(content, one, "unbiased", has_reference=False, even_class=0)


def test_a_body_is_never_longer_than_it_may_be() -> None:
    vector, lengths = gaussian(20_000), np.array([20_000])
    codec = TrellisCodec("trellis", "unbiased")
    statistics = Statistics.of(vector, lengths, np.zeros(1, dtype=np.int64))
    job = _Job(codec, vector, statistics, 2.0 * vector.size, SEED, has_reference=False)
    assert len(job.best_body(vector.size)) > vector.size // 5
    body = job.best_body(vector.size // 5)
    assert len(body) <= vector.size // 5
    decoded = codec.decode(body, length=vector.size, bits=2, seed=SEED)
    assert energy(decoded - vector) < energy(vector)


@pytest.mark.parametrize("share", [1, 700, 33_333, WHOLE])
def test_every_value_is_kept_with_the_probability_of_its_share(share: int) -> None:
    lengths, shares = np.array([50, 7]), np.array([share, 0])
    seen = np.zeros(57)
    for number in range(2000):
        counts, kept = kept_values(lengths, shares, make_seed(number, 0, 0, "test"))
        assert kept is not None
        assert counts.tolist() == [kept[:50].sum(), 0]
        seen += kept
    np.testing.assert_allclose(seen[:50] / 2000, share / WHOLE, atol=0.05)
    assert not seen[50:].any()


def test_a_prediction_is_taken_in_the_share_that_helps_and_none_where_it_does_not() -> None:
    noise, reference = gaussian(50_000), np.random.default_rng(2).standard_normal(50_000)
    reference = reference.astype(np.float32)
    close = reference + np.float32(0.3) * noise
    for vector, gain in ((close, 10), (noise, 0.97)):
        plain = energy(coded(CODECS["trellis"], vector, 1) - vector)
        predicted = energy(coded(CODECS["trellis"], vector, 1, reference=reference) - vector)
        assert plain / predicted > gain


@pytest.mark.parametrize("num_states", NUM_STATES)
def test_more_states_err_less_and_every_path_is_allowed(num_states: int) -> None:
    z_TL = np.random.default_rng(0).uniform(0, 40, (256, 96)).astype(np.float32)
    subset_TL = search(z_TL, num_states)
    state = np.zeros(96, dtype=np.int64)
    for subset in subset_TL:
        np.testing.assert_array_equal(subset & 1, state & 1)
        state = next_states(num_states)[2 * state + (subset >> 1)]
    error = np.square(subset_TL + 4 * np.rint((z_TL - subset_TL) / 4) - z_TL).mean()
    # Of a scalar quantiser with numbers of one parity it is 1/3.
    assert error < {4: 0.276, 8: 0.27, 16: 0.266}.get(num_states, 0.264)


def test_search_finds_the_least_error_of_all_paths() -> None:
    z = np.random.default_rng(3).uniform(0, 4, (7, 1)).astype(np.float32)

    def cost(branches: tuple[int, ...]) -> float:
        state, total = 0, 0.0
        for value, branch in zip(z[:, 0], branches, strict=True):
            subset = 2 * branch + (state & 1)
            total += (subset + 4 * np.rint((value - subset) / 4) - value) ** 2
            state = next_states(8)[2 * state + branch]
        return total

    found = tuple((search(z, 8)[:, 0] >> 1).tolist())
    assert cost(found) == pytest.approx(
        min(map(cost, itertools.product((0, 1), repeat=7))), rel=1e-5
    )


def test_lanes_give_back_symbols_and_what_they_carried() -> None:
    generator = np.random.default_rng(4)
    table = FrequencyTable.of_weights(generator.random((5, 30)) ** 5 + 1e-4)
    for count, lanes, extra in ((1000, 7, 3), (1000, 7, 20), (5, 8, 0), (2**15, 256, 100)):
        rows = generator.integers(0, 5, count)
        symbols = table.slots[rows * 2**13 + generator.integers(0, 2**13, count)]
        carried = generator.integers(0, 2**16, extra).astype(np.uint16)
        words = encode_lanes(table.packed[rows * 128 + symbols], lanes, carried)
        decoder = LaneDecoder(words, lanes, table)
        found = [decoder.step(2**13 * rows[at : at + lanes]) for at in range(0, count, lanes)]
        np.testing.assert_array_equal(np.concatenate(found), symbols)
        back = decoder.finish()
        np.testing.assert_array_equal(back[:extra], carried)
        assert not back[extra:].any()


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_weak_last_tensors_do_not_spoil_the_budget(factor: float) -> None:
    # The last values' words lie in the lanes' first states: fewer lanes where they are few.
    vector = np.random.default_rng(3).standard_normal(2**18).astype(np.float32)
    vector[-(2**14) :] *= factor
    body = CODECS["trellis"].encode(vector, bits=1, seed=SEED, segments=[2**13] * 32)
    assert 8 * len(body) / vector.size == pytest.approx(1, rel=0.006)
    turned = CODECS["trellis"].encode(vector[::-1], bits=1, seed=SEED, segments=[2**13] * 32)
    lanes, more = (int.from_bytes(one[12:14], "little") for one in (body, turned))
    assert lanes < more == 2**18 // 1024


@pytest.mark.parametrize("name", ["trellis", "trellis-even", "trellis-wiener"])
@pytest.mark.parametrize("few", [1e-10, 1e-15, 1e-20, 1e-30])
def test_a_tensor_of_next_to_nothing_does_not_spoil_the_others(name: str, few: float) -> None:
    vector, lengths = gaussian(768) * np.float32(1e3), (256, 256, 256)
    vector[256:512] *= np.float32(1e-3)
    vector[512:] = 0
    vector[519] = few
    body = CODECS[name].encode(vector, bits=4, seed=SEED, segments=lengths)
    terms = {"length": 768, "bits": 4, "seed": SEED, "segments": lengths}
    error = np.square(CODECS[name].decode(body, **terms) - vector).reshape(3, -1).sum(axis=1)
    assert 3.5 < 8 * len(body) / 768 < 4.5
    assert error[0] < 0.03 * energy(vector[:256])
    assert error[2] < 1e-6 * energy(vector)
    if name == "trellis-even":
        assert error[1] < 0.03 * energy(vector[256:512])


def test_lanes_so_few_that_decoding_would_take_long_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector, codec = gaussian(40_000), CODECS["trellis"]
    terms = {"length": 40_000, "bits": 1, "seed": SEED}
    weak = vector.copy()
    weak[-2000:] *= np.float32(1e-6)  # leaves the lanes little to carry: as few as there may be
    codec.decode(codec.encode(weak, bits=1, seed=SEED, segments=(38_000, 2000)), **terms,
                 segments=(38_000, 2000))  # fmt: skip
    monkeypatch.setattr("fedcunet.codecs.trellis.MAX_LANES", 3)
    body = codec.encode(vector, bits=1, seed=SEED)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="3 lanes, expected 4 or more"):
        codec.decode(body, **terms)


def test_states_of_lanes_of_every_size_take_few_words() -> None:
    state = np.array([2**16, 2**17 - 1, 2**31, 2**32 - 1, *(3 << np.arange(16, 30))])
    words = _state_words(state)
    found, num_words = _read_states(words, state.size)
    np.testing.assert_array_equal(found, state)
    num_bits = 4 * state.size + sum(int(one).bit_length() - 17 for one in state)
    assert num_words == words.size == -(-num_bits // 16) + state.size
    np.testing.assert_array_equal(_read_states(np.append(words, 7), state.size)[0], state)
    with pytest.raises(ValueError, match="hold no states of 18 lanes"):
        _read_states(words[:-1], state.size)
    last = -(-num_bits // 16) - 1
    words[last] |= 1 << 15  # behind the last bit
    with pytest.raises(ValueError, match="bits behind"):
        _read_states(words, state.size)


def test_lanes_refuse_words_that_end_early_or_do_not_fit() -> None:
    table = FrequencyTable.of_weights(np.ones((1, 64)))
    words = encode_lanes(table.packed[np.arange(60)], 4, np.empty(0, dtype=np.uint16))
    with pytest.raises(ValueError, match="hold no states"):
        LaneDecoder(words[:4], 4, table)
    decoder = LaneDecoder(words[:-1], 4, table)
    rows = np.zeros(4, dtype=np.int64)
    with pytest.raises(ValueError, match="end before"):
        list(map(decoder.step, [rows] * 15))
    decoder = LaneDecoder(words, 4, table)
    with pytest.raises(ValueError, match="do not end as"):
        decoder.finish()


def test_the_range_coder_gives_back_numbers_in_few_bytes() -> None:
    generator = np.random.default_rng(5)
    for bits in (1, 3, 8):
        numbers = np.minimum(generator.geometric(0.6, 3000) - 1, 2**bits - 1).tolist()
        coder = RangeEncoder()
        for number in numbers:
            coder.number(number, bits, "test")
        content = coder.finish()
        decoder = RangeDecoder(content)
        assert [decoder.number(bits, "test") for _ in numbers] == numbers
        counts = np.bincount(numbers) / 3000
        entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
        assert 8 * len(content) / 3000 < 1.1 * entropy + 0.05


def test_escaped_numbers_of_any_size_come_back() -> None:
    numbers = np.array([0, 1, -1, 60, -61, 2**20, -(2**40), 12345678901], dtype=np.int64)
    content = pack_escapes(numbers)
    assert len(content) == escapes_length(numbers)
    np.testing.assert_array_equal(unpack_escapes(content, numbers.size), numbers)
    assert pack_escapes(numbers[:0]) == b""
    for wrong, count in ((content[:-1], 8), (content + b"\0", 8), (content[:3], 8)):
        with pytest.raises(ValueError, match=r"take|hold"):
            unpack_escapes(wrong, count)


def test_every_class_and_shape_has_a_table_with_room_for_escapes() -> None:
    for number in range(0, NUM_CLASSES, 7):
        table = table_of([(number, shape) for shape in range(len(SHAPES))], 8)
        assert (table.frequency.sum(axis=1) == 2**13).all()
        assert (table.frequency[:, 121:123] > 0).all()


def test_tables_do_not_depend_on_the_machine() -> None:
    # Frequencies are part of the format: a change here needs a new payload version.
    hashed = hashlib.sha256()
    for num_states in (1, 8):
        for number in (0, 9, 31, 39, 40, 55, 56, 57, 90, 175):
            weights = [class_weights(number, shape, num_states) for shape in range(len(SHAPES))]
            table = FrequencyTable.of_weights(np.concatenate(weights))
            hashed.update(table.frequency.astype("<u2").tobytes())
    assert hashed.hexdigest() == TABLES


TABLES = "7ffb0f83da154ee0ab60212d74ea7c83dd22d9b77eeacd72ecc889a8770bca62"


def test_the_same_bytes_decode_to_the_same_floats_on_every_machine() -> None:
    decoded = CODECS["trellis"].decode(
        bytes.fromhex(BODY), length=161, bits=3, seed=SEED, segments=(60, 101)
    )
    assert hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest() == DECODED
    vector = (np.arange(-80, 81) ** 3 / 1e5).astype(np.float32)
    assert energy(decoded - vector) < 0.25 * energy(vector)


BODY = (
    "3c3ba88156a50e401100000001000000000003000000000300d1af0a2d6b010014613e8123c1568196ca20ad"
    "73abb273429c887ec9fc557f92dfb73faa9f"
)
DECODED = "5717a4444806b819d560f0150c95790136d90205790c14189fce5e82ade5f80a"
